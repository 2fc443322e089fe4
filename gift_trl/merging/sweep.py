"""Which λ is best: the adapter is applied at run time with one factor after the other, and no checkpoint is written."""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from gift_trl.checkpoints import write_folder
from gift_trl.merging.preflight import preflight
from gift_trl.merging.runtime import apply_plan, set_scale
from gift_trl.plots import SERIES, new_figure


SWEEP_FILE, SWEEP_PLOT_FILE = "sweep.json", "sweep.png"
# A folder with this file was written by a sweep, and may be replaced by one
SWEEP_MARKS = (SWEEP_FILE,)
_Z = 1.96  # standard errors to either side of a mean in a 95 % interval


@dataclass(frozen=True)
class ScaleScore:
    """
    The score of one factor.

    Args:
        scale (`float`):
            λ of θ_I + λ·M(φ).
        score (`float`):
            What the evaluation gave.
        interval (`tuple[float, float]`, *optional*):
            Ends of its 95 % interval over the examples it was measured on.
        difference (`tuple[float, float, float]`, *optional*):
            How far it is above the best factor's on the same examples, example by example: the mean and the ends of its
            95 % interval.
    """

    scale: float
    score: float
    interval: tuple[float, float] | None = None
    difference: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Sweep:
    """
    The scores of all factors.

    Args:
        scores (`tuple[ScaleScore, ...]`):
            In ascending order of the factor.
        metric (`str`):
            What was measured.
        higher_is_better (`bool`):
            Whether a higher score is the better one.
    """

    scores: tuple[ScaleScore, ...]
    metric: str
    higher_is_better: bool

    @property
    def best(self) -> ScaleScore:
        """The best factor on this data; the smallest of equal ones, which changes the instruct model least."""
        sign = -1 if self.higher_is_better else 1
        return min(self.scores, key=lambda entry: (sign * entry.score, abs(entry.scale)))

    def table(self) -> str:
        """
        The scores as a table for the terminal.

        Returns:
            `str`: Text of one line per factor.
        """
        lines = [f"{'scale':>8}  {self.metric}"]
        for entry in self.scores:
            line = f"{entry.scale:8g}  {entry.score:.4f}"
            if entry.interval is not None:
                line += " [{:.4f}, {:.4f}]".format(*entry.interval)
            if entry is self.best:
                line += "  <- best"
            elif entry.difference is not None:
                line += "  {:+.4f} [{:+.4f}, {:+.4f}] to the best".format(*entry.difference)
            lines.append(line)
        return "\n".join(lines)

    def not_told_apart(self) -> tuple[float, ...]:
        """
        The factors whose difference from the best may be chance: its 95 % interval holds 0.

        Returns:
            `tuple[float, ...]`: The factors, without the best. Those without a difference are left out.
        """
        return tuple(e.scale for e in self.scores if e.difference and e.difference[1] <= 0 <= e.difference[2])

    def plot(self, path: str | os.PathLike) -> None:
        """
        Draws the scores.

        Args:
            path (`str` or `os.PathLike`):
                PNG file to write.
        """
        with new_figure(path, (6, 4)) as figure:
            axes = figure.subplots()
            scales, values = [e.scale for e in self.scores], [e.score for e in self.scores]
            ends = [e.interval or (e.score, e.score) for e in self.scores]
            sides = [[v - low for v, (low, _) in zip(values, ends, strict=True)]]
            sides += [[high - v for v, (_, high) in zip(values, ends, strict=True)]]
            axes.errorbar(scales, values, yerr=sides, marker="o")
            axes.axvline(self.best.scale, color=SERIES[1], linestyle="--", label=f"best: {self.best.scale:g}")
            axes.set_xlabel("scale of the update")
            axes.set_ylabel(self.metric)
            axes.legend()

    def write(self, output_dir: str | os.PathLike, *, overwrite: bool = False) -> None:
        """
        Writes `sweep.json` and `sweep.png`.

        Args:
            output_dir (`str` or `os.PathLike`):
                Folder to write.
            overwrite (`bool`, *optional*, defaults to `False`):
                Whether to replace a folder that a sweep wrote.

        Raises:
            `FileExistsError`: If the folder has something in it and `overwrite` is not set, or no sweep wrote it.
        """
        with write_folder(output_dir, overwrite=overwrite, marks=SWEEP_MARKS) as folder:
            (folder / SWEEP_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
            self.plot(folder / SWEEP_PLOT_FILE)

    def to_dict(self) -> dict[str, Any]:
        """
        The scores and the best factor.

        Returns:
            `dict[str, Any]`: What `sweep.json` holds.
        """
        return {**asdict(self), "best_scale": self.best.scale}


def ordered_scales(scales: Sequence[float]) -> list[float]:
    """
    The factors of a sweep, each once.

    Args:
        scales (`Sequence[float]`):
            The factors.

    Returns:
        `list[float]`: In ascending order.

    Raises:
        `ValueError`: If there is none, or one is not finite.
    """
    ordered = sorted(set(map(float, scales)))
    if not ordered or not all(map(math.isfinite, ordered)):
        raise ValueError("There is nothing to compare: pass at least one finite scale, such as 0, 0.5 and 1.")
    return ordered


def sweep_scales(
    adapter: str | os.PathLike,
    instruct_model: str | os.PathLike,
    scales: Sequence[float],
    score: Callable[[PreTrainedModel], tuple[float, float | None]],
    *,
    metric: str,
    higher_is_better: bool,
    adapter_revision: str | None = None,
    instruct_model_revision: str | None = None,
    saved_modules: str | None = None,
    dtype: str | torch.dtype = "auto",
) -> Sweep:
    """
    Scores the instruct model with the adapter at several factors.

    The model is loaded once; PEFT's layers apply the update at run time.

    Args:
        adapter (`str` or `os.PathLike`):
            Folder or Hub id of the adapter.
        instruct_model (`str` or `os.PathLike`):
            Folder or Hub id of the instruct model.
        scales (`Sequence[float]`):
            The factors. 0 is the instruct model.
        score (`Callable`):
            Evaluation: takes the model, returns its score and the standard error of it, or `None`.
        metric (`str`):
            Name of the score.
        higher_is_better (`bool`):
            Whether a higher score is the better one.
        adapter_revision, instruct_model_revision (`str`, *optional*):
            Revisions on the Hub.
        saved_modules (`str`, *optional*):
            What to do with tensors that the adapter holds whole, as in [`merge_adapter`]: `"replace"` puts them in the place
            of the instruct model's, at every factor; `"ignore"` leaves them out. Without a choice, such an adapter is
            refused.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Dtype to load the model in; the checkpoint's own by default.

    Returns:
        [`Sweep`]: The scores.

    Raises:
        `ValueError`: If there is no factor, if the adapter cannot be merged, or if a score is not finite.
    """
    scales = ordered_scales(scales)
    # A scale that every type must be able to apply; 1 may be the only one that is asked for.
    hardest = next((scale for scale in scales if scale != 1.0), 1.0)
    plan = preflight(
        [(os.fspath(adapter), adapter_revision)],
        os.fspath(instruct_model),
        None,
        instruct_model_revision=instruct_model_revision,
        scale=hardest,
        saved_modules=saved_modules,
    )
    placement = {"device_map": "auto"} if torch.cuda.is_available() else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(plan.instruct_dir, dtype=dtype, **placement)
    model = apply_plan(model, plan.adapters[0], saved_modules)
    entries = []
    for scale in tqdm(scales, desc="Sweeping", unit="scale", delay=2):
        set_scale(model, scale)
        value, error = score(model)
        if not math.isfinite(value):
            raise ValueError(f"The score at scale {scale:g} is {value}: leave this scale out, it breaks the model.")
        interval = None if error is None else (value - _Z * error, value + _Z * error)
        entries.append(ScaleScore(scale, float(value), interval))
    return Sweep(tuple(entries), metric, higher_is_better)
