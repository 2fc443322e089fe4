"""
Runs the commands of pages one after the other, as they stand there, and prints their exit status:

    python tests/run_docs.py README.md docs/guides/merging.md

Each page starts in a new folder that holds what a reader has at that point, and talks to a Hub on the loopback interface
(`tests/hub_server.py`), on which small models and a few rows of data have the names that the pages use. `--use_cpu` and, for
evaluations, `--limit` and `--max_new_tokens` are added. What needs several GPUs, an environment of its own, the data of
lm-eval, or longer than a minute is parsed.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch


ROOT = Path(__file__).parent.parent
INSTRUCT = "Qwen/Qwen2.5-7B-Instruct"
TESTS = ROOT / "tests"
sys.path[:0] = [str(ROOT), str(TESTS), str(TESTS / "evaluation")]

from docs_commands import (  # noqa: E402
    LEFT_OUT,
    Block,
    Command,
    blocks_of,
    changed,
    check,
    check_python,
    commands_of,
    write_stand_ins,
)
from hub_server import HubServer  # noqa: E402


# Added to the commands, as they run on small models and without a GPU
ADDED = {
    "train": ["--use_cpu"],
    "annotate": ["--use_cpu"],
    "evaluate": ["--use_cpu", "--limit", "2", "--max_new_tokens", "4"],
    "sweep --task": ["--use_cpu", "--max_new_tokens", "4"],
}
# What a command writes, and refuses to write over; on a page one line after the other may name the same folder
WRITTEN = ("--output_dir", "--merge_output_dir", "--annotation_output_dir", "--output")
# Run by tests of their own, as they take minutes
ELSEWHERE = {"quickstart": "run by tests/scripts/test_quickstart.py", "lab": "run by tests/lab/test_experiment.py"}


@dataclass
class Outcome:
    """What became of a command or a block of Python."""

    page: str
    line: int
    text: str
    status: int | None
    how: str
    seconds: float = 0.0


def run_page(page: Path, prepared: Path) -> Iterator[Outcome]:
    """Runs a page in a copy of a folder."""
    from datasets import load_dataset
    from peft import LoraConfig

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        if page == ROOT / "README.md":  # which makes all that it uses
            write_stand_ins(Path(folder))
        else:
            shutil.copytree(prepared, folder, dirs_exist_ok=True)
        # What the Python of the pages takes for granted
        data = load_dataset("json", data_files="data.jsonl", split="train")
        scope: dict[str, Any] = {"dataset": data, "peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}
        for block in blocks_of(page):
            if block.language == "bash":
                yield from map(run_command, commands_of(block))
            elif block.language == "python" or (block.language == "diff" and "(" in block.text):
                yield run_python(block, scope)


def run_command(command: Command) -> Outcome:
    """Runs a command of `gift-trl` in this process, and parses any other."""
    text, start = str(command), time.perf_counter()
    outcome = Outcome(command.page, command.line, text, None, "parsed")
    if text in LEFT_OUT:
        outcome.how = LEFT_OUT[text]
    elif command.argv[0] != "gift-trl" or {"--accelerate_config", "--lm_eval"} & {*command.argv}:
        check(command)
    elif command.argv[1] in ELSEWHERE:
        check(command)
        outcome.how = ELSEWHERE[command.argv[1]]
    else:
        from gift_trl.scripts import cli

        _remove_what_is_written(command.argv)
        name = f"{command.argv[1]} --task" if "--task" in command.argv else command.argv[1]
        argv = [*command.argv, *ADDED.get(name, [])]
        with patch.object(sys, "argv", argv):
            outcome.status, outcome.how = _status_of(cli.main)
    outcome.seconds = time.perf_counter() - start
    return outcome


def run_python(block: Block, scope: dict[str, Any]) -> Outcome:
    """Runs a block of Python, in which names of earlier blocks are known; of a change, what it leads to."""
    source, start = changed(block)[1] if block.language == "diff" else block.text, time.perf_counter()
    check_python(source)
    text = f"{block.language}: {block.text.splitlines()[0]} …"
    if "(..." in source:  # the rest is as before
        return Outcome(block.page, block.line, text, None, "parsed")
    source = source.replace("GIFTConfig(", "GIFTConfig(use_cpu=True, report_to='none', ")
    shutil.rmtree("merged", ignore_errors=True)
    status, how = _status_of(lambda: exec(source, scope))
    return Outcome(
        block.page,
        block.line,
        text,
        status,
        how,
        time.perf_counter() - start,
    )


def _status_of(work) -> tuple[int, str]:
    output = io.StringIO()
    status = 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            work()
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            status = 1
            traceback.print_exc()
    return status, "run" if status == 0 else output.getvalue()[-3000:]


def _remove_what_is_written(argv: tuple[str, ...]) -> None:
    names = [value for option, value in itertools.pairwise(argv) if option in WRITTEN]
    if argv[1] in ("evaluate", "train"):  # which go on in their folder
        names = [name for name in names if not name.endswith(("results", "adapter"))]
    if argv[1] == "train" and "--merge_output_dir" not in argv:
        names += ["merged", *map(str, Path("outputs").rglob("gift/merged"))]
    if argv[1] == "report":
        names += ["annotation_report.html", "evaluation_report"]
    for name in names:
        if os.path.isdir(name):
            shutil.rmtree(name)
        elif os.path.isfile(name):
            os.remove(name)


def prepare(folder: Path) -> None:
    """What a reader has: a recipe and data, a training and its merged model, and an evaluation of it."""
    from gift_trl.scripts import evaluate, train

    with contextlib.chdir(folder):
        write_stand_ins(folder)
        (folder / "problems.jsonl").write_text(published_data()["HuggingFaceH4/MATH-500"]["test.jsonl"])
        train.main(["--config", "recipe.yaml", "--use_cpu"])
        for name in ("merged", "shadow_merged", "adapter"):
            shutil.copytree(name.removeprefix("shadow_"), Path("outputs") / name)
        models = [f"instruct={INSTRUCT}", "GIFT=outputs/merged"]
        argv = ["--models", *models, "--tasks", "math500", "--output_dir", "outputs/results", *ADDED["evaluate"]]
        evaluate.main(argv)


def fill(hub: HubServer, folder: Path) -> None:
    """Puts a small pair under the names of every pair, and a few rows under those of the data."""
    import yaml

    from gift_trl.lab.text_pair import make_text_pair

    base, instruct = make_text_pair(
        ["What is 2 + 2? It is \\boxed{4}. The answer is A."], folder / "pair", hidden_size=64
    )
    models = yaml.safe_load((ROOT / "recipes" / "models.yaml").read_text())["models"].values()
    for model in models:
        hub.add("model", model["base"], base)
        hub.add("model", model["instruct"], instruct)
    for name, files in published_data().items():
        target = folder / "data" / name
        for path, content in files.items():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_text(content)
        hub.add("dataset", name, target)


def published_data() -> dict[str, dict[str, str]]:
    """The files of every dataset of the recipes and of the shipped tasks, with a few rows."""
    import yaml
    from test_shipped_tasks import ROWS

    from gift_trl.evaluation.tasks import load_task
    from gift_trl.scripts.recipes import recipes_folder

    problems = [{"problem": f"What is {n} + {n}?", "solution": f"\\boxed{{{2 * n}}}"} for n in range(8)]
    data = {"AI-MO/NuminaMath-CoT": {"train.jsonl": json_lines(problems)}}
    for name, (row, _, _) in ROWS.items():
        task = load_task(name, recipes_folder() / "evaluation")
        rows = [{**row, **({"exp": "So."} if "exp" in row else {})}] * 3
        if task.data_files:
            files = [*task.data_files, "train/task1_x_summarization_train.jsonl", "train/task2_y_summary_train.jsonl"]
            files += ["train/task3_z_summary_text_generation_train.jsonl"]
            data[task.dataset] = {file: json_lines(rows) for file in files}
            continue
        configs = [task.dataset_config] if isinstance(task.dataset_config, str) else task.dataset_config
        if not configs:
            # Recipes train on what a task evaluates on another split of
            data[task.dataset] = {f"{split}.jsonl": json_lines(rows) for split in {"train", task.split}}
            continue
        paths = {config: f"{config}/{task.split}.jsonl" for config in configs}
        card = [
            {"config_name": config, "data_files": [{"split": task.split, "path": path}]}
            for config, path in paths.items()
        ]
        data[task.dataset] = {path: json_lines(rows) for path in paths.values()}
        data[task.dataset]["README.md"] = f"---\n{yaml.safe_dump({'configs': card})}---\n"
    return data


def json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def row(outcome: Outcome) -> str:
    """Where a command stands, its exit status or why it has none, seconds, and what it is."""
    status = outcome.how.splitlines()[0] if outcome.status is None else str(outcome.status)
    seconds = "" if outcome.status is None else f"{outcome.seconds:.1f} s"
    return f"{outcome.page}:{outcome.line} | {status} | {seconds} | {' '.join(outcome.text.split())}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", help="pages of the repository")
    options = parser.parse_args()
    with HubServer(user="USER") as hub, tempfile.TemporaryDirectory() as folder:
        # Read by libraries when they are imported, which they are not yet
        os.environ.update(hub.environment(Path(folder) / "home"))
        os.environ.update({"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""})
        fill(hub, Path(folder))
        prepared = Path(folder) / "prepared"
        prepared.mkdir()
        with contextlib.redirect_stdout(io.StringIO()):
            prepare(prepared)
        print("where | exit status | time | command")
        outcomes = []
        published = set(hub.repositories)
        for page in options.pages:
            for outcome in run_page(ROOT / page, prepared):
                print(row(outcome), flush=True)
                outcomes.append(outcome)
            # The next reader has pushed nothing yet
            for name in hub.repositories.keys() - published:
                del hub.repositories[name]
    failures = [outcome for outcome in outcomes if outcome.status not in (0, None)]
    for outcome in failures:
        print(f"\n{outcome.page}:{outcome.line}: {outcome.text}\n{outcome.how}", file=sys.stderr)
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
