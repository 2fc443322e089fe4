"""The pictures of an experiment: differences to the instruct model over learning rates, scales and numbers of examples."""

import os
from collections.abc import Callable, Sequence
from typing import BinaryIO

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gift_trl.lab.figures import METHOD_COLORS
from gift_trl.lab.summary import Row
from gift_trl.plots import MARKERS, new_figure, stack_bands


COLORS = {**METHOD_COLORS, "RE-Adapt": "#009e73", "LoRE-Adapt": "#a874c9"}
_STYLES = dict(zip(COLORS, MARKERS, strict=False))


def plot_curves(
    mixes: Sequence[str],
    places: Sequence[float],
    rows_at: Callable[[str, float], list[Row]],
    label: str,
    file: str | os.PathLike | BinaryIO,
    dark: bool = False,
    *,
    log: bool = True,
) -> None:
    """
    Draws the difference in target accuracy to the instruct model along one setting, a panel per mix.

    Args:
        mixes (`Sequence[str]`):
            The mixes.
        places (`Sequence[float]`):
            Values of the setting.
        rows_at (`Callable`):
            Takes a mix and a value, returns a row per method.
        label (`str`):
            Name of the setting.
        file (`str`, `os.PathLike` or binary file):
            PNG file to write.
        dark (`bool`, *optional*, defaults to `False`):
            Whether it is for a dark page.
        log (`bool`, *optional*, defaults to `True`):
            Whether the setting has a logarithmic axis.
    """
    with new_figure(file, (4.2 * len(mixes), 4.4), dark=dark) as figure:
        panels = _panels(figure, len(mixes))
        for axes, mix in zip(panels, mixes, strict=True):
            rows = {place: {row.method: row for row in rows_at(mix, place)} for place in places}
            methods = [method for method in COLORS if any(method in found for found in rows.values())]
            for shift, method in enumerate(methods):
                known = [place for place in places if method in rows[place]]
                estimates = [rows[place][method].against_instruct for place in known]
                offset = (shift - (len(methods) - 1) / 2) * 0.02
                axes.errorbar(
                    [place * (1 + offset) if log else place + offset * (max(places) - min(places)) for place in known],
                    [estimate.mean for estimate in estimates],
                    yerr=[_drawn(estimate.margin) for estimate in estimates],
                    color=COLORS[method],
                    marker=_STYLES[method],
                    markersize=5,
                    linewidth=1.6,
                    elinewidth=0.8,
                    capsize=2,
                    label=method,
                )
            if log:
                axes.set_xscale("log")
            axes.set_xticks(places, [f"{place:g}" for place in places])
            axes.minorticks_off()
            axes.axhline(0, color=rcParams["text.color"], linewidth=1, linestyle="--")
            axes.set_title(f"mix {mix}")
            axes.set_xlabel(label)
        panels[0].set_ylabel("target accuracy against\nthe instruct model (points)")
        _legend(figure, panels)


def plot_rows(
    groups: Sequence[tuple[str, Sequence[Row]]], file: str | os.PathLike | BinaryIO, dark: bool = False
) -> None:
    """
    Draws target and retention differences to the instruct model of every method, a panel per group.

    Args:
        groups (`Sequence[tuple[str, Sequence[Row]]]`):
            Title and rows of each panel.
        file (`str`, `os.PathLike` or binary file):
            PNG file to write.
        dark (`bool`, *optional*, defaults to `False`):
            Whether it is for a dark page.
    """
    methods = list(dict.fromkeys(row.method for _, rows in groups for row in rows))
    with new_figure(file, (4.2 * len(groups), 1.4 + 0.45 * len(methods)), dark=dark) as figure:
        panels = _panels(figure, len(groups))
        for axes, (title, rows) in zip(panels, groups, strict=True):
            for row in rows:
                height, color = methods.index(row.method), COLORS[row.method]
                for estimate, shift, fill in ((row.against_instruct, -0.13, "full"), (row.retention, 0.13, "none")):
                    axes.errorbar(
                        estimate.mean,
                        height + shift,
                        xerr=_drawn(estimate.margin),
                        color=color,
                        marker="o",
                        fillstyle=fill,
                        capsize=2,
                        elinewidth=1,
                    )
            axes.axvline(0, color=rcParams["text.color"], linewidth=1, linestyle="--")
            axes.set_yticks(range(len(methods)), methods)
            axes.set_title(title)
            axes.set_xlabel("against the instruct model (points)\nfilled: target, open: retention")
        panels[0].invert_yaxis()


def plot_signal(
    groups: Sequence[tuple[str, Sequence[tuple[str, Sequence[float]]]]],
    file: str | os.PathLike | BinaryIO,
    dark: bool = False,
) -> None:
    """
    Draws where the loss before training comes from, a panel per group.

    Args:
        groups (`Sequence[tuple[str, Sequence[tuple[str, Sequence[float]]]]]`):
            Title of each panel, and in it by method the shares in percent by confidence band.
        file (`str`, `os.PathLike` or binary file):
            PNG file to write.
        dark (`bool`, *optional*, defaults to `False`):
            Whether it is for a dark page.
    """
    with new_figure(file, (4.2 * len(groups), 1.2 + 0.42 * max(len(bars) for _, bars in groups)), dark=dark) as figure:
        panels = figure.subplots(1, len(groups), squeeze=False)[0]
        for axes, (title, bars) in zip(panels, groups, strict=True):
            stack_bands(axes, *zip(*bars, strict=True))
            axes.tick_params(axis="y", labelleft=axes is panels[0])
            axes.set_title(title)
            axes.set_xlabel("share of the weighted loss (%)")
        _legend(figure, panels)


def _panels(figure: Figure, count: int) -> Sequence[Axes]:
    return figure.subplots(1, count, sharey=True, squeeze=False)[0]


def _drawn(margin: float) -> float:
    """A margin as it can be drawn: that of a single seed is not known."""
    return 0.0 if margin == float("inf") else margin


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    found = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(len(found), 2 * len(panels)))
