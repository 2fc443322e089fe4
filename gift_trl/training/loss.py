"""The GIFT loss."""

import torch


# Below this, the released code of the paper divides by the number of tokens instead of the sum of the weights
_EMPTY_WEIGHT = 1e-8


def weighted_loss(
    log_probs: torch.Tensor,
    label_mask: torch.Tensor,
    weights: torch.Tensor,
    *,
    normalization: str = "weights",
    denominator: torch.Tensor | int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Confidence-weighted cross-entropy of one forward pass: `Σ_t w_t · ℓ_t / denominator` with `ℓ_t = −log p(y_t)`, the
    loss of the [GIFT paper](https://huggingface.co/papers/2605.01256) up to the normalisation.

    Args:
        log_probs (`torch.Tensor` of shape `(batch, seq_len - 1)`):
            Log-probability of every next token; 0 where it is no target.
        label_mask (`torch.Tensor` of shape `(batch, seq_len - 1)`, bool):
            Whether the next token is a target.
        weights (`torch.Tensor` of shape `(batch, seq_len - 1)`, float32):
            Weight of every next token; 0 where it is no target.
        normalization (`str`, *optional*, defaults to `"weights"`):
            `weight_normalization` of [`GIFTConfig`].
        denominator (`torch.Tensor` of shape `()` or `int`, *optional*):
            Denominator of the whole optimizer step. Defaults to the one of this forward pass.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The loss, and whether the denominator was zero. Then the loss is a finite
        0, or with `"microbatch"` the plain mean that the released code takes.
    """
    losses = -log_probs
    num_tokens = label_mask.sum()
    if denominator is None:
        denominator = num_tokens if normalization == "tokens" else weights.sum()
    denominator = torch.as_tensor(denominator, device=log_probs.device)
    empty = denominator <= _EMPTY_WEIGHT
    # Divided by 1 instead of 0: a division by zero gives NaN gradients even where its result is not selected
    loss = (weights * losses).sum() / torch.where(empty, 1.0, denominator)
    if normalization == "microbatch":
        loss = torch.where(empty, losses.sum() / num_tokens.clamp(min=1), loss)
    return loss, empty
