"""Probability of every target token under a causal language model."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, is_peft_model
from datasets.utils import tqdm
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from gift_trl.model_pair import vocabulary_size


def unwrap_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, under the adapters it may be wrapped with."""
    return model.get_base_model() if is_peft_model(model) else model


@contextlib.contextmanager
def _scoring_head(model: PreTrainedModel) -> Iterator[None]:
    # TRL's fused head gives log-probabilities of the labels without the (batch, length, vocabulary) logits. The model
    # is the caller's: its forward is put back afterwards.
    target = unwrap_model(model)
    own_forward = target.__dict__.get("forward")
    was_training = model.training
    add_fused_lm_head(target)
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        if own_forward is None:
            del target.forward
        else:
            target.forward = own_forward


def token_budget_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """
    Groups rows of similar length so that no batch exceeds a number of tokens once padded.

    Args:
        lengths (`Sequence[int]`):
            Number of tokens of every row.
        tokens_per_batch (`int`):
            Upper bound of rows × longest row of a batch. A longer row is a batch of its own.

    Returns:
        `list[list[int]]`: Row indices of every batch, longest rows first, so that a memory error comes at the start.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # Sorted by length: the first row of a batch is its longest
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens_per_batch:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def score_tokens(
    model: PreTrainedModel,
    input_ids: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    row_names: Sequence[int] | None = None,
    tokens_per_batch: int = 4096,
    description: str = "Annotating",
) -> list[np.ndarray]:
    """
    Probability q of every target token: `q_t = p(y_t | x, y_<t)`, the confidence of the
    [GIFT paper](https://huggingface.co/papers/2605.01256).

    Every process scores its share of the batches and all of them return all rows.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model that scores the tokens. Runs in its own dtype with float32 soft-max statistics.
        input_ids (`Sequence[Sequence[int]]`):
            Token ids of every row.
        labels (`Sequence[Sequence[int]]`):
            Labels of every row, aligned with `input_ids`; `-100` marks tokens that are no targets.
        row_names (`Sequence[int]`, *optional*):
            Index by which an error names a row. Defaults to its position.
        tokens_per_batch (`int`, *optional*, defaults to `4096`):
            Upper bound of the padded number of tokens in one forward pass.
        description (`str`, *optional*, defaults to `"Annotating"`):
            Text of the progress bar.

    Returns:
        `list[np.ndarray]`: One float32 array a row, as long as its `input_ids`. Entry `i` is the probability of token
        `i` given the tokens before it; 0.0 where the label is `-100` and at position 0, which nothing predicts.

    Raises:
        `ValueError`: If a token id is outside the vocabulary, a row is longer than the model's positions, or the
            model gives NaN or infinity.
    """
    row_names = range(len(input_ids)) if row_names is None else row_names
    _check_rows(model, input_ids, row_names)
    state = PartialState()
    if state.num_processes > 1:
        digest = hashlib.sha256(b"".join(np.asarray(ids, dtype=np.int64).tobytes() for ids in input_ids)).hexdigest()
        if len(set(gather_object([digest]))) > 1:
            raise ValueError(
                "The processes were given different rows, so their confidences cannot be put together. Shuffle and "
                "split the data with the same seed in every process."
            )
    batches = token_budget_batches([len(ids) for ids in input_ids], tokens_per_batch)
    mine = batches[state.process_index :: state.num_processes]
    scored: dict[int, np.ndarray] = {}
    progress = tqdm(
        total=sum(len(input_ids[row]) for batch in mine for row in batch),
        desc=description,
        unit="tok",
        unit_scale=True,
        disable=not state.is_main_process,
        leave=False,
    )
    with _scoring_head(model), torch.no_grad(), progress:
        for batch in mine:
            scored.update(_score_batch(model, batch, input_ids, labels))
            progress.update(sum(len(input_ids[row]) for row in batch))
    if state.num_processes > 1:
        scored = {row: q for part in gather_object([scored]) for row, q in part.items()}
    # Checked after the gathering, so that every process fails with the same message instead of one waiting for another
    broken = [row_names[row] for row, q in sorted(scored.items()) if not np.isfinite(q).all()]
    if broken:
        raise ValueError(
            f"The model gave NaN or infinite probabilities for {len(broken)} rows, the first being row {broken[0]}. "
            "Score with another dtype (`instruct_model_init_kwargs: {dtype: float32}`), or check the checkpoint."
        )
    return [scored[row] for row in range(len(input_ids))]


def _score_batch(
    model: PreTrainedModel,
    batch: list[int],
    input_ids: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
) -> dict[int, np.ndarray]:
    width = max(len(input_ids[row]) for row in batch)
    ids = torch.zeros((len(batch), width), dtype=torch.long)
    targets = torch.full((len(batch), width), -100, dtype=torch.long)
    # The mask comes from the lengths, never from pad ids: the pad token is often the end-of-sequence token
    mask = torch.zeros((len(batch), width), dtype=torch.long)
    for i, row in enumerate(batch):
        n = len(input_ids[row])
        ids[i, :n] = torch.as_tensor(input_ids[row])
        targets[i, :n] = torch.as_tensor(labels[row])
        mask[i, :n] = 1
    device = model.get_input_embeddings().weight.device
    outputs = model(
        input_ids=ids.to(device), attention_mask=mask.to(device), labels=targets.to(device), fused_lm_head=True
    )
    # `log_probs` is zero where there is no target, and exp(0) is not the confidence of nothing
    # (rounding may put the probability of a certain token a last digit above 1)
    q = torch.where(outputs.label_mask, outputs.log_probs.float().exp().clamp(max=1.0), 0.0)
    q = torch.nn.functional.pad(q, (1, 0)).cpu().numpy()
    return {row: q[i, : len(input_ids[row])].copy() for i, row in enumerate(batch)}


def _check_rows(model: PreTrainedModel, input_ids: Sequence[Sequence[int]], row_names: Sequence[int]) -> None:
    size = vocabulary_size(model)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, ids in zip(row_names, input_ids, strict=True):
        if len(ids) and max(ids) >= size:
            raise ValueError(
                f"Row {name} holds the token id {max(ids)}, but the model's vocabulary has {size} rows. The data was "
                "tokenised for another model: use the instruct model's tokenizer."
            )
        if positions is not None and len(ids) > positions:
            raise ValueError(
                f"Row {name} is {len(ids)} tokens long, but the model has {positions} positions. Set `max_length` to "
                f"{positions} or less."
            )
