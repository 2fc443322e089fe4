"""From confidences to token weights."""

from collections.abc import Sequence

import torch


def token_weights(
    confidences: torch.Tensor,
    labels: torch.Tensor,
    *,
    exponent: float = 1.0,
    floor: float = 1e-4,
    eos_confidence: float | None = 1.0,
    end_of_turn_token_ids: Sequence[int] | torch.Tensor = (),
) -> torch.Tensor:
    """
    Weight of every token that the model predicts: `w_t = max(q_t, floor) ** exponent`.

    With the exponent 1 and up to the floor, this is the weight q_t of the
    [GIFT paper](https://huggingface.co/papers/2605.01256).

    Args:
        confidences (`torch.Tensor` of shape `(batch, seq_len)`):
            Confidence of every token, aligned with the labels.
        labels (`torch.Tensor` of shape `(batch, seq_len)`):
            Labels; `-100` marks tokens that are no targets.
        exponent (`float`, *optional*, defaults to `1.0`):
            Exponent.
        floor (`float`, *optional*, defaults to `1e-4`):
            Smallest confidence before the exponent is applied.
        eos_confidence (`float` or `None`, *optional*, defaults to `1.0`):
            Confidence of the tokens that end a turn. `None` keeps theirs.
        end_of_turn_token_ids (`Sequence[int]` or `torch.Tensor`, *optional*):
            Token ids that end a turn. A tensor on the device of the labels is not copied there.

    Returns:
        `torch.Tensor` of shape `(batch, seq_len - 1)`, float32: Entry `t` weighs the prediction of token `t + 1`; 0.0
        where that token is no target. This is the only place where confidences are shifted.
    """
    confidences, labels = confidences[:, 1:].float(), labels[:, 1:]
    if eos_confidence is not None and len(end_of_turn_token_ids) > 0:
        ends = torch.isin(labels, torch.as_tensor(end_of_turn_token_ids, device=labels.device))
        confidences = confidences.masked_fill(ends, eos_confidence)
    weights = confidences.clamp(min=floor).pow(exponent)
    return weights.masked_fill(labels == -100, 0.0)
