"""
Where the learning signal comes from: shares of the weighted loss by the confidence of the token.

The loss before training needs no model any more: where a model is the annotator, it is ℓ = −log q.
"""

from collections.abc import Sequence

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from gift_trl.lab.results import ScoredExample
from gift_trl.training import GIFTConfig
from gift_trl.training.learning_signal import CONFIDENCE_BANDS
from gift_trl.training.weights import token_weights


def token_shares(annotated: Dataset) -> tuple[float, ...]:
    """
    Shares of the target tokens by the confidence in them.

    Args:
        annotated ([`~datasets.Dataset`]):
            Dataset annotated by the instruct model.

    Returns:
        `tuple[float, ...]`: For each confidence band, from low to high, its share in percent.
    """
    confidences, labels = _columns(annotated)
    return _shares(confidences[:, 1:], (labels[:, 1:] != -100).float())


def signal_shares(
    annotated: Dataset,
    *,
    weighted_by: Dataset,
    trained: Dataset,
    args: GIFTConfig,
    end_of_turn_token_ids: Sequence[int],
) -> tuple[float, ...]:
    """
    Shares of the weighted loss Σ w·ℓ, before the first training step, by the instruct model's confidence.

    Args:
        annotated ([`~datasets.Dataset`]):
            Dataset annotated by the instruct model: sorts the tokens into bands.
        weighted_by ([`~datasets.Dataset`]):
            The same rows annotated by the method's annotator: gives w.
        trained ([`~datasets.Dataset`]):
            The same rows annotated by the model the method trains: gives ℓ.
        args ([`GIFTConfig`]):
            Exponent, floor and end-of-turn confidence of the weights.
        end_of_turn_token_ids (`Sequence[int]`):
            Token ids that end a turn.

    Returns:
        `tuple[float, ...]`: For each confidence band, from low to high, its share in percent.
    """
    confidences, labels = _columns(annotated)
    weights = token_weights(
        _columns(weighted_by)[0],
        labels,
        exponent=args.confidence_exponent,
        floor=args.confidence_floor,
        eos_confidence=args.eos_confidence,
        end_of_turn_token_ids=end_of_turn_token_ids,
    )
    # A probability below the smallest float would make one token an infinite share.
    probabilities = _columns(trained)[0][:, 1:].clamp(min=torch.finfo(torch.float32).tiny)
    return _shares(confidences[:, 1:], -weights * probabilities.log())


def pick_example(annotated: Dataset, mix: str, tokenizer: PreTrainedTokenizerBase) -> ScoredExample:
    """
    Picks the row that shows most of the range of confidences: the one whose rarest band has the most tokens.

    Args:
        annotated ([`~datasets.Dataset`]):
            Dataset annotated by the instruct model.
        mix (`str`):
            The mix it is from.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.

    Returns:
        [`ScoredExample`]: The example.
    """
    confidences, labels = _columns(annotated)
    targets = (labels != -100).float()
    counts = torch.stack([(targets * band).sum(1) for band in _bands(confidences)])
    row = annotated[int(counts.min(0).values.argmax())]
    tokens = [
        (str(tokenizer.convert_ids_to_tokens(token_id)), confidence)
        for token_id, label, confidence in zip(row["input_ids"], row["labels"], row["confidences"], strict=True)
        if label != -100
    ]
    return ScoredExample(mix, row["prompt"][0]["content"], tuple(tokens))


def _columns(annotated: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    confidences = [torch.tensor(row, dtype=torch.float32) for row in annotated["confidences"]]
    labels = [torch.tensor(row) for row in annotated["labels"]]
    return pad_sequence(confidences, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=-100)


def _bands(confidences: torch.Tensor) -> list[torch.Tensor]:
    low, high = CONFIDENCE_BANDS
    return [confidences < low, (confidences >= low) & (confidences <= high), confidences > high]


def _shares(confidences: torch.Tensor, amounts: torch.Tensor) -> tuple[float, ...]:
    amounts = amounts.double()
    return tuple(100 * float((amounts * band).sum() / amounts.sum()) for band in _bands(confidences))
