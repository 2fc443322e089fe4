"""What a comparison shows, in sentences that go no further than its intervals, and what is to be looked after in it."""

import math
from collections import Counter
from collections.abc import Sequence

from gift_trl.evaluation.comparison import MIN_PROBLEMS, Comparison
from gift_trl.evaluation.statistics import Interval


# From here on, the length allowed is part of what is measured
_MANY_TRUNCATED = 0.1


def percent(share: float | None) -> str:
    """A share in percent with one decimal, `–` if it is not known."""
    return "–" if share is None else f"{100 * share:.1f}"


def points(difference: float) -> str:
    """A difference in percentage points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")


def with_interval(interval: Interval | None) -> str:
    """A figure in percent with its interval, `–` if there is none."""
    return "–" if interval is None else f"{percent(interval.mean)} [{percent(interval.low)}, {percent(interval.high)}]"


def difference_with_interval(interval: Interval) -> str:
    """A difference in points with its interval."""
    return f"{points(interval.mean)} [{points(interval.low)}, {points(interval.high)}]"


def describe_findings(comparison: Comparison) -> list[str]:
    """
    Says what the intervals support.

    Args:
        comparison ([`Comparison`]):
            The comparison.

    Returns:
        `list[str]`: Sentences as plain text.
    """
    sentences = []
    for model in comparison.others:
        for role in ("target", "retention"):
            sentences += _describe_model(comparison, model, role)
    small = {
        task: len(difference.problems)
        for (_, task), difference in comparison.differences.items()
        if len(difference.problems) < MIN_PROBLEMS
    }
    if small:
        named = _join([f"{task} ({count} problems)" for task, count in small.items()])
        sentences.append(
            f"Nothing is concluded from {named}: with fewer than {MIN_PROBLEMS} problems, such intervals are too narrow."
        )
    if len(comparison.differences) > 1:
        sentences.append(
            f"{len(comparison.differences)} differences are looked at. If none were real, about one in twenty intervals would "
            "exclude zero all the same. They speak of other problems of the same kind, not of another training."
        )
    return sentences


def _describe_model(comparison: Comparison, model: str, role: str) -> list[str]:
    reference = comparison.reference
    found: dict[str, list[tuple[str, Interval]]] = {"above": [], "below": [], "undecided": []}
    for task in comparison.with_role(role):
        difference = comparison.differences.get((model, task))
        if difference is not None and len(difference.problems) >= MIN_PROBLEMS:
            found[difference.verdict].append((task, difference.interval))
    kind = "retention task" if role == "retention" else "target task"
    sentences = [
        f"{model} is {verdict} {reference} on the {_plural(kind, found[verdict])} {_list_differences(found[verdict])}."
        for verdict in ("above", "below")
        if found[verdict]
    ]
    undecided = found["undecided"]
    if undecided and role == "target":
        sentences.append(
            f"No difference between {model} and {reference} is shown on the {_plural(kind, undecided)} "
            f"{_list_differences(undecided)}: the interval holds zero."
        )
    elif undecided:
        loss = max(-interval.low for _, interval in undecided)
        limit = f" This does not exclude one of up to {100 * loss:.1f} points." if loss > 0 else ""
        sentences.append(
            f"No loss of {model} against {reference} is shown on the {_plural(kind, undecided)} "
            f"{_list_differences(undecided)}.{limit}"
        )
    return sentences


def describe_warnings(comparison: Comparison) -> list[str]:
    """
    Says what stands in the way of reading the figures as they are.

    Args:
        comparison ([`Comparison`]):
            The comparison.

    Returns:
        `list[str]`: Sentences as plain text.
    """
    return [
        *_describe_lost_ends(comparison),
        *_describe_truncation(comparison),
        *_describe_unchecked(comparison),
        *_describe_unlike_runs(comparison),
        *_describe_missing(comparison),
    ]


def _describe_unchecked(comparison: Comparison) -> list[str]:
    """Answers of which nobody knows whether they are right."""
    counts = {pair: run.summary.unchecked for pair, run in comparison.runs.items() if run.summary.unchecked}
    return [
        f"{count:,} answers of {model} to {task} took too long to check and count as wrong. `gift-trl evaluate` with a higher "
        "`time_limit` of the metric checks all again, and generates nothing."
        for (model, task), count in counts.items()
    ]


def _describe_lost_ends(comparison: Comparison) -> list[str]:
    """A merge that lost the end-of-turn token shows in answers that are cut off."""
    warnings = []
    for model in comparison.others:
        worse = []
        for task in comparison.tasks:
            ours, theirs = comparison.summary(model, task), comparison.summary(comparison.reference, task)
            if ours is None or theirs is None:
                continue
            sizes = ours.num_problems, theirs.num_problems
            if _clearly_more(ours.truncated, theirs.truncated, *sizes):
                worse.append(f"{task} ({percent(ours.truncated)} % against {percent(theirs.truncated)} %)")
        if worse:
            warnings.append(
                f"{model} is cut off clearly more often than {comparison.reference} on {_join(worse)}. A merged model that does "
                "not end its answers has often lost its end-of-turn token: compare its `generation_config.json` and its chat "
                "template with the instruct model's (`gift-trl merge --verify`), and look at `eos_confidence` in the training. "
                "What is cut off before the answer counts as wrong."
            )
    return warnings


def _clearly_more(share: float | None, other: float | None, problems: int, other_problems: int) -> bool:
    """Beyond twice the standard error, as if the samples of a problem were one, and by at least a percentage point."""
    if share is None or other is None:
        return False
    error = math.sqrt(share * (1 - share) / problems + other * (1 - other) / other_problems)
    return share - other >= max(0.01, 2 * error)


def _describe_truncation(comparison: Comparison) -> list[str]:
    cut = []
    for task in comparison.tasks:
        summary = comparison.summary(comparison.reference, task)
        if summary is not None and (summary.truncated or 0) > _MANY_TRUNCATED:
            cut.append(f"{task} ({percent(summary.truncated)} %)")
    if not cut:
        return []
    return [
        f"Even {comparison.reference} is cut off often on {_join(cut)}: the scores there measure short answers too. Raise "
        "`max_new_tokens`."
    ]


def _describe_unlike_runs(comparison: Comparison) -> list[str]:
    """Models that were not asked the same, not in the same way, or not as often."""
    warnings = []
    for name in ("engine", "seeds"):
        values = dict.fromkeys(str(part.config.get(name)) for part in comparison.results)
        if len(values) > 1:
            warnings.append(f"The folders have different {name.removesuffix('s')}s ({' and '.join(values)}).")
    for task in comparison.tasks:
        runs = {model: run for (model, name), run in comparison.runs.items() if name == task}
        samples = {model: run.summary.num_samples for model, run in runs.items()}
        if len(set(samples.values())) > 1:
            counts = ", ".join(f"{model} {count}" for model, count in samples.items())
            warnings.append(
                f"The models have different numbers of samples on {task} ({counts}): their means compare, their "
                "best and most frequent answers do not."
            )
        for model, run in runs.items():
            difference = comparison.differences.get((model, task))
            if difference is None:
                continue
            paired = len(difference.problems)
            most = max(run.summary.num_problems, runs[comparison.reference].summary.num_problems)
            if paired < most:
                warnings.append(
                    f"Only {paired:,} of {most:,} problems of {task} were graded for both {model} and "
                    f"{comparison.reference}; the difference is over these."
                )
    return warnings


def _describe_missing(comparison: Comparison) -> list[str]:
    warnings = []
    if comparison.missing:
        named = _join([f"{model} on {task}" for model, task in comparison.missing])
        warnings.append(f"Not complete, and left out: {named}. `gift-trl evaluate` goes on where it was.")
    alone = [
        task
        for task in comparison.tasks
        if (comparison.reference, task) not in comparison.runs and any(name == task for _, name in comparison.runs)
    ]
    if alone and comparison.others:
        warnings.append(f"{comparison.reference} has no results on {_join(alone)}, so that nothing is compared there.")
    return warnings


def count_skips(comparison: Comparison) -> list[tuple[str, str, str, int, list[int]]]:
    """
    Counts what was left out of the figures.

    Args:
        comparison ([`Comparison`]):
            The comparison.

    Returns:
        `list[tuple[str, str, str, int, list[int]]]`: Task, model (`all` if every model of the task is concerned alike),
        reason, number of problems or samples, and the first problems.
    """
    rows = []
    for task in comparison.tasks:
        by_model = {model: run.summary.skipped for (model, name), run in comparison.runs.items() if name == task}
        if len(by_model) > 1 and len(set(by_model.values())) == 1:
            by_model = {"all": next(iter(by_model.values()))}
        for model, skips in by_model.items():
            for reason, count in Counter(skip.reason for skip in skips).items():
                problems = dict.fromkeys(skip.problem for skip in skips if skip.reason == reason)
                rows.append((task, model, reason, count, list(problems)[:5]))
    return rows


def _list_differences(found: Sequence[tuple[str, Interval]]) -> str:
    return _join([f"{task} ({difference_with_interval(interval)})" for task, interval in found])


def _plural(noun: str, items: Sequence) -> str:
    return noun if len(items) == 1 else f"{noun}s"


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
