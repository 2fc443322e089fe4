"""The datasets of a recipe."""

import dataclasses
import os

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from huggingface_hub import try_to_load_from_cache
from transformers.utils.hub import extract_commit_hash
from trl import DatasetMixtureConfig, get_dataset

from gift_trl.annotation import load_annotated_dataset
from gift_trl.annotation.hub import download_provenance
from gift_trl.annotation.storage import PROVENANCE_FILE, attach_provenance
from gift_trl.data_files import load_local_data, read_data
from gift_trl.scripts.arguments import GIFTScriptArguments
from gift_trl.scripts.columns import map_columns


def load_recipe_datasets(
    script_args: GIFTScriptArguments,
    mixture: DatasetMixtureConfig,
    *,
    evaluate: bool,
    seed: int,
    kept_columns: tuple[str, ...] = (),
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """
    Loads the training and evaluation data a recipe names, with its columns mapped.

    Args:
        script_args ([`GIFTScriptArguments`]):
            What the recipe says about the data.
        mixture ([`~trl.DatasetMixtureConfig`]):
            The recipe's `datasets:` section.
        evaluate (`bool`):
            Whether an evaluation set is needed.
        seed (`int`):
            Seed of a split made with `test_split_size`.
        kept_columns (`tuple[str, ...]`, *optional*, defaults to `()`):
            Columns that stay beside the mapped ones.

    Returns:
        `tuple`: Training set, and evaluation set or `None`.

    Raises:
        `ValueError`: If the recipe names no data or two, or a split or column does not exist.
        `FileNotFoundError`: If a local file does not exist.
    """
    if bool(mixture.datasets) == bool(script_args.dataset_name):
        raise ValueError(
            "The recipe names both `datasets` and `dataset_name`. Keep one."
            if mixture.datasets
            else "The recipe names no data: set `dataset_name`, or list `datasets:`."
        )
    # Split below: `get_dataset` splits without a seed, so every process and every resumed run would differ
    whole = dataclasses.replace(mixture, test_split_size=None)
    loaded = get_dataset(whole) if mixture.datasets else _load(script_args, mixture.streaming)
    train_split, test_split = script_args.dataset_train_split, script_args.dataset_test_split
    _require_split(loaded, train_split, "dataset_train_split")
    if evaluate and mixture.test_split_size is not None and test_split not in loaded:
        if not isinstance(loaded[train_split], Dataset):
            raise ValueError("`test_split_size` cannot split a stream. Load without streaming, or name a test split.")
        loaded = loaded[train_split].train_test_split(test_size=mixture.test_split_size, seed=seed)
        train_split = "train"
        test_split = "test"
    if evaluate:
        _require_split(loaded, test_split, 'dataset_test_split`, `test_split_size`, or `eval_strategy: "no"')
    train = loaded[train_split]
    if script_args.max_samples is not None:
        if script_args.sample_seed is not None:
            train = train.shuffle(seed=script_args.sample_seed)
        count = script_args.max_samples
        train = train.take(min(count, len(train)) if isinstance(train, Dataset) else count)
    test = map_columns(loaded[test_split], script_args, kept_columns) if evaluate else None
    return map_columns(train, script_args, kept_columns), test


def _load(script_args: GIFTScriptArguments, streaming: bool) -> DatasetDict | IterableDatasetDict:
    name = os.path.expanduser(script_args.dataset_name)
    streaming = streaming or script_args.dataset_streaming
    if os.path.isfile(os.path.join(name, PROVENANCE_FILE)):
        return load_annotated_dataset(name)
    local = load_local_data(name, split=script_args.dataset_train_split, streaming=streaming)
    if local is not None:
        return local
    options = {"name": script_args.dataset_config, "streaming": streaming}
    if os.path.isdir(name):
        return read_data(name, lambda: load_dataset(name, **options))
    try:
        loaded = load_dataset(name, **options)
    except (ConnectionError, FileNotFoundError) as error:
        raise type(error)(
            f"There is no file or folder `{name}`, and no such dataset on the Hub within reach: {str(error).splitlines()[0]}"
        ) from error
    # A stream that does not know its columns before its first row is not the Parquet that was pushed
    if any("confidences" in (split.column_names or ()) for split in loaded.values()):
        # Of the commit whose card `load_dataset` has just read: the provenance must be that of this data
        card = try_to_load_from_cache(name, "README.md", repo_type="dataset")
        commit = extract_commit_hash(card, None) if isinstance(card, str) else None
        attach_provenance(loaded, download_provenance(name, revision=commit) or {})
    return loaded


def _require_split(loaded: DatasetDict | IterableDatasetDict, split: str, remedy: str) -> None:
    if split not in loaded:
        raise ValueError(f"The data has the splits {sorted(loaded)}, and no split `{split}`. Set `{remedy}`.")
