"""Scores made by the paper's released scripts, put onto the tokens of this library."""

from collections.abc import Collection
from typing import Any

import numpy as np
from datasets import Dataset, List, Value


SCORES_COLUMN = "scores"


def attach_scores(dataset: Dataset, end_of_turn_token_ids: Collection[int], dataset_name: str = "train") -> Dataset:
    """
    Turns the `scores` of a tokenised dataset into `confidences`.

    The released scripts give one score to every token of the response and none to the end of the turn, whose weight is
    1. So do the confidences: 1.0 for the target tokens from the last end of turn on.

    Args:
        dataset ([`~datasets.Dataset`]):
            Tokenised dataset, not truncated, with a column `scores` of lists of `[q, q]` or of q.
        end_of_turn_token_ids (`Collection[int]`):
            Token ids that end a turn.
        dataset_name (`str`, *optional*, defaults to `"train"`):
            Name of the dataset in messages and progress bars.

    Returns:
        [`~datasets.Dataset`]: The dataset with `confidences` in place of `scores`.

    Raises:
        `ValueError`: If there is no such column, a row has another number of scores than its response has tokens, or a
            score is no probability; the message names the row.
    """
    if SCORES_COLUMN not in dataset.column_names:
        raise ValueError(
            f"The {dataset_name} dataset has the columns {sorted(dataset.column_names)}, and no `{SCORES_COLUMN}`. Give a "
            "file of the released scripts, whose lines hold `instruction`, `response` and `scores`."
        )
    ends = np.array(sorted(end_of_turn_token_ids), dtype=np.int64)

    def attach(row: dict[str, Any], index: int) -> dict[str, Any]:
        ids, labels = np.array(row["input_ids"], dtype=np.int64), np.array(row["labels"], dtype=np.int64)
        targets = 1 + np.flatnonzero(labels[1:] != -100)
        last_ends = np.flatnonzero(np.isin(ids[targets], ends))
        response = targets[: last_ends[-1]] if len(last_ends) else targets
        scores = _read_scores(row[SCORES_COLUMN], index)
        if len(scores) != len(response):
            raise ValueError(
                f"Row {index} has {len(scores)} scores, and its response has {len(response)} tokens here. The scores were "
                "made with another tokenizer or chat format, or of a shortened text: use the instruct model they were "
                "made with, or leave the row out."
            )
        confidences = np.zeros(len(ids), dtype=np.float32)
        confidences[targets] = 1.0
        confidences[response] = scores
        return {"confidences": confidences}

    return dataset.map(
        attach,
        with_indices=True,
        remove_columns=SCORES_COLUMN,
        features=_with_confidences(dataset),
        desc=f"Importing scores of {dataset_name} dataset",
    )


def _with_confidences(dataset: Dataset) -> Any:
    features = dataset.features.copy()
    del features[SCORES_COLUMN]
    features["confidences"] = List(Value("float32"))
    return features


def _read_scores(scores: list[float] | list[list[float]] | None, index: int) -> np.ndarray:
    pairs = [score if isinstance(score, list) else [score] for score in scores or []]
    if not all(pair and all(isinstance(value, (int, float)) for value in pair) for pair in pairs):
        raise ValueError(
            f"Row {index} has scores that are no numbers. Give one number for each token, or two equal ones."
        )
    if any(len(set(pair)) > 1 for pair in pairs):
        raise ValueError(
            f"Row {index} has scores of several different numbers, and it is not known which is the confidence. Give "
            "one number for each token, or the same one twice."
        )
    values = np.array([pair[0] for pair in pairs], dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():  # NaN is neither
        raise ValueError(f"Row {index} has scores that are no probabilities between 0 and 1. Make them again.")
    return values
