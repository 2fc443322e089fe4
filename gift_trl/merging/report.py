"""What a merge did: printed at its end, and written beside the weights."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gift_trl.checkpoints import REPORT_FILE


# What a merged checkpoint may take the place of: a checkpoint, or a merge.
REPLACED_MARKS = ("config.json", REPORT_FILE)


@dataclass(frozen=True)
class MergeReport:
    """
    The facts of one merge. Local folders appear by their last name only, so that the file can be published.

    Args:
        output_dir (`Path`):
            Folder of the merged checkpoint. Not written to the file.
        instruct_model (`str`):
            Hub id or folder name of the instruct model.
        instruct_model_commit (`str` or `None`):
            Commit of the Hub repository, `None` for a local folder.
        instruct_model_fingerprint (`str`):
            Hash of the instruct weights, see [`~gift_trl.checkpoints.weights_fingerprint`].
        adapter (`str`):
            Hub id or folder name of the adapter.
        adapter_commit (`str` or `None`):
            Commit of the Hub repository, `None` for a local folder.
        adapter_fingerprint (`str`):
            Hash of the adapter weights.
        adapter_base_model (`str` or `None`):
            The model that the adapter says it was trained on.
        adapter_settings (`dict[str, Any]`):
            The settings that decide the update: type, rank, alpha, their patterns, rank stabilisation, targets.
        scale (`float`):
            λ of θ'_I = θ_I + λ·M(φ).
        merged_tensors (`dict[str, str]`):
            Name and dtype of every tensor that received an update, in checkpoint order.
        num_changed (`int`):
            How many of them differ in value from the instruct model's.
        num_tensors (`int`):
            Number of tensors in the checkpoint.
        num_bytes (`int`):
            Size of the safetensors files.
        recipe (`dict[str, Any]`):
            The merge as a recipe, with the commits that were read.
        updates (`tuple[dict[str, Any], ...]`):
            Name, commit, fingerprint and settings of every adapter and further checkpoint, and what their training has
            written of itself beside them (`gift_training.json`).
        licence (`dict[str, Any]`):
            `license`, `license_name` and `license_link`, as the instruct model's card gives them.
        kinship (`dict[str, dict[str, float | None]]`, *optional*):
            ‖θ_I − θ_B‖/‖θ_B‖, ‖M‖/‖θ_I − θ_B‖ and the cosine of the two by kind of module, where a base model was given.
        versions (`dict[str, str]`):
            Versions of the libraries that did the arithmetic.
        duration_s (`float`):
            Seconds from the call to the last tensor.
        warnings (`tuple[str, ...]`):
            The warnings given during the merge.
    """

    output_dir: Path
    instruct_model: str
    instruct_model_commit: str | None
    instruct_model_fingerprint: str
    adapter: str
    adapter_commit: str | None
    adapter_fingerprint: str
    adapter_base_model: str | None
    adapter_settings: dict[str, Any]
    scale: float
    merged_tensors: dict[str, str]
    num_changed: int
    num_tensors: int
    num_bytes: int
    recipe: dict[str, Any]
    updates: tuple[dict[str, Any], ...]
    licence: dict[str, Any]
    kinship: dict[str, dict[str, float | None]] | None
    versions: dict[str, str]
    duration_s: float
    warnings: tuple[str, ...]

    def summary(self) -> str:
        """
        The merge in a few lines for the terminal.

        Returns:
            `str`: Text of a few lines.
        """
        lines = [
            f"Merged {self.adapter} ({self._kind()}, scale {self.scale:g}) into {self.instruct_model}",
            f"  {len(self.merged_tensors)} of {self.num_tensors} tensors updated, {self.num_changed} of them changed in "
            f"value; {self.num_bytes / 1e9:.2f} GB in {self.duration_s:.1f} s",
            f"  written to {self.output_dir} (details in {REPORT_FILE})",
        ]
        if self.kinship:
            change, ratio, cosine = (self.kinship["all"][n] for n in ("relative_change", "update_ratio", "cosine"))
            parts = [f"the instruct model is {change:.4f} of the base model's norm away from it"] if change else []
            parts += (
                [f"the update is {ratio:.2f} times as long as that, at a cosine of {cosine:+.3f}"] if ratio else []
            )
            lines.insert(2, f"  {', '.join(parts)} (see kinship.png)" if parts else "  the two models are the same")
        return "\n".join(lines)

    def _kind(self) -> str:
        settings, method = self.adapter_settings, self.recipe["method"]
        if len(self.recipe.get("adapter", [])) > 1 or method != "linear":
            return method
        if settings["peft_type"] != "LORA":
            return settings["peft_type"]
        name = "DoRA" if settings["use_dora"] else "rsLoRA" if settings["use_rslora"] else "LoRA"
        return f"{name}, r={settings['r']}, alpha={settings['lora_alpha']}"

    def to_json(self) -> str:
        """
        The report as it is written to `merge_report.json`.

        Returns:
            `str`: JSON object with every field but `output_dir`.
        """
        facts = dataclasses.asdict(self)
        del facts["output_dir"]
        return json.dumps(facts, indent=2) + "\n"
