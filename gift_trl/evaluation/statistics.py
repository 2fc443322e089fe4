"""Aggregates of scored samples, and how far they would move with other problems of the same kind."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


# Indices drawn at a time, which bounds the memory of a bootstrap to a few MB.
_DRAWS_AT_ONCE = 1 << 20


class Interval(NamedTuple):
    """
    A mean over problems with its confidence interval.

    Parameters:
        mean (`float`):
            The mean over problems.
        low (`float`):
            Lower end of the interval.
        high (`float`):
            Upper end of the interval.
    """

    mean: float
    low: float
    high: float


def average_at_n(scores: ArrayLike) -> np.ndarray:
    """
    Average@n: the mean score of a problem's n samples. The mean of the result over problems is the benchmark's figure.

    Args:
        scores (array of shape `(problems, samples)`):
            Scores in [0, 1].

    Returns:
        `np.ndarray` of shape `(problems,)`, float64: One value for each problem.

    Raises:
        ValueError: If the scores are no finite numbers in [0, 1] of that shape.
    """
    return _checked_scores(scores).mean(axis=1)


def pass_at_k(scores: ArrayLike, k: int) -> np.ndarray:
    """
    pass@k: the probability that at least one of k samples is right, by the unbiased estimator 1 − C(n−c, k)/C(n, k) of
    [Chen et al.](https://huggingface.co/papers/2107.03374) from c right ones among n.

    The quotient is computed as Π_{j<c} (n−k−j)/(n−j), which neither overflows nor cancels.

    Args:
        scores (array of shape `(problems, samples)`):
            Scores, each 0 or 1.
        k (`int`):
            Number of samples, from 1 to n.

    Returns:
        `np.ndarray` of shape `(problems,)`, float64: One probability for each problem.

    Raises:
        ValueError: If a score is neither 0 nor 1, or if `k` is not between 1 and n.
    """
    scores = _checked_scores(scores)
    if not np.isin(scores, (0.0, 1.0)).all():
        raise ValueError(
            "pass@k counts right samples, and some scores are neither 0 nor 1: use `average_at_n` for them."
        )
    n = scores.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples of a problem: k must be from 1 to {n}.")
    j = np.arange(n)
    all_wrong = np.concatenate([[1.0], np.cumprod(np.maximum(n - k - j, 0) / (n - j))])
    return 1.0 - all_wrong[scores.sum(axis=1).astype(int)]


def majority_at_n(answers: Sequence[Sequence[str | None]], scores: ArrayLike) -> np.ndarray:
    """
    majority@n: the score of the answer that most of a problem's n samples give.

    A sample without an answer (`None`) has no vote; a problem without any vote scores 0. Where several answers have the
    most votes, the value is the mean of their scores: what is expected if one of them is drawn at random.

    Args:
        answers (`Sequence[Sequence[str | None]]` of shape `(problems, samples)`):
            Answers; equal strings are one answer.
        scores (array of shape `(problems, samples)`):
            Scores in [0, 1]. Where equal answers have different scores, their mean counts.

    Returns:
        `np.ndarray` of shape `(problems,)`, float64: One value for each problem.

    Raises:
        ValueError: If the two shapes differ, or if the scores are no finite numbers in [0, 1].
    """
    scores = _checked_scores(scores)
    if len(answers) != len(scores) or any(len(row) != scores.shape[1] for row in answers):
        raise ValueError(f"There must be an answer, or None, for each of the {scores.shape} scores.")
    return np.array([_majority_score(*row) for row in zip(answers, scores, strict=True)])


def _majority_score(answers: Sequence[str | None], scores: np.ndarray) -> float:
    """Expected score of the majority's answer for one problem."""
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    # The tied answers have equally many votes, so the mean over their samples is the mean over the answers
    winners = [
        score for answer, score in zip(answers, scores, strict=True) if answer is not None and votes[answer] == most
    ]
    return float(np.mean(winners))


def bootstrap_interval(
    values_per_problem: ArrayLike, confidence: float = 0.95, samples: int = 10_000, seed: int = 0
) -> Interval:
    """
    Percentile bootstrap of a mean: the problems are drawn again with replacement.

    It says how far the mean would move with other problems of the same kind, not with other samples of the same ones. With
    fewer than about 30 problems such intervals are too narrow; when all values are equal its width is 0.

    Args:
        values_per_problem (array of shape `(problems,)`):
            One value for each problem, as from [`average_at_n`], [`pass_at_k`] or [`majority_at_n`].
        confidence (`float`, *optional*, defaults to `0.95`):
            Probability between the ends.
        samples (`int`, *optional*, defaults to `10_000`):
            Number of draws.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        [`Interval`]: The mean and its interval.

    Raises:
        ValueError: If there is no problem, a value is not finite, or an option is out of its range.
    """
    values = np.asarray(values_per_problem, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError("A bootstrap needs one finite value for each problem, and at least one problem.")
    if not 0 < confidence < 1 or samples < 1:
        raise ValueError(f"`confidence` ({confidence}) must be between 0 and 1, and `samples` ({samples}) at least 1.")
    rng = np.random.default_rng(seed)
    rows = max(_DRAWS_AT_ONCE // values.size, 1)
    means = np.concatenate(
        [
            values[rng.integers(values.size, size=(min(rows, samples - first), values.size), dtype=np.int32)].mean(
                axis=1
            )
            for first in range(0, samples, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def paired_difference(
    a: ArrayLike, b: ArrayLike, confidence: float = 0.95, samples: int = 10_000, seed: int = 0
) -> Interval:
    """
    Mean of a − b over the problems that two models were both asked, with its bootstrap interval.

    A draw takes the same problems for both models, so what makes a problem hard for both cancels.

    Args:
        a (array of shape `(problems,)`):
            One value for each problem of the first model.
        b (array of shape `(problems,)`):
            The second model's, of the same problems in the same order.
        confidence (`float`, *optional*, defaults to `0.95`):
            Probability between the ends.
        samples (`int`, *optional*, defaults to `10_000`):
            Number of draws.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        [`Interval`]: The difference and its interval.

    Raises:
        ValueError: If the two have not the same length, or as in [`bootstrap_interval`].
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(
            f"Values of {a.shape} and {b.shape} problems cannot be paired: give both for the same problems."
        )
    return bootstrap_interval(a - b, confidence, samples, seed)


def _checked_scores(scores: ArrayLike) -> np.ndarray:
    """Scores as a float64 matrix."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"Scores must have the shape (problems, samples), neither of them 0, not {scores.shape}.")
    # Written so that NaN is refused, too
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError("Scores must be numbers from 0 to 1.")
    return scores
