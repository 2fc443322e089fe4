"""Everything that can be known to go wrong with a merge before a weight of the instruct model is read."""

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import TensorInfo
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from yaml import YAMLError

from gift_trl.checkpoints import (
    ADAPTER_FILE,
    check_output_folder,
    checkpoint_folder,
    read_header,
    safetensors_files,
)
from gift_trl.merging.adapter import (
    ADAPTER_CONFIG_FILE,
    SAVED_MODULES,
    read_adapter_config,
    unsupported_settings,
    unusual_settings,
)
from gift_trl.merging.conversion import DTYPES, build_skeleton, misfits
from gift_trl.merging.targets import Target, find_targets
from gift_trl.model_pair import check_same_architecture, load_tokenizer, vocabulary_conflicts


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


class _Findings(list[str]):
    @contextmanager
    def collect(self) -> Iterator[None]:
        """Turns an error into a finding, so that the next check still runs."""
        try:
            yield
        except (OSError, ValueError) as error:
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
    findings, cautions = _Findings(), []
    title = ", ".join(f"'{name}'" for name, _ in adapters or (companions or {}).values())
    if not math.isfinite(scale):
        findings.append(f"The scale is {scale}: pass a finite number, 1.0 for the update as it was trained.")
    if saved_modules not in (None, *SAVED_MODULES):
        findings.append(f"`saved_modules` is {saved_modules!r}: pass one of {', '.join(map(repr, SAVED_MODULES))}.")
    output = None
    if output_dir is not None:
        with findings.collect():
            output = check_output_folder(output_dir, overwrite=overwrite)
    layer_scale = scale if scaled_by_layers else 1.0
    loaded = [_read_adapter(name, revision, layer_scale, saved_modules, findings) for name, revision in adapters]

    # The configuration comes first: an unfit model should not be downloaded to be refused.
    instruct_dir = config = None
    with findings.collect():
        instruct_dir = checkpoint_folder(instruct_model, instruct_model_revision, weights=False)
        config = _instruct_config(instruct_dir)
    for adapter in loaded:
        if adapter.settings is not None and config is not None:
            with findings.collect():
                _check_recorded_base(adapter.settings, instruct_dir)
            with findings.collect():
                cautions += _check_tokenizers(adapter.folder, instruct_dir)
            cautions += _foreign_base(adapter.settings, instruct_model, instruct_dir)
            cautions += unusual_settings(adapter.settings)
    if output is not None:
        findings += _overlaps(output, *(adapter.folder for adapter in loaded), instruct_dir)
    if findings and instruct_dir != Path(instruct_model).expanduser():
        findings.raise_any(title, instruct_model)

    shards, tensors = [], {}
    if config is not None:
        with findings.collect():
            instruct_dir = checkpoint_folder(instruct_model, instruct_model_revision)
            shards = safetensors_files(instruct_dir)
            tensors = _checkpoint_tensors(shards)
            skeletons = [build_skeleton(config) for _ in loaded or [None]]  # each adapter is put on its own
            findings += _incomplete(skeletons[0], tensors)
    plans = []
    for number, adapter in enumerate(loaded):
        if not tensors or not adapter.tensors:
            continue
        with findings.collect():
            targets, problems = find_targets(
                adapter.settings, adapter.tensors, skeletons[number], tensors, saved_modules
            )
            findings += problems
            plans.append(AdapterPlan(adapter.name, adapter.folder, adapter.settings, targets, adapter.is_zero))
    others = {}
    for role, (name, revision) in (companions or {}).items():
        with findings.collect():
            folder = checkpoint_folder(name, revision)
            others[role] = (folder, safetensors_files(folder))
            findings += _unlike(role, name, _checkpoint_tensors(others[role][1]), tensors)
            findings += _overlaps(output, folder) if output is not None else []
    if shards and output is not None:
        findings += _disk_problems(output, sum(shard.stat().st_size for shard in shards))
    findings.raise_any(title, instruct_model)
    return MergePlan(plans, instruct_dir, shards, others, cautions)


