"""Accuracy of mathematical answers as an `evaluate.Metric`."""

import importlib.util
from collections.abc import Sequence
from functools import lru_cache

import evaluate
import numpy as np

from gift_trl.evaluation.metrics.math_accuracy.equivalence import canonical, equivalent, plain_text
from gift_trl.evaluation.metrics.math_accuracy.extraction import LONGEST_ANSWER, final_answer, reference_answer
from gift_trl.evaluation.metrics.math_accuracy.parts import parse_answer
from gift_trl.evaluation.metrics.math_accuracy.pool import compare_pairs
from gift_trl.evaluation.metrics.pairs import TextPairs, text_features


_DESCRIPTION = """
Share of predictions whose final answer equals the reference as mathematics, by math-verify and by rules of our own that are
stricter where a wrong answer could pass. What a model wrote is never run as code, and no check takes longer than its limit.
"""
_INPUTS = r"""
Args:
    predictions (`list[str]`):
        Generated texts. The final answer of each is the last `\boxed{}` or the line after the last `####`; without both the
        rest of the sentence after the last "answer is" or "answer:"; without that the text, if it is a single line. An
        answer of more than 1,000 characters, or one that was cut off inside its box, is none.
    references (`list[str]`):
        Right answers, in LaTeX or plain; or whole solutions with a `\boxed{}` or `####`.
    time_limit (`float`, *optional*, defaults to `5.0`):
        Seconds of processor time to compare two answers. A pair that takes longer, or gigabytes, counts as wrong.
    num_processes (`int`, *optional*):
        Processes that compare. Defaults to the number of processors, at most 8, and fewer for few pairs.

    Equal are: numbers of the same value, however they are written (0.5, 1/2, 50%, \frac12), and a decimal with the value that
    it is a rounding of, if it has at least three significant digits in the reference or six in the prediction; expressions
    that are equal for all values of their variables; lists and sets in any order; tuples, intervals and matrices part by
    part, with their brackets; words without case. x = 5 is 5. A unit, a currency or a degree sign may be missing; two
    different units are not equal. A list is right only as a whole.

Returns:
    `dict`: `"math_accuracy"`, the mean; `"scores"`, 0.0 or 1.0 for each pair; `"answers"`, each prediction's answer written
    so that equal answers are equal strings, as far as sympy tells, or `None`; `"unanswered"`, the number of predictions
    without an answer; `"timeouts"`, that of checks that were cut off; `"cut_off"`, whether a pair's was.
"""


class MathAccuracy(TextPairs, evaluate.Metric):
    """Share of predictions whose final answer equals the reference as mathematics. The options stand at `compute`."""

    def _info(self) -> evaluate.MetricInfo:
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("The metric math_accuracy needs math_verify: pip install 'gift_trl[evaluation]'.")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=text_features(several_references=False),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        time_limit: float = 5.0,
        num_processes: int | None = None,
    ) -> dict:
        if not time_limit > 0:
            raise ValueError(f"`time_limit` must be a number of seconds above 0, not {time_limit}.")
        right = [reference_answer(reference) for reference in references]
        if None in right:
            index = right.index(None)
            raise ValueError(
                f"Reference {index} has no answer of 1 to {LONGEST_ANSWER} characters: {references[index]!r:.100}. Give the "
                r"answer itself, or a solution with the answer in \boxed{} or after ####."
            )
        given = [final_answer(prediction) for prediction in predictions]
        # Each pair is compared once, however many samples give it
        results = {pair: _compare_at_sight(*pair) for pair in zip(right, given, strict=True) if pair[1] is not None}
        hard = [pair for pair, result in results.items() if result is None]
        if hard:
            results.update(zip(hard, compare_pairs(hard, time_limit, num_processes), strict=True))
        scores, answers, cut_off = [], [], []
        for pair in zip(right, given, strict=True):
            correct, answer = results.get(pair) or (False, None)
            cut_off.append(pair in results and results[pair] is None)
            scores.append(float(correct))
            # All right answers are one, that of the reference
            answers.append(_as_written(pair[0]) if correct else answer or (pair[1] and _as_written(pair[1])))
        return {
            "math_accuracy": float(np.mean(scores)),
            "scores": scores,
            "answers": answers,
            "unanswered": given.count(None),
            "timeouts": sum(cut_off),
            "cut_off": cut_off,
        }


class _NotAtSight(Exception):
    """Two answers that only sympy can compare."""


def _compare_at_sight(right: str, given: str) -> tuple[bool, str | None] | None:
    """The result of comparing two answers where that takes no sympy: words, plain numbers, the same text."""
    try:
        return equivalent(_parsed(right), _parsed(given), _refuse), None
    except _NotAtSight:
        return None


def _refuse(reference: str, prediction: str) -> bool:
    raise _NotAtSight


_parsed = lru_cache(maxsize=10_000)(parse_answer)


def _as_written(answer: str) -> str:
    """An answer as it is counted in a vote, without sympy."""
    return canonical(_parsed(answer), plain_text)
