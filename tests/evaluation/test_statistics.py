import tracemalloc
from fractions import Fraction
from itertools import combinations, product
from math import comb

import numpy as np
import pytest

from gift_trl.evaluation.grading import summarize
from gift_trl.evaluation.results import Grade, Skip, Summary
from gift_trl.evaluation.statistics import (
    average_at_n,
    bootstrap_interval,
    majority_at_n,
    paired_difference,
    pass_at_k,
)


def test_average_at_n():
    np.testing.assert_array_equal(average_at_n([[1, 0, 0, 1], [0, 0, 0, 0], [1, 0.5, 0.5, 0]]), [0.5, 0.0, 0.5])


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    rng = np.random.default_rng(0)
    scores = rng.integers(2, size=(20, 7))
    for k in range(1, 8):
        subsets = [any(row[list(chosen)]) for row in scores for chosen in combinations(range(7), k)]
        expected = np.reshape(subsets, (20, -1)).mean(axis=1)
        np.testing.assert_allclose(pass_at_k(scores, k), expected, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(pass_at_k(scores, 1), average_at_n(scores), rtol=1e-15)


@pytest.mark.parametrize("n", [16, 10_000])
def test_pass_at_k_equals_exact_fractions(n):
    for c in (0, 1, 2, n // 2, n - 1, n):
        scores = np.zeros((1, n))
        scores[0, :c] = 1
        for k in (1, 2, 16, n // 2, n):
            exact = float(1 - Fraction(comb(n - c, k), comb(n, k)))
            assert pass_at_k(scores, k)[0] == pytest.approx(exact, rel=1e-10), (c, k)


@pytest.mark.parametrize(
    ("scores", "k", "message"),
    [
        ([[0.5, 1]], 1, "neither 0 nor 1"),
        ([[0, 1]], 3, "from 1 to 2"),
        ([[0, 1]], 0, "from 1 to 2"),
        ([[0, float("nan")]], 1, "from 0 to 1"),
        ([0, 1], 1, "shape"),
        ([[], []], 1, "shape"),
    ],
)
def test_pass_at_k_refuses(scores, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(scores, k)


def test_majority_at_n():
    answers = [
        ["5", "5", "7", None],  # the majority is right
        ["7", "7", "5", None],  # and wrong
        ["7", "5", "5", "7"],  # a tie is what one drawn at random scores, whichever stands first
        ["1", "2", "3", "5"],
        [None, None, None, "5"],  # no answer is no vote
        [None, None, None, None],
    ]
    scores = [[float(answer == "5") for answer in row] for row in answers]
    np.testing.assert_array_equal(majority_at_n(answers, scores), [1, 0, 0.5, 0.25, 1, 0])
    np.testing.assert_array_equal(
        majority_at_n([row[::-1] for row in answers], np.fliplr(scores)), [1, 0, 0.5, 0.25, 1, 0]
    )
    with pytest.raises(ValueError, match="for each of the"):
        majority_at_n([["5", "5"]], [[1, 1, 1]])


def test_bootstrap_interval_of_a_share():
    # For 400 problems half of which are right the normal approximation is good to a few parts in a thousand
    interval = bootstrap_interval([0.0, 1.0] * 200)
    half_width = 1.96 * 0.5 / 20
    assert interval.mean == 0.5
    assert interval.low == pytest.approx(0.5 - half_width, abs=4e-3)
    assert interval.high == pytest.approx(0.5 + half_width, abs=4e-3)
    assert bootstrap_interval([0.0, 1.0] * 200) == interval, "the seed makes it reproducible"
    assert bootstrap_interval(np.arange(50.0)) != bootstrap_interval(np.arange(50.0), seed=1)
    narrow = bootstrap_interval([0.0, 1.0] * 200, confidence=0.5)
    assert interval.low < narrow.low < 0.5 < narrow.high < interval.high
    assert bootstrap_interval([0.25] * 10) == (0.25, 0.25, 0.25)


def test_bootstrap_intervals_are_those_of_all_resamples():
    """Of five problems there are 3,125 equally likely draws, so that the interval can be counted out."""
    a, b = np.array([1.0, 0.0, 0.5, 1.0, 0.25]), np.array([0.0, 0.0, 1.0, 0.75, 0.25])
    draws = np.array(list(product(range(5), repeat=5)))
    for found, values in (
        (bootstrap_interval(a, samples=200_000), a),
        (paired_difference(a, b, samples=200_000), a - b),
    ):
        exact = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
        assert found.mean == values.mean()
        # Means are multiples of 1/20, and a quantile that falls on a step may come out on either side of it
        np.testing.assert_allclose([found.low, found.high], exact, atol=0.05 + 1e-12)
    # What two models have in common cancels: the same draw is taken for both
    shift = paired_difference(a + 1, a)
    assert shift == pytest.approx((1.0, 1.0, 1.0))


def test_a_summary_is_what_brute_force_gives():
    rng = np.random.default_rng(1)
    scores = {problem: rng.integers(2, size=4) for problem in (3, 5, 8)}
    answers = {p: ["r" if score else str(rng.integers(2)) for score in row] for p, row in scores.items()}
    answers[5][0] = None if not scores[5][0] else "r"
    grades = [Grade(p, s, float(scores[p][s]), answers[p][s]) for p in scores for s in range(4)]
    lengths = {p: [(10 * p + s, "length" if p == 5 or s == 0 else "stop") for s in range(4)] for p in scores}
    summary = summarize(grades, lengths, {"name": "math_accuracy"}, [Skip(1, "none")], unchecked=2)
    everything = np.array(list(scores.values()))
    assert summary.average.mean == pytest.approx(everything.mean())
    for k in (1, 2, 4):
        subsets = [row[list(chosen)].any() for row in everything for chosen in combinations(range(4), k)]
        assert summary.pass_at_k[k].mean == pytest.approx(np.mean(subsets))
    expected = []
    for p in scores:
        votes = {answer: answers[p].count(answer) for answer in answers[p] if answer is not None}
        best = [answer for answer, count in votes.items() if count == max(votes.values())]
        expected.append(sum(answer == "r" for answer in best) / len(best))
    assert summary.majority.mean == pytest.approx(np.mean(expected))
    assert (summary.truncated, summary.never_stopped) == (6 / 12, 1 / 3)
    assert summary.mean_tokens == pytest.approx(np.mean([count for row in lengths.values() for count, _ in row]))
    assert (summary.num_problems, summary.num_samples, summary.unchecked) == (3, 4, 2)
    assert Summary.from_dict(summary.to_dict()) == summary
    with pytest.raises(ValueError, match="not equally many answers"):
        summarize(grades[:-1], lengths, {"name": "math_accuracy"}, [])


def test_bootstrap_interval_covers():
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(rng.random(60) < 0.3, samples=1000, seed=seed) for seed in range(300)]
    covered = np.mean([interval.low <= 0.3 <= interval.high for interval in intervals])
    assert 0.90 <= covered <= 0.98


def test_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(0)
    difficulty = rng.random(200)
    a, b = difficulty + 0.02 * rng.standard_normal(200), difficulty
    difference = paired_difference(a, b)
    assert difference.mean == pytest.approx(np.mean(a) - np.mean(b))
    assert difference.high - difference.low < 0.2 * (bootstrap_interval(a).high - bootstrap_interval(a).low)
    assert paired_difference(b, a) == pytest.approx((-difference.mean, -difference.high, -difference.low), abs=1e-3)
    with pytest.raises(ValueError, match="paired"):
        paired_difference(a, b[1:])


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0]]])
def test_bootstrap_refuses(values):
    with pytest.raises(ValueError, match="one finite value"):
        bootstrap_interval(values)


def test_bootstrap_of_5000_problems_takes_little_memory():
    values = np.random.default_rng(0).random(5_000)
    tracemalloc.start()
    interval = bootstrap_interval(values, samples=2_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert interval.low < values.mean() < interval.high
    assert peak < 64 << 20
