"""`gift-trl report`: pages to look at what the other commands wrote."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from gift_trl.scripts.cli import ExampleHelpFormatter


if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedTokenizerBase

_ANNOTATION = """\
Writes one HTML page about a folder that `gift-trl annotate` wrote, which opens anywhere without a network: where the
confidences come from, how they are distributed, rows from the least to the most confident with every target token shaded,
and the target tokens with the lowest confidence in context.
"""
_ANNOTATION_EPILOG = """\
example:
  gift-trl report annotation outputs/annotated --output outputs/annotated.html
"""
_PAGE_FILE = "annotation_report.html"


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Parser of the command."""
    parser = argparse.ArgumentParser(
        prog=prog or "gift-trl report",
        description="Makes a page from what another command wrote.",
        epilog="example:\n  gift-trl report annotation outputs/annotated\n\n"
        "`gift-trl report KIND --help` shows the options of a kind.",
        formatter_class=ExampleHelpFormatter,
    )
    kinds = parser.add_subparsers(title="kinds of report", dest="kind", metavar="KIND", required=True)
    annotation = kinds.add_parser(
        "annotation",
        help="how sure the instruct model is of an annotated dataset, and of which tokens",
        description=_ANNOTATION,
        epilog=_ANNOTATION_EPILOG,
        formatter_class=ExampleHelpFormatter,
    )
    annotation.add_argument("folder", metavar="DIR", help="folder that `gift-trl annotate` wrote")
    annotation.add_argument("--output", metavar="FILE", default=_PAGE_FILE, help="page to write")
    annotation.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    annotation.add_argument(
        "--tokenizer",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help="folder or Hub id of the tokenizer (default: the one in DIR, else the scoring model's)",
    )
    annotation.add_argument(
        "--split",
        metavar="NAME",
        action="append",
        default=argparse.SUPPRESS,
        help="split to report on; may be given several times (default: all)",
    )
    annotation.set_defaults(run=_report_annotation)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    options = make_parser().parse_args(argv)
    options.run(options)


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
