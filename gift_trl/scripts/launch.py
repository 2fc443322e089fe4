"""`--accelerate_config`: launches a command in several processes, as `accelerate launch` does."""

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gift_trl.scripts.recipes import recipes_folder


if TYPE_CHECKING:
    from argparse import ArgumentParser

    from gift_trl.scripts.arguments import RecipeParser


ACCELERATE_CONFIG = "--accelerate_config"
_PR_SET_PDEATHSIG = 1
# Commands whose module can be launched, each with a `make_parser` of its own fields
LAUNCHED = ("annotate", "evaluate", "train")


def wants_launch(command: str, argv: list[str]) -> bool:
    """
    Whether the arguments of a command ask for a launch.

    Args:
        command (`str`):
            Name of the command.
        argv (`list[str]`):
            Its arguments.

    Returns:
        `bool`: Whether `--accelerate_config` is among them and the command can be launched.
    """
    return command in LAUNCHED and any(arg.split("=", 1)[0] == ACCELERATE_CONFIG for arg in argv)


def launch(module: str, parser: "RecipeParser", argv: list[str]) -> None:
    """
    Runs a module in the processes that an accelerate configuration describes.

    Args:
        module (`str`):
            Module to run.
        parser ([`RecipeParser`]):
            Parser of the module: what it knows goes to the module, the rest to `accelerate launch`.
        argv (`list[str]`):
            Arguments of both, with `--accelerate_config NAME` (a file of `recipes/accelerate_configs` without its ending,
            or a path) among them.

    Raises:
        `FileNotFoundError`: If there is no such configuration or recipe.
        `ValueError`: If an option belongs neither to the module nor to `accelerate launch`, or the recipe is not valid.
        `SystemExit`: If a process fails, with its message on the standard error.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    launcher = launch_command_parser()
    config, launch_options, options = split_arguments(argv, parser, launcher)
    command = ["--module", module, *parser.find_recipe(options)]
    args = launcher.parse_args(
        ["--config_file", str(accelerate_config_file(config)), "--quiet", *launch_options, *command]
    )
    try:
        launch_command(args)
    except ChildFailedError as error:  # the process has said why
        raise SystemExit(1) from error


def end_with_launcher() -> None:
    """
    Lets this process end at once if it is one of a launch and its launcher dies (on Linux).

    Else it would go on when the launcher is killed without a warning, by a scheduler or for want of memory, and write beside
    the run that is started in its place.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher:  # it died before it was asked
        os.kill(os.getpid(), signal.SIGKILL)


def split_arguments(
    argv: list[str], parser: "ArgumentParser", launcher: "ArgumentParser"
) -> tuple[str, list[str], list[str]]:
    """
    Tells the options of the launcher from those of the command.

    Args:
        argv (`list[str]`):
            Arguments of both.
        parser ([`~argparse.ArgumentParser`]):
            Parser of the command, which is given what both know.
        launcher ([`~argparse.ArgumentParser`]):
            Parser of `accelerate launch`.

    Returns:
        `tuple[str, list[str], list[str]]`: The accelerate configuration, the launcher's arguments, the command's.

    Raises:
        `ValueError`: If an option belongs to neither, or `--accelerate_config` has no value.
    """
    own = {option for action in parser._actions for option in action.option_strings} | {"--config"}
    others = {option for action in launcher._actions for option in action.option_strings}
    parts = {"own": [], "launcher": [], "config": []}
    part = "own"
    for arg in argv:
        if arg.startswith("--"):
            name = arg.split("=", 1)[0]
            part = "config" if name == ACCELERATE_CONFIG else "own" if name in own else "launcher"
            if part == "launcher" and name not in others:
                raise ValueError(
                    f"`{name}` is neither a field of a recipe nor an option of `accelerate launch`. Check its spelling "
                    "(`--help_all` lists the fields, `accelerate launch --help` the options)."
                )
            if part == "config" and "=" in arg:
                arg = arg.split("=", 1)[1]
            elif part == "config":
                continue
        parts[part].append(arg)
    if len(parts["config"]) != 1:
        raise ValueError(
            f"`{ACCELERATE_CONFIG}` needs one value, and has {len(parts['config'])}: {', '.join(_config_names())}, or the "
            "path of a file that `accelerate config` wrote."
        )
    return parts["config"][0], parts["launcher"], parts["own"]


def accelerate_config_file(name: str) -> Path:
    """
    Finds an accelerate configuration.

    Args:
        name (`str`):
            Path of a file, or the name of one that is shipped: `ddp`, `zero3`, ...

    Returns:
        `Path`: The file.

    Raises:
        `FileNotFoundError`: If there is none; the message lists those that are shipped.
    """
    for path in (Path(name).expanduser(), _configs_folder() / f"{name}.yaml"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"There is no accelerate configuration `{name}`: give the path of a file, or one of {', '.join(_config_names())}."
    )


def _configs_folder() -> Path:
    return recipes_folder() / "accelerate_configs"


def _config_names() -> list[str]:
    return sorted(path.stem for path in _configs_folder().glob("*.yaml"))
