"""
Other weights than plain q, as changes of the `confidences` column, to ask of the lab which of them do better.

The trainer makes its weights from the column as ever, so that no variant needs code of its own in the trainer.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from gift_trl.checkpoints import write_folder


# The tokens that end a step of an answer in the lab
_STEP_ENDS = (";", ".")
_SMALLEST = 1e-4


@dataclass(frozen=True)
class Row:
    """
    What a weighting may look at: one row's target tokens, in order.

    Args:
        confidences (`Sequence[float]`):
            q of the instruct model.
        base_confidences (`Sequence[float]`):
            q of the base model.
        tokens (`Sequence[str]`):
            The tokens.
    """

    confidences: Sequence[float]
    base_confidences: Sequence[float]
    tokens: Sequence[str]


Weighting = Callable[[Row], list[float]]


def smooth_over_answer(row: Row) -> list[float]:
    """
    One value for the whole answer: the geometric mean of q.

    Args:
        row ([`Row`]):
            The target tokens.

    Returns:
        `list[float]`: Values in the place of q.
    """
    return [_geometric_mean(row.confidences)] * len(row.confidences)


def smooth_over_steps(row: Row) -> list[float]:
    """
    One value for every step of an answer: the geometric mean of q over the step.

    Args:
        row ([`Row`]):
            The target tokens.

    Returns:
        `list[float]`: Values in the place of q.
    """
    values: list[float] = []
    start = 0
    for end, token in enumerate(row.tokens, start=1):
        if token in _STEP_ENDS or end == len(row.tokens):
            values += [_geometric_mean(row.confidences[start:end])] * (end - start)
            start = end
    return values


def smooth_over_window(row: Row, *, size: int = 3) -> list[float]:
    """
    The geometric mean of q over a token and its neighbours.

    Args:
        row ([`Row`]):
            The target tokens.
        size (`int`, *optional*, defaults to `3`):
            Tokens of the window, an odd number.

    Returns:
        `list[float]`: Values in the place of q.
    """
    reach = size // 2
    return [_geometric_mean(row.confidences[max(0, i - reach) : i + reach + 1]) for i in range(len(row.confidences))]


def relative_to_base(row: Row) -> list[float]:
    """
    q_I / (q_I + q_B): how much more likely a token is to the instruct model than to the base model.

    Args:
        row ([`Row`]):
            The target tokens.

    Returns:
        `list[float]`: Values in the place of q.
    """
    pairs = zip(row.confidences, row.base_confidences, strict=True)
    return [max(q, _SMALLEST) / (max(q, _SMALLEST) + max(base, _SMALLEST)) for q, base in pairs]


def capped_ratio_to_base(row: Row) -> list[float]:
    """
    min(1, q_I / q_B): no less weight than 1 for what the instruct model likes at least as well as the base model does.

    Args:
        row ([`Row`]):
            The target tokens.

    Returns:
        `list[float]`: Values in the place of q.
    """
    pairs = zip(row.confidences, row.base_confidences, strict=True)
    return [min(1.0, max(q, _SMALLEST) / max(base, _SMALLEST)) for q, base in pairs]


def trust_by_answer(row: Row) -> list[float]:
    """
    q ** (1 − g), with g the geometric mean of q over the answer: an answer that is likely as a whole is learned as it is,
    its unlikely tokens too, and one that is not is weighed token by token.

    Args:
        row ([`Row`]):
            The target tokens.

    Returns:
        `list[float]`: Values in the place of q.
    """
    mean = _geometric_mean(row.confidences)
    return [max(q, _SMALLEST) ** (1.0 - mean) for q in row.confidences]


def answer_times_token(row: Row) -> list[float]:
    """
    q times the geometric mean of q over the answer: likely answers weigh more than unlikely ones.

    Args:
        row ([`Row`]):
            The target tokens.

    Returns:
        `list[float]`: Values in the place of q.
    """
    mean = _geometric_mean(row.confidences)
    return [q * mean for q in row.confidences]


WEIGHTINGS: dict[str, Weighting] = {
    "window": smooth_over_window,
    "step": smooth_over_steps,
    "answer": smooth_over_answer,
    "relative": relative_to_base,
    "capped ratio": capped_ratio_to_base,
    "trust": trust_by_answer,
    "answer × token": answer_times_token,
}


def reweigh(annotated: Dataset, by_base: Dataset, tokenizer: PreTrainedTokenizerBase, weighting: Weighting) -> Dataset:
    """
    Puts a weighting's values in the place of the confidences.

    Args:
        annotated ([`~datasets.Dataset`]):
            Dataset annotated by the instruct model.
        by_base ([`~datasets.Dataset`]):
            The same rows annotated by the base model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        weighting (`Callable`):
            The weighting.

    Returns:
        [`~datasets.Dataset`]: The rows with other `confidences`, 0.0 where the label is −100, as ever.
    """
    column = []
    for row, base_confidences in zip(annotated, by_base["confidences"], strict=True):
        targets = [place for place, label in enumerate(row["labels"]) if label != -100]
        values = weighting(
            Row(
                [row["confidences"][place] for place in targets],
                [base_confidences[place] for place in targets],
                tokenizer.convert_ids_to_tokens([row["input_ids"][place] for place in targets]),
            )
        )
        confidences = [0.0] * len(row["labels"])
        for place, value in zip(targets, values, strict=True):
            confidences[place] = value
        column.append(confidences)
    return replace_confidences(annotated, column)


def replace_confidences(annotated: Dataset, column: Sequence[Sequence[float]]) -> Dataset:
    """
    A dataset with other confidences, under the name of the model that made the first ones.

    Args:
        annotated ([`~datasets.Dataset`]):
            Annotated dataset.
        column (`Sequence[Sequence[float]]`):
            The other confidences.

    Returns:
        [`~datasets.Dataset`]: The dataset.
    """
    feature = annotated.features["confidences"]
    return annotated.remove_columns("confidences").add_column("confidences", list(column), feature=feature)


def write_tempered_model(model_dir: str | os.PathLike, temperature: float, output_dir: Path) -> None:
    """
    Writes a copy of a lab model whose logits are divided by a temperature: its last norm is, which the logits are linear
    in.

    Args:
        model_dir (`str` or `os.PathLike`):
            Folder of the model.
        temperature (`float`):
            Temperature.
        output_dir (`Path`):
            Folder to write.
    """
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.model.norm.weight.data /= temperature
    with write_folder(output_dir, overwrite=True) as folder:
        model.save_pretrained(folder)


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(max(value, _SMALLEST)) for value in values) / len(values))
