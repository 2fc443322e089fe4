"""`gift-trl report`: tables, pictures and pages to look at what the other commands wrote."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gift_trl.scripts.cli import ExampleHelpFormatter


if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedTokenizerBase

_EVALUATION = """\
Writes a report about folders that `gift-trl evaluate` wrote: models x tasks with 95 % intervals and paired differences from
the instruct model, what was gained against what was lost, pass@k, answers that did not end, examples, settings. It is a
folder with report.html (one page that opens anywhere), report.md, results.csv and the pictures as PNG.
"""
_EVALUATION_EPILOG = """\
example:
  gift-trl report outputs/results --training outputs/adapter --output outputs/report

`gift-trl report annotation DIR` makes a page about annotated data; `gift-trl report annotation --help` shows its options.
"""
_ANNOTATION = """\
Writes one HTML page about a folder that `gift-trl annotate` wrote, which opens anywhere without a network: where the
confidences come from, how they are distributed, rows from the least to the most confident with every target token shaded,
and the target tokens with the lowest confidence in context.
"""
_ANNOTATION_EPILOG = """\
example:
  gift-trl report annotation outputs/annotated --output outputs/annotated.html
"""
_REPORT_FOLDER, _PAGE_FILE = "evaluation_report", "annotation_report.html"


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Parser of the report on evaluations."""
    parser = argparse.ArgumentParser(
        prog=prog or "gift-trl report",
        description=_EVALUATION,
        epilog=_EVALUATION_EPILOG,
        formatter_class=ExampleHelpFormatter,
    )
    parser.add_argument("results", metavar="RESULTS", nargs="+", help="folders that `gift-trl evaluate` wrote")
    parser.add_argument(
        "--training",
        metavar="DIR",
        nargs="+",
        default=[],
        help="output folders of trainings (or checkpoints), for where their loss came from",
    )
    parser.add_argument("--output", metavar="DIR", default=_REPORT_FOLDER, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the report in DIR")
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        default=argparse.SUPPRESS,
        help="model to compare with (default: the one called `instruct`, else the baseline of the configuration)",
    )
    parser.add_argument(
        "--retention",
        metavar="TASK",
        nargs="+",
        default=[],
        help="tasks that should not be lost, beside those whose `role` says so",
    )
    parser.add_argument(
        "--card",
        metavar="MODEL=DIR",
        nargs="+",
        default=[],
        help="put the figures of MODEL on the card of the merged model in DIR",
    )
    return parser


