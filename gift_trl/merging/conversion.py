"""How the parameters of a model are stored in a checkpoint: under other names, transposed, or expert by expert."""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import transformers
from huggingface_hub.utils import TensorInfo
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.initialization import no_init_weights


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredParameter:
    """
    A parameter of a model and the tensors of the checkpoint that hold it.

    Args:
        name (`str`):
            Name of the parameter.
        tensors (`tuple[str, ...]`):
            Names of the tensors, in the order in which transformers puts them together.
        patterns (`tuple[str, ...]`):
            For each tensor, the pattern of the converter that it matches; empty if the parameter is stored as it is.
        converter (`WeightConverter`, *optional*):
            What transformers makes the parameter of the tensors with.
        model ([`~transformers.PreTrainedModel`], *optional*):
            The model without weights, whose configuration the converter reads.
    """

    name: str
    tensors: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    converter: WeightConverter | None = None
    model: PreTrainedModel | None = None

    def assemble(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """
        Makes the parameter of the stored tensors, as transformers does on loading.

        Args:
            tensors (`Mapping[str, torch.Tensor]`):
                The stored tensors by name.

        Returns:
            `torch.Tensor`: The parameter; the tensor itself if it is stored as it is.
        """
        if self.converter is None:
            return tensors[self.tensors[0]]
        converter = copy.deepcopy(self.converter)
        for tensor, pattern in zip(self.tensors, self.patterns, strict=True):
            converter.add_tensor(self.name, tensor, pattern, tensors[tensor])
        made = converter.convert(self.name, model=self.model, config=self.model.config)[self.name]
        return made[0] if isinstance(made, list) else made

    def take_apart(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Makes the stored tensors of the parameter, as transformers does on saving.

        Args:
            parameter (`torch.Tensor`):
                The parameter.

        Returns:
            `dict[str, torch.Tensor]`: The tensors by their names in the checkpoint.
        """
        if self.converter is None:
            return {self.tensors[0]: parameter}
        return revert_weight_conversion(self.model, {self.name: parameter})


def build_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """
    Builds a model without weights.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Its configuration.

    Returns:
        [`~transformers.PreTrainedModel`]: The model on the meta device.
    """
    # The class that TRL trains: the one named in the configuration, if transformers has it.
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"), no_init_weights():
        return AutoModelForCausalLM.from_config(config) if architecture is None else architecture(config)


def stored_parameters(model: PreTrainedModel, checkpoint: Mapping[str, TensorInfo]) -> dict[str, StoredParameter]:
    """
    Finds the tensors of a checkpoint that hold each parameter of a model, by transformers' own rules for loading.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, which may be without weights.
        checkpoint (`Mapping[str, TensorInfo]`):
            Name, dtype and shape of the tensors of the checkpoint.

    Returns:
        `dict[str, StoredParameter]`: By parameter name. Left out are parameters that share a tensor with others, and those
        that transformers cannot take apart into the very tensors that it made them of.
    """
    parameters = model.state_dict()
    sources, converters = _sources(model, checkpoint)
    found = {}
    for name, parts in sources.items():
        tensors, patterns = zip(*parts, strict=True)
        if None not in patterns:
            stored = StoredParameter(name, tensors, patterns, converters[patterns[0]], model)
            if name in parameters and _comes_back(stored, checkpoint, parameters[name]):
                found[name] = stored
        elif name in parameters and len(tensors) == 1:
            found[name] = StoredParameter(name, tensors)
    return found


def misfits(model: PreTrainedModel, checkpoint: Mapping[str, TensorInfo]) -> list[str]:
    """
    Finds what a model needs and a checkpoint does not hold, which transformers would fill with random values.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, which may be without weights.
        checkpoint (`Mapping[str, TensorInfo]`):
            Name, dtype and shape of the tensors of the checkpoint.

    Returns:
        `list[str]`: A few words for each parameter that is missing or has another shape.
    """
    sources, converters = _sources(model, checkpoint)
    made = set(sources)
    for converter in converters.values():
        if len(converter.target_patterns) > 1:  # one tensor holds several parameters: the others are not named
            made |= {name for name in model.state_dict() if any(p in name for p in converter.target_patterns)}
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    optional = model._keys_to_ignore_on_load_missing or ()
    found = []
    for name, parameter in model.state_dict().items():
        if name not in made:
            if name not in tied and not any(re.search(pattern, name) for pattern in optional):
                found.append(f"{name} is missing")
        elif name in sources and len(sources[name]) == 1 and sources[name][0][1] is None:
            info = checkpoint[sources[name][0][0]]
            if list(info.shape) != list(parameter.shape):
                found.append(f"{name} is {list(info.shape)}, not {list(parameter.shape)}")
    # Of tied parameters, one has to be there.
    for name, other in model.all_tied_weights_keys.items():
        if name not in made and other not in made:
            found.append(f"{other} is missing")
    return found


def _sources(
    model: PreTrainedModel, checkpoint: Iterable[str]
) -> tuple[dict[str, list[tuple[str, str | None]]], dict[str, WeightConverter]]:
    """The tensors that each parameter is made of, with the patterns by which a converter takes them; the converters."""
    mapping = get_model_conversion_mapping(model)
    renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
    parameters = model.state_dict()
    sources: dict[str, list[tuple[str, str | None]]] = {}
    for tensor in sorted(checkpoint, key=dot_natural_key):
        name, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, parameters)
        if name not in parameters and tensor in parameters:
            name, pattern = tensor, None
        sources.setdefault(name, []).append((tensor, pattern))
    return sources, {pattern: converter for converter in converters for pattern in converter.source_patterns}


def _comes_back(stored: StoredParameter, checkpoint: Mapping[str, TensorInfo], parameter: torch.Tensor) -> bool:
    infos = {tensor: checkpoint[tensor] for tensor in stored.tensors}
    if len({info.dtype for info in infos.values()}) > 1 or any(info.dtype not in DTYPES for info in infos.values()):
        return False
    empty = {
        tensor: torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta") for tensor, info in infos.items()
    }
    try:
        made = stored.assemble(empty)
        if made.shape != parameter.shape:
            return False
        parts = stored.take_apart(made)
    except (KeyError, RuntimeError, ValueError, TypeError, IndexError):
        return False  # what its own rules cannot convert, transformers would not load either
    return {tensor: part.shape for tensor, part in parts.items()} == {
        tensor: part.shape for tensor, part in empty.items()
    }
