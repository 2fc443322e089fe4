"""What SFTTrainer does to `input_ids` and `labels`, done to the confidences."""

import copy
from typing import Any

from datasets import Dataset, IterableDataset
from trl import SFTConfig, pack_dataset
from trl.trainer.utils import global_then_local_main_first

from gift_trl.annotation.rows import measure_rows
from gift_trl.annotation.tokenization import token_slice


def cut_confidences(
    dataset: Dataset | IterableDataset, args: SFTConfig, *, packing: bool, dataset_name: str
) -> tuple[Dataset | IterableDataset, SFTConfig]:
    """
    Cuts the confidences as SFTTrainer is about to cut the tokens.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Annotated dataset.
        args ([`~trl.SFTConfig`]):
            Configuration of the trainer.
        packing (`bool`):
            Whether rows are to be packed, which cuts them later and all columns alike.
        dataset_name (`str`):
            Name of the dataset in progress bars.

    Returns:
        `tuple[Dataset | IterableDataset, SFTConfig]`: The dataset, and the configuration to prepare it with: SFTTrainer
        goes over the rows, to cut some and leave out those without a target, only if it has a `max_length`; shuffling is
        left to the end.
    """
    sft_args = copy.copy(args)
    sft_args.shuffle_dataset = False
    if packing or _needs_no_cut(dataset, args.max_length):
        sft_args.max_length = None
    elif args.max_length is not None:
        kept = token_slice(args)
        with global_then_local_main_first():
            dataset = dataset.map(
                lambda row: {"confidences": row["confidences"][kept]},
                **_map_kwargs(dataset, args, f"Truncating confidences of {dataset_name} dataset"),
            )
    return dataset, sft_args


def pack_with_confidences(
    dataset: Dataset | IterableDataset, args: SFTConfig, *, dataset_name: str
) -> Dataset | IterableDataset:
    """
    Packs a dataset with TRL's own `pack_dataset`, confidences included.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset with the columns `input_ids`, `labels` and `confidences`.
        args ([`~trl.SFTConfig`]):
            Configuration of the trainer.
        dataset_name (`str`):
            Name of the dataset in progress bars.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The packed dataset.
    """
    dataset = dataset.select_columns(["input_ids", "labels", "confidences"])
    if args.shuffle_dataset:
        dataset = dataset.shuffle(seed=args.seed)
    map_kwargs = _map_kwargs(dataset, args, f"Packing {dataset_name} dataset")
    max_length: Any = args.max_length  # a number, or the trainer has refused to pack
    with global_then_local_main_first():
        return pack_dataset(dataset, max_length, args.packing_strategy, map_kwargs)


def _map_kwargs(dataset: Dataset | IterableDataset, args: SFTConfig, description: str) -> dict[str, Any]:
    # IterableDataset.map knows neither
    return {"num_proc": args.dataset_num_proc, "desc": description} if isinstance(dataset, Dataset) else {}


def _needs_no_cut(dataset: Dataset | IterableDataset, max_length: int | None) -> bool:
    """Whether every row fits and has a target, as after an annotation with the same length."""
    if (
        not isinstance(dataset, Dataset)
        or max_length is None
        or len(dataset) == 0
        or "labels" not in dataset.column_names
    ):
        return False
    rows = measure_rows(dataset)
    return bool((rows.lengths <= max_length).all() and (rows.targets > 0).all())
