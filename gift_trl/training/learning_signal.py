"""Where the loss comes from: sums over the target tokens between two logs."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger


logger = get_logger(__name__)

# Edges between low, middle and high confidence, as in the paper's analysis of the learning signal
CONFIDENCE_BANDS = (0.2, 0.8)


class LearningSignal:
    """
    Sums over the target tokens of every process since the last log.

    Each forward pass only adds to sums on its device, without waiting for it and without talking to other processes.
    They are added over the processes once per log.

    Examples:
    ```python
    >>> signal = LearningSignal()
    >>> signal.add("train", confidences, weights, losses, mask, empty)
    >>> signal.gather("train", accelerator)
    >>> signal.take("train")
    {'nll': 1.31, 'gift/confidence_mean': 0.42, 'gift/weight_mean': 0.43, 'gift/signal_low': 0.17, ...}
    ```
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._metrics: dict[str, dict[str, float]] = {}

    def add(
        self,
        mode: str,
        confidences: torch.Tensor,
        weights: torch.Tensor,
        losses: torch.Tensor,
        mask: torch.Tensor,
        empty: torch.Tensor,
    ) -> None:
        """
        Adds a forward pass.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
            confidences (`torch.Tensor` of shape `(batch, seq_len - 1)`, float32):
                Confidence q of every next token.
            weights (`torch.Tensor` of shape `(batch, seq_len - 1)`, float32):
                Weight w of every next token.
            losses (`torch.Tensor` of shape `(batch, seq_len - 1)`):
                Cross-entropy ℓ of every next token.
            mask (`torch.Tensor` of shape `(batch, seq_len - 1)`, bool):
                Whether the next token is a target that counts. Others are left out.
            empty (`torch.Tensor` of shape `()`, bool):
                Whether the weights of the step add up to nothing.
        """
        with torch.no_grad():
            weights, losses = torch.where(mask, weights, 0.0), torch.where(mask, losses, 0.0)
            weighted = weights * losses
            low, high = CONFIDENCE_BANDS
            values = [
                mask.sum(),
                torch.where(mask, confidences, 0.0).sum(),
                weights.sum(),
                losses.sum(),
                torch.where(confidences < low, weighted, 0.0).sum(),
                torch.where((confidences >= low) & (confidences <= high), weighted, 0.0).sum(),
                torch.where(confidences > high, weighted, 0.0).sum(),
                empty,
            ]
            # In float32, a count stops growing at 16.8 million tokens
            dtype = torch.float32 if mask.device.type == "mps" else torch.float64
            sums = torch.stack([value.to(dtype) for value in values])
        self._sums[mode] = self._sums[mode] + sums if mode in self._sums else sums

    def clear(self, mode: str) -> None:
        """
        Forgets what was added and not taken.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
        """
        self._sums.pop(mode, None)
        self._metrics.pop(mode, None)

    def gather(self, mode: str, accelerator: Accelerator) -> None:
        """
        Adds the sums over the processes, all of which must call this, and warns once of steps without any weight.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
            accelerator ([`~accelerate.Accelerator`]):
                Accelerator of the trainer.
        """
        if mode not in self._sums:
            return
        sums = accelerator.reduce(self._sums.pop(mode)).tolist()
        tokens, confidence, weight, loss, low, mid, high, empty = sums
        if empty > 0:
            logger.warning_once(
                "At least one batch had no weight at all and taught nothing. Raise `confidence_floor`, or check "
                "that the rows have target tokens."
            )
        metrics = {}
        if tokens > 0:
            metrics["nll"] = loss / tokens
            metrics["gift/confidence_mean"] = confidence / tokens
            metrics["gift/weight_mean"] = weight / tokens
        if low + mid + high > 0:
            for name, part in (("low", low), ("mid", mid), ("high", high)):
                metrics[f"gift/signal_{name}"] = part / (low + mid + high)
        self._metrics[mode] = metrics

    def take(self, mode: str) -> dict[str, float]:
        """
        The metrics of the last [`gather`], once.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.

        Returns:
            `dict[str, float]`: `nll`, the cross-entropy per target token; `gift/confidence_mean` and
            `gift/weight_mean`, the means of q and w over the target tokens; `gift/signal_low`, `gift/signal_mid` and
            `gift/signal_high`, the shares of Σ w·ℓ that come from tokens with q < 0.2, 0.2 ≤ q ≤ 0.8 and q > 0.8.
        """
        return self._metrics.pop(mode, {})


def real_rows(inputs: Mapping[str, torch.Tensor], accelerator: Accelerator) -> torch.Tensor | None:
    """
    Finds the tokens of rows that the last batch of a pass repeats to give every process as many.

    Args:
        inputs (`Mapping[str, torch.Tensor]`):
            Batch of this process.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator of the trainer.

    Returns:
        `torch.Tensor` or `None`: Whether a token, or a whole row in padded batches, is none of them, of shape
        `(batch, seq_len)` or `(batch, 1)`. `None` if there are none.
    """
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0 or accelerator.num_processes == 1:
        return None
    labels = inputs["labels"]
    if "row_lengths" in inputs:  # padding-free: rows follow each other in one
        ends = inputs["row_lengths"].cumsum(0)
        rows = torch.bucketize(torch.arange(labels.shape[1], device=ends.device), ends, right=True)[None]
        count = len(ends)
    elif len(labels) == 1 and "attention_mask" not in inputs and "position_ids" in inputs:
        logger.warning_once(
            "The data collator does not say how long the rows are that it joins, so `nll` and `gift/*` of an evaluation in "
            "several processes count the rows that the last batch repeats. Let it give `row_lengths`, as "
            "`gift_trl.training.DataCollatorForGIFT` does, or evaluate in one process."
        )
        return None
    else:
        rows = torch.arange(len(labels), device=labels.device)[:, None]
        count = len(labels)
    # Rows of all processes, one process after the other, as `Accelerator.gather_for_metrics` cuts them
    return accelerator.process_index * count + rows < state.remainder