def make_annotation_parser() -> argparse.ArgumentParser:
    """Parser of the page about annotated data."""
    parser = argparse.ArgumentParser(
        prog="gift-trl report annotation",
        description=_ANNOTATION,
        epilog=_ANNOTATION_EPILOG,
        formatter_class=ExampleHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="folder that `gift-trl annotate` wrote")
    parser.add_argument("--output", metavar="FILE", default=_PAGE_FILE, help="page to write")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help="folder or Hub id of the tokenizer (default: the one in DIR, else the scoring model's)",
    )
    parser.add_argument(
        "--split",
        metavar="NAME",
        action="append",
        default=argparse.SUPPRESS,
        help="split to report on; may be given several times (default: all)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["annotation"]:
        _report_annotation(make_annotation_parser().parse_args(argv[1:]))
    else:
        _report_evaluation(make_parser().parse_args(argv))


def _report_evaluation(options: argparse.Namespace) -> None:
    for folder in options.results:
        if not Path(folder).expanduser().is_dir():
            raise FileNotFoundError(
                f"There is no folder '{folder}': name one that `gift-trl evaluate` wrote, or `annotation` and a folder that "
                "`gift-trl annotate` wrote."
            )

    if wrong := [card for card in options.card if not all(card.partition("="))]:
        raise ValueError(f"`--card {wrong[0]}` names no model and folder: write MODEL=DIR.")
    cards = {model: folder for model, _, folder in (card.partition("=") for card in options.card)}

    from gift_trl.evaluation.card import add_to_card
    from gift_trl.evaluation.report import write_evaluation_report
    from gift_trl.evaluation.report_text import describe_findings, describe_warnings

    comparison = write_evaluation_report(
        options.results,
        options.output,
        training=options.training,
        reference=getattr(options, "reference", None),
        retention=options.retention,
        overwrite=options.overwrite,
    )
    for warning in describe_warnings(comparison):
        print(f"warning: {warning}", file=sys.stderr)
    for finding in describe_findings(comparison):
        print(finding)
    print(f"Written to {os.path.relpath(options.output)}")
    for model, folder in cards.items():
        if add_to_card(comparison, model, folder):
            print(f"The figures of {model} are on the card in {os.path.relpath(folder)}")


def _report_annotation(options: argparse.Namespace) -> None:
    folder, output = Path(options.folder).expanduser().resolve(), Path(options.output).expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder '{options.folder}': name one that `gift-trl annotate` wrote.")
    if options.output == _PAGE_FILE and output.is_relative_to(folder):
        raise ValueError(
            "The working directory is the annotated folder itself, which is left as it is: say with `--output` where to "
            "write the page."
        )

    from gift_trl.annotation.report import check_report_file, write_annotation_report
    from gift_trl.annotation.storage import PROVENANCE_FILE, load_annotated_dataset

    check_report_file(output, overwrite=options.overwrite)
    if not (folder / PROVENANCE_FILE).is_file():
        raise FileNotFoundError(
            f"'{options.folder}' holds no {PROVENANCE_FILE}, so `gift-trl annotate` did not write it: name the folder "
            "given to it as `--annotation_output_dir`."
        )
    splits = load_annotated_dataset(folder)
    wanted = getattr(options, "split", list(splits))
    if missing := [split for split in wanted if split not in splits]:
        raise ValueError(
            f"The data has the splits {sorted(splits)}, and no split {' or '.join(f'`{split}`' for split in missing)}: "
            "name another with `--split`, or leave it out for all."
        )
    splits = {split: splits[split] for split in wanted}
    tokenizer = _load_tokenizer(folder, getattr(options, "tokenizer", None), splits)
    summaries = write_annotation_report(splits, tokenizer, output, title=folder.name, overwrite=options.overwrite)
    for split, summary in summaries.items():
        print(f"{split}: {summary.describe()}")
    print(f"Written to {os.path.relpath(output)}")


def _load_tokenizer(folder: Path, name: str | None, splits: "DatasetDict") -> "PreTrainedTokenizerBase":
    """The tokenizer named, the one kept beside the data, or the one the scoring model is loaded with."""
    from gift_trl.annotation import read_provenance
    from gift_trl.annotation.provenance import hash_vocabulary
    from gift_trl.annotation.storage import TOKENIZER_FOLDER
    from gift_trl.model_pair import load_tokenizer

    provenances = [provenance for dataset in splits.values() for provenance in read_provenance(dataset)]
    vocabularies = {provenance.vocabulary for provenance in provenances}
    kept = folder / TOKENIZER_FOLDER
    if name is None and kept.is_dir():
        return load_tokenizer(str(kept))
    if name is not None:
        tokenizer = load_tokenizer(name)
        if vocabularies - {hash_vocabulary(tokenizer)}:
            raise ValueError(
                f"The tokenizer `{name}` has another vocabulary than the one the data was annotated with, so its text "
                f"would be another: name the tokenizer of {' or '.join(sorted({p.model for p in provenances}))}."
            )
        return tokenizer
    for provenance in provenances:
        try:
            tokenizer = load_tokenizer(provenance.model, revision=provenance.commit)
        except ValueError:
            continue
        # A model in a folder is known by the folder's name alone, which may be that of something else by now
        if hash_vocabulary(tokenizer) == provenance.vocabulary:
            return tokenizer
    raise ValueError(
        f"The text of the tokens needs the tokenizer, but '{folder.name}' holds none, and none of the scoring model can "
        "be loaded by name: pass its folder or Hub id with `--tokenizer`."
    )


if __name__ == "__main__":
    from gift_trl.scripts.cli import run

    run(main)