def _checkpoint_tensors(shards: list[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        held = read_header(shard)[0].tensors
        if twice := sorted(tensors.keys() & held.keys()):
            raise ValueError(
                f"'{shard.name}' in '{shard.parent}' holds {twice[0]}, which another shard holds too: copy or download the "
                "checkpoint again."
            )
        tensors |= held
    return tensors


def _unlike(role: str, name: str, tensors: dict[str, TensorInfo], instruct: dict[str, TensorInfo]) -> list[str]:
    """What keeps a checkpoint from being subtracted from another, tensor by tensor."""
    problems = [f"{tensor} is missing" for tensor in instruct if tensor not in tensors]
    problems += [
        f"{tensor} is {list(tensors[tensor].shape)}, not {list(info.shape)}"
        for tensor, info in instruct.items()
        if tensor in tensors and list(tensors[tensor].shape) != list(info.shape)
    ]
    problems += [f"{tensor} is of dtype {i.dtype}" for tensor, i in tensors.items() if i.dtype not in DTYPES]
    if not problems or not instruct:
        return []
    shown = "; ".join(problems[:3]) + ("; ..." if len(problems) > 3 else "")
    return [
        f"`{role}` '{name}' differs from the instruct checkpoint in {len(problems)} tensors ({shown}): pass the unquantised "
        "checkpoint of the model that the instruct model was post-trained from."
    ]


def _incomplete(model: PreTrainedModel, tensors: dict[str, TensorInfo]) -> list[str]:
    problems = misfits(model, tensors)
    if not problems:
        return []
    shown = "; ".join(problems[:3]) + ("; ..." if len(problems) > 3 else "")
    return [
        f"The instruct checkpoint does not hold what its configuration promises, in {len(problems)} places ({shown}): "
        "transformers would load random values there. Copy or download the checkpoint again, unquantised and saved whole."
    ]


@dataclass
class _Adapter:
    name: str
    folder: Path | None = None
    settings: dict[str, Any] | None = None
    tensors: dict[str, torch.Tensor] | None = None
    is_zero: bool = False


def _read_adapter(
    name: str, revision: str | None, scale: float, saved_modules: str | None, findings: _Findings
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
        header = _adapter_header(adapter.folder)
        with safe_open(adapter.folder / ADAPTER_FILE, framework="pt") as file:
            # Mapped into memory, not read: their values come from the file where they are used.
            tensors = {key: file.get_tensor(key) for key in header}
        adapter.is_zero = _check_values(tensors, findings)
        adapter.tensors = None if unsupported else tensors
    return adapter


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
    odd = sorted({info.dtype for info in tensors.values()} - {"F64", "F32", "F16", "BF16", "I32", "I64"})
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


def _check_values(tensors: dict[str, torch.Tensor], findings: list[str]) -> bool:
    """Looks for values that are not finite; returns whether every update of LoRA is zero, having a zero factor."""
    broken, zeros = [], set()
    for key, tensor in tensors.items():
        # The extremes show a NaN or an infinity without a copy of the tensor.
        extremes = torch.stack(tensor.aminmax()) if tensor.numel() else tensor
        if extremes.is_floating_point() and not extremes.isfinite().all():
            broken.append(key)
        if not extremes.any():
            zeros.add(key.rpartition(".lora_")[0])
    if broken:
        findings.append(
            f"{len(broken)} of {len(tensors)} tensors of the adapter hold NaN or infinite values (first: {broken[0]}): the "
            "training diverged; train again with a lower learning rate, or take an earlier adapter."
        )
    return all(".lora_" in key and key.rpartition(".lora_")[0] in zeros for key in tensors)


def _check_tokenizers(adapter_dir: Path, instruct_dir: Path) -> list[str]:
    """Compares the tokenizer that was saved with the adapter with the instruct model's, where both have one."""
    files = [folder / "tokenizer.json" for folder in (adapter_dir, instruct_dir)]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return []
    trained, instruct = (load_tokenizer(str(folder)) for folder in (adapter_dir, instruct_dir))
    if conflicts := vocabulary_conflicts(trained, instruct):
        raise ValueError(
            f"The tokenizer saved with the adapter and the instruct model's do not fit together: {conflicts}. The adapter "
            "was trained on token ids that mean something else here: pass the instruct model whose tokenizer it was "
            "trained with."
        )
    tokens, others = ({i: token for token, i in t.get_vocab().items()} for t in (trained, instruct))
    renamed = [i for i in sorted(tokens.keys() & others.keys()) if tokens[i] != others[i]]
    if not renamed:
        return []
    shown = ", ".join(f"{i} ({tokens[i]!r} against {others[i]!r})" for i in renamed[:3])
    return [
        f"The tokenizer saved with the adapter names {len(renamed)} special tokens otherwise than the instruct model's, the "
        f"first being {shown}: if the adapter was trained in a chat format, it was another one."
    ]


def _foreign_base(settings: dict[str, Any], instruct_model: str, instruct_dir: Path) -> list[str]:
    """Compares the adapter's base model with the one that the instruct model's card names."""
    base, card = settings.get("base_model_name_or_path"), instruct_dir / "README.md"
    if not base or not card.is_file() or base == instruct_model:
        return []
    try:
        known = ModelCard(card.read_text(encoding="utf-8")).data.base_model
    except (ValueError, YAMLError):
        return []  # a card that cannot be read says nothing
    known = [known] if isinstance(known, str) else list(known or [])
    # The last part only: mirrors and local copies keep it
    names = {name.rstrip("/").rpartition("/")[2].lower() for name in known}
    if not names or base.rstrip("/").rpartition("/")[2].lower() in names:
        return []
    return [
        f"The adapter was trained on '{base}', while the instruct model's card says that it was made from "
        f"{', '.join(known)}: an update of another model may do harm. `--base_model` reports how far the two are related."
    ]
