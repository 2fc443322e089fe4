"""The rows that are scored, read from Arrow as they are needed."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, LargeList, List, Value


# Rows read at a time: their token ids are in memory, those of the whole dataset never are
CHUNK_ROWS = 1000


@dataclass(frozen=True, eq=False)
class Row:
    """
    A row to be scored.

    Args:
        index (`int`):
            Position in the dataset that is scored.
        name (`int`):
            Index in the dataset the user gave, for messages.
        input_ids (`np.ndarray` of shape `(length,)`, int64):
            Token ids.
        targets (`np.ndarray` of shape `(targets,)`, int64):
            Positions of the target tokens, ascending and at least 1, since nothing predicts position 0.
        target_ids (`np.ndarray` of shape `(targets,)`, int64):
            Their labels, which are the token ids at these positions unless the data says otherwise.
    """

    index: int
    name: int
    input_ids: np.ndarray
    targets: np.ndarray
    target_ids: np.ndarray


@dataclass(frozen=True, eq=False)
class RowStatistics:
    """
    What one pass over the token ids and labels of a dataset finds.

    Args:
        lengths (`np.ndarray` of shape `(rows,)`, int64):
            Tokens of every row.
        targets (`np.ndarray` of shape `(rows,)`, int64):
            Target tokens of every row.
        largest_ids (`np.ndarray` of shape `(rows,)`, int64):
            Largest token id or label of every row, `-1` for an empty one.
        starts (`np.ndarray` of shape `(rows, 2)`, int64):
            First two token ids of every row, `-1` where there is none.
        relabelled (`np.ndarray` of shape `(rows,)`, bool):
            Whether a target's label is another token than the one at its position.
        digest (`str`):
            SHA-256 of the token ids and labels, as hexadecimal digits.
    """

    lengths: np.ndarray
    targets: np.ndarray
    largest_ids: np.ndarray
    starts: np.ndarray
    relabelled: np.ndarray
    digest: str

    def select(self, rows: np.ndarray) -> "RowStatistics":
        """The statistics of some of the rows; the digest stays that of all."""
        return RowStatistics(
            lengths=self.lengths[rows],
            targets=self.targets[rows],
            largest_ids=self.largest_ids[rows],
            starts=self.starts[rows],
            relabelled=self.relabelled[rows],
            digest=self.digest,
        )


def measure_rows(dataset: Dataset) -> RowStatistics:
    """
    Measures the rows of a tokenised dataset in one pass.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset with the columns `input_ids` and `labels`, and at least one row.

    Returns:
        [`RowStatistics`]: Lengths, target counts, largest ids and a digest.

    Raises:
        `ValueError`: If the columns are no lists of integers, or a row has labels of another length than its token ids,
            or a token id below 0.
    """
    check_token_columns(dataset)
    lengths, targets, largest, starts, relabelled = [], [], [], [], []
    digest = hashlib.sha256()
    for start, table in _tables(dataset):
        ids, offsets = flatten_lists(table["input_ids"])
        labels, label_offsets = flatten_lists(table["labels"])
        if not np.array_equal(offsets, label_offsets):
            row = int(np.flatnonzero(np.diff(offsets) != np.diff(label_offsets))[0])
            raise ValueError(
                f"Row {start + row} has {np.diff(offsets)[row]} token ids and {np.diff(label_offsets)[row]} labels. Give "
                "every token a label, `-100` where there is nothing to learn."
            )
        targeted = target_labels(labels, offsets)
        is_target = targeted != -100
        negative = (ids < 0) | (is_target & (targeted < 0))
        if negative.any():
            row = int(np.searchsorted(offsets, int(np.flatnonzero(negative)[0]), side="right")) - 1
            raise ValueError(
                f"Row {start + row} holds a negative token id, or a negative label other than -100. Tokenise the data "
                "again."
            )
        lengths.append(np.diff(offsets))
        targets.append(_sum_rows(is_target, offsets))
        largest.append(_max_rows(np.maximum(ids, targeted), offsets))
        starts.append(_first_two(ids, offsets))
        relabelled.append(_sum_rows(is_target & (targeted != ids), offsets) > 0)
        for part in (np.diff(offsets), ids, targeted):
            digest.update(np.ascontiguousarray(part).tobytes())
    return RowStatistics(
        lengths=np.concatenate(lengths),
        targets=np.concatenate(targets),
        largest_ids=np.concatenate(largest),
        starts=np.concatenate(starts),
        relabelled=np.concatenate(relabelled),
        digest=digest.hexdigest(),
    )


def check_token_columns(dataset: Dataset) -> None:
    """
    Checks that those of the columns `input_ids` and `labels` that are there hold lists of integers.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset.

    Raises:
        `ValueError`: If they do not, or a row has none.
    """
    for name in sorted({"input_ids", "labels"} & set(dataset.column_names)):
        kind = dataset.features[name]
        is_list = isinstance(kind, (List, LargeList))
        if not (is_list and isinstance(kind.feature, Value) and "int" in kind.feature.dtype):
            raise ValueError(
                f"The column `{name}` holds {kind}, not lists of token ids. A tokenised dataset has lists of integers in "
                "`input_ids` and `labels`; rename the column if it means something else."
            )
        empty = pc.is_null(dataset.with_format("arrow")[:][name]).to_numpy()
        if empty.any():
            raise ValueError(f"Row {int(empty.argmax())} has no `{name}`. Leave the row out, or tokenise it again.")


def find_empty_answers(
    dataset: Dataset, end_of_turn_token_ids: Collection[int], is_blank: Callable[[int], bool]
) -> np.ndarray:
    """
    Finds the rows whose targets end a turn and say nothing.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset with the columns `input_ids` and `labels`.
        end_of_turn_token_ids (`Collection[int]`):
            Token ids that end a turn.
        is_blank (`Callable`):
            Tells whether the text of a token id is white space, which a chat template may write after a turn.

    Returns:
        `np.ndarray`, int64: Positions of the rows.

    Raises:
        `ValueError`: As [`check_token_columns`].
    """
    check_token_columns(dataset)
    ends = np.array(sorted(end_of_turn_token_ids), dtype=np.int64)
    found = [np.array([], dtype=np.int64)]
    for start, table in _tables(dataset):
        labels, offsets = flatten_lists(table["labels"])
        targeted = target_labels(labels, offsets)
        is_end = np.isin(targeted, ends)
        is_other = (targeted != -100) & ~is_end
        turns = _sum_rows(is_end, offsets)
        # Only tokens of rows that could be empty are decoded
        candidates = (turns > 0) & (_sum_rows(is_other, offsets) <= turns)
        others = np.unique(targeted[is_other & np.repeat(candidates, np.diff(offsets))])
        blank = [token_id for token_id in others.tolist() if is_blank(token_id)]
        said = _sum_rows(is_other & ~np.isin(targeted, blank), offsets)
        found.append(start + np.flatnonzero(candidates & (said == 0)))
    return np.concatenate(found)


def read_rows(dataset: Dataset, indices: Sequence[int], names: np.ndarray) -> list[Row]:
    """
    Reads rows of a tokenised dataset.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset with the columns `input_ids` and `labels`, in Arrow format (`with_format("arrow")`).
        indices (`Sequence[int]`):
            Positions of the rows.
        names (`np.ndarray`):
            Name of every row of the dataset in messages.

    Returns:
        `list[Row]`: The rows, in the given order.
    """
    table = dataset[list(indices)]
    ids, offsets = flatten_lists(table["input_ids"])
    labels, _ = flatten_lists(table["labels"])
    rows = []
    for i, index in enumerate(indices):
        part = slice(offsets[i], offsets[i + 1])
        targets = 1 + np.flatnonzero(labels[part][1:] != -100)
        rows.append(Row(index, int(names[index]), ids[part], targets, labels[part][targets]))
    return rows


def flatten_lists(column: pa.ChunkedArray, dtype: type = np.int64) -> tuple[np.ndarray, np.ndarray]:
    """
    Joins the rows of a column of lists.

    Args:
        column (`pa.ChunkedArray`):
            Column of lists of numbers.
        dtype (`type`, *optional*, defaults to `np.int64`):
            Data type of the values.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: The values, and the `rows + 1` offsets of the rows in them.
    """
    lengths = pc.list_value_length(column).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return pc.list_flatten(column).to_numpy().astype(dtype, copy=False), offsets


def target_labels(labels: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """
    Labels of joined rows without those at position 0, which nothing predicts.

    Args:
        labels (`np.ndarray` of shape `(tokens,)`, int64):
            Labels of all rows.
        offsets (`np.ndarray` of shape `(rows + 1,)`, int64):
            Offsets of the rows.

    Returns:
        `np.ndarray` of shape `(tokens,)`, int64: The labels, `-100` wherever there is no target.
    """
    labels = labels.copy()
    labels[offsets[:-1][np.diff(offsets) > 0]] = -100
    return labels


def _tables(dataset: Dataset) -> Iterator[tuple[int, pa.Table]]:
    columns = dataset.select_columns(["input_ids", "labels"]).with_format("arrow")
    for start in range(0, len(columns), CHUNK_ROWS):
        yield start, columns[start : start + CHUNK_ROWS]


def _first_two(ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    padded = np.concatenate([ids, [-1, -1]])
    positions = offsets[:-1, None] + np.arange(2)
    return np.where(positions < offsets[1:, None], padded[positions], -1)


def _sum_rows(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return sums[offsets[1:]] - sums[offsets[:-1]]


def _max_rows(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    result = np.full(len(offsets) - 1, -1, dtype=np.int64)
    filled = np.diff(offsets) > 0
    if filled.any():
        result[filled] = np.maximum.reduceat(values, offsets[:-1][filled])
    return result
