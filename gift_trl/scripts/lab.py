"""`gift-trl lab`: the effect experiment on tiny model pairs, over seeds, noise, learning rates and numbers of examples."""

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gift_trl.scripts.cli import ExampleHelpFormatter


if TYPE_CHECKING:
    from gift_trl.lab.experiment import Treatment


# One of them is in every folder of the command: its runs, or their report
_MARKS = ("runs", "lab.json")
_DESCRIPTION = """\
Trains, merges and evaluates Instruct-SFT, Shadow-FT, GIFT-BaseT, GIFT, RE-Adapt and LoRE-Adapt on a tiny model pair for
every seed, mix of reference answers, learning rate and number of examples. Every finished run is kept in the output folder
at once, so that the same command goes on after it was stopped. Writes lab.html, lab.md, lab.json and the pictures.
"""
_EPILOG = """\
example:
  gift-trl lab --seeds 3 4 5 6 7 --workers 8 --output_dir outputs/lab
  gift-trl lab --seeds 0 1 2 --exponents --variants --sizes 512 --output_dir outputs/lab_weights
  gift-trl lab --seeds 8 9 10 11 12 --methods Shadow-FT GIFT --variants window "floor 0.3" --sizes 512

mixes: see `gift-trl quickstart --help`; Z has no noise in the references, A5 some, A much.
"""


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Parser of the command."""
    from gift_trl.scripts.quickstart import MIXES

    parser = argparse.ArgumentParser(
        prog=prog or "gift-trl lab", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=ExampleHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[3, 4, 5, 6, 7], help="seeds of pairs, data and training"
    )
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=["Z", "A5", "A"], help="mixes of the references")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3], help="learning rates")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[128, 512, 2048],
        help="numbers of training examples; all learning rates at the middle one, the others at 1e-3",
    )
    parser.add_argument("--exponents", action="store_true", help="GIFT with the exponents 0.5 and 2, too")
    parser.add_argument(
        "--variants",
        nargs="*",
        metavar="NAME",
        help="other weights than q, too: floors, smoothing, temperature; all of them, or those that are named",
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these methods of the paper (default: all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes side by side")
    parser.add_argument("--output_dir", default="outputs/lab", help="folder of the runs and the report")
    parser.add_argument(
        "--report_only", action="store_true", help="make the report of the finished runs, and run nothing"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    options = make_parser().parse_args(argv)
    _check(options)
    # Read by libraries on import, here and in the workers
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    from gift_trl.lab.corpora import check_seed
    from gift_trl.lab.experiment import EXPONENTS, TREATMENTS, VARIANTS, load_experiment, make_grid, run_experiment
    from gift_trl.lab.experiment_report import PAGE_FILE, write_experiment_report
    from gift_trl.lab.quiet import silence_libraries
    from gift_trl.scripts.quickstart import load_recipe

    for seed in options.seeds:
        check_seed(seed)
    treatments = (
        *_named(TREATMENTS, options.methods, "--methods"),
        *(EXPONENTS if options.exponents else ()),
        *(() if options.variants is None else _named(VARIANTS, options.variants or None, "--variants")),
    )
    silence_libraries()
    folder = Path(options.output_dir)
    if not options.report_only:
        args, peft_config = load_recipe()
        cells = list(make_grid(options.seeds, options.mixes, options.learning_rates, options.sizes))
        run_experiment(cells, treatments, args, peft_config, folder, num_workers=options.workers)
    command = f"gift-trl lab --output_dir {folder.name}" if argv is None else f"gift-trl lab {shlex.join(argv)}"
    for sentence in write_experiment_report(load_experiment(folder), folder, command=command):
        print(f"- {sentence}")
    print(f"Report: {folder / PAGE_FILE}")


def _named(treatments: Sequence["Treatment"], names: Sequence[str] | None, option: str) -> Sequence["Treatment"]:
    known = {treatment.name: treatment for treatment in treatments}
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(
            f"`{option}` names {', '.join(map(repr, unknown))}: choose from {', '.join(map(repr, known))}."
        )
    return treatments if names is None else [known[name] for name in names]


def _check(options: argparse.Namespace) -> None:
    problems = []
    if any(rate <= 0 for rate in options.learning_rates):
        problems.append("`--learning_rates` must be above 0.")
    if any(size < 1 for size in options.sizes):
        problems.append("`--sizes` must be at least 1.")
    if options.workers < 1:
        problems.append("`--workers` must be at least 1.")
    folder = Path(options.output_dir)
    if folder.exists() and not folder.is_dir():
        problems.append(f"`--output_dir {folder}` is a file: name a folder.")
    elif folder.is_dir() and not any((folder / name).exists() for name in _MARKS):
        foreign = sorted(entry.name for entry in folder.iterdir())
        if foreign:
            problems.append(
                f"`--output_dir {folder}` holds `{foreign[0]}` and nothing of the lab, whose files would come beside it or in "
                "its place: name a new folder, or that of earlier runs."
            )
    if problems:
        raise ValueError(" ".join(problems))


if __name__ == "__main__":
    from gift_trl.scripts.cli import run

    run(main)
