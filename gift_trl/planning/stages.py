"""A training step and an annotation pass, traced on a model that is no more than its configuration."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import trl.kernels.chunked_logprob as chunked_logprob
import trl.trainer.utils as trl_utils
from peft import PeftConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, masking_utils

from gift_trl.annotation.head import add_scoring_head
from gift_trl.planning.trace import CostTrace, Operation
from gift_trl.training.loss import weighted_loss


@dataclass(frozen=True)
class Batch:
    """
    Tokens of a forward pass.

    Args:
        rows (`int`):
            Rows.
        length (`int`):
            Tokens of each.
        targets (`int`):
            Target tokens of all rows together.
        masked (`bool`, *optional*, defaults to `False`):
            Whether the rows differ in length, or several share one, so that attention needs a mask.
    """

    rows: int
    length: int
    targets: int
    masked: bool = False


@dataclass(frozen=True)
class StageCosts:
    """
    What a pass costs.

    Args:
        peak (`int`):
            Most bytes that are live at once, parameters and their gradients left out.
        operations (`Mapping[Operation, int]`):
            How often every operation is done.
    """

    peak: int
    operations: Mapping[Operation, int]

    @property
    def flops(self) -> int:
        """Floating-point operations of matrix products and attention."""
        return sum(operation.flops * count for operation, count in self.operations.items())


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """
    Builds a model without weights.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Its configuration, which is not changed.
        dtype ([`torch.dtype`], *optional*, defaults to `torch.bfloat16`):
            Its dtype.

    Returns:
        [`~transformers.PreTrainedModel`]: The model on the meta device.
    """
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)


def trace_training_step(
    config: PreTrainedConfig,
    peft_config: PeftConfig | None,
    batch: Batch,
    *,
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype = torch.float32,
    autocast_dtype: torch.dtype | None = torch.bfloat16,
    checkpointing: bool = True,
    quantised: bool = False,
    on_gpu: bool = True,
    whole: bool = False,
) -> StageCosts:
    """
    Traces the forward and the backward pass of a micro-batch, as [`GIFTSFTTrainer`] makes them.

    The model's own class, PEFT's layers and TRL's head run on tensors without content. As every layer but the first and the
    last costs the same, a model of few layers is traced twice, and what more layers cost is linear in their number.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the base model.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The adapter; `None` trains every parameter.
        batch ([`Batch`]):
            The micro-batch.
        dtype ([`torch.dtype`], *optional*, defaults to `torch.bfloat16`):
            Of the base model.
        adapter_dtype ([`torch.dtype`], *optional*, defaults to `torch.float32`):
            Of the adapter, as the layers see it.
        autocast_dtype ([`torch.dtype`], *optional*, defaults to `torch.bfloat16`):
            Of autocast; `None` without.
        checkpointing (`bool`, *optional*, defaults to `True`):
            Whether activations are checkpointed.
        quantised (`bool`, *optional*, defaults to `False`):
            Whether the linear layers' weights are unpacked for every use (QLoRA).
        on_gpu (`bool`, *optional*, defaults to `True`):
            Whether the kernels are those of a GPU.
        whole (`bool`, *optional*, defaults to `False`):
            Whether all layers are traced.

    Returns:
        [`StageCosts`]: The costs; the optimizer's state and step are not among them.
    """

    def run(config: PreTrainedConfig) -> CostTrace:
        model: Any = build_skeleton(config, dtype)
        layers = _decoder_layers(model)
        trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        if quantised:
            _unpack_weights(model)
        if peft_config is not None:
            model = get_peft_model(model, copy.deepcopy(peft_config), low_cpu_mem_usage=True)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(adapter_dtype)
        if checkpointing:
            model.enable_input_require_grads()
            # Before transformers 5.23 it has the other name, which is deprecated since
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        with _pass(model.train(), batch, on_gpu) as (trace, inputs):
            weights = torch.empty((batch.rows, batch.length - 1))
            _name_phases(layers, trace)
            with torch.autocast("cpu", autocast_dtype, enabled=autocast_dtype is not None):
                outputs = model(**inputs, fused_lm_head=True, use_cache=False)
            weighted_loss(outputs.log_probs, outputs.label_mask, weights)[0].backward()
        return trace

    return _for_all_layers(config, run, whole)


@torch.no_grad()
def trace_annotation(
    config: PreTrainedConfig,
    batch: Batch,
    *,
    dtype: torch.dtype = torch.bfloat16,
    quantised: bool = False,
    on_gpu: bool = True,
    whole: bool = False,
) -> StageCosts:
    """
    Traces a forward pass that scores the target tokens.

    Args:
        config, batch, dtype, quantised, on_gpu, whole:
            As for [`trace_training_step`], of the instruct model.

    Returns:
        [`StageCosts`]: The costs.
    """

    def run(config: PreTrainedConfig) -> CostTrace:
        model = build_skeleton(config, dtype)
        layers = _decoder_layers(model)
        if quantised:
            _unpack_weights(model)
        with _pass(model.eval(), batch, on_gpu) as (trace, inputs):
            if on_gpu:
                trl_utils.add_fused_lm_head(model)
            else:
                add_scoring_head(model)
            _name_phases(layers, trace)
            model(**inputs, fused_lm_head=True)
        return trace

    return _for_all_layers(config, run, whole)


def _for_all_layers(config: PreTrainedConfig, run: Callable[[PreTrainedConfig], CostTrace], whole: bool) -> StageCosts:
    text = config.get_text_config()
    layers, kinds = text.num_hidden_layers, getattr(text, "layer_types", None)
    period = 1
    if kinds:
        period = next(p for p in range(1, layers + 1) if all(kinds[i] == kinds[i % p] for i in range(layers)))
    # The first layer shares its input with the embedding, and the first ones of some families are dense
    few = period + max(1, getattr(text, "first_k_dense_replace", None) or 0)
    few += (layers - few) % period
    if whole or few + period >= layers:
        trace = run(config)
        return StageCosts(max(trace.peaks.values()), dict(trace.operations))
    first, second = (run(_with_layers(config, n)) for n in (few, few + period))
    more = (layers - few) // period
    peaks = [a + more * (b - a) for a, b in zip(_peaks(first), _peaks(second), strict=True)]
    counts = {
        operation: first.operations[operation] + more * (second.operations[operation] - first.operations[operation])
        for operation in first.operations | second.operations
    }
    return StageCosts(max(peaks), counts)


def _peaks(trace: CostTrace) -> list[int]:
    """Peaks before the head, in the head, and in the backward pass of the layers, which is highest in the last one."""
    backward = [peak for phase, peak in trace.peaks.items() if phase.startswith("layer")]
    return [trace.peaks["forward"], trace.peaks["head"], max(backward, default=0)]


def _with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    text.num_hidden_layers = layers
    return config


def _decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    count = model.config.get_text_config().num_hidden_layers
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise ValueError(
            f"`{type(model).__name__}` keeps its layers in a way that is not known here, so its costs cannot be estimated."
        )
    return list(found[0])


@contextlib.contextmanager
def _pass(model: nn.Module, batch: Batch, on_gpu: bool) -> Iterator[tuple[CostTrace, dict[str, torch.Tensor]]]:
    """Runs what is inside on tensors without content, and follows it."""
    trace = CostTrace(batch.targets)
    with FakeTensorMode(), contextlib.ExitStack() as stack:
        _empty_tensors(model)
        for tensor in (*model.parameters(), *model.buffers()):
            trace.ignore(tensor)
        for parameter in model.parameters():
            if parameter.requires_grad:
                # Counted by whoever knows how they are shared out
                parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        if on_gpu:
            _use_gpu_kernels(model, trace, stack)
        ids = torch.empty((batch.rows, batch.length), dtype=torch.long)
        inputs = {"input_ids": ids, "labels": ids}
        if batch.masked:
            inputs["attention_mask"] = torch.empty_like(ids)
        # Without content, positions do not say that a row is one sequence
        stack.enter_context(patch.object(masking_utils, "find_packed_sequence_indices", lambda positions: None))
        stack.enter_context(trace)
        trace.enter("forward")
        yield trace, inputs


def _empty_tensors(model: nn.Module) -> None:
    """Puts tensors of a CPU without content in place of those of the meta device, which has fewer kernels."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                if id(old) not in made:
                    made[id(old)] = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), old.requires_grad)
                module._parameters[name] = made[id(old)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _name_phases(layers: list[nn.Module], trace: CostTrace) -> None:
    def follow(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _: trace.enter(f"layer {index}"))
            if index == len(layers) - 1 and trace.phase == "forward":  # it comes by again when it is recomputed
                trace.enter("head")

        return hook

    for index, layer in enumerate(layers):
        layer.register_forward_hook(follow(index))


def _use_gpu_kernels(model: nn.Module, trace: CostTrace, stack: contextlib.ExitStack) -> None:
    """Has what a GPU does in other kernels than a CPU allocate and cost what it does there."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            # One kernel, which leaves a mask of a byte for each element
            module.__dict__["forward"] = functools.partial(_drop_out, module)

    def fold(name: str, accesses: int) -> Callable[..., None]:
        def kernel(tile: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            trace.count(Operation(name, tile.dtype, tuple(tile.shape), 0, accesses * tile.numel() * tile.itemsize))

        return kernel

    def add_product(acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        shape = (1, *a.shape, b.shape[1])
        moved = a.nbytes + b.nbytes + 2 * acc.nbytes
        trace.count(Operation("addmm", a.dtype, shape, 2 * a.numel() * b.shape[1], moved))

    attention = nn.functional.scaled_dot_product_attention

    def without_dropout(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> torch.Tensor:
        return attention(*args, **kwargs)

    # Flash attention drops out by itself, where a CPU would make the whole matrix
    stack.enter_context(patch.object(nn.functional, "scaled_dot_product_attention", without_dropout))
    # TRL's head with its Triton kernels, which work in place, and for the targets alone
    stack.enter_context(patch.object(trl_utils, "_use_triton", lambda device: True))
    stack.enter_context(patch.object(chunked_logprob, "_forward_tile", fold("head_forward", 1)))
    stack.enter_context(patch.object(chunked_logprob, "_backward_tile", fold("head_backward", 2)))
    stack.enter_context(patch.object(chunked_logprob, "_addmm_fp32", add_product))


def _drop_out(module: nn.Dropout, x: torch.Tensor) -> torch.Tensor:
    return torch.native_dropout(x, module.p, True)[0] if module.training else x


class _UnpackedLinear(torch.autograd.Function):
    """A product with a weight that is unpacked before it, in the forward and in the backward pass, as bitsandbytes does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return nn.functional.linear(x, weight.clone(), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0] @ ctx.weight.clone(), None, None


def _unpack_weights(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.__dict__["forward"] = functools.partial(_unpacked_forward, module)


def _unpacked_forward(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return _UnpackedLinear.apply(x.to(module.weight.dtype), module.weight, module.bias)
