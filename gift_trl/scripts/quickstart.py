"""`gift-trl quickstart`: the whole method on a tiny model pair, compared with its baselines, in minutes on a CPU."""

import argparse
import dataclasses
import json
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from peft import PeftConfig
    from rich.console import Console

    from gift_trl.evaluation.config import EvaluationConfig
    from gift_trl.lab.results import Comparison
    from gift_trl.training import GIFTConfig

MIXES = ("A", "A5", "B", "Z")

_DESCRIPTION = """\
Makes a tiny base and instruct model (cached for the next time), then annotates, trains, merges and evaluates GIFT and
its baselines as settings of one recipe, recipes/quickstart/gift.yaml. Prints a table and writes report.html,
comparison.png and results.json to the output folder, with every answer (results, for `gift-trl report`), the models and
the data, so that `gift-trl train --config recipes/quickstart/gift.yaml` runs from there.
"""
_EPILOG = """\
example:
  gift-trl quickstart --seed 4 --mix A5 Z --output_dir outputs/seed4

mixes of the training data's reference answers:
  A   all in another style than the instruct model's, some steps wrong
  A5  half of them as in A, half as in Z
  B   a fifth of them as in Z, the others as in A
  Z   all in the instruct model's own style, none wrong
"""
# All that the command writes, so that replacing an earlier result removes nothing else.
_WRITTEN = {"base", "instruct", "data", "results", "report.html", "comparison.png", "results.json"}
# With this among them, it was the quick start that wrote the folder
_MARKS = ("results.json",)
# The stress case, a smaller learning rate on the same data, and clean data: None stands for the recipe's learning rate.
_DEFAULT_SETTINGS: tuple[tuple[str, float | None], ...] = (("A", None), ("A", 1e-3), ("Z", None))


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Parser of the command."""
    parser = argparse.ArgumentParser(
        prog=prog or "gift-trl quickstart",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=3, help="seed of models, data and training (default: 3)")
    parser.add_argument(
        "--output_dir", default="outputs/quickstart", help="folder for the results (default: outputs/quickstart)"
    )
    parser.add_argument(
        "--mix",
        nargs="+",
        choices=MIXES,
        help="mixes to compare on, at the recipe's learning rate (default: A, A at a learning rate of 1e-3, and Z)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    options = make_parser().parse_args(argv)
    output_dir = _check_output_dir(options.output_dir)
    start = time.perf_counter()
    # Read by libraries on import.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    from rich.console import Console

    console = Console()
    with console.status("Loading the libraries"):
        from gift_trl.checkpoints import write_folder
        from gift_trl.lab.corpora import check_seed
        from gift_trl.lab.quiet import silence_libraries
        from gift_trl.lab.report import write_report

    check_seed(options.seed)
    with warnings.catch_warnings(), write_folder(output_dir, overwrite=True, marks=_MARKS) as folder:
        silence_libraries()
        comparison = _compare(options.seed, options.mix, folder)
        seconds = time.perf_counter() - start
        write_report(comparison, folder, seconds=seconds)
    _print_results(console, comparison, output_dir, seconds)


def _check_output_dir(output_dir: str) -> Path:
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"--output_dir {output_dir} is a file: name a folder.")
    found = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    # Names alone, such as `data`, are anyone's
    foreign = sorted(found - _WRITTEN) or (sorted(found) if found.isdisjoint(_MARKS) else [])
    if foreign:
        raise FileExistsError(
            f"--output_dir {output_dir} holds `{foreign[0]}`, which the quick start did not write, and would be "
            "replaced: name a new folder, or that of an earlier quick start."
        )
    return path


def load_recipe() -> tuple["GIFTConfig", "PeftConfig"]:
    """The quick start's recipe, as the trainer takes it: training arguments and adapter."""
    from trl import get_peft_config

    from gift_trl.scripts.arguments import make_recipe_parser
    from gift_trl.scripts.recipes import recipes_folder

    recipe = recipes_folder() / "quickstart" / "gift.yaml"
    _, args, model_args, _, _ = make_recipe_parser().parse_args_and_config(["--config", str(recipe)])
    args.disable_tqdm = True
    return args, get_peft_config(model_args)


def load_evaluation(folder: Path) -> "EvaluationConfig":
    """The quick start's tasks, as `gift-trl evaluate` takes them, with their questions and their results in `folder`."""
    from gift_trl.scripts.evaluate import config_of, make_parser
    from gift_trl.scripts.recipes import recipes_folder

    recipe = recipes_folder() / "quickstart" / "evaluation.yaml"
    (arguments,) = make_parser().parse_args_and_config(["--config", str(recipe)])
    config = config_of(arguments)
    tasks = (
        dataclasses.replace(task, dataset=str(folder / "data" / Path(task.dataset).name)) for task in config.tasks
    )
    return dataclasses.replace(config, output_dir=str(folder / "results"), tasks=tuple(tasks))


def _compare(seed: int, mixes: list[str] | None, folder: Path) -> "Comparison":
    """Runs the comparison, and leaves the models, the data and every answer in `folder`."""
    import torch

    from gift_trl.lab.comparison import make_target_dataset, run_comparison
    from gift_trl.lab.evaluation import make_evaluation_set, write_questions
    from gift_trl.lab.pair import make_pair
    from gift_trl.lab.progress import progress_display
    from gift_trl.lab.results import Setting

    args, peft_config = load_recipe()
    chosen = [(mix, None) for mix in dict.fromkeys(mixes)] if mixes else _DEFAULT_SETTINGS
    settings = [Setting(mix, args.learning_rate if rate is None else rate) for mix, rate in chosen]
    # On matrices this small a second thread gains little, and on a busy machine two wait for each other most of the time.
    torch.set_num_threads(1)
    (folder / "data").mkdir()
    write_questions(make_evaluation_set(), folder / "data")
    evaluation = load_evaluation(folder)
    with progress_display() as progress:
        pair = make_pair(seed, progress=progress)
        comparison = run_comparison(pair, settings, args, peft_config, evaluation, seed=seed, progress=progress)
    for source in pair:
        shutil.copytree(source, folder / source.name)
    for mix in MIXES:
        lines = (json.dumps(row) for row in make_target_dataset(mix, seed))
        (folder / "data" / f"mix_{mix}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return comparison


def _print_results(console: "Console", comparison: "Comparison", output_dir: Path, seconds: float) -> None:
    from gift_trl.lab.findings import describe_findings
    from gift_trl.lab.report import describe_mixes, make_table

    findings = describe_findings(comparison)
    console.print(make_table(comparison))
    for line in describe_mixes(comparison):
        console.print(line, style="dim", highlight=False)
    for title, sentences in (
        ("What this run shows", findings.shows),
        ("What it does not show", findings.does_not_show),
    ):
        console.print(f"\n[bold]{title}[/bold]")
        for sentence in sentences:
            console.print(f"- {sentence}", highlight=False)
    console.print(f"\nReport: {output_dir / 'report.html'}   ({seconds:.0f} s in all)", highlight=False)
    console.print(f"Every answer: gift-trl report {output_dir / 'results'}", highlight=False)


if __name__ == "__main__":
    from gift_trl.scripts.cli import run

    run(main)
