"""An annotated dataset on disk: Parquet that any tool opens, with its provenance beside it."""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from transformers import PreTrainedTokenizerBase

from gift_trl.annotation.provenance import Provenance, add_provenance, read_provenance
from gift_trl.checkpoints import write_folder


PROVENANCE_FILE = "gift_provenance.json"
TOKENIZER_FOLDER = "tokenizer"
# A folder with this file was written here, and may be replaced
ANNOTATION_MARKS = (PROVENANCE_FILE,)
# As `push_to_hub` of datasets cuts its Parquet files
_SHARD_BYTES = 500_000_000


def save_annotated_dataset(
    dataset: Dataset | dict[str, Dataset],
    output_dir: str | os.PathLike[str],
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> None:
    """
    Writes annotated data as Parquet with its provenance beside it; the folder appears whole or not at all.

    Args:
        dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`):
            Dataset returned by [`annotate_dataset`], which becomes the split `train`, or several by split.
        output_dir (`str` or `os.PathLike`):
            Folder to write. [`~datasets.load_dataset`] opens it.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer to keep in the subfolder `tokenizer`, with which the token ids can be read as text.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a folder that this function wrote before.

    Raises:
        `FileExistsError`: If the folder is not empty, and `overwrite` is not set or it holds something else.
    """
    splits = {"train": dataset} if isinstance(dataset, Dataset) else dataset
    with write_folder(output_dir, overwrite=overwrite, marks=ANNOTATION_MARKS) as folder:
        # The `data/<split>-*.parquet` layout keeps `load_dataset` away from the JSON beside it
        (folder / "data").mkdir()
        for split, rows in splits.items():
            shards = max(1, math.ceil(rows.data.nbytes / _SHARD_BYTES))
            for i in range(shards):
                part = rows.shard(shards, i, contiguous=True)
                part.to_parquet(folder / "data" / f"{split}-{i:05d}-of-{shards:05d}.parquet")
        provenances = {split: [asdict(p) for p in read_provenance(rows)] for split, rows in splits.items()}
        (folder / PROVENANCE_FILE).write_text(json.dumps(provenances, indent=2, sort_keys=True) + "\n")
        if processing_class is not None:
            processing_class.save_pretrained(folder / TOKENIZER_FOLDER)


def load_annotated_dataset(folder: str | os.PathLike[str]) -> DatasetDict:
    """
    Loads a folder that [`save_annotated_dataset`] wrote, with its provenance.

    Args:
        folder (`str` or `os.PathLike`):
            Folder.

    Returns:
        [`~datasets.DatasetDict`]: The annotated datasets by split.
    """
    splits = load_dataset(str(folder))
    attach_provenance(splits, read_provenance_file(Path(folder) / PROVENANCE_FILE))
    return splits


def read_provenance_file(path: str | os.PathLike[str]) -> dict[str, list[Provenance]]:
    """
    Reads the provenance that [`save_annotated_dataset`] wrote beside the data.

    Args:
        path (`str` or `os.PathLike`):
            File `gift_provenance.json`.

    Returns:
        `dict[str, list[Provenance]]`: The provenances by split.

    Raises:
        `ValueError`: If the file is damaged, or has fields that this version does not know.
    """
    try:
        splits = json.loads(Path(path).read_text(encoding="utf-8"))
        return {split: [Provenance(**provenance) for provenance in found] for split, found in splits.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"'{path}' is not a provenance this version of gift_trl can read ({error}): install the version that "
            "annotated the data, or annotate it again."
        ) from error


def attach_provenance(splits: dict[str, Dataset | IterableDataset], provenances: dict[str, list[Provenance]]) -> None:
    """
    Attaches to every split the provenances that are known for it.

    Args:
        splits (`dict[str, Dataset | IterableDataset]`):
            Annotated datasets by split.
        provenances (`dict[str, list[Provenance]]`):
            Provenances by split.
    """
    for split in splits.keys() & provenances.keys():
        add_provenance(splits[split], *provenances[split])
