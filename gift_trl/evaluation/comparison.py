"""The models of one or several evaluations side by side: what each scores on each task, and how far that is from the reference."""

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from gift_trl.evaluation.results import GRADES_FILE, Grade, Results, Summary, TaskResults, load_results, read_lines
from gift_trl.evaluation.statistics import Interval, bootstrap_interval


REFERENCE = "instruct"
# With fewer problems, a bootstrap interval is too narrow to conclude anything from
MIN_PROBLEMS = 30


@dataclass(frozen=True)
class Difference:
    """
    How far a model is above the reference, over the problems that both were asked.

    Args:
        points (`np.ndarray` of shape `(problems,)`, float64):
            Difference of the mean scores over samples, problem by problem.
        problems (`np.ndarray` of shape `(problems,)`, int64):
            The problems, ascending.
        interval ([`~gift_trl.evaluation.statistics.Interval`]):
            Mean of `points` and its 95 % interval.
    """

    points: np.ndarray
    problems: np.ndarray
    interval: Interval

    @property
    def verdict(self) -> str:
        """`"above"` or `"below"` if the interval excludes zero, else `"undecided"`; also with fewer than 30 problems."""
        return _verdict(self.interval) if len(self.problems) >= MIN_PROBLEMS else "undecided"


@dataclass(frozen=True)
class Comparison:
    """
    Models side by side.

    Args:
        results (`tuple[Results, ...]`):
            The folders it is made of.
        models, tasks (`tuple[str, ...]`):
            Names, in the order of the folders.
        roles (`dict[str, str]`):
            `"target"` or `"retention"` by task.
        reference (`str`):
            The model that the others are compared with.
        runs (`dict[tuple[str, str], TaskResults]`):
            Results by model and task.
        differences (`dict[tuple[str, str], Difference]`):
            Differences from the reference by model and task, where both have answered the same problems.
        missing (`tuple[tuple[str, str], ...]`):
            Models and tasks whose evaluation is not complete.
    """

    results: tuple[Results, ...]
    models: tuple[str, ...]
    tasks: tuple[str, ...]
    roles: dict[str, str]
    reference: str
    runs: dict[tuple[str, str], TaskResults]
    differences: dict[tuple[str, str], Difference]
    missing: tuple[tuple[str, str], ...]

    @property
    def others(self) -> tuple[str, ...]:
        """The models but the reference."""
        return tuple(model for model in self.models if model != self.reference)

    def with_role(self, role: str) -> tuple[str, ...]:
        """The tasks of a role."""
        return tuple(task for task in self.tasks if self.roles[task] == role)

    def summary(self, model: str, task: str) -> Summary | None:
        """The figures of a model on a task, `None` where there are none."""
        run = self.runs.get((model, task))
        return run.summary if run is not None else None

    def model_config(self, model: str) -> dict[str, Any]:
        """What the configuration says of a model."""
        return next(results.config["models"][model] for results in self.results if model in results.models)

    def task_config(self, task: str) -> dict[str, Any]:
        """What the configuration says of a task."""
        return next(results.config["tasks"][task] for results in self.results if task in results.tasks)

    def mean_difference(self, model: str, tasks: Sequence[str]) -> tuple[Interval, str] | None:
        """
        Mean difference of a model from the reference over tasks.

        Args:
            model (`str`):
                The model.
            tasks (`Sequence[str]`):
                Tasks, each of which counts as much.

        Returns:
            `tuple[Interval, str]` or `None`: The difference, whose interval takes the tasks as independent, and its verdict
            as in [`Difference`]; `None` if a task is missing.
        """
        found = [self.differences.get((model, task)) for task in tasks]
        interval = mean_interval([None if difference is None else difference.interval for difference in found])
        if interval is None:
            return None
        is_enough = all(difference is not None and len(difference.problems) >= MIN_PROBLEMS for difference in found)
        return interval, _verdict(interval) if is_enough else "undecided"


def _verdict(interval: Interval) -> str:
    return "above" if interval.low > 0 else "below" if interval.high < 0 else "undecided"


def mean_interval(intervals: Sequence[Interval | None]) -> Interval | None:
    """
    Mean of independent figures.

    Args:
        intervals (`Sequence[Interval | None]`):
            The figures with their intervals.

    Returns:
        [`~gift_trl.evaluation.statistics.Interval`] or `None`: The mean, with an interval whose sides are the root of the
        summed squares of theirs by their number; `None` if there is no figure, or one is missing.
    """
    known = [interval for interval in intervals if interval is not None]
    count = len(known)
    if not known or count < len(intervals):
        return None
    mean = sum(interval.mean for interval in known) / count
    below = math.hypot(*(interval.mean - interval.low for interval in known)) / count
    above = math.hypot(*(interval.high - interval.mean for interval in known)) / count
    return Interval(mean, mean - below, mean + above)


