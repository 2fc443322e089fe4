"""PEFT's layers of an adapter, without weights: they are lent one layer of the instruct model at a time to merge."""

import functools
import itertools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import get_peft_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners import hira, ia3, loha, lokr, lora, miss
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from gift_trl.merging.products import Buffer, LoraProduct


ADAPTER_NAME = "default"
PREFIX = "base_model.model."

# Elements of the update that are made at a time: few enough to stay in a processor's cache, enough to run at full speed.
_BLOCK_ELEMENTS = 2**18
# Matrix products of fewer rows take other paths on a CPU, in which the last digit may come out differently.
_SMALLEST_BLOCK = 16
# The kernels of matrix products make some rows at a time, and take longer for what is left over.
_ROW_STEP = 8


@dataclass(frozen=True)
class AdapterLayer:
    """
    One of PEFT's layers, with the tensors that the adapter file has for it.

    Args:
        layer ([`~peft.tuners.tuners_utils.BaseTunerLayer`]):
            PEFT's layer, without weights.
        module (`str`):
            Name of the module that it adapts.
        parameters (`tuple[str, ...]`):
            Names of the parameters of that module which take part in the merge.
        tensors (`dict[str, torch.Tensor]`):
            The adapter's tensors by their name in the layer, read from the file where they are used.
    """

    layer: BaseTunerLayer
    module: str
    parameters: tuple[str, ...]
    tensors: dict[str, torch.Tensor] = field(repr=False)

    @property
    def merges_by_rows(self) -> bool:
        """
        Whether some rows of the weight are merged without the others: LoRA, DoRA on rows of outputs, LoHa, LoKr, IA3, HiRA,
        MiSS.
        """
        # Exactly these classes: their subclasses belong to other methods or kinds of layer.
        kind = type(self.layer)
        if kind is lora.Embedding:
            return not self.layer.lora_variant
        if kind is loha.Linear:
            return len(self.tensors) == 4
        if kind is lokr.Linear:
            return "lokr_w1" in self._factors and "lokr_t2" not in self._factors
        if kind in (ia3.Linear, hira.Linear):
            return not self.layer.fan_in_fan_out
        if kind is miss.MissLinear:
            # Other functions of MiSS mix rows, or repeat what they add to them
            return self.layer.miss_fn not in ("bat", "mini")
        if kind is not lora.Linear or self.layer.lora_bias[ADAPTER_NAME]:
            return False
        return not self.layer.lora_variant or (
            self.layer.use_dora[ADAPTER_NAME] and not self.layer.fan_in_fan_out and len(self.tensors) == 3
        )

    @property
    def _factors(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors by the name of what they are in it."""
        return {name.partition(".")[0]: tensor for name, tensor in self.tensors.items()}

    @property
    def _row_unit(self) -> int:
        """Rows that belong together: of LoKr's Kronecker product, those of one row of its first factor."""
        if type(self.layer) is not lokr.Linear:
            return 1
        factors = self._factors
        return len(factors["lokr_w2"] if "lokr_w2" in factors else factors["lokr_w2_a"])

    def merge(self, weights: Mapping[str, torch.Tensor], scale: float = 1.0) -> dict[str, torch.Tensor]:
        """
        Merges the adapter into the whole module, by PEFT's own layer.

        Args:
            weights (`Mapping[str, torch.Tensor]`):
                The module's parameters by their name in it. They may be changed in place.
            scale (`float`, *optional*, defaults to `1.0`):
                Factor of the update.

        Returns:
            `dict[str, torch.Tensor]`: The merged parameters, of the same shapes and dtypes.

        Raises:
            `RuntimeError`: If PEFT's layer did not merge.
        """
        return self._merge(weights, self.tensors, scale)

    def merge_rows(self, weight: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """
        Merges the adapter into a weight in place, a block of rows at a time.

        Args:
            weight (`torch.Tensor`):
                The weight, two-dimensional.
            scale (`float`, *optional*, defaults to `1.0`):
                Factor of the update.

        Returns:
            `torch.Tensor`: The weight.
        """
        merge = self.block_merger(weight.dtype, scale)
        for start, end in self.row_blocks(*weight.shape):
            weight[start:end] = merge(weight[start:end], start)
        return weight

    def block_merger(
        self, dtype: torch.dtype, scale: float = 1.0, buffer: Buffer | None = None
    ) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """
        Makes what merges the adapter into some rows of a weight.

        Plain LoRA on a half-precision weight is a [`~gift_trl.merging.products.LoraProduct`]; everything else is merged by
        PEFT's own layer, for a smaller module.

        Args:
            dtype (`torch.dtype`):
                Dtype of the weight.
            scale (`float`, *optional*, defaults to `1.0`):
                Factor of the update.
            buffer ([`~gift_trl.merging.products.Buffer`], *optional*):
                Float32 memory for a block, used again from call to call.

        Returns:
            `Callable[[torch.Tensor, int], torch.Tensor]`: Takes neighbouring rows, of shape `(N, columns)`, which may be
            changed in place, and the index of the first of them in the weight; returns the merged rows.
        """
        if self._is_plain and dtype in (torch.bfloat16, torch.float16):
            buffer = buffer or Buffer(torch.float32)
            return LoraProduct(self._factors["lora_A"], self._factors["lora_B"], self._scaling(scale), buffer).add_to
        return functools.partial(self._merge_block, scale=scale)

    def _merge_block(self, rows: torch.Tensor, start: int, scale: float) -> torch.Tensor:
        end = start + len(rows)
        tensors = {name: self._rows_of(name, tensor, start, end) for name, tensor in self.tensors.items()}
        # A layer that also merges a bias does so each time
        bias = {"bias": rows.new_zeros(len(rows))} if "bias" in self.parameters else {}
        return self._merge({"weight": rows, **bias}, tensors, scale)["weight"]

    def merge_bias(self, bias: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """
        Merges the adapter into a bias, where the weight is merged by rows.

        Args:
            bias (`torch.Tensor` of shape `(N,)`):
                The bias. It may be changed in place.
            scale (`float`, *optional*, defaults to `1.0`):
                Factor of the update.

        Returns:
            `torch.Tensor` of shape `(N,)`: The merged bias.
        """
        # PEFT's layer merges both at once, and any weight with as many rows does
        return self._merge({"weight": bias.new_zeros(len(bias), 1), "bias": bias}, self.tensors, scale)["bias"]

    def _rows_of(self, name: str, tensor: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """What some rows of the weight need of one of the adapter's tensors."""
        kind, factor = type(self.layer), name.partition(".")[0]
        if kind is loha.Linear:
            return tensor[start:end] if factor in ("hada_w1_a", "hada_w2_a") else tensor
        if kind is lokr.Linear:
            unit = self._row_unit
            return tensor[start // unit : end // unit] if factor == "lokr_w1" else tensor
        if kind is hira.Linear:
            return tensor[start:end] if factor == "hira_B" else tensor
        if kind is miss.MissLinear:  # whose columns are the rows of the weight
            return tensor[:, start:end]
        if kind is ia3.Linear:  # one factor for each row, or for each column
            return tensor if self.layer.is_feedforward else tensor[start:end]
        # The factor whose one dimension are the rows of the stored weight; the columns of A where that is transposed.
        if kind is lora.Embedding or self.layer.fan_in_fan_out:
            return tensor[:, start:end] if factor in ("lora_A", "lora_embedding_A") else tensor
        return tensor if factor == "lora_A" else tensor[start:end]

    @property
    def _is_plain(self) -> bool:
        layer = self.layer
        return (
            type(layer) is lora.Linear
            and not layer.lora_variant
            and not layer.fan_in_fan_out
            # In float64 PEFT multiplies in float64
            and all(tensor.dtype != torch.float64 for tensor in self.tensors.values())
        )

    def _scaling(self, scale: float) -> float:
        self.layer.set_scale(ADAPTER_NAME, scale)
        scaling = self.layer.scaling[ADAPTER_NAME]
        self.layer.set_scale(ADAPTER_NAME, 1.0)
        return scaling

    def row_blocks(self, num_rows: int, num_columns: int) -> list[tuple[int, int]]:
        """
        Cuts the rows of a weight into blocks of nearly the same size.

        Args:
            num_rows (`int`):
                Number of rows.
            num_columns (`int`):
                Number of columns.

        Returns:
            `list[tuple[int, int]]`: First row and row after the last of each block.
        """
        unit = self._row_unit
        step = unit if unit > 1 else _ROW_STEP
        rows = max(_SMALLEST_BLOCK, round(_BLOCK_ELEMENTS / max(1, num_columns) / step) * step)
        count = max(1, min(num_rows // rows, num_rows // unit))
        inner = [num_rows * i // count // step * step for i in range(count)]
        return list(itertools.pairwise([*inner, num_rows]))

    @torch.no_grad()
    def _merge(
        self, weights: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], scale: float
    ) -> dict[str, torch.Tensor]:
        layer, base_layer = self.layer, self.layer.get_base_layer()
        dtype = next(iter(weights.values())).dtype
        slots = [(base_layer, name, tensor) for name, tensor in weights.items()]
        for name, tensor in tensors.items():
            owner, _, attribute = name.rpartition(".")
            # PEFT keeps a half-precision adapter in float32 when it loads one, and so multiplies in float32.
            if tensor.is_floating_point():
                tensor = tensor.to(torch.promote_types(dtype, torch.float32))
            slots.append((layer.get_submodule(owner), attribute, tensor))
        lent = [(_slots_of(module, name), name, _slots_of(module, name)[name]) for module, name, _ in slots]
        try:
            for (held, name, _), (_, _, tensor) in zip(lent, slots, strict=True):
                held[name] = nn.Parameter(tensor, requires_grad=False) if held[name] is not None else None
            if scale != 1.0 and _has_scale(layer):
                layer.set_scale(ADAPTER_NAME, scale)
            layer.merge(adapter_names=[ADAPTER_NAME])
            # A layer without its adapter merges nothing and says nothing.
            if not layer.merged:
                raise RuntimeError(f"PEFT merged nothing into the layer of '{self.module}'.")
            merged = {name: base_layer._parameters[name].data for name in weights}
        finally:
            layer.merged_adapters.clear()
            if isinstance(layer, hira.HiraLayer):  # the next weights would be taken for those that it remembers
                layer._base_weight_before_merge = None
            if scale != 1.0 and _has_scale(layer):
                layer.set_scale(ADAPTER_NAME, 1.0)
            for held, name, empty in lent:
                held[name] = empty
        if any(tensor.is_meta for tensor in merged.values()):
            raise RuntimeError(f"PEFT merged nothing into the layer of '{self.module}'.")
        return merged


def _has_scale(layer: BaseTunerLayer) -> bool:
    # Rows of trained tokens take the place of the model's: a replacement is not scaled
    return not isinstance(layer, TrainableTokensLayer)


def _slots_of(module: nn.Module, name: str) -> dict[str, Any]:
    return module._parameters if name in module._parameters else module._buffers


@dataclass(frozen=True)
class LoadedAdapter:
    """
    What PEFT makes of an adapter on a model without weights.

    Args:
        layers (`list[AdapterLayer]`):
            Its layers.
        tensors (`dict[str, torch.Tensor]`):
            The adapter's tensors under the names that they have in the model, without [`PREFIX`].
        own (`dict[str, torch.Tensor]`):
            Everything that PEFT put into the model, by name, without values: what the file has to hold.
    """

    layers: list[AdapterLayer]
    tensors: dict[str, torch.Tensor]
    own: dict[str, torch.Tensor]


def load_adapter(
    settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], model: PreTrainedModel
) -> LoadedAdapter:
    """
    Puts an adapter on a model without weights, by PEFT.

    Args:
        settings (`Mapping[str, Any]`):
            Contents of `adapter_config.json`.
        tensors (`Mapping[str, torch.Tensor]`):
            Contents of the adapter file.
        model ([`~transformers.PreTrainedModel`]):
            The model. It is changed: PEFT puts its layers in.

    Returns:
        [`LoadedAdapter`]: The layers and their tensors.

    Raises:
        `ValueError`, `TypeError`, `KeyError`: If PEFT cannot do it.
    """
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[settings["peft_type"]]
    known = {key: value for key, value in settings.items() if key in config_class.__dataclass_fields__}
    known.pop("runtime_config", None)
    # Neither the initialisation nor the base model's name matters to layers whose weights come from a file.
    neutral = {"base_model_name_or_path": None, "inference_mode": True}
    if settings["peft_type"] == "LORA":
        neutral["init_lora_weights"] = False
    with warnings.catch_warnings(), no_init_weights():
        # PEFT warns of what is checked here, or was decided when the adapter was made.
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(
            model, config_class(**{**known, **neutral}), adapter_name=ADAPTER_NAME, low_cpu_mem_usage=True
        )
        renamed = _names_in_model(peft_model, tensors)
    peft_model.eval()
    layers, own = [], {}
    for name, module in peft_model.named_modules():
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        inside = {
            key: tensor
            for key, tensor in [*module.named_parameters(), *module.named_buffers()]
            # What the module had before, which no file of an adapter has to hold, and a layer of its own inside
            if not key.startswith(("base_layer.", "original_module.", "trainable_tokens_original.", "token_adapter."))
        }
        own.update({f"{name}.{key}".removeprefix(PREFIX): tensor for key, tensor in inside.items()})
        if isinstance(module, BaseTunerLayer):
            found = {key: renamed[f"{name}.{key}"] for key in inside if f"{name}.{key}" in renamed}
            layers.append(AdapterLayer(module, _module_name(name), _merged_parameters(module), found))
    return LoadedAdapter(layers, {key.removeprefix(PREFIX): value for key, value in renamed.items()}, own)


def _names_in_model(peft_model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # PEFT moves what it loads to where the base layer is, which here is nowhere: it would throw the values away, and merge
    # nothing afterwards, without a word. So its names are taken from it, and the values are kept.
    names: dict[str, torch.Tensor] = {}

    def keep(state_dict: Mapping[str, torch.Tensor], **kwargs: Any) -> _IncompatibleKeys:
        names.update(state_dict)
        return _IncompatibleKeys([], [])

    peft_model.load_state_dict = keep
    try:
        set_peft_model_state_dict(peft_model, dict(tensors), adapter_name=ADAPTER_NAME, low_cpu_mem_usage=True)
    finally:
        del peft_model.load_state_dict
    return names


def _module_name(name: str) -> str:
    name = name.removeprefix(PREFIX).removesuffix(".token_adapter")
    while name.endswith(".base_layer"):  # several adapted parameters of one module are wrapped in one another
        name = name.removesuffix(".base_layer")
    return name


def _merged_parameters(layer: BaseTunerLayer) -> tuple[str, ...]:
    if isinstance(layer, lora.ParamWrapper):
        return (layer.parameter_name,)
    held = tuple(name for name, parameter in layer.get_base_layer()._parameters.items() if parameter is not None)
    # LoRA leaves the bias alone unless it has one of its own, as do LoHa, LoKr, HiRA and MiSS; other methods may scale it.
    has_own_bias = isinstance(layer, lora.LoraLayer) and layer.lora_bias[ADAPTER_NAME]
    scales_columns = isinstance(layer, ia3.IA3Layer) and layer.is_feedforward
    spares_bias = isinstance(layer, lora.LoraLayer | LycorisLayer | hira.HiraLayer | miss.MissLayer)
    if (spares_bias and not has_own_bias) or scales_columns:
        return tuple(name for name in held if name != "bias")
    return held
