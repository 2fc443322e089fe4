"""Data on the local disk, as `datasets` reads it."""

import os

from datasets import DatasetDict, IterableDatasetDict, load_dataset, load_from_disk


_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_local_data(
    name: str, *, split: str = "train", streaming: bool = False
) -> DatasetDict | IterableDatasetDict | None:
    """
    Loads a data file, or a folder that `save_to_disk` wrote.

    Args:
        name (`str`):
            JSON, JSON-lines, CSV or Parquet file, or folder.
        split (`str`, *optional*, defaults to `"train"`):
            Name given to a single dataset in a folder. That of a file is `"train"`.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read a file as it is needed.

    Returns:
        [`~datasets.DatasetDict`], [`~datasets.IterableDatasetDict`] or `None`: The splits; `None` if it is neither.

    Raises:
        `FileNotFoundError`: If the name is that of a data file, which does not exist.
    """
    name = os.path.expanduser(name)
    extension = os.path.splitext(name)[1].lower()
    if os.path.isdir(name):
        if any(os.path.isfile(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json")):
            saved = load_from_disk(name)
            return saved if isinstance(saved, DatasetDict) else DatasetDict({split: saved})
        return None
    if extension not in _BUILDERS:
        return None
    if not os.path.isfile(name):
        raise FileNotFoundError(f"There is no file `{name}`. Check the path of the data.")
    return load_dataset(_BUILDERS[extension], data_files=name, streaming=streaming)
