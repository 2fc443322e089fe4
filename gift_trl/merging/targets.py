"""Which tensors of the instruct checkpoint an adapter updates, and PEFT's arithmetic on one of them."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from huggingface_hub.utils import TensorInfo
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from gift_trl.merging.adapter import ADAPTER_CONFIG_FILE


_ADAPTER_NAME = "default"
_LORA_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


@dataclass(frozen=True)
class Target:
    """
    One tensor of the instruct checkpoint and the update that it receives.

    Args:
        layer ([`~peft.tuners.lora.Linear`]):
            PEFT's layer for it, without weights.
        lora_A (`str`):
            Name of the down projection in the adapter file.
        lora_B (`str`):
            Name of the up projection in the adapter file.
    """

    layer: lora.Linear
    lora_A: str
    lora_B: str

    @torch.no_grad()
    def merge(self, weight: torch.Tensor, adapter: safe_open, scale: float) -> torch.Tensor:
        """
        Adds the update to a weight, by PEFT's own layer.

        Args:
            weight (`torch.Tensor`):
                Weight of the instruct model, two-dimensional, of any floating dtype. It may be changed in place.
            adapter (`safe_open`):
                Open adapter file.
            scale (`float`):
                Factor of the update.

        Returns:
            `torch.Tensor`: The merged weight, of the same shape and dtype.

        Raises:
            `RuntimeError`: If PEFT's layer did not merge.
        """
        layer, base_layer = self.layer, self.layer.get_base_layer()
        slots = (
            (base_layer, weight),
            # PEFT keeps a half-precision adapter in float32 when it loads one, and so multiplies in float32.
            *(
                (factor[_ADAPTER_NAME], adapter.get_tensor(key).to(torch.promote_types(weight.dtype, torch.float32)))
                for factor, key in ((layer.lora_A, self.lora_A), (layer.lora_B, self.lora_B))
            ),
        )
        empty = [module.weight for module, _ in slots]
        try:
            for module, tensor in slots:
                module.weight = nn.Parameter(tensor, requires_grad=False)
            layer.set_scale(_ADAPTER_NAME, scale)
            layer.merge(adapter_names=[_ADAPTER_NAME])
            # A layer without its adapter merges nothing and says nothing.
            if not layer.merged:
                raise RuntimeError(f"PEFT merged nothing into the layer of '{self.lora_A}'.")
            return base_layer.weight.data
        finally:
            layer.merged_adapters.clear()
            for (module, _), parameter in zip(slots, empty, strict=True):
                module.weight = parameter


def build_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """
    Builds the instruct model without weights.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Its configuration.

    Returns:
        [`~transformers.PreTrainedModel`]: The model on the meta device.
    """
    # The class that TRL trains: the one named in the configuration, if transformers has it.
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config) if architecture is None else architecture(config)


def checkpoint_names(model: PreTrainedModel, tensors: list[str]) -> dict[str, str]:
    """
    Maps the parameters of a model to the tensors of its checkpoint, as transformers does on loading.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, which may be without weights.
        tensors (`list[str]`):
            Names in the checkpoint.

    Returns:
        `dict[str, str]`: Parameter name to tensor name. Parameters that transformers makes out of several tensors, or
        out of a part of one, are left out.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
    parameters = model.state_dict()
    names = {}
    for tensor in tensors:
        name, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, parameters)
        if name not in parameters and tensor in parameters:
            name, pattern = tensor, None
        if name in parameters and pattern is None:
            names[name] = tensor
    return names


