import importlib
import subprocess
import sys

import pytest

from gift_trl.scripts.cli import COMMANDS


def call(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "gift_trl.scripts.cli", *argv], capture_output=True, text=True)


def test_help_lists_the_commands_without_loading_torch():
    probe = "import sys; from gift_trl.scripts.cli import main; sys.argv = ['gift-trl', '--help']\n"
    probe += "try: main()\nexcept SystemExit as e: assert e.code == 0\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, text in COMMANDS.items():
        assert name in done.stdout and text in done.stdout


def test_unknown_command_shows_the_known_ones():
    done = call("trian")
    assert done.returncode == 2
    assert "there is no command `trian`" in done.stderr and "train" in done.stderr


def test_version():
    assert call("--version").stdout.startswith("gift_trl 0.")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name, capsys):
    module = importlib.import_module(f"gift_trl.scripts.{name.replace('-', '_')}")
    with pytest.raises(SystemExit) as status:
        module.main(["--help"])
    assert status.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: gift-trl {name}")
    # What it does and how it is called, within a few screens
    assert "example" in text
    assert text.count("\n") < 200  # the help of inherited fields differs from version to version


def test_every_field_is_reachable_by_help_all(capsys):
    from gift_trl.scripts.train import make_parser

    with pytest.raises(SystemExit):
        make_parser().parse_args(["--help_all"])
    text = capsys.readouterr().out
    for option in ("--confidence_exponent", "--max_grad_norm", "--lora_modules_to_save", "--test_split_size"):
        assert option in text
