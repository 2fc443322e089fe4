"""
What the pages tell a reader to type: found in the fences of every page and the first lines of every YAML file, and parsed as
the program that it calls would parse it, without running it.
"""

import argparse
import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from unittest.mock import patch

import yaml


ROOT = Path(__file__).parent.parent
PAGES = ("*.md", "docs/**/*.md", "recipes/**/*.md", "benchmarks/*.md")
# Fences in which nothing is typed
SHOWN = ("text", "math", "bibtex")
# What is neither run nor parsed, and why
LEFT_OUT = {"hf auth login": "asks for a token of the Hub, and is a command of huggingface_hub"}
_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", flags=re.DOTALL | re.MULTILINE)
_PROGRAMS = ("gift-trl", "accelerate", "python", "pip", "make", "hf", ".venv/bin/pytest", ".venv/bin/python")


@dataclass(frozen=True)
class Block:
    """A fence of a page, or the commands in the first lines of a YAML file."""

    page: str
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """One command, as the shell splits it."""

    page: str
    line: int
    argv: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.argv)


def pages(*patterns: str) -> list[Path]:
    """The files that match, without what a test or a build left behind."""
    found = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(path for path in found if path.is_file() and "outputs" not in path.parts)


def blocks_of(path: Path) -> list[Block]:
    """The fences of a page; of a YAML file, the lines of its header that begin with a program."""
    text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    if path.suffix == ".md":
        return [
            Block(
                name,
                text[: match.start(3)].count("\n") + 1,
                match[2],
                re.sub(f"^{match[1]}", "", match[3], flags=re.M),
            )
            for match in _FENCE.finditer(text)
        ]
    found, continued = [], False
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("#"):
            break
        line = line[1:].strip()
        if continued:
            found[-1] = Block(name, found[-1].line, "bash", f"{found[-1].text}\n{line}")
        elif line.split(" ")[0] in _PROGRAMS:
            found.append(Block(name, number, "bash", line))
        else:
            continue
        continued = line.endswith("\\")
    return found


def all_blocks() -> list[Block]:
    """The blocks of every page and every YAML file."""
    return [block for path in pages(*PAGES, "recipes/**/*.yaml") for block in blocks_of(path)]


def commands_of(block: Block) -> list[Command]:
    """The commands of a block of the shell."""
    commands, line = [], block.line
    for text in re.split(r"(?<!\\)\n", block.text):
        argv = shlex.split(text.replace("\\\n", " "), comments=True)
        if argv:
            commands.append(Command(block.page, line, tuple(argv)))
        line += text.count("\n") + 1
    return commands


def changed(block: Block) -> tuple[str, str]:
    """Both sides of a `diff`: before and after."""
    lines = block.text.splitlines()
    return tuple("\n".join(line[1:] for line in lines if line[:1] in ("", " ", sign)) + "\n" for sign in "-+")


