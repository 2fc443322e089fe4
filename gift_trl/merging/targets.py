"""Which tensors of the instruct checkpoint an adapter updates, and what of it does not fit."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.utils import TensorInfo
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners import lora
from transformers import PreTrainedModel

from gift_trl.merging.adapter import ADAPTER_CONFIG_FILE
from gift_trl.merging.conversion import DTYPES, StoredParameter, stored_parameters
from gift_trl.merging.layers import ADAPTER_NAME, PREFIX, AdapterLayer, LoadedAdapter, load_adapter


# PEFT saves such layers whole, under these names inside the module.
_WHOLE = re.compile(rf"\.(base_layer|original_module|modules_to_save\.{ADAPTER_NAME})(?=\.)")


@dataclass(frozen=True)
class Target:
    """
    A module of the instruct model that the adapter updates.

    Args:
        module (`str`):
            Its name.
        parameters (`dict[str, StoredParameter]`):
            The parameters that take part, by their name in the module, and the tensors that hold them.
        layer ([`AdapterLayer`], *optional*):
            PEFT's layer for it.
        replacement (`torch.Tensor`, *optional*):
            What takes the place of its only parameter, in place of a layer.
    """

    module: str
    parameters: dict[str, StoredParameter]
    layer: AdapterLayer | None = None
    replacement: torch.Tensor | None = None

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors of the checkpoint that it may change."""
        return [tensor for stored in self.parameters.values() for tensor in stored.tensors]

    @property
    def merges_by_rows(self) -> bool:
        """Whether the update needs no more than some rows of a weight at a time."""
        return (
            self.layer is not None
            and self.layer.merges_by_rows
            and self.parameters.keys() <= {"weight", "bias"}
            and not any(stored.converter for stored in self.parameters.values())
        )

    def merge(self, weights: Mapping[str, torch.Tensor], scale: float = 1.0) -> dict[str, torch.Tensor]:
        """
        Merges the update into the module.

        Args:
            weights (`Mapping[str, torch.Tensor]`):
                Its parameters by their name in it. They may be changed in place.
            scale (`float`, *optional*, defaults to `1.0`):
                Factor of the update. A replacement is not scaled.

        Returns:
            `dict[str, torch.Tensor]`: The merged parameters, of the same shapes and dtypes.
        """
        if self.layer is None:
            assert self.replacement is not None  # a target has one or the other
            return {name: self.replacement.to(weight.dtype) for name, weight in weights.items()}
        if self.merges_by_rows:
            merge = {"weight": self.layer.merge_rows, "bias": self.layer.merge_bias}
            return {name: merge[name](value, scale) for name, value in weights.items()}
        return self.layer.merge(weights, scale)