def compare_results(
    folders: Sequence[str | os.PathLike], *, reference: str | None = None, retention: Collection[str] = ()
) -> Comparison:
    """
    Reads folders of results and compares their models with a reference.

    Args:
        folders (`Sequence[str | os.PathLike]`):
            Folders that `gift-trl evaluate` wrote.
        reference (`str`, *optional*):
            Name of the model to compare with. Defaults to the one called `instruct`, else to the baseline of the
            configuration.
        retention (`Collection[str]`, *optional*):
            Names of tasks that the model should not lose, beside those of which the configuration says so.

    Returns:
        [`Comparison`]: The comparison.

    Raises:
        `FileNotFoundError`: If a folder holds no results.
        `ValueError`: If two folders mean different things by one name, nothing is complete, or a name is unknown.
    """
    results = tuple(load_results(folder) for folder in folders)
    runs = _join(results)
    models = tuple(dict.fromkeys(model for part in results for model in part.models))
    tasks = tuple(dict.fromkeys(task for part in results for task in part.tasks))
    if not runs:
        names = ", ".join(f"'{part.folder}'" for part in results)
        raise ValueError(
            f"No evaluation in {names} is complete: run `gift-trl evaluate` again, it goes on where it was."
        )
    if unknown := [task for task in retention if task not in tasks]:
        raise ValueError(
            f"There is no task `{'`, `'.join(unknown)}` to call one of retention: the tasks are {', '.join(tasks)}."
        )
    roles: dict[str, str] = {}
    for part in results:
        for task in part.tasks:
            roles.setdefault(task, "retention" if task in retention else part.role(task))
    reference = _find_reference(results, models, reference)
    missing = dict.fromkeys(pair for part in results for pair in part.missing if pair not in runs)
    differences = _differences(runs, tasks, reference)
    return Comparison(results, models, tasks, roles, reference, runs, differences, tuple(missing))


def _join(results: Sequence[Results]) -> dict[tuple[str, str], TaskResults]:
    """The runs of all folders, in which a name has to mean the same."""
    seen: dict[tuple[str, str], tuple[Any, Results]] = {}
    runs: dict[tuple[str, str], TaskResults] = {}
    for part in results:
        for kind in ("models", "tasks"):
            for name, settings in part.config[kind].items():
                first, other = seen.setdefault((kind, name), (settings, part))
                if first != settings:
                    raise ValueError(
                        f"'{other.folder}' and '{part.folder}' mean different things by the {kind.removesuffix('s')} "
                        f"`{name}`: {_describe_change(first, settings)}. Give one of them another name in its "
                        "configuration and evaluate again, or report on the folders apart."
                    )
        for pair, run in part.runs.items():
            if pair in runs and runs[pair].summary != run.summary:
                raise ValueError(
                    f"'{runs[pair].folder.parents[1]}' and '{part.folder}' hold different results of the model `{pair[0]}` "
                    f"on the task `{pair[1]}`, by other seeds or another engine: leave one of the folders out."
                )
            runs.setdefault(pair, run)
    return runs


def _describe_change(first: Any, second: Any) -> str:
    if not isinstance(first, dict) or not isinstance(second, dict):
        return f"{first!r} and {second!r}"
    changed = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    return "; ".join(f"`{key}` is {first.get(key)!r} and {second.get(key)!r}" for key in changed)


def _find_reference(results: Sequence[Results], models: Sequence[str], reference: str | None) -> str:
    if reference is None:
        baselines = dict.fromkeys(part.baseline for part in results)
        if REFERENCE in models or len(baselines) == 1:
            return REFERENCE if REFERENCE in models else next(iter(baselines))
        raise ValueError(
            f"The folders have different baselines ({', '.join(baselines)}), and none is called `{REFERENCE}`: name the "
            "model to compare with as the reference (`--reference`)."
        )
    if reference not in models:
        raise ValueError(f"There is no model `{reference}` to compare with: the models are {', '.join(models)}.")
    return reference


def _differences(
    runs: dict[tuple[str, str], TaskResults], tasks: Sequence[str], reference: str
) -> dict[tuple[str, str], Difference]:
    differences = {}
    bar = tqdm(total=len(runs), desc="Comparing", unit="run", delay=2)
    for task in tasks:
        here = {model: run for (model, name), run in runs.items() if name == task}
        base = _mean_scores(here[reference]) if reference in here else None
        for model, run in here.items():
            bar.update()
            if model != reference and base is not None:
                means = _mean_scores(run)
                both, ours, theirs = np.intersect1d(means[0], base[0], assume_unique=True, return_indices=True)
                if len(both):
                    # Rounded, or scores that are equal but for the order of a sum would all lie on one side of zero
                    points = np.round(means[1][ours] - base[1][theirs], 12)
                    differences[model, task] = Difference(points, both, bootstrap_interval(points))
    bar.close()
    return differences


def _mean_scores(run: TaskResults) -> tuple[np.ndarray, np.ndarray]:
    """The problems, and the mean score of each, without keeping the grades in memory."""
    sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    for grade in read_lines(run.folder / GRADES_FILE, Grade):
        sums[grade.problem] = sums.get(grade.problem, 0.0) + grade.score
        counts[grade.problem] = counts.get(grade.problem, 0) + 1
    problems = np.array(sorted(sums), dtype=np.int64)
    return problems, np.array([sums[problem] / counts[problem] for problem in problems.tolist()])
