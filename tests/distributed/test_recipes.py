"""The shipped accelerate configurations say what accelerate reads, and nothing else."""

import os
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import StateDictType

from gift_trl.scripts.recipes import recipes_folder


CONFIGS = sorted((recipes_folder() / "accelerate_configs").glob("*.yaml"))
TYPES = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}  # the others: DEEPSPEED


def launch_options(path: Path, *options: str):
    """What the launcher makes of a configuration and of options on the command line."""
    parser = launch_command_parser()
    args, defaults, _ = _validate_launch_command(parser.parse_args(["--config_file", str(path), *options, "train.py"]))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return args


def test_all_are_here():
    names = ["ddp", "fsdp2", "single", "two_nodes", "zero1", "zero2", "zero3", "zero3_offload"]
    assert [path.stem for path in CONFIGS] == names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_keys_and_header(path):
    config = load_config_from_file(str(path))  # raises if it does not know a key
    assert config.distributed_type == TYPES.get(path.stem, "DEEPSPEED")
    assert config.mixed_precision == "bf16"
    assert not config.use_cpu
    machines, processes = {"single": (1, 1), "two_nodes": (2, 16)}.get(path.stem, (1, 8))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    # Of the sections, accelerate takes any key, and reads those that are options of the launcher
    known = vars(launch_command_parser().parse_args(["train.py"]))
    assert {*config.deepspeed_config, *config.fsdp_config} <= known.keys()
    text = path.read_text()
    assert f"accelerate launch --config_file recipes/accelerate_configs/{path.name}" in text
    assert "-m gift_trl.scripts.train --config recipe.yaml" in text
    assert all(len(line) <= 130 for line in text.splitlines())
    # A key that the command line's default hides would have no effect
    args = launch_options(path)
    for key, value in yaml.safe_load(text).items():
        if isinstance(value, dict):
            for name, setting in value.items():
                assert getattr(args, name) == setting, name
        elif key not in ("compute_environment", "distributed_type"):
            assert getattr(args, key) == value, key
    assert launch_options(path, "--num_processes", "3").num_processes == 3


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem not in TYPES], ids=lambda path: path.stem)
def test_deepspeed_plugin(path, monkeypatch):
    options = ["--main_process_ip", "127.0.0.1", "--machine_rank", "1"] if path.stem == "two_nodes" else []
    command, environment = prepare_deepspeed_cmd_env(launch_options(path, "--main_process_port", "0", *options))
    assert command is None, "no other launcher than accelerate's own, which needs no ssh"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    device = "cpu" if path.stem == "zero3_offload" else "none"
    assert plugin.zero_stage == {"zero1": 1, "zero2": 2}.get(path.stem, 3)
    assert (plugin.offload_optimizer_device, plugin.offload_param_device) == (device, device)
    assert plugin.zero3_init_flag == plugin.zero3_save_16bit_model == (plugin.zero_stage == 3)
    # Left to the recipe of the run
    assert (plugin.gradient_accumulation_steps, plugin.gradient_clipping) == ("auto", "auto")


def test_fsdp_plugin(monkeypatch):
    path = next(path for path in CONFIGS if path.stem == "fsdp2")
    for name, value in prepare_multi_gpu_env(launch_options(path, "--main_process_port", "0")).items():
        monkeypatch.setenv(name, value)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing
