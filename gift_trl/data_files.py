"""Files a user writes: data, as `datasets` reads it, and YAML."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from datasets import DatasetDict, IterableDatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError


_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_local_data(
    name: str, *, split: str = "train", streaming: bool = False
) -> DatasetDict | IterableDatasetDict | None:
    """
    Loads a data file, or a folder that `save_to_disk` wrote.

    Args:
        name (`str`):
            JSON, JSON-lines, CSV or Parquet file, also one that gzip has compressed, or folder.
        split (`str`, *optional*, defaults to `"train"`):
            Name given to a single dataset in a folder. That of a file is `"train"`.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read a file as it is needed.

    Returns:
        [`~datasets.DatasetDict`], [`~datasets.IterableDatasetDict`] or `None`: The splits; `None` if it is neither.

    Raises:
        `FileNotFoundError`: If the name is that of a data file, which does not exist.
        `ValueError`: If it holds no rows, cannot be read, or is a file of another kind.
    """
    name = os.path.expanduser(name)
    extension = os.path.splitext(name.removesuffix(".gz"))[1].lower()
    if os.path.isdir(name):
        if any(os.path.isfile(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json")):
            saved = read_data(name, lambda: load_from_disk(name))
            return saved if isinstance(saved, DatasetDict) else DatasetDict({split: saved})
        return None
    if extension not in _BUILDERS:
        if os.path.isfile(name):
            raise ValueError(
                f"`{name}` is a file of another kind than are read, which are {', '.join(_BUILDERS)}, and these with .gz."
            )
        return None
    if not os.path.isfile(name):
        raise FileNotFoundError(f"There is no file `{name}`. Check the path of the data.")
    return read_data(name, lambda: load_dataset(_BUILDERS[extension], data_files=name, streaming=streaming))


def read_data(name: str, load: Callable[[], Any]) -> Any:
    """
    Loads data, and says what is wrong with a file that cannot be read.

    Args:
        name (`str`):
            Name of the data.
        load (`Callable[[], Any]`):
            Loads it.

    Returns:
        `Any`: What was loaded.

    Raises:
        `ValueError`: If it holds no rows, or cannot be read.
    """
    try:
        return load()
    # The third and fourth are what becomes of data without rows
    except (DatasetGenerationError, ValueError, StopIteration, IndexError) as error:
        reason = str(error.__cause__ or error) or "it is empty"
        raise ValueError(
            f"`{name}` cannot be read, or holds no rows: {reason.splitlines()[0]}. Check the data."
        ) from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a mapping with the same key twice, of which YAML's own loader silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key}` stands there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def read_yaml(path: str | os.PathLike, kind: str = "recipe") -> Any:
    """
    Reads a YAML file.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        kind (`str`, *optional*, defaults to `"recipe"`):
            What it is, for messages.

    Returns:
        `Any`: Its content.

    Raises:
        `ValueError`: If it is not valid YAML, or has a key twice.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The {kind} is not valid YAML: {error}") from error
