"""Exact match of texts as an `evaluate.Metric`."""

import string
from collections.abc import Sequence

import evaluate
import numpy as np

from gift_trl.evaluation.metrics.pairs import TextPairs, text_features


_DESCRIPTION = "Share of predictions that are equal to their reference, or to one of their references."
_INPUTS = """
Args:
    predictions (`list[str]`):
        Generated texts.
    references (`list[str]` or `list[list[str]]`):
        Right texts, one or several for each prediction.
    ignore_case (`bool`, *optional*, defaults to `False`):
        Compare in lower case.
    ignore_punctuation (`bool`, *optional*, defaults to `False`):
        Leave out ASCII punctuation.
    White space at the ends is left out and any run of it inside counts as one space, always. With both options `True` this
    is the normalisation of Super-NaturalInstructions, which unlike SQuAD's keeps articles.

Returns:
    `dict`: `"exact_match"`, the mean; `"scores"`, 0.0 or 1.0 for each pair; `"answers"`, the predictions as they were
    compared.
"""
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ExactMatch(TextPairs, evaluate.Metric):
    """Share of predictions that are equal to a reference. The options stand at `compute`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=text_features(several_references=True),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str | Sequence[str]],
        ignore_case: bool = False,
        ignore_punctuation: bool = False,
    ) -> dict:
        def normalize(text: str) -> str:
            text = text.lower() if ignore_case else text
            text = text.translate(_PUNCTUATION) if ignore_punctuation else text
            return " ".join(text.split())

        answers = [normalize(prediction) for prediction in predictions]
        scores = [
            float(answer in [normalize(text) for text in ([right] if isinstance(right, str) else right)])
            for answer, right in zip(answers, references, strict=True)
        ]
        return {"exact_match": float(np.mean(scores)), "scores": scores, "answers": answers}