def find_targets(
    settings: Mapping[str, Any],
    adapter: Mapping[str, TensorInfo],
    model: PreTrainedModel,
    checkpoint: Mapping[str, TensorInfo],
) -> tuple[dict[str, Target], list[str]]:
    """
    Matches the adapter's tensors with those of the instruct checkpoint. Reads no weights.

    Args:
        settings (`Mapping[str, Any]`):
            Contents of `adapter_config.json`.
        adapter (`Mapping[str, TensorInfo]`):
            Name, dtype and shape of the tensors of the adapter file.
        model ([`~transformers.PreTrainedModel`]):
            The instruct model without weights. It is changed: PEFT puts its layers in.
        checkpoint (`Mapping[str, TensorInfo]`):
            The same for the instruct checkpoint, all shards together.

    Returns:
        `tuple[dict[str, Target], list[str]]`: The update of each targeted tensor by its name in the checkpoint, and one
        sentence for each thing that does not fit.
    """
    problems = []
    stored: dict[str, dict[str, str]] = {}
    others = []
    for key in adapter:
        match = _LORA_KEY.fullmatch(key)
        if match:
            stored.setdefault(match["module"], {})[match["factor"]] = key
        else:
            others.append(key)
    copies = [key for key in others if not re.search(r"\.lora_[^.]+(\.|$)", key)]
    if copies:
        problems.append(
            f"The adapter file holds whole layers of the model it was trained on ({_first(copies)}), which PEFT saves when "
            "an embedding or output layer is a target or the vocabulary was resized; they would replace the instruct "
            "model's: save the adapter with `save_pretrained(..., save_embedding_layers=False)`."
        )
    variants = [key for key in others if key not in copies]
    if variants:
        problems.append(
            f"The adapter holds {len(variants)} tensors that are no LoRA A or B of a linear layer ({_first(variants)}), "
            "which are not merged: train plain LoRA with linear layers as targets."
        )

    names = checkpoint_names(model, list(checkpoint))
    modules = {name for name, _ in model.named_modules()}
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    strangers = [module for module in stored if module not in modules]
    if strangers:
        problems.append(
            f"{len(strangers)} of {len(stored)} modules in the adapter do not exist in the instruct model "
            f"({_first(strangers)}): pass the instruct model that was post-trained from the adapter's base model."
        )
    try:
        layers = _peft_layers(settings, model)
    except (TypeError, ValueError) as error:
        problems.append(f"PEFT cannot put this adapter on the instruct model: {error}")
        return {}, problems

    untargeted = [module for module in stored if module in modules and module not in layers]
    if untargeted:
        problems.append(
            f"The adapter holds tensors for {len(untargeted)} modules that its own `target_modules` do not name "
            f"({_first(untargeted)}): {ADAPTER_CONFIG_FILE} and the weights do not belong together, save them again."
        )
    targets, foreign, incomplete, misshapen, homeless = {}, [], [], [], []
    for module, layer in layers.items():
        factors = stored.get(module, {})
        # Exactly this class: its subclasses and siblings belong to other methods or kinds of layer.
        if type(layer) is not lora.Linear or layer.lora_variant:
            foreign.append(f"{module} ({type(layer.get_base_layer()).__name__})")
        elif f"{module}.weight" in tied:
            problems.append(
                f"The adapter targets {module}, whose weight the instruct model shares between its embedding and its "
                f"output layer, so the update would reach both: train without {module.rpartition('.')[2]} as a target."
            )
        elif set(factors) != {"A", "B"}:
            incomplete.append(f"{module} (no lora_{' and no lora_'.join(sorted({'A', 'B'} - set(factors)))})")
        else:
            wanted = {"A": layer.lora_A[_ADAPTER_NAME], "B": layer.lora_B[_ADAPTER_NAME]}
            misshapen += [
                f"{factors[factor]} is {adapter[factors[factor]].shape}, not {list(wanted[factor].weight.shape)}"
                for factor in "AB"
                if adapter[factors[factor]].shape != list(wanted[factor].weight.shape)
            ]
            tensor = names.get(f"{module}.weight")
            shape = list(layer.get_base_layer().weight.shape)
            if tensor is None:
                homeless.append(f"{module}.weight is missing")
            elif checkpoint[tensor].shape != shape:
                homeless.append(f"{tensor} is {checkpoint[tensor].shape}, not {shape}")
            elif checkpoint[tensor].dtype not in ("F64", "F32", "F16", "BF16"):
                homeless.append(f"{tensor} is of dtype {checkpoint[tensor].dtype}")
            else:
                targets[tensor] = Target(layer, factors["A"], factors["B"])
    if foreign:
        problems.append(
            f"The adapter targets layers that are not merged ({_first(foreign)}): train with linear layers as targets."
        )
    if incomplete:
        problems.append(
            f"The adapter lacks tensors of {len(incomplete)} targeted modules ({_first(incomplete)}): save it again, with "
            "all its parameters gathered if it was trained under ZeRO-3 or FSDP, or pass the instruct model it fits."
        )
    if misshapen:
        problems.append(
            f"{len(misshapen)} tensors of the adapter have another shape than the instruct model asks for "
            f"({_first(misshapen)}): pass the instruct model of the size that the adapter was trained on."
        )
    if homeless:
        problems.append(
            f"The instruct checkpoint does not hold what its configuration promises for {len(homeless)} targeted modules "
            f"({_first(homeless)}): pass an unquantised checkpoint, saved whole by `save_pretrained`."
        )
    return targets, problems


def _peft_layers(settings: Mapping[str, Any], model: PreTrainedModel) -> dict[str, nn.Module]:
    with warnings.catch_warnings():
        # PEFT warns of what is checked here, or was decided when the adapter was made.
        warnings.simplefilter("ignore")
        # Neither the initialisation nor the base model's name matters to layers whose weights come from a file.
        neutral = {"init_lora_weights": False, "base_model_name_or_path": None, "inference_mode": True}
        known = {key: settings[key] for key in settings if key in LoraConfig.__dataclass_fields__}
        known.pop("runtime_config", None)
        peft_config = LoraConfig(**{**known, **neutral})
        peft_model = get_peft_model(model, peft_config, adapter_name=_ADAPTER_NAME, low_cpu_mem_usage=True)
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module
        for name, module in peft_model.named_modules()
        if isinstance(module, lora.LoraLayer)
    }


def _first(items: list[str], count: int = 3) -> str:
    return "; ".join(items[:count]) + ("; ..." if len(items) > count else "")