def find_targets(
    settings: Mapping[str, Any],
    adapter: Mapping[str, torch.Tensor],
    model: PreTrainedModel,
    checkpoint: Mapping[str, TensorInfo],
    saved_modules: str | None = None,
) -> tuple[list[Target], list[str]]:
    """
    Matches the adapter's tensors with those of the instruct checkpoint. Reads no weights of the instruct model.

    Args:
        settings (`Mapping[str, Any]`):
            Contents of `adapter_config.json`.
        adapter (`Mapping[str, torch.Tensor]`):
            Contents of the adapter file.
        model ([`~transformers.PreTrainedModel`]):
            The instruct model without weights. It is changed: PEFT puts its layers in.
        checkpoint (`Mapping[str, TensorInfo]`):
            Name, dtype and shape of the tensors of the instruct checkpoint, all shards together.
        saved_modules (`str`, *optional*):
            `"replace"` puts tensors that the adapter holds whole in the place of the instruct model's, `"ignore"` leaves
            them out.

    Returns:
        `tuple[list[Target], list[str]]`: The targets, and one sentence for each thing that does not fit.
    """
    stored = stored_parameters(model, checkpoint)
    parameters = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    modules = {name for name, _ in model.named_modules()}
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    try:
        loaded = load_adapter(settings, adapter, model)
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        problems = _strangers(settings, adapter, parameters, modules, set())
        return [], [*problems, f"PEFT cannot put this adapter on the instruct model: {error}"]

    whole = {key: _WHOLE.sub("", key) for key in loaded.tensors if key not in _layer_keys(loaded)}
    copies = [key for key, parameter in whole.items() if parameter in parameters]
    problems = _strangers(settings, adapter, parameters, modules, {layer.module for layer in loaded.layers})
    problems += _unfit(loaded)
    targets, tied_targets, homeless, foreign = [], [], [], []
    for layer in loaded.layers:
        if isinstance(layer.layer, lora.LoraLayer) and type(layer.layer) not in (
            lora.Linear,
            lora.Embedding,
            lora.ParamWrapper,
        ):
            foreign.append(f"{layer.module} ({type(layer.layer.get_base_layer()).__name__})")
            continue
        names = {name: f"{layer.module}.{name}" for name in layer.parameters}
        tied_targets += [name for name in names.values() if name in tied]
        # Of a shared weight the checkpoint holds one name, and lacks nothing
        homeless += _homeless([name for name in names.values() if name not in tied], stored, checkpoint, parameters)
        targets.append(Target(layer.module, {n: stored[p] for n, p in names.items() if p in stored}, layer))
    if copies and saved_modules == "replace":
        adapted = {name for target in targets for name in target.tensors}
        for key in copies:
            module, _, name = whole[key].rpartition(".")
            if whole[key] in tied:
                tied_targets.append(whole[key])
            else:
                homeless += _homeless([whole[key]], stored, checkpoint, parameters)
            if whole[key] in stored and set(stored[whole[key]].tensors) & adapted:
                problems.append(
                    f"The adapter holds '{whole[key]}' whole and updates it too, so it cannot be replaced: merge with "
                    "`saved_modules='ignore'` (`--saved_modules ignore`), which updates the instruct model's own."
                )
            elif whole[key] in stored:
                targets.append(Target(module, {name: stored[whole[key]]}, replacement=loaded.tensors[key]))
    elif copies and saved_modules is None:
        file_keys = _file_keys(copies, loaded, adapter)
        problems.append(
            f"The adapter file holds whole layers of the model it was trained on ({_first(file_keys)}), which PEFT saves "
            "for `modules_to_save`, trained biases, and where an embedding or output layer is a target or the vocabulary "
            "was resized. Choose: `saved_modules='ignore'` (`--saved_modules ignore`) keeps the instruct model's, "
            "`'replace'` takes the adapter's in their place. Untrained copies are best not saved, by "
            "`save_pretrained(..., save_embedding_layers=False)`."
        )
    if foreign:
        problems.append(
            f"The adapter targets layers that are not merged ({_first(foreign)}): train with linear layers as targets."
        )
    if tied_targets:
        modules_tied = _first([name.rpartition(".")[0] for name in tied_targets])
        problems.append(
            f"The adapter targets {modules_tied}, whose weight the instruct model shares between its embedding and its "
            "output layer, so the update would reach both: train without "
            f"{tied_targets[0].rpartition('.')[0].rpartition('.')[2]} as a target."
        )
    if homeless:
        problems.append(
            f"The instruct checkpoint does not hold what its configuration promises for {len(homeless)} targeted modules "
            f"({_first(homeless)}): pass an unquantised checkpoint, saved whole by `save_pretrained`."
        )
    return targets, problems


def _layer_keys(loaded: LoadedAdapter) -> set[str]:
    return {key for key in loaded.own if f".modules_to_save.{ADAPTER_NAME}." not in key}


def _file_keys(keys: list[str], loaded: LoadedAdapter, adapter: Mapping[str, torch.Tensor]) -> list[str]:
    by_tensor = {id(tensor): key for key, tensor in adapter.items()}
    return [by_tensor.get(id(loaded.tensors[key]), f"{PREFIX}{key}") for key in keys]


