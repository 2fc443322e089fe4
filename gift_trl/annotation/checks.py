"""What an annotation refuses: data and models whose confidences could not be right, or not be had."""

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from gift_trl.annotation.provenance import model_name
from gift_trl.annotation.rows import RowStatistics, find_empty_answers
from gift_trl.annotation.server import ServerScorer
from gift_trl.annotation.tokenization import SortedRows
from gift_trl.model_pair import load_tokenizer, vocabulary_conflicts


logger = get_logger(__name__)

ORIGINAL_INDEX = "original_index"


def check_dataset(dataset: Any, dataset_name: str) -> None:
    """Refuses what is no table of rows to be annotated."""
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"The {dataset_name} dataset is an `IterableDataset`, which cannot be scored ahead of training. Load it "
            "without streaming, as a `datasets.Dataset`, or train with `confidence_source: online`, which scores each batch "
            "as it comes."
        )
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"The {dataset_name} dataset is a `{type(dataset).__name__}`. Give a `datasets.Dataset`: one split of a "
            "`DatasetDict`, or `Dataset.from_list(rows)`."
        )
    if ORIGINAL_INDEX in dataset.column_names and dataset.features[ORIGINAL_INDEX] != Value("int64"):
        raise ValueError(
            f"The {dataset_name} dataset has a column `{ORIGINAL_INDEX}` that holds no integers, and annotating adds one of "
            "this name. Rename it."
        )
    if "confidences" in dataset.column_names:
        raise ValueError(
            f"The {dataset_name} dataset already has a `confidences` column. Remove the columns `input_ids`, `labels` "
            "and `confidences` to annotate it again."
        )


def check_token_ids(statistics: RowStatistics, size: int, processing_class: PreTrainedTokenizerBase) -> None:
    """Refuses token ids beyond the vocabulary, and rows that begin twice."""
    beyond = np.flatnonzero(statistics.largest_ids >= size)
    if len(beyond):
        row = int(beyond[0])
        raise ValueError(
            f"Row {row} holds the token id {statistics.largest_ids[row]}, but the model's vocabulary has {size} rows. "
            "The data was tokenised for another model: use the instruct model's tokenizer."
        )
    bos = processing_class.bos_token_id
    doubled = np.flatnonzero((statistics.starts == bos).all(axis=1)) if bos is not None else np.array([])
    if len(doubled):
        raise ValueError(
            f"{len(doubled)} rows begin with two {processing_class.bos_token!r} tokens, the first being row "
            f"{int(doubled[0])}: the text or chat template has one, and the tokenizer adds another. Remove it from "
            "the text."
        )


def check_lengths(rows: SortedRows, positions: int | None, *, cut_later: bool) -> None:
    """Refuses rows that are longer than the model's positions; rows to be packed are cut only after the scoring."""
    lengths = rows.statistics.lengths
    longest = int(lengths.argmax())
    if positions is None or lengths[longest] <= positions:
        return
    remedy = f"Set `max_length` to {positions} or less."
    if cut_later:
        remedy = "Rows to be packed are scored whole: leave the row out, or set `packing` to false."
    raise ValueError(
        f"Row {rows.names[longest]} is {lengths[longest]} tokens long, but the model has {positions} positions. {remedy}"
    )


def warn_of_empty_answers(
    dataset: Dataset,
    end_of_turn_token_ids: Collection[int],
    processing_class: PreTrainedTokenizerBase | None,
    dataset_name: str,
    names: np.ndarray | None = None,
) -> None:
    """Warns of rows that teach to end the turn at once: `eos_confidence` gives its end the full weight."""

    @functools.cache
    def is_blank(token_id: int) -> bool:
        return processing_class is not None and not str(processing_class.decode([token_id])).strip()

    rows = find_empty_answers(dataset, end_of_turn_token_ids, is_blank)
    if len(rows):
        first = rows[0] if names is None else names[rows[0]]
        logger.warning(
            f"{len(rows)} of {len(dataset)} rows of the {dataset_name} dataset have an empty answer, the first being row "
            f"{first}: their only targets end the turn, which teaches the model to say nothing. Drop these rows from the "
            "data, unless that is meant."
        )


def check_server(server: ServerScorer, model: str, statistics: RowStatistics, names: np.ndarray) -> None:
    """Refuses rows that a server cannot score, and warns of a server of another model."""
    if statistics.relabelled.any():
        raise ValueError(
            f"Row {names[statistics.relabelled.argmax()]} has labels that are not its tokens, and a server scores the "
            "tokens it is sent only. Score with the engine 'transformers'."
        )
    longest = int(statistics.lengths.argmax())
    if server.max_length is not None and statistics.lengths[longest] > server.max_length:
        raise ValueError(
            f"Row {names[longest]} is {statistics.lengths[longest]} tokens long, but the server takes "
            f"{server.max_length}. Set `max_length` to that or less, or start the server with a larger "
            "`--max-model-len`."
        )
    served = server.identity
    names_of_it = {Path(name).name for name in (served["model"], served["root"])}
    if Path(model).name not in names_of_it:
        logger.warning(
            f"The server serves `{served['model']}` (from `{served['root']}`), and its probabilities are taken for "
            f"those of `{model}`. Make sure that it has loaded these weights."
        )


def check_tokenizer(processing_class: PreTrainedTokenizerBase, model: str, **kwargs: Any) -> None:
    """Refuses a tokenizer whose ids mean something else to the model that scores."""
    try:
        own = load_tokenizer(model, **kwargs)
    except ValueError:  # a checkpoint without tokenizer files has nothing to compare
        return
    conflicts = vocabulary_conflicts(own, processing_class)
    if conflicts:
        raise ValueError(
            f"The tokenizer is not that of `{model_name(model)}`, which would score other tokens than those "
            f"meant: {conflicts}. Leave `processing_class` unset, or give the tokenizer of the model that scores."
        )
