"""ROUGE as an `evaluate.Metric`."""

from collections.abc import Sequence

import evaluate
import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from gift_trl.evaluation.metrics.pairs import TextPairs, text_features


_DESCRIPTION = """
F-measures of ROUGE-1, ROUGE-2 and ROUGE-L by rouge_score, with Porter's stemmer: the protocol of Super-NaturalInstructions.
"""
_INPUTS = """
Args:
    predictions (`list[str]`):
        Generated texts. The first 50,000 characters of each are compared: a longest common subsequence takes time by the
        product of both lengths.
    references (`list[str]` or `list[list[str]]`):
        Right texts, one or several for each prediction; the best one counts, for each of the three by itself.
    use_stemmer (`bool`, *optional*, defaults to `True`):
        Compare the stems of words longer than three letters. rouge_score compares in lower case and drops whatever is not
        a Latin letter or a digit, so that it cannot score languages with another script.

Returns:
    `dict`: `"rouge"`, the mean ROUGE-L, also as `"rougeL"`; `"rouge1"` and `"rouge2"`; `"scores"`, ROUGE-L for each pair;
    `"answers"`, the predictions with each run of white space as one space. All in [0, 1].
"""
_TYPES = ("rouge1", "rouge2", "rougeL")
_LONGEST_TEXT = 50_000


class Rouge(TextPairs, evaluate.Metric):
    """ROUGE-1, ROUGE-2 and ROUGE-L. The options stand at `compute`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=text_features(several_references=True),
        )

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str | Sequence[str]], use_stemmer: bool = True
    ) -> dict:
        scorer = RougeScorer(_TYPES, use_stemmer=use_stemmer)
        pairs = [
            scorer.score_multi(
                [text[:_LONGEST_TEXT] for text in ([right] if isinstance(right, str) else right)],
                prediction[:_LONGEST_TEXT],
            )
            for prediction, right in zip(predictions, references, strict=True)
        ]
        scores = {name: [pair[name].fmeasure for pair in pairs] for name in _TYPES}
        means = {name: float(np.mean(values)) for name, values in scores.items()}
        answers = [" ".join(prediction[:_LONGEST_TEXT].split()) for prediction in predictions]
        return {"rouge": means["rougeL"], **means, "scores": scores["rougeL"], "answers": answers}
