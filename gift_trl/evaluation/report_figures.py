"""The pictures of an evaluation report, narrow enough for a phone, a column of a paper or a model card."""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, BinaryIO

from matplotlib import rcParams
from matplotlib.ticker import NullLocator

from gift_trl.evaluation.comparison import Comparison
from gift_trl.evaluation.statistics import Interval
from gift_trl.evaluation.training_logs import TrainingSignal
from gift_trl.plots import MARKERS, SERIES, new_figure, stack_bands


Draw = Callable[[BinaryIO, bool], None]
_WIDTH = 5.4


def score_figure(comparison: Comparison) -> Draw:
    """
    The scores of every model on every task with their intervals.

    Args:
        comparison ([`Comparison`]):
            The comparison.

    Returns:
        `Callable`: Writes the picture, as [`~gift_trl.page.embed_picture`] takes it.
    """
    return partial(_draw_scores, comparison)


def _draw_scores(comparison: Comparison, file: BinaryIO, dark: bool) -> None:
    tasks, models = comparison.tasks, comparison.models
    step = 0.7 / max(len(models), 2)
    with new_figure(
        file, (_WIDTH, 1.0 + _legend_height(models) + len(tasks) * (0.3 + 0.14 * len(models))), dark=dark
    ) as figure:
        axes = figure.subplots()
        for place, model in enumerate(models):
            rows, intervals = [], []
            for row, task in enumerate(tasks):
                summary = comparison.summary(model, task)
                if summary is not None:
                    rows.append(row + (place - (len(models) - 1) / 2) * step)
                    intervals.append(summary.average)
            axes.errorbar(
                [100 * interval.mean for interval in intervals],
                rows,
                xerr=_error_sides(intervals),
                label=model,
                linestyle="none",
                **_look(comparison, model),
            )
        axes.set_yticks(range(len(tasks)), [_label(comparison, task) for task in tasks])
        axes.set_ylim(len(tasks) - 0.4, -0.6)
        axes.set_xlabel("mean score (%)")
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        figure.legend(loc="outside lower center", ncols=_columns(models))


def trade_off_figure(comparison: Comparison) -> Draw | None:
    """
    What every model gains on the target tasks against what it loses on the retention tasks, from the reference.

    Args:
        comparison ([`Comparison`]):
            The comparison.

    Returns:
        `Callable` or `None`: Writes the picture; `None` if no model has results on all tasks of both roles.
    """
    shown = {}
    for model in comparison.others:
        places = [comparison.mean_difference(model, comparison.with_role(role)) for role in ("retention", "target")]
        if None not in places:
            shown[model] = [interval for interval, _ in places]
    return partial(_draw_trade_off, comparison, shown) if shown else None


def _draw_trade_off(comparison: Comparison, places: dict[str, list[Interval]], file: BinaryIO, dark: bool) -> None:
    names = (comparison.reference, *places)
    with new_figure(file, (_WIDTH, 3.8 + _legend_height(names)), dark=dark) as figure:
        axes = figure.subplots()
        axes.axhline(0, color=rcParams["grid.color"], linewidth=1.5)
        axes.axvline(0, color=rcParams["grid.color"], linewidth=1.5)
        axes.plot(0, 0, label=comparison.reference, linestyle="none", **_look(comparison, comparison.reference))
        for model, (retained, gained) in places.items():
            axes.errorbar(
                100 * retained.mean,
                100 * gained.mean,
                xerr=_error_sides([retained]),
                yerr=_error_sides([gained]),
                label=model,
                linestyle="none",
                **_look(comparison, model),
            )
        axes.margins(0.12)
        axes.set_xlabel(f"retention tasks: points above {comparison.reference}")
        axes.set_ylabel(f"target tasks: points above {comparison.reference}")
        figure.legend(loc="outside lower center", ncols=_columns(names))


def pass_at_k_figure(comparison: Comparison, task: str) -> Draw | None:
    """
    pass@k of every model on a task with its interval.

    Args:
        comparison ([`Comparison`]):
            The comparison.
        task (`str`):
            The task.

    Returns:
        `Callable` or `None`: Writes the picture; `None` if no model has more than one k.
    """
    curves = {}
    for model in comparison.models:
        summary = comparison.summary(model, task)
        if summary is not None and len(summary.pass_at_k) > 1:
            curves[model] = summary.pass_at_k
    return partial(_draw_pass_at_k, comparison, task, curves) if curves else None


