"""What a training run needs on each GPU, from the shapes of the model alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


# TRL's head makes the logits of so many tokens and so many entries of the vocabulary at a time
_TILE = (4096, 32768)
# NF4: half a byte, and a scale of one byte for each block of 64, whose own scales are shared by 256 blocks
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Bytes that a training run needs on each GPU, beside what CUDA and the allocator keep for themselves.

    Args:
        weights (`int`):
            The base model.
        adapter (`int`):
            The adapter, its gradients and its optimizer state.
        activations (`int`):
            What the longest rows leave for the backward pass, at most.
    """

    weights: int
    adapter: int
    activations: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.weights + self.adapter + self.activations


def adapter_size(model: PreTrainedModel, target_modules: Sequence[str], rank: int) -> int:
    """
    Number of parameters of a LoRA adapter.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Base model, which may be on the meta device.
        target_modules (`Sequence[str]`):
            Last parts of the names of the modules that are adapted.
        rank (`int`):
            Rank r.

    Returns:
        `int`: The number of parameters, r · (inputs + outputs) for every module.
    """
    layers = [module for name, module in model.named_modules() if name.rpartition(".")[2] in target_modules]
    return sum(rank * sum(layer.weight.shape) for layer in layers)


def estimate_memory(
    model: PreTrainedModel,
    target_modules: Sequence[str],
    *,
    rank: int,
    rows: int,
    length: int,
    processes: int = 1,
    zero_stage: int = 0,
    load_in_4bit: bool = False,
) -> MemoryEstimate:
    """
    Estimates the memory of a LoRA training with AdamW, bf16 weights and activation checkpointing.

    Weights, adapter and optimizer state are counted: two bytes for each parameter of the base model, 16 for each of the
    adapter (in float32: itself, its gradient, two moments), 8 with a quantised base model, whose adapter is in bf16.
    Activations are 2·h·n bytes a token for the checkpoints of n layers of width h, and 46·h + 10·q + 4·k + 22·i + 18·r for
    the layer that is computed again, with q, k and i the widths of queries, keys and feed-forward network and r the rank:
    what PyTorch's profiler shows on a CPU (`tests/training/test_memory.py`). It has not been compared with a GPU.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Base model, which may be on the meta device.
        target_modules (`Sequence[str]`):
            Last parts of the names of the modules that are adapted.
        rank (`int`):
            Rank of the adapter.
        rows (`int`):
            Rows of a forward pass (`per_device_train_batch_size`).
        length (`int`):
            Tokens of a row, at most (`max_length`).
        processes (`int`, *optional*, defaults to `1`):
            Number of GPUs.
        zero_stage (`int`, *optional*, defaults to `0`):
            DeepSpeed's stage: 1 shares out the optimizer state, 2 the gradients, 3 the parameters.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether the linear layers of the base model are in NF4 with nested quantisation.

    Returns:
        [`MemoryEstimate`]: Bytes on each GPU.
    """
    weights = _weight_bytes(model, load_in_4bit)
    element = 2 if load_in_4bit else 4
    parameters = gradients = float(element * adapter_size(model, target_modules, rank))
    moments = 2 * parameters
    if zero_stage >= 1:
        moments /= processes
    if zero_stage >= 2:
        gradients /= processes
    if zero_stage >= 3:
        parameters /= processes
        # Each GPU gathers a module when it is its turn, and the next one meanwhile
        weights = weights / processes + 2 * _largest_module(model)
    tokens = rows * length
    return MemoryEstimate(
        round(weights),
        round(parameters + gradients + moments),
        _activations(model, rank, tokens),
    )


def _weight_bytes(model: PreTrainedModel, load_in_4bit: bool) -> float:
    quantised = set()
    if load_in_4bit:
        head = model.get_output_embeddings()
        linear = (
            module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head
        )
        quantised = {id(module.weight) for module in linear}
    return sum(p.numel() * (_NF4_BYTES if id(p) in quantised else 2) for p in model.parameters())


def _largest_module(model: PreTrainedModel) -> int:
    """Bytes in bf16 of the largest decoder layer, embedding or head."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    modules += [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    return max(2 * sum(p.numel() for p in module.parameters()) for module in modules)


def _activations(model: PreTrainedModel, rank: int, tokens: int) -> int:
    """Checkpoints, and the layer that is computed again or the head, whichever is larger."""
    config = model.config.get_text_config()
    width, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    keys = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    inner = getattr(config, "intermediate_size", None) or 4 * width
    layer = 46 * width + 10 * heads * head_dim + 4 * keys + 22 * inner + 18 * rank
    head = 2 * min(tokens, _TILE[0]) * _TILE[1] + 6 * tokens * width
    return tokens * 2 * width * config.num_hidden_layers + max(tokens * layer, head)
