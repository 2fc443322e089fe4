"""Everything that can be known to go wrong with a merge before a weight of the instruct model is read."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import TensorInfo
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors import safe_open
from transformers import PreTrainedModel

from gift_trl.checkpoints import ADAPTER_FILE, check_output_folder, checkpoint_folder, safetensors_files
from gift_trl.merging.adapter import (
    SAVED_MODULES,
    foreign_base,
    read_adapter_config,
    unsupported_settings,
    unusual_settings,
)
from gift_trl.merging.checks import (
    adapter_header,
    check_recorded_base,
    check_tokenizers,
    check_values,
    checkpoint_tensors,
    disk_problems,
    instruct_config,
    missing_parameters,
    overlapping_folders,
    unlike_tensors,
)
from gift_trl.merging.conversion import build_skeleton
from gift_trl.merging.layers import PREFIX
from gift_trl.merging.report import REPLACED_MARKS
from gift_trl.merging.targets import Target, find_targets


@dataclass(frozen=True)
class AdapterPlan:
    """
    An adapter that has passed its checks.

    Args:
        name (`str`):
            Folder or Hub id, as it was given.
        folder (`Path`):
            Its folder.
        settings (`dict[str, Any]`):
            Contents of its `adapter_config.json`.
        targets (`list[Target]`):
            The modules that it updates.
        is_zero (`bool`):
            Whether every update is exactly zero.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    targets: list[Target]
    is_zero: bool


@dataclass(frozen=True)
class MergePlan:
    """
    A merge that has passed its checks.

    Args:
        adapters (`list[AdapterPlan]`):
            The adapters.
        instruct_dir (`Path`):
            Folder of the instruct checkpoint.
        shards (`list[Path]`):
            Its safetensors files.
        companions (`dict[str, tuple[Path, list[Path]]]`):
            Folder and safetensors files of the other checkpoints, by their part in the merge.
        cautions (`list[str]`):
            What is supported but may not be meant.
    """

    adapters: list[AdapterPlan]
    instruct_dir: Path
    shards: list[Path]
    companions: dict[str, tuple[Path, list[Path]]]
    cautions: list[str]


