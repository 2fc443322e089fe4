"""An annotated dataset on disk: Parquet that any tool opens, with its provenance beside it."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset

from gift_trl.annotation.provenance import Provenance, add_provenance, read_provenance
from gift_trl.checkpoints import write_folder


PROVENANCE_FILE = "gift_provenance.json"


def save_annotated_dataset(
    dataset: Dataset | dict[str, Dataset], output_dir: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """
    Writes annotated data as Parquet with its provenance beside it; the folder appears whole or not at all.

    Args:
        dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`):
            Dataset returned by [`annotate_dataset`], which becomes the split `train`, or several by split.
        output_dir (`str` or `os.PathLike`):
            Folder to write. [`~datasets.load_dataset`] opens it.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a folder that is not empty.

    Raises:
        `FileExistsError`: If the folder is not empty and `overwrite` is not set.
    """
    splits = {"train": dataset} if isinstance(dataset, Dataset) else dataset
    with write_folder(output_dir, overwrite=overwrite) as folder:
        # The `data/<split>-*.parquet` layout keeps `load_dataset` away from the JSON beside it
        (folder / "data").mkdir()
        for split, rows in splits.items():
            rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
        provenances = {split: [asdict(p) for p in read_provenance(rows)] for split, rows in splits.items()}
        (folder / PROVENANCE_FILE).write_text(json.dumps(provenances, indent=2, sort_keys=True) + "\n")


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
    for split, provenances in json.loads((Path(folder) / PROVENANCE_FILE).read_text()).items():
        add_provenance(splits[split], *(Provenance(**provenance) for provenance in provenances))
    return splits
