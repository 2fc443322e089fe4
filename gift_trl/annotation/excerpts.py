"""Rows and tokens of an annotated dataset as text: what the report shows of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gift_trl.annotation.summary import LOWEST_TOKENS, ConfidenceSummary


# The rows shown, by the quantile of their mean confidence: closer together where something may be wrong
_QUANTILES = (0, 0.01, 0.05, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.99, 1)
# First and last tokens that are shown of a long prompt, and of a long row
_PROMPT_ENDS = (40, 30)
_ROW_ENDS = (900, 300)
_CONTEXT_TOKENS = 8
# Tokens that may share characters. A character has at most four bytes, but a token may end one and begin the next
_MAX_GROUP = 8


class ShownToken(NamedTuple):
    """
    A token as it is shown.

    Args:
        token_id (`int`):
            Its id.
        text (`str`):
            Its text; empty if the token is a part of a character that a later token ends.
        confidence (`float` or `None`):
            Its confidence, `None` if it is no target.
    """

    token_id: int
    text: str
    confidence: float | None


@dataclass(frozen=True)
class RowExample:
    """
    A row of the report.

    Args:
        split (`str`):
            Split of the row.
        row (`int`):
            Its `original_index`, or its position if the dataset has no such column.
        quantile (`float`):
            Quantile, from 0 to 1, of its mean confidence among all rows.
        mean (`float`):
            Its mean confidence.
        targets (`int`):
            Number of its target tokens.
        parts (`list[ShownToken | int]`):
            Its tokens in order; a number stands for as many tokens that are left out.
    """

    split: str
    row: int
    quantile: float
    mean: float
    targets: int
    parts: list[ShownToken | int]


@dataclass(frozen=True)
class TokenInContext:
    """
    A token of the report, with some tokens on each side.

    Args:
        split (`str`):
            Split of its row.
        row (`int`):
            The row's `original_index`, or its position if the dataset has no such column.
        position (`int`):
            Position of the token in `input_ids`.
        before (`list[ShownToken]`):
            Tokens before it.
        token ([`ShownToken`]):
            The token.
        after (`list[ShownToken]`):
            Tokens after it.
    """

    split: str
    row: int
    position: int
    before: list[ShownToken]
    token: ShownToken
    after: list[ShownToken]


def decode_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """
    Text of every token where it stands, so that the parts join to the text of the whole.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        ids (`Sequence[int]`):
            Token ids.

    Returns:
        `list[str]`: As long as `ids`. Of tokens that share a character, the last has it and the others are empty; `�`
        stands only for bytes that are part of no character.
    """

    def decode(start: int, stop: int) -> str:
        part = list(ids[start:stop])
        return str(tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    texts: list[str] = []
    # The group before is decoded along, since some tokenizers strip the space before the first token of a text
    context = 0
    while (start := len(texts)) < len(ids):
        before = len(decode(context, start))
        sizes = range(1, min(_MAX_GROUP, len(ids) - start) + 1)
        size = next((n for n in sizes if "�" not in decode(context, start + n)[before:]), 1)
        text = decode(context, start + size)[before:]
        texts += [""] * (size - 1) + [text]
        # Bytes of no character stay alone: what follows is not to be read as their end
        context = start + size if "�" in text else start
    return texts


def read_row_examples(
    splits: Mapping[str, Dataset], summaries: Mapping[str, ConfidenceSummary], tokenizer: PreTrainedTokenizerBase
) -> list[RowExample]:
    """
    Reads rows from the lowest to the highest mean confidence, over all splits together.

    Args:
        splits (`Mapping[str, Dataset]`):
            Annotated datasets.
        summaries (`Mapping[str, ConfidenceSummary]`):
            Their summaries.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer the rows were tokenised with.

    Returns:
        `list[RowExample]`: At most 12 rows.
    """
    means = np.concatenate([summaries[split].row_means for split in splits])
    # NaN, which is a row without a target token, is sorted to the end
    order = np.argsort(means, kind="stable")[: np.count_nonzero(~np.isnan(means))]
    chosen: dict[int, float] = {}
    # Of quantiles that fall on one row of a small dataset, the ends and the median name it
    for quantile in sorted(_QUANTILES, key=lambda quantile: quantile not in (0, 0.5, 1)):
        chosen.setdefault(int(order[round(quantile * (len(order) - 1))]), quantile)
    names, starts = list(splits), np.cumsum([0, *(summaries[split].rows for split in splits)])
    examples = []
    for index, quantile in sorted(chosen.items(), key=lambda entry: entry[1]):
        number = int(np.searchsorted(starts, index, side="right")) - 1
        row, name = _read_row(splits[names[number]], index - int(starts[number]))
        is_target = np.array(row["labels"]) != -100
        is_target[0] = False
        parts: list[ShownToken | int] = []
        for first, stop, is_shown in _shown_spans(is_target):
            parts += _decode_row(tokenizer, row, first, stop) if is_shown else [stop - first]
        examples.append(RowExample(names[number], name, quantile, float(means[index]), int(is_target.sum()), parts))
    return examples


def read_lowest_tokens(
    splits: Mapping[str, Dataset], summaries: Mapping[str, ConfidenceSummary], tokenizer: PreTrainedTokenizerBase
) -> list[TokenInContext]:
    """
    Reads the target tokens with the lowest confidence in context, over all splits together.

    Args:
        splits (`Mapping[str, Dataset]`):
            Annotated datasets.
        summaries (`Mapping[str, ConfidenceSummary]`):
            Their summaries.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer the rows were tokenised with.

    Returns:
        `list[TokenInContext]`: At most 50 tokens, ascending.
    """
    lowest = sorted(
        ((split, token) for split in splits for token in summaries[split].lowest),
        key=lambda entry: entry[1].confidence,
    )
    shown = []
    for split, (index, position, _) in lowest[:LOWEST_TOKENS]:
        row, name = _read_row(splits[split], index)
        start = max(0, position - _CONTEXT_TOKENS)
        tokens = _decode_row(tokenizer, row, start, position + _CONTEXT_TOKENS + 1)
        at = position - start
        shown.append(TokenInContext(split, name, position, tokens[:at], tokens[at], tokens[at + 1 :]))
    return shown


def _read_row(dataset: Dataset, index: int) -> tuple[dict[str, Any], int]:
    names = [name for name in dataset.column_names if name == "original_index"]
    row = dataset.select_columns(["input_ids", "labels", "confidences", *names]).with_format(None)[index]
    return row, row.get("original_index", index)


def _decode_row(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], start: int, stop: int) -> list[ShownToken]:
    """Tokens `start` to `stop` of a row, whose first and last characters may begin and end outside."""
    ids, first = row["input_ids"], max(0, start - _MAX_GROUP)
    texts = decode_tokens(tokenizer, ids[first : stop + _MAX_GROUP])[start - first : stop - first]
    return [
        ShownToken(ids[i], text, row["confidences"][i] if i > 0 and row["labels"][i] != -100 else None)
        for i, text in enumerate(texts, start)
    ]


def _shown_spans(is_target: np.ndarray) -> list[tuple[int, int, bool]]:
    """Spans of a row that are shown or left out: the middle of long runs that are no targets, then of a long row."""
    shown = np.ones(len(is_target), dtype=bool)
    for start, stop in _runs(is_target):
        if not is_target[start] and stop - start > sum(_PROMPT_ENDS):
            shown[start + _PROMPT_ENDS[0] : stop - _PROMPT_ENDS[1]] = False
    kept = np.flatnonzero(shown)
    shown[kept[_ROW_ENDS[0] : max(_ROW_ENDS[0], len(kept) - _ROW_ENDS[1])]] = False
    return [(start, stop, bool(shown[start])) for start, stop in _runs(shown)]


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    borders = [0, *(1 + np.flatnonzero(np.diff(mask))).tolist(), len(mask)]
    return list(pairwise(borders))
