"""Everything that can be known to go wrong with a merge before a weight of the instruct model is read."""

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import TensorInfo
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig

from gift_trl.checkpoints import (
    ADAPTER_FILE,
    check_output_folder,
    checkpoint_folder,
    read_header,
    safetensors_files,
)
from gift_trl.merging.adapter import ADAPTER_CONFIG_FILE, read_adapter_config, unsupported_settings
from gift_trl.merging.targets import Target, build_skeleton, find_targets
from gift_trl.model_pair import check_same_architecture


@dataclass(frozen=True)
class MergePlan:
    """
    A merge that has passed its checks.

    Args:
        adapter_dir (`Path`):
            Adapter folder.
        adapter_settings (`dict[str, Any]`):
            Contents of its `adapter_config.json`.
        instruct_dir (`Path`):
            Folder of the instruct checkpoint.
        shards (`list[Path]`):
            Its safetensors files.
        targets (`dict[str, Target]`):
            The update of each targeted tensor.
        is_zero (`bool`):
            Whether every update is exactly zero.
    """

    adapter_dir: Path
    adapter_settings: dict[str, Any]
    instruct_dir: Path
    shards: list[Path]
    targets: dict[str, Target]
    is_zero: bool


class _Findings(list[str]):
    @contextmanager
    def collect(self) -> Iterator[None]:
        """Turns an error into a finding, so that the next check still runs."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.append(str(error))

    def raise_any(self, adapter: str, instruct_model: str) -> None:
        if len(self) == 1:
            raise ValueError(f"Cannot merge '{adapter}' into '{instruct_model}'. {self[0]}")
        if self:
            listed = "".join(f"\n  {number}. {finding}" for number, finding in enumerate(self, start=1))
            raise ValueError(f"Cannot merge '{adapter}' into '{instruct_model}', for {len(self)} reasons:{listed}")


def preflight(
    adapter: str,
    instruct_model: str,
    output_dir: str | os.PathLike,
    *,
    instruct_model_revision: str | None,
    adapter_revision: str | None,
    scale: float,
    overwrite: bool,
) -> MergePlan:
    """
    Checks a merge and finds the tensors that it changes.

    Args:
        adapter (`str`):
            Adapter folder or Hub id.
        instruct_model (`str`):
            Checkpoint folder or Hub id.
        output_dir (`str` or `os.PathLike`):
            Folder of the merged checkpoint.
        instruct_model_revision (`str`, *optional*):
            Revision of the instruct model on the Hub.
        adapter_revision (`str`, *optional*):
            Revision of the adapter on the Hub.
        scale (`float`):
            Factor of the update.
        overwrite (`bool`):
            Whether an existing output may be replaced.

    Returns:
        `MergePlan`: What to do.

    Raises:
        `ValueError`: With everything that was found, each with its remedy.
    """
    findings = _Findings()
    if not math.isfinite(scale):
        findings.append(f"The scale is {scale}: pass a finite number, 1.0 for the update as it was trained.")
    output = None
    with findings.collect():
        output = check_output_folder(output_dir, overwrite=overwrite)

    adapter_dir = settings = factors = None
    with findings.collect():
        adapter_dir = checkpoint_folder(adapter, adapter_revision)
        settings = read_adapter_config(adapter_dir)
    supported = settings is not None
    if supported and (unsupported := unsupported_settings(settings)):
        findings += unsupported
        supported = False
    if settings is not None:
        with findings.collect():
            factors = _adapter_header(adapter_dir)

    # The configuration comes first: an unfit model should not be downloaded to be refused.
    instruct_dir = config = None
    with findings.collect():
        instruct_dir = checkpoint_folder(instruct_model, instruct_model_revision, weights=False)
        config = _instruct_config(instruct_dir)
    if config is not None and settings is not None:
        with findings.collect():
            _check_recorded_base(settings, instruct_dir)
    if output is not None:
        findings += _overlaps(output, adapter_dir, instruct_dir)
    is_zero = False
    if factors is not None and supported:
        is_zero = _check_values(adapter_dir / ADAPTER_FILE, factors, findings)
    if findings and instruct_dir != Path(instruct_model).expanduser():
        findings.raise_any(adapter, instruct_model)

    shards, targets = [], {}
    if config is not None:
        with findings.collect():
            instruct_dir = checkpoint_folder(instruct_model, instruct_model_revision)
            shards = safetensors_files(instruct_dir)
    if shards and factors is not None and supported:
        with findings.collect():
            tensors = {name: info for shard in shards for name, info in read_header(shard)[0].tensors.items()}
            targets, misfits = find_targets(settings, factors, build_skeleton(config), tensors)
            findings += misfits
    if shards and output is not None:
        findings += _disk_problems(output, sum(shard.stat().st_size for shard in shards))
    findings.raise_any(adapter, instruct_model)
    return MergePlan(adapter_dir, settings, instruct_dir, shards, targets, is_zero)


def _adapter_header(folder: Path) -> dict[str, TensorInfo]:
    if not (folder / ADAPTER_FILE).is_file():
        remedy = "pass the folder that `trainer.save_model()` wrote."
        if (folder / "adapter_model.bin").is_file():
            remedy = (
                "it has adapter_model.bin, which is not read; convert it with "
                "`PeftModel.from_pretrained(base_model, adapter).save_pretrained(new_folder)`."
            )
        raise FileNotFoundError(f"The adapter folder '{folder}' holds no {ADAPTER_FILE}: {remedy}")
    tensors = read_header(folder / ADAPTER_FILE)[0].tensors
    if not tensors:
        raise ValueError(
            f"'{folder / ADAPTER_FILE}' holds no tensors: save the adapter again, with all its parameters gathered if it "
            "was trained under ZeRO-3 or FSDP."
        )
    odd = sorted({info.dtype for info in tensors.values()} - {"F64", "F32", "F16", "BF16"})
    if odd:
        raise ValueError(f"The adapter is stored as {', '.join(odd)}: save it in float32 or bfloat16.")
    return tensors


def _instruct_config(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"'{folder}' holds no config.json, so it is no model checkpoint: pass the instruct model's folder or Hub id."
        )
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        raise ValueError(
            f"The instruct model's folder '{folder}' holds {ADAPTER_CONFIG_FILE}: transformers would put that adapter on "
            "top whenever it loads the model. Merge it first, or move it away."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"The configuration in '{folder}' cannot be read ({str(error).splitlines()[0]}): the model must be of a kind "
            "that the installed transformers knows without custom code; upgrade transformers if it is newer."
        ) from error
    quantization = config.to_dict().get("quantization_config")
    if quantization:
        raise ValueError(
            f"The instruct checkpoint is quantised ({quantization.get('quant_method', 'unknown method')}), and an update "
            "cannot be added to quantised weights: merge into the unquantised checkpoint, then quantise the result."
        )
    return config


def _check_recorded_base(settings: dict[str, Any], instruct_dir: Path) -> None:
    base = settings.get("base_model_name_or_path")
    if not base:
        return
    folder = Path(base).expanduser()
    if not (folder / "config.json").is_file():
        try:
            cached = try_to_load_from_cache(base, "config.json", revision=settings.get("revision"))
        except HFValidationError:
            return
        if not isinstance(cached, str):
            return
        folder = Path(cached).parent
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return  # a base model that cannot be read here is no reason against the merge
    check_same_architecture(str(folder), str(instruct_dir))


def _overlaps(output: Path, *inputs: Path | None) -> list[str]:
    problems = []
    for folder in inputs:
        if folder is None:
            continue
        folder = folder.resolve()
        if output.is_relative_to(folder) or folder.is_relative_to(output):
            problems.append(
                f"The output folder '{output}' is, lies in, or holds the input folder '{folder}', which is never written "
                "to: choose an output folder beside it."
            )
    return problems


def _disk_problems(output: Path, num_bytes: int) -> list[str]:
    parent = output
    while not parent.is_dir():
        parent = parent.parent
    problems = []
    if not os.access(parent, os.W_OK):
        problems.append(f"'{parent}' cannot be written to: choose an output folder elsewhere.")
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        problems.append(
            f"The merged checkpoint takes {num_bytes / 1e9:.1f} GB, '{parent}' has {free / 1e9:.1f} GB free: make room, or "
            "choose an output folder on another disk."
        )
    return problems


def _check_values(path: Path, factors: dict[str, TensorInfo], findings: list[str]) -> bool:
    """Looks for values that are not finite; returns whether every update is zero, having a zero factor."""
    broken, zeros = [], set()
    with safe_open(path, framework="pt") as file:
        for key in factors:
            tensor = file.get_tensor(key)
            # The extremes show a NaN or an infinity without a copy of the tensor.
            extremes = torch.stack(tensor.aminmax()) if tensor.numel() else tensor
            if not extremes.isfinite().all():
                broken.append(key)
            if not extremes.any():
                zeros.add(key.rpartition(".lora_")[0])
    if broken:
        findings.append(
            f"{len(broken)} of {len(factors)} tensors of the adapter hold NaN or infinite values (first: {broken[0]}): the "
            "training diverged; train again with a lower learning rate, or take an earlier adapter."
        )
    return all(key.rpartition(".lora_")[0] in zeros for key in factors)
