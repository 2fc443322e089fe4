"""What the pictures share: a figure that needs no display, a light and a dark look, colours all readers can tell apart."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gift_trl.leftovers import whole_file


# Distinct for colour-blind readers (Okabe and Ito), and followed by the same colours on a dark page
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9", "#6a3d9a", "#666666")
_DARK_SERIES = ("#4fa8de", "#f08a4b", "#2fc49a", "#e39ac4", "#e0c04c", "#8fd0f5", "#b79be0", "#a6a6a6")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Of `CONFIDENCE_BANDS` in training/learning_signal.py
BAND_NAMES = ("q < 0.2", "0.2–0.8", "q > 0.8")
_BAND_COLORS = ("#e08a4b", "#cdcdc8", "#5b9bd1")
# Of text on a light colour, on a page of either look
DARK_ON_COLOR = "#1d1f22"

_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "errorbar.capsize": 3,
    "legend.frameon": False,
    # Names come from users, and a dollar in one is a dollar
    "text.parse_math": False,
}


@contextmanager
def new_figure(
    file: str | os.PathLike | BinaryIO, size: tuple[float, float], *, dark: bool = False
) -> Iterator[Figure]:
    """
    Makes a figure, and writes it when the body of the `with` statement ends well.

    Args:
        file (`str`, `os.PathLike` or binary file):
            PNG file to write.
        size (`tuple[float, float]`):
            Width and height in inches, of 150 pixels each.
        dark (`bool`, *optional*, defaults to `False`):
            Whether it is for a dark page.

    Yields:
        [`~matplotlib.figure.Figure`]: The figure, empty.
    """
    text, faint, page = ("#e4e6e9", "#34373c", "#16181b") if dark else ("#1d1f22", "#e3e5e8", "#ffffff")
    colors = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), text),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), page),
        "grid.color": faint,
        "axes.prop_cycle": cycler(color=_DARK_SERIES if dark else SERIES),
    }
    style: Any = {**_STYLE, **colors}
    with matplotlib.rc_context(style):
        # Without pyplot: no global state, and no display is looked for
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with whole_file(Path(file)) if isinstance(file, str | os.PathLike) else nullcontext(file) as target:
            figure.savefig(target, format="png", dpi=150)


def stack_bands(axes: Axes, names: Sequence[str], shares: Sequence[Sequence[float]]) -> None:
    """
    Draws shares by confidence band as one horizontal bar a name, the first on top.

    Args:
        axes ([`~matplotlib.axes.Axes`]):
            Axes to draw on.
        names (`Sequence[str]`):
            Names of the bars.
        shares (`Sequence[Sequence[float]]`):
            Shares of each bar in percent, from low to high confidence.
    """
    left = [0.0] * len(names)
    for band, (label, color) in enumerate(zip(BAND_NAMES, _BAND_COLORS, strict=True)):
        widths = [row[band] for row in shares]
        bars = axes.barh(names, widths, left=left, height=0.72, color=color, label=label)
        # A number does not fit into a narrow piece
        labels = [f"{width:.0f}" if width >= 5 else "" for width in widths]
        axes.bar_label(bars, labels=labels, label_type="center", fontsize=11, color=DARK_ON_COLOR)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def plot_bands(axes: Axes, steps: Sequence[float], shares: Sequence[Sequence[float]]) -> None:
    """
    Draws shares by confidence band as they change over a training.

    Args:
        axes ([`~matplotlib.axes.Axes`]):
            Axes to draw on.
        steps (`Sequence[float]`):
            Optimizer steps.
        shares (`Sequence[Sequence[float]]`):
            Of each band, from low to high confidence, its share in percent at each step.
    """
    if len(steps) == 1:  # an area needs two
        steps, shares = [steps[0] - 0.5, steps[0] + 0.5], [[band[0]] * 2 for band in shares]
        axes.set_xticks([sum(steps) / 2])
    axes.stackplot(steps, shares, labels=BAND_NAMES, colors=_BAND_COLORS)
    axes.set_xlim(steps[0], steps[-1])
    axes.set_ylim(0, 100)
