"""How sure the instruct model is of a dataset's target tokens, in numbers."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.utils import tqdm

from gift_trl.annotation.rows import CHUNK_ROWS, flatten_lists, target_labels


# The paper's bands of low, middling and high confidence
BANDS = (0.2, 0.8)
# Rows below this mean confidence are worth a look: another language, a broken answer, a wrong chat template
SUSPICIOUS_MEAN = 0.1
_BINS = 50
LOWEST_TOKENS = 50


class TokenConfidence(NamedTuple):
    """
    One target token.

    Args:
        row (`int`):
            Position of its row in the dataset.
        position (`int`):
            Its position in `input_ids`.
        confidence (`float`):
            Its confidence q.
    """

    row: int
    position: int
    confidence: float


@dataclass(frozen=True, eq=False)
class ConfidenceSummary:
    """
    How sure the instruct model is of the target tokens of a dataset.

    Args:
        rows (`int`):
            Number of rows.
        targets (`int`):
            Number of target tokens: not at position 0, and with a label other than `-100`.
        mean (`float`):
            Mean confidence of the target tokens.
        histogram (`np.ndarray` of shape `(50,)`, int64):
            Target tokens by confidence, in bins of equal width from 0 to 1.
        token_shares (`tuple[float, float, float]`):
            Shares of the target tokens with q < 0.2, 0.2 ≤ q ≤ 0.8 and q > 0.8.
        weight_shares (`tuple[float, float, float]`):
            Shares of Σq, the weight that GIFT gives to the tokens, by the same bands; 0.0 if every q is 0.
        row_means (`np.ndarray` of shape `(rows,)`, float32):
            Mean confidence of the target tokens of every row, NaN for a row without any.
        lowest (`tuple[TokenConfidence, ...]`):
            The 50 target tokens with the lowest confidence, ascending; equal ones in the order of the dataset.
    """

    rows: int
    targets: int
    mean: float
    histogram: np.ndarray
    token_shares: tuple[float, float, float]
    weight_shares: tuple[float, float, float]
    row_means: np.ndarray
    lowest: tuple[TokenConfidence, ...]

    @cached_property
    def row_histogram(self) -> np.ndarray:
        """Rows by mean confidence, in the bins of `histogram`: shape `(50,)`, int64."""
        return np.histogram(self.row_means[~np.isnan(self.row_means)], _BINS, (0, 1))[0]

    @cached_property
    def suspicious_rows(self) -> int:
        """Number of rows with a mean confidence below 0.1."""
        return int((self.row_means < SUSPICIOUS_MEAN).sum())

    def describe(self) -> str:
        """The summary in one sentence."""
        low, middle, high = self.token_shares
        return (
            f"{self.targets:,} target tokens in {self.rows:,} rows: mean confidence {self.mean:.3g}; {low:.1%} below "
            f"{BANDS[0]}, {middle:.1%} from {BANDS[0]} to {BANDS[1]}, {high:.1%} above {BANDS[1]}; mean confidence below "
            f"{SUSPICIOUS_MEAN} in {self.suspicious_rows:,} rows"
        )


def summarize_confidences(dataset: Dataset) -> ConfidenceSummary:
    """
    Summarises the confidences of an annotated dataset in one pass that holds a thousand rows at a time.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset with the columns `labels` and `confidences`.

    Returns:
        [`ConfidenceSummary`]: The summary.

    Raises:
        `ValueError`: If a column is missing, there is no target token, or a row holds confidences that are not one
            probability for every label.
    """
    require_columns(dataset, ["labels", "confidences"])
    columns = dataset.select_columns(["labels", "confidences"]).with_format("arrow")
    histogram, counts, sums = np.zeros(_BINS, dtype=np.int64), np.zeros(3, dtype=np.int64), np.zeros(3)
    row_means: list[np.ndarray] = []
    lowest: list[TokenConfidence] = []
    # The bar appears only if there is something to wait for
    for start in tqdm(range(0, len(columns), CHUNK_ROWS), desc="Reading confidences", delay=2):
        table = columns[start : start + CHUNK_ROWS]
        labels, offsets = flatten_lists(table["labels"])
        is_target = target_labels(labels, offsets) != -100
        confidences = _flatten_confidences(table["confidences"], offsets, is_target, start)
        rows = np.repeat(np.arange(len(table)), np.diff(offsets))[is_target]
        positions = np.flatnonzero(is_target) - offsets[rows]
        q = confidences[is_target]

        histogram += np.histogram(q, _BINS, (0, 1))[0]
        band = (q >= BANDS[0]).astype(np.int64) + (q > BANDS[1])
        counts += np.bincount(band, minlength=3)
        sums += np.bincount(band, q, minlength=3)
        with np.errstate(invalid="ignore"):
            means = np.bincount(rows, q, minlength=len(table)) / np.bincount(rows, minlength=len(table))
        row_means.append(means.astype(np.float32))
        # Only what is lower than the lowest so far: an equal one that comes later would be left out anyway
        near = np.flatnonzero(q < lowest[-1].confidence) if len(lowest) == LOWEST_TOKENS else np.arange(len(q))
        near = near[np.argsort(q[near], kind="stable")[:LOWEST_TOKENS]]
        lowest += [TokenConfidence(start + int(rows[i]), int(positions[i]), float(q[i])) for i in near]
        lowest = sorted(lowest, key=lambda token: token.confidence)[:LOWEST_TOKENS]
    targets, weight = int(counts.sum()), float(sums.sum())
    if targets == 0:
        raise ValueError("The dataset has no target token, so there is nothing to summarise: check its `labels`.")
    return ConfidenceSummary(
        rows=len(dataset),
        targets=targets,
        mean=weight / targets,
        histogram=histogram,
        token_shares=tuple((counts / targets).tolist()),
        weight_shares=tuple((sums / (weight or 1.0)).tolist()),
        row_means=np.concatenate(row_means),
        lowest=tuple(lowest),
    )


def require_columns(dataset: Dataset, names: list[str]) -> None:
    """Refuses a dataset that lacks one of the columns."""
    missing = [name for name in names if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"The dataset has no column {' and no column '.join(f'`{name}`' for name in missing)}, so it is not an "
            "annotated one: annotate it first, with `gift-trl annotate` or `annotate_dataset`."
        )


def _flatten_confidences(
    column: pa.ChunkedArray, offsets: np.ndarray, is_target: np.ndarray, start: int
) -> np.ndarray:
    """Values of the column; the first row whose values are no confidences is named."""
    values, own_offsets = flatten_lists(column, np.float32)
    wrong = np.flatnonzero(np.diff(own_offsets) != np.diff(offsets))
    if not len(wrong):
        # Not `(values < 0) | (values > 1)`, which NaN would pass
        outside = np.flatnonzero(is_target & ~((values >= 0) & (values <= 1)))
        if not len(outside):
            return values
        wrong = np.searchsorted(offsets, outside, side="right") - 1
    raise ValueError(
        f"Row {start + int(wrong[0])} does not have one confidence from 0 to 1 for every label: something changed "
        "`input_ids`, `labels` or `confidences` alone. Annotate the data again."
    )