def _draw_pass_at_k(
    comparison: Comparison, task: str, curves: dict[str, dict[int, Interval]], file: BinaryIO, dark: bool
) -> None:
    with new_figure(file, (_WIDTH, 3.2 + _legend_height(curves)), dark=dark) as figure:
        axes = figure.subplots()
        for model, curve in curves.items():
            look = _look(comparison, model)
            axes.plot(list(curve), [100 * interval.mean for interval in curve.values()], label=model, **look)
            low, high = ([100 * getattr(interval, end) for interval in curve.values()] for end in ("low", "high"))
            axes.fill_between(list(curve), low, high, color=look["color"], alpha=0.12, linewidth=0)
        axes.set_xscale("log", base=2)
        ks = sorted({k for curve in curves.values() for k in curve})
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(f"pass@k on {task}")
        axes.set_xlabel("k")
        axes.set_ylabel("pass@k (%)")
        axes.grid(axis="y")
        figure.legend(loc="outside lower center", ncols=_columns(curves))


def truncation_figure(comparison: Comparison) -> Draw | None:
    """
    How often the answers of every model were cut off: mean over the tasks, and each task.

    Args:
        comparison ([`Comparison`]):
            The comparison.

    Returns:
        `Callable` or `None`: Writes the picture; `None` if it is not known of any model, or none was cut off.
    """
    shares: dict[str, list[list[float]]] = {}
    for model in comparison.models:
        summaries = [comparison.summary(model, task) for task in comparison.tasks]
        known = [s for s in summaries if s is not None and s.truncated is not None and s.never_stopped is not None]
        if known:
            shares[model] = [[100 * s.truncated for s in known], [100 * s.never_stopped for s in known]]
    return partial(_draw_truncation, shares) if any(any(cut) for cut, _ in shares.values()) else None


def _draw_truncation(shares: dict[str, list[list[float]]], file: BinaryIO, dark: bool) -> None:
    names = ("answers cut off", "problems of which no answer ended")
    with new_figure(file, (_WIDTH, 1.2 + 0.55 * len(shares)), dark=dark) as figure:
        axes = figure.subplots()
        for place, (name, hatch) in enumerate(zip(names, (None, "////"), strict=True)):
            rows = [row + (place - 0.5) * 0.36 for row in range(len(shares))]
            values = [both[place] for both in shares.values()]
            means = [sum(tasks) / len(tasks) for tasks in values]
            axes.barh(rows, means, height=0.34, color=f"C{place}", hatch=hatch, edgecolor="white", label=name)
            for row, tasks in zip(rows, values, strict=True):
                axes.plot(tasks, [row] * len(tasks), "|", color=rcParams["text.color"], markersize=7)
        axes.set_yticks(range(len(shares)), list(shares))
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("share (%), mean over tasks; | marks each task")
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside lower center", ncols=2)


def signal_figure(signals: Sequence[TrainingSignal]) -> Draw | None:
    """
    Where the loss of every training came from.

    Args:
        signals (`Sequence[TrainingSignal]`):
            The trainings.

    Returns:
        `Callable` or `None`: Writes the picture; `None` without a training.
    """
    return partial(_draw_signals, signals) if signals else None


def _draw_signals(signals: Sequence[TrainingSignal], file: BinaryIO, dark: bool) -> None:
    with new_figure(file, (_WIDTH, 1.5 + 0.4 * len(signals)), dark=dark) as figure:
        axes = figure.subplots()
        stack_bands(axes, [signal.name for signal in signals], [signal.shares for signal in signals])
        axes.set_xlabel("share of the weighted loss (%)")
        figure.legend(loc="outside lower center", ncols=3, title="the instruct model's confidence q in the token")


def _look(comparison: Comparison, model: str) -> dict[str, Any]:
    """Color and marker of a model, in every picture the same: grey for the reference."""
    if model == comparison.reference:
        return {"color": f"C{len(SERIES) - 1}", "marker": MARKERS[-1], "markersize": 9}
    # Colors begin again with other markers, so that no two models look alike
    round_, color = divmod(comparison.others.index(model), len(SERIES) - 1)
    return {"color": f"C{color}", "marker": MARKERS[(color + round_) % (len(MARKERS) - 1)]}


def _error_sides(intervals: Sequence[Interval]) -> list[list[float]]:
    """Lengths of error bars in percent."""
    return [[100 * (i.mean - i.low) for i in intervals], [100 * (i.high - i.mean) for i in intervals]]


def _label(comparison: Comparison, task: str) -> str:
    return f"{task}\n(retention)" if comparison.roles[task] == "retention" else task


def _legend_height(names: Collection[str]) -> float:
    """Inches that a legend takes below the axes."""
    return 0.15 + 0.22 * math.ceil(len(names) / _columns(names))


def _columns(names: Collection[str]) -> int:
    """As many columns of a legend as its width has room for."""
    fitting = max(1, 54 // (6 + max(map(len, names))))
    return math.ceil(len(names) / math.ceil(len(names) / fitting))
