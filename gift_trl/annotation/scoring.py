"""Probability of every target token under a causal language model in this process."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedConfig, PreTrainedModel

from gift_trl.annotation.head import SMALLEST_PRODUCT, add_scoring_head
from gift_trl.annotation.rows import Row


# On a CPU a large batch gains nothing over a row, and its activations leave the cache (benchmarks/annotation.py); on a
# GPU nothing is gained beyond the upper bound
CPU_TOKENS = 1024
_GPU_TOKENS = (2048, 32_768)
# Tokens of the pass that compares the head with the model's own logits, and the largest mean difference of
# log-probabilities that rounding explains
_CHECKED_TOKENS = 32
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_PRECISION_TOLERANCE = 0.1


class ModelScorer:
    """
    Scores rows with a model in this process: `q_t = p(y_t | x, y_<t)`.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model with the head of [`add_scoring_head`].
        run (`Any`, *optional*):
            What runs its forward pass where that is not the model itself: the DeepSpeed engine that holds its shards.
    """

    def __init__(self, model: PreTrainedModel, run: Any = None):
        self.model = model
        self._run = model if run is None else run

    def check(self, input_ids: np.ndarray | torch.Tensor) -> None:
        """
        Compares the head with the model's own logits on the first of some tokens.

        The head rebuilds what the model does between its hidden states and its logits, and an architecture may do more
        there than is known.

        Args:
            input_ids (`np.ndarray` or `torch.Tensor` of shape `(seq_len,)`):
                Any tokens.

        Raises:
            `ValueError`: If they differ by more than rounding.
        """
        ids = torch.as_tensor(input_ids[None, :_CHECKED_TOKENS])
        ours = self._forward(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        logits = self._forward(input_ids=ids).logits
        theirs = logits[:, :-1].double().log_softmax(-1).gather(2, ids[:, 1:, None].to(logits.device))[..., 0]
        difference = (ours.to(theirs) - theirs).abs().mean().item()
        # Not a number in both is the data's or the weights' fault, and is reported with its row
        if difference > _TOLERANCE.get(self.model.dtype, _HALF_PRECISION_TOLERANCE):
            raise ValueError(
                f"The architecture `{type(unwrap_model(self.model)).__name__}` changes its logits in a way that is not "
                f"known here: log-probabilities differ by {difference:.2g} from those of its own forward pass. Its "
                "confidences, and TRL's own loss, would be wrong. Report the architecture."
            )

    def score(self, batches: Iterable[list[Row]], passes: int = 0) -> Iterator[tuple[Row, np.ndarray]]:
        """
        Scores batches of rows.

        Args:
            batches (`Iterable[list[Row]]`):
                Batches, each of which is one forward pass.
            passes (`int`, *optional*, defaults to `0`):
                Number of forward passes to make in all, where every process must make as many as the others because
                each holds a part of the weights.

        Yields:
            `tuple[Row, np.ndarray]`: A row and the float32 probabilities of its targets, in the order of
            `row.targets`.
        """
        made = 0
        for batch in batches:
            yield from zip(batch, self._score_batch(batch), strict=True)
            made += 1
        ids = torch.zeros((1, 2), dtype=torch.long)
        for _ in range(made, passes):
            self._forward(input_ids=ids, labels=ids, fused_lm_head=True)

    def score_collated(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Scores a batch as a data collator has made it.

        Args:
            inputs (`dict[str, torch.Tensor]`):
                `input_ids` and `labels` of shape `(batch, seq_len)`, and whatever else tells the model which tokens
                see each other (`attention_mask`, or `position_ids` of rows without padding).

        Returns:
            `torch.Tensor` of shape `(batch, seq_len)`, float32: Probability of every token that is a target, aligned
            with the labels; 0.0 elsewhere. On the device of the labels.
        """
        labels = inputs["labels"]
        log_probs = self._forward(**inputs, fused_lm_head=True).log_probs.to(labels.device, torch.float32)
        q = log_probs.exp().clamp(max=1.0).masked_fill(labels[:, 1:] == -100, 0.0)
        return torch.nn.functional.pad(q, (1, 0))

    def _score_batch(self, batch: list[Row]) -> list[np.ndarray]:
        lengths = [len(row.input_ids) for row in batch]
        width = max(max(lengths), math.ceil(SMALLEST_PRODUCT / len(batch)))
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for i, row in enumerate(batch):
            ids[i, : lengths[i]] = torch.as_tensor(row.input_ids)
            labels[i, row.targets] = torch.as_tensor(row.target_ids)
        inputs = {"input_ids": ids, "labels": labels}
        if min(lengths) < width:
            # From the lengths, never from pad ids: the pad token is often the end-of-sequence token
            inputs["attention_mask"] = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
        outputs = self._forward(**inputs, fused_lm_head=True)
        # Rounding may put the probability of a certain token a last digit above 1
        q = outputs.log_probs.float().exp().clamp(max=1.0).cpu().numpy()
        return [q[i, row.targets - 1] for i, row in enumerate(batch)]

    def _forward(self, **inputs: Any) -> Any:
        embedding: Any = self.model.get_input_embeddings()
        device = embedding.weight.device
        inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        return self._run(**inputs)