class Findings(list[str]):
    """What speaks against a merge, one sentence each."""

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Turns an error into a finding, so that the next check still runs."""
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, PermissionError) and error.filename:
                self.append(f"'{error.filename}' cannot be accessed ({error.strerror}): change its permissions.")
            else:
                self.append(str(error))

    def raise_any(self, adapters: str, instruct_model: str) -> None:
        if len(self) == 1:
            raise ValueError(f"Cannot merge {adapters} into '{instruct_model}'. {self[0]}")
        if self:
            listed = "".join(f"\n  {number}. {finding}" for number, finding in enumerate(self, start=1))
            raise ValueError(f"Cannot merge {adapters} into '{instruct_model}', for {len(self)} reasons:{listed}")


def preflight(
    adapters: Sequence[tuple[str, str | None]],
    instruct_model: str,
    output_dir: str | os.PathLike | None,
    *,
    instruct_model_revision: str | None,
    scale: float,
    overwrite: bool = False,
    saved_modules: str | None = None,
    companions: Mapping[str, tuple[str, str | None]] | None = None,
    scaled_by_layers: bool = True,
) -> MergePlan:
    """
    Checks a merge and finds the tensors that it changes.

    Args:
        adapters (`Sequence[tuple[str, str | None]]`):
            Folder or Hub id of each adapter, and its revision on the Hub.
        instruct_model (`str`):
            Checkpoint folder or Hub id.
        output_dir (`str` or `os.PathLike`, *optional*):
            Folder of the merged checkpoint. `None` if none is written.
        instruct_model_revision (`str`, *optional*):
            Revision of the instruct model on the Hub.
        scale (`float`):
            Factor of the update.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether an existing output may be replaced.
        saved_modules (`str`, *optional*):
            What to do with tensors that an adapter holds whole: `"replace"` or `"ignore"`. They are refused otherwise.
        companions (`Mapping[str, tuple[str, str | None]]`, *optional*):
            Folder or Hub id and revision of further checkpoints, by their part in the merge; they have to hold the same
            tensors as the instruct model.
        scaled_by_layers (`bool`, *optional*, defaults to `True`):
            Whether it is PEFT's layers that scale the update, which those of some types cannot.

    Returns:
        `MergePlan`: What to do.

    Raises:
        `ValueError`: With everything that was found, each with its remedy.
    """
    findings, cautions = Findings(), []
    title = ", ".join(f"'{name}'" for name, _ in adapters or (companions or {}).values())
    if not math.isfinite(scale):
        findings.append(f"The scale is {scale}: pass a finite number, 1.0 for the update as it was trained.")
    if saved_modules not in (None, *SAVED_MODULES):
        findings.append(f"`saved_modules` is {saved_modules!r}: pass one of {', '.join(map(repr, SAVED_MODULES))}.")
    output = None
    if output_dir is not None:
        output = Path(output_dir).expanduser().resolve()
        with findings.collect():
            check_output_folder(output, overwrite=overwrite, marks=REPLACED_MARKS)
    layer_scale = scale if scaled_by_layers else 1.0
    loaded = [_read_adapter(name, revision, layer_scale, saved_modules, findings) for name, revision in adapters]

    # The configuration comes first: an unfit model should not be downloaded to be refused.
    instruct_dir = config = None
    with findings.collect():
        instruct_dir = checkpoint_folder(instruct_model, instruct_model_revision, weights=False)
        config = instruct_config(instruct_dir)
    for adapter in loaded:
        if adapter.settings is not None and config is not None:
            with findings.collect():
                check_recorded_base(adapter.settings, instruct_dir)
            with findings.collect():
                cautions += check_tokenizers(adapter.folder, instruct_dir)
            cautions += foreign_base(adapter.settings, instruct_model, instruct_dir)
            cautions += unusual_settings(adapter.settings)
    if output is not None:
        findings += overlapping_folders(output, *(adapter.folder for adapter in loaded), instruct_dir)
    if findings and instruct_dir != Path(instruct_model).expanduser():
        findings.raise_any(title, instruct_model)

    shards, tensors = [], {}
    if config is not None:
        with findings.collect():
            instruct_dir = checkpoint_folder(instruct_model, instruct_model_revision)
            shards = safetensors_files(instruct_dir)
            tensors = checkpoint_tensors(shards)
            skeletons = [build_skeleton(config) for _ in loaded or [None]]  # each adapter is put on its own
            findings += missing_parameters(skeletons[0], tensors)
    plans = []
    for number, adapter in enumerate(loaded):
        if not tensors or not adapter.tensors:
            continue
        with findings.collect():
            targets, problems = find_adapter_targets(
                adapter.settings, adapter.tensors, skeletons[number], tensors, saved_modules
            )
            findings += problems
            plans.append(AdapterPlan(adapter.name, adapter.folder, adapter.settings, targets, adapter.is_zero))
    others = {}
    for role, (name, revision) in (companions or {}).items():
        with findings.collect():
            folder = checkpoint_folder(name, revision)
            others[role] = (folder, safetensors_files(folder))
            findings += unlike_tensors(role, name, checkpoint_tensors(others[role][1]), tensors)
            findings += overlapping_folders(output, folder) if output is not None else []
    if shards and output is not None:
        findings += disk_problems(output, sum(shard.stat().st_size for shard in shards))
    findings.raise_any(title, instruct_model)
    return MergePlan(plans, instruct_dir, shards, others, cautions)


@dataclass
class _Adapter:
    name: str
    folder: Path | None = None
    settings: dict[str, Any] | None = None
    tensors: dict[str, torch.Tensor] | None = None
    is_zero: bool = False


def _read_adapter(
    name: str, revision: str | None, scale: float, saved_modules: str | None, findings: Findings
) -> _Adapter:
    adapter = _Adapter(name)
    with findings.collect():
        adapter.folder = checkpoint_folder(name, revision)
        adapter.settings = read_adapter_config(adapter.folder)
    if adapter.settings is None:
        return adapter
    unsupported = unsupported_settings(adapter.settings, saved_modules, scale)
    findings += unsupported
    with findings.collect():
        header = adapter_header(adapter.folder)
        with safe_open(adapter.folder / ADAPTER_FILE, framework="pt") as file:
            # Mapped into memory, not read: their values come from the file where they are used.
            tensors = {key: file.get_tensor(key) for key in header}
        adapter.is_zero = check_values(tensors, findings)
        adapter.tensors = None if unsupported else tensors
    return adapter


def find_adapter_targets(
    settings: Mapping[str, Any],
    adapter: Mapping[str, torch.Tensor],
    model: PreTrainedModel,
    checkpoint: Mapping[str, TensorInfo],
    saved_modules: str | None,
) -> tuple[list[Target], list[str]]:
    """As [`~gift_trl.merging.targets.find_targets`], with one reason alone where a shared weight is a target."""
    # PEFT saves such weights whole too, and a choice about the copies would not help
    hopeless = _targets_tied_weights(settings, adapter, model)
    return find_targets(settings, adapter, model, checkpoint, "ignore" if hopeless else saved_modules)


def _targets_tied_weights(
    settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], model: PreTrainedModel
) -> bool:
    """Whether the adapter updates a weight that the model shares between its embedding and its output layer."""
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    mark = PEFT_TYPE_TO_PREFIX_MAPPING[settings["peft_type"]]
    starts = tuple(f"{PREFIX}{name.rpartition('.')[0]}.{mark}" for name in tied)
    return any(key.startswith(starts) for key in tensors)
