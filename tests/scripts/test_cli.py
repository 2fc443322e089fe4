import importlib
import subprocess
import sys

import pytest

from gift_trl.scripts.cli import COMMANDS, run


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


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ImportError("pip install it"), 1, "error: pip install it"),
        (KeyboardInterrupt(), 130, "Interrupted. What is finished is kept"),
    ],
)
def test_what_ends_without_a_traceback(capsys, monkeypatch, error, status, message):
    def command(argv):
        raise error

    monkeypatch.delenv("GIFT_TRL_DEBUG", raising=False)
    with pytest.raises(SystemExit) as end:
        run(command, [])
    assert end.value.code == status and message in capsys.readouterr().err


def test_a_command_ends_the_communication_of_its_processes():
    # Threads of a group that is left to the end may abort the interpreter
    import torch.distributed

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    run(lambda argv: None, [])
    assert not torch.distributed.is_initialized()


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