@contextlib.contextmanager
def scorer_of(model: PreTrainedModel, run: Any = None) -> Iterator[ModelScorer]:
    """
    A scorer of a loaded model, which is left as it was.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model.
        run (`Any`, *optional*):
            What runs its forward pass where that is not the model itself.

    Yields:
        [`ModelScorer`]: The scorer.
    """
    target = unwrap_model(model)
    own_forward = target.__dict__.get("forward")
    in_training = [module for module in model.modules() if module.training]
    add_scoring_head(target)
    model.eval()
    try:
        with torch.no_grad():
            yield ModelScorer(model, run)
    finally:
        for module in in_training:  # each for itself: some may have been in evaluation mode
            module.training = True
        if own_forward is None:
            del target.forward
        else:
            target.forward = own_forward


def unwrap_model(model: Any) -> PreTrainedModel:
    """The model itself, under the adapters it may be wrapped with."""
    return model.get_base_model() if is_peft_model(model) else model


def default_tokens_per_batch(model: PreTrainedModel) -> int:
    """
    Padded tokens of a forward pass that fit beside the weights.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model on its device.

    Returns:
        `int`: Number of tokens; on a GPU a power of two.
    """
    if model.device.type != "cuda":
        return CPU_TOKENS
    return tokens_that_fit(
        model.config, model.dtype, min(torch.cuda.mem_get_info(device)[0] for device in _devices(model))
    )


def tokens_that_fit(config: PreTrainedConfig, dtype: torch.dtype, free: int) -> int:
    """
    Padded tokens of a forward pass that fit into free memory of a GPU.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the model.
        dtype ([`torch.dtype`]):
            Dtype of its activations.
        free (`int`):
            Bytes that are free beside its weights.

    Returns:
        `int`: Number of tokens, a power of two.
    """
    config = config.get_text_config()
    hidden = config.hidden_size
    # Alive at once in a layer: residual, normalised and attention states, and the three intermediate ones of the MLP
    # (of every expert a token is sent to)
    experts = getattr(config, "num_experts_per_tok", None) or 1
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    bytes_per_token = dtype.itemsize * (8 * hidden + 3 * experts * intermediate)
    tokens = free // 2 // bytes_per_token
    low, high = _GPU_TOKENS
    return min(high, max(low, 1 << max(0, int(tokens).bit_length() - 1)))


def _devices(model: PreTrainedModel) -> set[torch.device]:
    return {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}


def describe_quantization(model: PreTrainedModel) -> str | None:
    """
    Quantisation method of a model.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.

    Returns:
        `str` or `None`: Method, such as `"bitsandbytes"`; `None` if the model is not quantised.
    """
    config = getattr(unwrap_model(model).config, "quantization_config", None)
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    return str(getattr(method, "value", method))
