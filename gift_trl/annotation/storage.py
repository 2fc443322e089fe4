"""An annotated dataset on disk: Parquet that any tool opens, with its provenance beside it."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset, load_dataset

from gift_trl.annotation.provenance import Provenance, add_provenance, read_provenance
from gift_trl.checkpoints import write_folder


PROVENANCE_FILE = "gift_provenance.json"


def save_annotated_dataset(
    dataset: Dataset, output_dir: str | os.PathLike[str], *, split: str = "train", overwrite: bool = False
) -> None:
    """
    Writes an annotated dataset as Parquet with its provenance beside it; the folder appears whole or not at all.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset returned by [`annotate_dataset`].
        output_dir (`str` or `os.PathLike`):
            Folder to write. [`~datasets.load_dataset`] opens it.
        split (`str`, *optional*, defaults to `"train"`):
            Name of the split.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a folder that is not empty.

    Raises:
        `FileExistsError`: If the folder is not empty and `overwrite` is not set.
    """
    with write_folder(output_dir, overwrite=overwrite) as folder:
        # The `data/<split>-*.parquet` layout keeps `load_dataset` away from the JSON beside it
        (folder / "data").mkdir()
        dataset.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
        provenances = [asdict(provenance) for provenance in read_provenance(dataset)]
        (folder / PROVENANCE_FILE).write_text(json.dumps(provenances, indent=2, sort_keys=True) + "\n")


def load_annotated_dataset(folder: str | os.PathLike[str], *, split: str = "train") -> Dataset:
    """
    Loads a folder that [`save_annotated_dataset`] wrote, with its provenance.

    Args:
        folder (`str` or `os.PathLike`):
            Folder.
        split (`str`, *optional*, defaults to `"train"`):
            Name of the split.

    Returns:
        [`~datasets.Dataset`]: The annotated dataset.
    """
    dataset = load_dataset(str(folder), split=split)
    for provenance in json.loads((Path(folder) / PROVENANCE_FILE).read_text()):
        add_provenance(dataset, Provenance(**provenance))
    return dataset
