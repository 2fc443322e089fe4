"""The picture of a comparison: accuracy bars and learning-signal shares."""

import os
from typing import BinaryIO

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gift_trl.lab.findings import accuracy_margin
from gift_trl.lab.results import Comparison, SettingResult
from gift_trl.plots import DARK_ON_COLOR, new_figure, stack_bands


# Distinct for colour-blind readers, and in grey.
METHOD_COLORS = {
    "Instruct-SFT": "#d55e00",
    "Shadow-FT": "#e6b045",
    "GIFT-BaseT": "#7cc0ea",
    "GIFT": "#1f6aa5",
}


def plot_comparison(comparison: Comparison, file: str | os.PathLike | BinaryIO, dark: bool = False) -> None:
    """
    Draws a comparison to a PNG file: target accuracy of the merged models by setting, and below it the shares of the
    learning signal on each mix.

    Args:
        comparison ([`Comparison`]):
            The results.
        file (`str`, `os.PathLike` or binary file):
            The file to write.
        dark (`bool`, *optional*, defaults to `False`):
            Whether it is for a dark page.
    """
    by_mix = {result.setting.mix: result for result in reversed(comparison.settings)}
    mixes = list(reversed(by_mix.values()))
    with new_figure(file, (10, 8), dark=dark) as figure:
        top, *bottom = _axes(figure, len(mixes))
        _plot_accuracies(top, comparison)
        for axes, result in zip(bottom, mixes, strict=True):
            _plot_signal(axes, result, show_methods=axes is bottom[0])
        handles, labels = bottom[0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=len(labels),
            title="the instruct model's confidence q in the token",
        )


def _axes(figure: Figure, num_mixes: int) -> list[Axes]:
    grid = figure.add_gridspec(2, num_mixes, height_ratios=(3, 2))
    return [figure.add_subplot(grid[0, :]), *(figure.add_subplot(grid[1, column]) for column in range(num_mixes))]


def _plot_accuracies(axes: Axes, comparison: Comparison) -> None:
    width = 0.8 / len(METHOD_COLORS)
    for place, (method, color) in enumerate(METHOD_COLORS.items()):
        heights = [result.by_method[method].scores.accuracies["target"] for result in comparison.settings]
        errors = [accuracy_margin(height, len(comparison.instruct.target)) for height in heights]
        positions = [index + (place - 1.5) * width for index in range(len(heights))]
        bars = axes.bar(
            positions,
            heights,
            width=0.94 * width,
            color=color,
            label=method,
            yerr=errors,
            error_kw={"ecolor": rcParams["text.color"], "elinewidth": 1},
        )
        # At the foot of the bars, where neither the error bars nor the instruct model's line cross the numbers.
        text_color = "white" if method in ("Instruct-SFT", "GIFT") else DARK_ON_COLOR
        for bar, height in zip(bars, heights, strict=True):
            center = bar.get_x() + bar.get_width() / 2
            axes.text(center, 2, f"{height:.1f}", ha="center", va="bottom", color=text_color, fontsize=12)
    instruct = comparison.instruct.accuracies["target"]
    axes.axhline(
        instruct,
        color=rcParams["text.color"],
        linewidth=1.2,
        linestyle="--",
        label=f"instruct model ({instruct:.1f}%)",
    )
    axes.set_xticks(range(len(comparison.settings)), [str(result.setting) for result in comparison.settings])
    axes.set_ylim(0, 100)
    axes.set_ylabel("solved (%)")
    axes.set_title("Held-out problems of the target task solved by the merged models")
    axes.tick_params(axis="x", length=0, labelsize=12)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=5)


def _plot_signal(axes: Axes, result: SettingResult, show_methods: bool) -> None:
    rows = [("share of tokens", result.tokens), *((outcome.method, outcome.signal) for outcome in result.results)]
    names, shares = zip(*rows, strict=True)
    stack_bands(axes, names, shares)
    axes.set_title(f"Learning signal, mix {result.setting.mix}")
    axes.set_xlabel("share of the weighted loss before training (%)")
    axes.tick_params(axis="y", labelleft=show_methods, labelsize=12)
