import pytest
import torch

from gift_trl.training import DataCollatorForGIFT, token_weights
from gift_trl.training.loss import weighted_loss


LABELS = torch.tensor([[-100, 7, 2, 9], [5, 6, -100, -100]])
CONFIDENCES = torch.tensor([[0.0, 0.5, 0.25, 1e-6], [0.0, 0.9, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[0.5, 0.25, 1e-4], [0.9, 0.0, 0.0]]),
        ({"end_of_turn_token_ids": [2]}, [[0.5, 1.0, 1e-4], [0.9, 0.0, 0.0]]),
        ({"end_of_turn_token_ids": [2, 9]}, [[0.5, 1.0, 1.0], [0.9, 0.0, 0.0]]),
        ({"end_of_turn_token_ids": [2], "eos_confidence": None}, [[0.5, 0.25, 1e-4], [0.9, 0.0, 0.0]]),
        ({"exponent": 2.0, "floor": 0.1}, [[0.25, 0.0625, 0.01], [0.81, 0.0, 0.0]]),
        ({"exponent": 0.0}, [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]),
    ],
)
def test_token_weights(options, expected):
    torch.testing.assert_close(token_weights(CONFIDENCES, LABELS, **options), torch.tensor(expected))


def test_token_weights_are_computed_in_float32():
    weights = token_weights(CONFIDENCES.bfloat16(), LABELS, exponent=0.3)
    torch.testing.assert_close(weights, token_weights(CONFIDENCES.bfloat16().float(), LABELS, exponent=0.3))


@pytest.mark.parametrize("normalization", ["weights", "tokens", "microbatch"])
def test_a_batch_without_weight_gives_a_finite_loss_and_gradient(normalization):
    log_probs = torch.tensor([[-2.0, -4.0]], requires_grad=True)
    mask = torch.tensor([[True, True]])
    loss, empty = weighted_loss(log_probs, mask, torch.zeros(1, 2), normalization=normalization)
    loss.backward()
    assert torch.isfinite(log_probs.grad).all()
    # The released code falls back to the plain mean, the others to nothing
    assert loss.item() == (3.0 if normalization == "microbatch" else 0.0)
    assert empty.item() is (normalization != "tokens")


def test_a_batch_without_targets_gives_a_finite_loss():
    log_probs = torch.zeros(1, 2, requires_grad=True)
    for normalization in ("weights", "tokens", "microbatch"):
        loss, empty = weighted_loss(log_probs, torch.zeros(1, 2, dtype=torch.bool), torch.zeros(1, 2))
        assert loss.item() == 0.0 and empty.item(), normalization


def test_collator_pads_confidences_as_tokens():
    examples = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "confidences": [0.0, 0.5, 0.9]},
        {"input_ids": [4, 5], "labels": [-100, 5], "confidences": [0.0, 0.25]},
    ]
    batch = DataCollatorForGIFT(pad_token_id=0, pad_to_multiple_of=4)(examples)
    assert batch["confidences"].dtype == torch.float32
    torch.testing.assert_close(batch["confidences"], torch.tensor([[0.0, 0.5, 0.9, 0.0], [0.0, 0.25, 0.0, 0.0]]))
    assert batch["confidences"].shape == batch["input_ids"].shape == batch["labels"].shape
    flat = DataCollatorForGIFT(pad_token_id=0, padding_free=True)(examples)
    torch.testing.assert_close(flat["confidences"], torch.tensor([[0.0, 0.5, 0.9, 0.0, 0.25]]))


@pytest.mark.parametrize("value", [float("nan"), -0.5, 7.0])
def test_collator_refuses_what_is_no_probability(value):
    example = {"input_ids": [1, 2], "labels": [-100, 2], "confidences": [0.0, value]}
    with pytest.raises(ValueError, match="no probabilities"):
        DataCollatorForGIFT(pad_token_id=0)([example])


@pytest.mark.parametrize("confidences", [None, [0.0, 0.5]])
def test_collator_refuses_rows_that_do_not_align(confidences):
    example = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    if confidences is not None:
        example["confidences"] = confidences
    with pytest.raises(ValueError, match=rf"A row has 3 tokens and {len(confidences or [])} confidences"):
        DataCollatorForGIFT(pad_token_id=0)([example])