def check_python(source: str) -> None:
    """Compiles it; what it imports must exist, and take the keywords that it is called with."""
    imported = {}
    for node in ast.walk(compile(source, "<page>", "exec", ast.PyCF_ONLY_AST)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            imported |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
            keywords = {keyword.arg: None for keyword in node.keywords}
            inspect.signature(imported[node.func.id]).bind(*node.args, **keywords)


def check(command: Command) -> str:
    """
    Parses a command as the program that it calls would.

    Args:
        command (`Command`):
            The command. Files that it names are looked for in the working directory.

    Returns:
        `str`: Why it is left out, or nothing.

    Raises:
        `Exception`: Whatever the parser says; `ValueError` if no parser here knows the program.
    """
    if str(command) in LEFT_OUT:
        return LEFT_OUT[str(command)]
    program, *argv = command.argv
    program = program.removeprefix(".venv/bin/")
    checks: dict[str, Callable[[list[str]], None]] = {
        "gift-trl": _check_gift_trl,
        "accelerate": _check_accelerate,
        "make": _check_make,
        "pip": _check_pip,
        "python": _check_script,
        "pytest": _check_pytest,
    }
    if program not in checks:
        raise ValueError(f"No parser of `{program}` is known here: write one, or name the command in LEFT_OUT.")
    with _errors_of_argparse():
        checks[program](argv)
    return ""


def parser_of(name: str) -> argparse.ArgumentParser:
    """A new parser of a command of `gift-trl`, as a recipe's values stay in one; `report annotation` has its own."""
    name, _, second = name.partition(" ")
    module = importlib.import_module(f"gift_trl.scripts.{name.replace('-', '_')}")
    return module.make_annotation_parser() if second else module.make_parser()


def command_name(argv: list[str]) -> str:
    """Name of the command of `gift-trl` that arguments call."""
    return " ".join(argv[: 2 if argv[:2] == ["report", "annotation"] else 1])


@lru_cache
def options_of(name: str) -> set[str]:
    """The options of a command of `gift-trl`, with those of the launcher where it can be launched."""
    from accelerate.commands.launch import launch_command_parser

    from gift_trl.scripts.launch import ACCELERATE_CONFIG, LAUNCHED

    parsers = [parser_of(name), *([launch_command_parser()] if name in LAUNCHED else [])]
    options = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    return options | {"--config", ACCELERATE_CONFIG} if name in LAUNCHED else options | {"--config"}


def _check_gift_trl(argv: list[str]) -> None:
    from trl import TrlParser

    from gift_trl.scripts.cli import COMMANDS
    from gift_trl.scripts.launch import accelerate_config_file, split_arguments, wants_launch

    if argv in (["--version"], ["--help"]):
        return
    if argv[0] not in COMMANDS:
        raise ValueError(f"gift-trl has no command {argv[0]}")
    name = command_name(argv)
    parser, argv = parser_of(name), argv[len(name.split()) :]
    if wants_launch(name, argv):
        from accelerate.commands.launch import launch_command_parser

        launcher = launch_command_parser()
        config, options, argv = split_arguments(argv, parser, launcher)
        launcher.parse_args(["--config_file", str(accelerate_config_file(config)), *options, "module"])
    if isinstance(parser, TrlParser):
        # A GPU is not what is checked
        parser.parse_args_and_config([*argv, *(["--use_cpu"] if "--use_cpu" in parser._option_string_actions else [])])
    else:
        parser.parse_args(argv)


def _check_accelerate(argv: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    if argv[0] != "launch":
        raise ValueError(f"`accelerate {argv[0]}` is not known here")
    args = launch_command_parser().parse_args(argv[1:])
    if not (ROOT / args.config_file).is_file() or not args.module:
        raise ValueError(f"no file {args.config_file}, or no `-m`")
    package, _, name = args.training_script.rpartition(".")
    if package != "gift_trl.scripts":
        raise ValueError(f"{args.training_script} is no command of ours")
    _check_gift_trl([name, *args.training_script_args])


def _check_make(argv: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    if [name for name in argv if f"\n{name}:" not in makefile]:
        raise ValueError(f"no such target: {argv}")


def _check_pip(argv: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    parser = argparse.ArgumentParser("pip")
    parser.add_argument("command", choices=["install"])
    parser.add_argument("-c", dest="constraints")
    parser.add_argument("-e", action="store_true")
    parser.add_argument("requirements", nargs="+")
    args = parser.parse_args(argv)
    if args.constraints is not None and not (ROOT / args.constraints).is_file():
        raise ValueError(f"no file {args.constraints}")
    for requirement in args.requirements:
        name, extras = re.fullmatch(r"([\w.-]+)(?:\[([\w,-]+)\])?", requirement).groups()
        if name in (".", project["name"]) and set((extras or "dev").split(",")) - set(
            project["optional-dependencies"]
        ):
            raise ValueError(f"an extra of {requirement} does not exist")


def _check_pytest(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("pytest")
    for option in ("-k", "-m"):
        parser.add_argument(option)
    parser.add_argument("paths", nargs="*")
    args = parser.parse_args(argv)
    if missing := [path for path in args.paths if not (ROOT / path).exists()]:
        raise ValueError(f"no such tests: {missing}")
    if args.m not in (None, "slow", "not slow"):
        raise ValueError(f"no such marker: {args.m}")


def _check_script(argv: list[str]) -> None:
    """A script of the repository: its own parser, and nothing after it."""
    path = ROOT / argv[0]
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    if not hasattr(module, "main") and "argparse" not in path.read_text(encoding="utf-8"):
        if argv[1:]:
            raise ValueError(f"{argv[0]} takes no arguments")
        return
    parse = argparse.ArgumentParser.parse_args

    class Parsed(Exception):
        pass

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    with patch.object(sys, "path", [str(path.parent), *sys.path]), patch.dict(sys.modules, {spec.name: module}):
        spec.loader.exec_module(module)
        with patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop):
            try:
                module.main(argv[1:])
            except Parsed:
                return
    raise ValueError(f"{argv[0]} parses nothing")


@contextmanager
def _errors_of_argparse() -> Iterator[None]:
    """`ValueError`s in place of a usage message and the end of the process."""

    def error(parser, message):
        raise ValueError(f"{parser.prog}: {message}")

    with patch.object(argparse.ArgumentParser, "error", error):
        yield


def write_stand_ins(folder: Path) -> None:
    """The files that the pages speak of and a reader has: `recipe.yaml` and data for it."""
    rows = [f'{{"prompt": "What is {n} + {n}?", "completion": "It is {2 * n}."}}\n' for n in range(1, 9)]
    for name in ("data", "validation"):
        (folder / f"{name}.jsonl").write_text("".join(rows))
    recipe = {
        "model_name_or_path": "Qwen/Qwen2.5-7B",
        "instruct_model_name_or_path": "Qwen/Qwen2.5-7B-Instruct",
        "dataset_name": "data.jsonl",
        "prompt_column": "prompt",
        "completion_column": "completion",
        "use_peft": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "output_dir": "adapter",
        "merge_output_dir": "merged",
        "report_to": "none",
        "disable_tqdm": True,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
