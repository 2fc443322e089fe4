"""An annotated dataset on one page: how sure the instruct model is, and of which tokens."""

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gift_trl.annotation.excerpts import read_lowest_tokens, read_row_examples
from gift_trl.annotation.provenance import read_provenance
from gift_trl.annotation.report_page import render_page
from gift_trl.annotation.summary import ConfidenceSummary, require_columns, summarize_confidences


def check_report_file(output_file: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """
    Checks that a file may be written, before the work whose result goes there.

    Args:
        output_file (`str` or `os.PathLike`):
            The file to be.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether an existing file may be replaced.

    Returns:
        `Path`: The file with links and relative parts resolved.

    Raises:
        `FileExistsError`: If it is a folder, or exists and `overwrite` is not set.
    """
    path = Path(output_file).expanduser().resolve()
    if path.is_dir():
        raise FileExistsError(f"'{path}' is a folder: name a file in it.")
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"'{path}' exists: choose another output file, or overwrite it (`overwrite=True`, `--overwrite`)."
        )
    return path


def write_annotation_report(
    splits: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    output_file: str | os.PathLike[str],
    *,
    title: str,
    overwrite: bool = False,
) -> dict[str, ConfidenceSummary]:
    """
    Writes a self-contained HTML page about an annotated dataset; the file appears whole or not at all.

    The page shows where the confidences come from, their distribution, rows from the least to the most confident with
    every target token shaded, and the target tokens with the lowest confidence in context.

    Args:
        splits (`Mapping[str, Dataset]`):
            Annotated datasets by split, as [`load_annotated_dataset`] returns them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer the rows were tokenised with.
        output_file (`str` or `os.PathLike`):
            File to write. Missing parents are created.
        title (`str`):
            Name of the dataset, for the heading.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace an existing file.

    Returns:
        `dict[str, ConfidenceSummary]`: Summary of every split.

    Raises:
        `FileExistsError`: If `output_file` is a folder, or exists and `overwrite` is not set.
        `ValueError`: If a split has no `input_ids`, or as [`summarize_confidences`].
    """
    path = check_report_file(output_file, overwrite=overwrite)
    for dataset in splits.values():
        require_columns(dataset, ["input_ids", "labels", "confidences"])
    summaries = {split: summarize_confidences(dataset) for split, dataset in splits.items()}
    page = render_page(
        title=title,
        summaries=summaries,
        provenances={split: read_provenance(dataset) for split, dataset in splits.items()},
        examples=read_row_examples(splits, summaries, tokenizer),
        lowest=read_lowest_tokens(splits, summaries, tokenizer),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, because a rename is atomic only within a file system
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return summaries
