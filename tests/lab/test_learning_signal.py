"""Shares of the learning signal, against sums done by hand."""

import math

import pytest
from datasets import Dataset

from gift_trl.lab.learning_signal import pick_example, signal_shares, token_shares
from gift_trl.lab.pair import make_tokenizer
from gift_trl.training import GIFTConfig


EOS = 1
LABELS = [[-100, -100, 40, 41, 42, EOS], [-100, 43, EOS]]


def _annotated(confidences: list[list[float]]) -> Dataset:
    rows = [
        {"input_ids": [40 if label == -100 else label for label in labels], "labels": labels, "confidences": row}
        for labels, row in zip(LABELS, confidences, strict=True)
    ]
    for index, row in enumerate(rows):
        row["prompt"] = [{"role": "user", "content": f"question {index}"}]
    return Dataset.from_list(rows)


INSTRUCT = _annotated([[0, 0, 0.1, 0.5, 0.9, 0.95], [0, 0.85, 0.7]])
BASE = _annotated([[0, 0, 0.3, 0.4, 0.6, 0.5], [0, 0.0, 0.2]])
FLAT_LOW, FLAT_MIDDLE, FLAT_HIGH = [0.1], [0.5, 0.7], [0.9, 0.95, 0.85]


def _config(**changes) -> GIFTConfig:
    return GIFTConfig("unused", bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", **changes)


def test_token_shares():
    assert token_shares(INSTRUCT) == pytest.approx((100 / 6, 200 / 6, 300 / 6))


def test_plain_cross_entropy_of_the_instruct_model():
    parts = [sum(-math.log(q) for q in band) for band in (FLAT_LOW, FLAT_MIDDLE, FLAT_HIGH)]
    shares = signal_shares(
        INSTRUCT,
        weighted_by=INSTRUCT,
        trained=INSTRUCT,
        args=_config(confidence_exponent=0.0),
        end_of_turn_token_ids=[EOS],
    )
    assert shares == pytest.approx([100 * part / sum(parts) for part in parts], rel=1e-5)


def test_gift_weighs_the_base_model_by_the_instruct_model():
    # Weights: the instruct model's confidence, 1 at the end of a turn. Losses: the base model's, the smallest float
    # standing in for a probability of 0.
    tiny = -math.log(1.1754943508222875e-38)
    low = 0.1 * -math.log(0.3)
    middle = 0.5 * -math.log(0.4) + 1.0 * -math.log(0.2)
    high = 0.9 * -math.log(0.6) + 1.0 * -math.log(0.5) + 0.85 * tiny
    shares = signal_shares(INSTRUCT, weighted_by=INSTRUCT, trained=BASE, args=_config(), end_of_turn_token_ids=[EOS])
    total = low + middle + high
    assert shares == pytest.approx((100 * low / total, 100 * middle / total, 100 * high / total), rel=1e-5)


def test_example_shows_every_band():
    example = pick_example(INSTRUCT, "A", make_tokenizer())
    assert example.question == "question 0"
    assert [round(confidence, 2) for _, confidence in example.tokens] == [0.1, 0.5, 0.9, 0.95]
    assert example.tokens[-1][0] == "<eos>"
