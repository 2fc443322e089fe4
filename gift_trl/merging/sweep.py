"""Which λ is best: the adapter is applied at run time with one factor after the other, and no checkpoint is written."""

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from gift_trl.checkpoints import ADAPTER_FILE, write_folder
from gift_trl.merging.adapter import ADAPTER_CONFIG_FILE
from gift_trl.merging.preflight import preflight
from gift_trl.merging.runtime import apply_adapter, set_scale
from gift_trl.plots import SERIES, new_figure


@dataclass(frozen=True)
class ScaleScore:
    """
    The score of one factor.

    Args:
        scale (`float`):
            λ of θ_I + λ·M(φ).
        score (`float`):
            What the evaluation gave.
        standard_error (`float`, *optional*):
            Standard error of the score over the examples it was measured on.
    """

    scale: float
    score: float
    standard_error: float | None = None


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
            error = f" ± {entry.standard_error:.4f}" if entry.standard_error is not None else ""
            mark = "  <- best" if entry is self.best else ""
            lines.append(f"{entry.scale:8g}  {entry.score:.4f}{error}{mark}")
        return "\n".join(lines)

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
            axes.errorbar(scales, values, yerr=[e.standard_error or 0.0 for e in self.scores], marker="o")
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
                Whether to replace an existing folder.

        Raises:
            `FileExistsError`: If the folder has something in it and `overwrite` is not set.
        """
        facts = {**asdict(self), "best_scale": self.best.scale}
        with write_folder(output_dir, overwrite=overwrite) as folder:
            (folder / "sweep.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            self.plot(folder / "sweep.png")


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
    scales = sorted(set(map(float, scales)))
    if not scales or not all(map(math.isfinite, scales)):
        raise ValueError("There is nothing to compare: pass at least one finite scale, such as 0, 0.5 and 1.")
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
    model = AutoModelForCausalLM.from_pretrained(plan.instruct_dir, dtype=dtype, **placement)
    folder, settings = Path(plan.adapters[0].folder), plan.adapters[0].settings
    if saved_modules == "ignore":
        with tempfile.TemporaryDirectory() as updates:
            model = apply_adapter(model, _only_updates(folder, settings, Path(updates)))
    else:
        model = apply_adapter(model, folder)
    entries = []
    for scale in tqdm(scales, desc="Sweeping", unit="scale", delay=2):
        set_scale(model, scale)
        value, error = score(model)
        if not math.isfinite(value):
            raise ValueError(f"The score at scale {scale:g} is {value}: leave this scale out, it breaks the model.")
        entries.append(ScaleScore(scale, float(value), error))
    return Sweep(tuple(entries), metric, higher_is_better)


def _only_updates(folder: Path, settings: Mapping[str, object], copy: Path) -> Path:
    """A copy of an adapter without the tensors that it holds whole."""
    mark = f".{PEFT_TYPE_TO_PREFIX_MAPPING[settings['peft_type']]}"
    tensors = {key: tensor for key, tensor in load_file(folder / ADAPTER_FILE).items() if mark in key}
    save_file(tensors, copy / ADAPTER_FILE, metadata={"format": "pt"})
    plain = {**settings, "modules_to_save": None, **({"bias": "none"} if "bias" in settings else {})}
    (copy / ADAPTER_CONFIG_FILE).write_text(json.dumps(plain), encoding="utf-8")
    return copy