def _strangers(
    settings: Mapping[str, Any],
    adapter: Mapping[str, torch.Tensor],
    parameters: Mapping[str, list[int]],
    modules: set[str],
    adapted: set[str],
) -> list[str]:
    """Tensors of the adapter for which the model has no place, or its own settings name none."""
    mark = f".{PEFT_TYPE_TO_PREFIX_MAPPING[settings['peft_type']]}"
    stored: dict[str, str] = {}
    for key in adapter:
        if mark in key:
            module = key.removeprefix(PREFIX).partition(mark)[0]
            while module.endswith(".base_layer"):
                module = module.removesuffix(".base_layer")
            stored.setdefault(module, key)
    # Experts that a checkpoint or an old adapter names one by one are one module of the model.
    known = modules | {re.sub(r"\.experts\.\d+\..*", ".experts", module) for module in stored} & modules
    strangers = [module for module in stored if re.sub(r"(\.experts)\.\d+\..*", r"\1", module) not in known]
    problems = []
    if strangers:
        problems.append(
            f"{len(strangers)} of {len(stored)} modules in the adapter do not exist in the instruct model "
            f"({_first(strangers)}): pass the instruct model that was post-trained from the adapter's base model."
        )
    untargeted = [module for module in stored if module in modules and adapted and module not in adapted]
    if untargeted:
        problems.append(
            f"The adapter holds tensors for {len(untargeted)} modules that its own `target_modules` do not name "
            f"({_first(untargeted)}): {ADAPTER_CONFIG_FILE} and the weights do not belong together, save them again."
        )
    odd = [
        key for key in adapter if mark not in key and ".token_adapter." not in key and "trainable_tokens" not in key
    ]
    odd = [key for key in odd if _WHOLE.sub("", key.removeprefix(PREFIX)) not in parameters]
    if odd:
        problems.append(
            f"{len(odd)} tensors of the adapter belong to nothing in the instruct model ({_first(odd)}): pass the instruct "
            "model that was post-trained from the adapter's base model, and the adapter as PEFT saved it."
        )
    return problems


def _unfit(loaded: LoadedAdapter) -> list[str]:
    """Tensors that the adapter lacks, or has in another shape."""
    problems: list[str] = []
    missing: dict[str, list[str]] = {}
    for key, empty in loaded.own.items():
        if key not in loaded.tensors and empty.is_meta:
            path, _, rest = key.partition(f".{ADAPTER_NAME}")
            module, _, name = path.rpartition(".")
            missing.setdefault(module, []).append(name + rest.removesuffix(".weight"))
    if missing:
        listed = [f"{module} (no {' and no '.join(names)})" for module, names in missing.items()]
        problems.append(
            f"The adapter lacks tensors of {len(missing)} targeted modules ({_first(listed)}): save it again, with all its "
            "parameters gathered if it was trained under ZeRO-3 or FSDP, or pass the instruct model it fits."
        )
    misshapen = [
        f"{key.replace(f'.{ADAPTER_NAME}', '')} is {list(tensor.shape)}, not {list(loaded.own[key].shape)}"
        for key, tensor in loaded.tensors.items()
        if key in loaded.own and loaded.own[key].shape != tensor.shape
    ]
    if misshapen:
        problems.append(
            f"{len(misshapen)} tensors of the adapter have another shape than the instruct model asks for "
            f"({_first(misshapen)}): pass the instruct model of the size that the adapter was trained on."
        )
    return problems


def _homeless(
    names: Iterable[str],
    stored: Mapping[str, StoredParameter],
    checkpoint: Mapping[str, TensorInfo],
    shapes: Mapping[str, list[int]],
) -> list[str]:
    problems = []
    for name in names:
        if name not in stored:
            problems.append(f"{name} is missing")
        elif not stored[name].converter:
            tensor = stored[name].tensors[0]
            if checkpoint[tensor].shape != shapes.get(name, checkpoint[tensor].shape):
                problems.append(f"{tensor} is {checkpoint[tensor].shape}, not {shapes[name]}")
            elif checkpoint[tensor].dtype not in DTYPES:
                problems.append(f"{tensor} is of dtype {checkpoint[tensor].dtype}")
    return problems


def _first(items: list[str], count: int = 3) -> str:
    return "; ".join(items[:count]) + ("; ..." if len(items) > count else "")
