"""Log-probabilities of the target tokens from the hidden states, without the vocabulary-sized logits."""

import functools
import types
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from trl.trainer.utils import add_fused_lm_head, maybe_gather_lm_head_ctx


# Logits of 512 tokens × 2,048 vocabulary rows are 4 MB in float32: small enough for the processor's cache, and large
# enough for the matrix product to run at full speed
_TILE_TOKENS = 512
_TILE_VOCABULARY = 2048
# Matrix products of fewer rows take other paths on a CPU, in which the last digit depends on where a tensor happens to
# lie in memory: the same row would not always come out the same
SMALLEST_PRODUCT = 16


def add_scoring_head(model: PreTrainedModel) -> None:
    """
    Makes `model(..., labels=labels, fused_lm_head=True)` return log-probabilities of the labels instead of logits.

    On CUDA and XPU this is TRL's fused head, whose kernels score the target positions only. Elsewhere TRL projects every
    position on the whole vocabulary; there, this head projects the target positions, tile by tile.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, not wrapped. Its `forward` is replaced on the instance.
    """
    if model.device.type in ("cuda", "xpu"):
        add_fused_lm_head(model)
        return
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = logit_scale(config)
    original_forward = model.forward
    buffers: dict[str, torch.Tensor] = {}

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return original_forward(*args, **({} if labels is None else {"labels": labels}), **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        head = self.get_output_embeddings()
        device = head.weight.device
        hidden, labels = hidden.to(device), labels[:, 1:].to(device)
        mask = labels != -100
        with maybe_gather_lm_head_ctx(head.weight, head.bias):  # the weight is empty under ZeRO-3 until it is gathered
            log_probs = target_log_probs(
                hidden[:, :-1][mask],
                labels[mask],
                head.weight,
                head.bias,
                scale=scale,
                softcap=softcap,
                buffers=buffers,
            )
        return ModelOutput(log_probs=log_probs.new_zeros(mask.shape).masked_scatter_(mask, log_probs), label_mask=mask)

    model.forward = types.MethodType(forward, model)


def logit_scale(config: PreTrainedConfig) -> float:
    """
    Factor between the output of a model's head and its logits.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Text configuration of the model.

    Returns:
        `float`: The factor, before any soft-capping. Families name it differently, and some divide by it.
    """
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


def target_log_probs(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    buffers: dict[str, Any] | None = None,
) -> torch.Tensor:
    """
    `log softmax(hidden @ weight.T)` at the targets, in tiles, with an online log-sum-exp in float32.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            Hidden states of the positions that predict a target.
        targets (`torch.Tensor` of shape `(N,)`, int64):
            Token ids of the targets.
        weight (`torch.Tensor` of shape `(V, H)`):
            Weight of the head, in the dtype of `hidden`.
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Bias of the head.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor of the logits.
        softcap (`float`, *optional*):
            Logits are replaced by `softcap · tanh(logits / softcap)`.
        buffers (`dict[str, Any]`, *optional*):
            Holds the tile between calls: much of the time of a fresh large allocation goes into page faults.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32: Log-probabilities.
    """
    vocabulary, count = weight.shape[0], len(hidden)
    hidden = torch.nn.functional.pad(hidden, (0, 0, 0, -count % SMALLEST_PRODUCT))
    targets = torch.nn.functional.pad(targets, (0, -count % SMALLEST_PRODUCT))
    buffers = {} if buffers is None else buffers
    size = _TILE_TOKENS * min(_TILE_VOCABULARY, vocabulary)
    for name, dtype in (("logits", torch.float32), ("log_softmax", torch.float32), ("product", hidden.dtype)):
        if name not in buffers or buffers[name].device != hidden.device:
            same = name == "product" and dtype == torch.float32
            buffers[name] = buffers["logits"] if same else torch.empty(size, dtype=dtype, device=hidden.device)
    result = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(hidden), _TILE_TOKENS):
        rows = hidden[start : start + _TILE_TOKENS]
        ids = targets[start : start + _TILE_TOKENS]
        target_logits = torch.empty(len(rows), dtype=torch.float32, device=hidden.device)
        normalizer = torch.full_like(target_logits, float("-inf"))
        for low in range(0, vocabulary, _TILE_VOCABULARY):
            part = weight[low : low + _TILE_VOCABULARY]
            product, logits, log_softmax = (
                buffers[name][: len(rows) * len(part)].view(len(rows), len(part))
                for name in ("product", "logits", "log_softmax")
            )
            torch.mm(rows, part.T, out=product)
            if bias is not None:
                product.add_(bias[low : low + len(part)])
            if product.dtype != logits.dtype:
                logits.copy_(product)
            if scale != 1.0:
                logits.mul_(scale)
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            # One kernel for what would be four passes; the largest logit minus its log-probability is the tile's
            # log-sum-exp, without cancellation. A tile may be masked as a whole, with a bias of minus infinity
            torch.log_softmax(logits, dim=1, out=log_softmax)
            largest = logits.amax(dim=1)
            tile_normalizer = torch.where(largest == float("-inf"), largest, largest - log_softmax.amax(dim=1))
            torch.logaddexp(normalizer, tile_normalizer, out=normalizer)
            inside = (ids >= low) & (ids < low + len(part))
            found = logits.gather(1, (ids - low).clamp(0, len(part) - 1)[:, None])[:, 0]
            target_logits = torch.where(inside, found, target_logits)
        result[start : start + _TILE_TOKENS] = target_logits - normalizer
    return result[:count]
