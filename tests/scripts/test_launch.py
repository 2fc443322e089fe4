"""`--accelerate_config`: the processes that were asked for, and nothing else changed."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file

import gift_trl
from gift_trl.scripts import annotate, cli, train
from gift_trl.scripts.launch import accelerate_config_file, launch, split_arguments
from gift_trl.scripts.recipes import recipes_folder


# Imported by every Python at its start: each process of the run notes what accelerate says it is
NOTES = """
import atexit, json, os, sys


def note():
    accelerate = sys.modules.get("accelerate")
    if accelerate is not None and accelerate.PartialState._shared_state and "RANK" in os.environ:
        state = accelerate.PartialState()
        facts = {"processes": state.num_processes, "type": state.distributed_type.value}
        with open(os.path.join(os.environ["NOTES"], os.environ["RANK"]), "w") as file:
            json.dump(facts, file)


atexit.register(note)
"""


def split(*argv: str) -> tuple:
    return split_arguments(list(argv), train.make_parser(), launch_command_parser())


def test_options_go_where_they_belong():
    argv = ["--config", "r.yaml", "--num_processes", "2", "--lora_target_modules", "q_proj", "v_proj"]
    argv += ["--machine_rank=1", "--accelerate_config", "zero3", "--gradient_accumulation_steps", "4", "--use_cpu"]
    config, launcher, own = split(*argv)
    assert config == "zero3"
    assert launcher == ["--num_processes", "2", "--machine_rank=1"]
    assert own == [*argv[:2], *argv[4:7], "--gradient_accumulation_steps", "4", "--use_cpu"]
    assert split("--accelerate_config=my.yaml", "--learning_rate", "-1")[::2] == ("my.yaml", ["--learning_rate", "-1"])
    with pytest.raises(ValueError, match="`--learning_rte` is neither a field of a recipe nor an option"):
        split("--accelerate_config", "ddp", "--learning_rte", "1")
    for argv in (["--accelerate_config", "--use_cpu"], ["--accelerate_config", "ddp", "zero3"]):
        with pytest.raises(ValueError, match=r"needs one value, and has [02]: ddp, fsdp2"):
            split(*argv)


def test_configurations_by_name_and_by_path(tmp_path):
    shipped = recipes_folder() / "accelerate_configs"
    for path in shipped.glob("*.yaml"):
        assert accelerate_config_file(path.stem) == path
    own = shutil.copy(shipped / "ddp.yaml", tmp_path)
    assert accelerate_config_file(own) == Path(own)
    with pytest.raises(FileNotFoundError, match="`zero4`: give the path of a file, or one of ddp, fsdp2"):
        accelerate_config_file("zero4")


def test_mistakes_are_told_before_anything_is_launched(fails, monkeypatch, recipe):
    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["gift-trl", "train", *argv])
        return fails(lambda _: cli.main())

    assert "There is no recipe file `no.yaml`" in run("--accelerate_config", "ddp", "--config", "no.yaml")
    assert "no accelerate configuration `zero4`" in run("--accelerate_config", "zero4", "--config", recipe())


def test_what_the_launcher_is_told(monkeypatch, recipe):
    told = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", told.append)
    config = recipe()
    argv = ["--accelerate_config", "zero2", "--num_processes", "4", "--config", config, "--max_steps", "3"]
    launch("gift_trl.scripts.annotate", annotate.make_parser(), argv)
    args = told[0]
    assert (args.training_script, args.module, args.num_processes) == ("gift_trl.scripts.annotate", True, 4)
    assert args.config_file == str(recipes_folder() / "accelerate_configs" / "zero2.yaml")
    assert args.training_script_args == ["--config", config, "--max_steps", "3"]


def test_recipes_and_configurations_of_an_installed_package(tmp_path):
    """As in the wheel, in which `recipes` lies inside the package."""
    package = tmp_path / "site" / "gift_trl"
    shutil.copytree(Path(gift_trl.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "recipes"))
    shutil.copytree(recipes_folder(), package / "recipes")
    probe = "from gift_trl.scripts.launch import accelerate_config_file as a\n"
    probe += "from gift_trl.scripts.arguments import recipe_file as r\n"
    probe += "print(a('zero3'), r('recipes/quickstart/gift.yaml'), r('quickstart/gift.yaml'))"
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=environment, cwd=tmp_path)
    folder = package / "recipes"
    recipe = str(folder / "quickstart" / "gift.yaml")
    assert done.stdout.split()[-3:] == [str(folder / "accelerate_configs" / "zero3.yaml"), recipe, recipe], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("config, kind", [("ddp", "MULTI_CPU"), ("zero3", "DEEPSPEED")])
def test_two_processes(config, kind, recipe, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NOTES)
    notes = tmp_path / "notes"
    notes.mkdir()
    path = os.pathsep.join([str(tmp_path / "site"), str(Path(gift_trl.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "NOTES": str(notes)}
    command = [sys.executable, "-m", "gift_trl.scripts.cli", "train", "--accelerate_config", config]
    command += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    command += ["--config", recipe(max_steps=1), "--per_device_train_batch_size", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = [json.loads(path.read_text()) for path in sorted(notes.iterdir())]
    assert facts == [{"processes": 2, "type": kind}] * 2
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_failing_process_ends_the_launch(recipe):
    command = [
        sys.executable,
        "-m",
        "gift_trl.scripts.cli",
        "train",
        "--accelerate_config",
        "ddp",
        "--num_processes",
        "2",
    ]
    command += ["--main_process_port", "0", "--config", recipe(), "--dataset", "nowhere.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 1
    assert "error: There is no file `nowhere.jsonl`" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_a_process_ends_with_its_launcher(tmp_path):
    # A launcher that is killed cannot end its processes, which would write beside the next run
    rank = (
        "import os, pathlib, sys, time\n"
        "from gift_trl.scripts.cli import run\n"
        f"note = pathlib.Path({str(tmp_path / 'rank')!r})\n"
        "run(lambda argv: (note.write_text(str(os.getpid())), time.sleep(60)), [])\n"
    )
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "none", "PYTHONPATH": os.pathsep.join(sys.path)}
    launcher = subprocess.Popen([sys.executable, "-c", code], env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "rank").is_file() or not (tmp_path / "rank").read_text():
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    pid = int((tmp_path / "rank").read_text())
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and "(zombie)" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, "the process works on"
        time.sleep(0.05)
