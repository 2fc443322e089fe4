from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import IntervalStrategy
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from gift_trl import GIFTSFTTrainer, annotate_dataset
from gift_trl.training import DataCollatorForGIFT
from gift_trl.training.data_collator import RowDataCollator
from gift_trl.training.learning_signal import LearningSignal, real_rows


def test_shares_by_confidence():
    # One token in each band, the edges belonging to the middle; the last one is no target
    q = torch.tensor([[0.1, 0.2, 0.8, 0.9, 0.05]])
    weights = torch.tensor([[0.1, 0.2, 0.8, 0.9, 0.0]])
    losses = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    signal = LearningSignal()
    for _ in range(2):  # two forward passes between two logs
        signal.add("train", q, weights, losses, mask, torch.tensor(False))
    signal.gather("train", Accelerator(cpu=True))
    total = 0.4 + 0.6 + 1.6 + 0.9
    assert signal.take("train") == pytest.approx(
        {
            "nll": 2.5,
            "gift/confidence_mean": 0.5,
            "gift/weight_mean": 0.5,
            "gift/signal_low": 0.4 / total,
            "gift/signal_mid": 2.2 / total,
            "gift/signal_high": 0.9 / total,
        },
        rel=1e-6,
    )
    assert signal.take("train") == {}


def test_counts_do_not_stop_growing():
    # 2^24 + 1 is no float32
    signal = LearningSignal()
    ones = torch.ones(1, 2**22)
    for _ in range(4):
        signal.add("eval", ones, ones, ones, ones.bool(), torch.tensor(False))
    one = torch.ones(1, 1)
    signal.add("eval", one, one, 3 * one, one.bool(), torch.tensor(False))
    signal.gather("eval", Accelerator(cpu=True))
    assert signal.take("eval")["nll"] == (2**24 + 3) / (2**24 + 1)


def test_metrics_equal_a_count_over_the_tokens(pair, conversations, config, run):
    # Two accumulation steps and two optimizer steps between two logs, at learning rate 0
    trainer = run(
        config(
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=2,
            learning_rate=0.0,
        ),
        conversations,
        eval_dataset=conversations,
    )
    entry = trainer.state.log_history[0]
    metrics = trainer.evaluate()
    model = trainer.model.double().eval()
    sums = {"low": 0.0, "mid": 0.0, "high": 0.0}
    for row in annotate_dataset(conversations, pair[1]):
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for t, (label, q) in enumerate(zip(row["labels"], row["confidences"], strict=True)):
            if label != -100:
                weight = 1.0 if label == 2 else max(q, 1e-4)
                band = "low" if q < 0.2 else "high" if q > 0.8 else "mid"
                sums[band] -= weight * log_probs[t - 1, label].item()
    total = sum(sums.values())
    for band, share in sums.items():
        assert entry[f"gift/signal_{band}"] == pytest.approx(share / total, rel=1e-5), band
        assert metrics[f"eval_gift/signal_{band}"] == pytest.approx(share / total, rel=1e-5), band


def test_steps_after_the_last_log_are_logged_at_the_end(conversations, config, run):
    settings = {"per_device_train_batch_size": 2, "learning_rate": 0.0}
    every = run(config(max_steps=3, logging_steps=1, **settings), conversations).state.log_history
    some = run(config(max_steps=3, logging_steps=2, **settings), conversations).state.log_history
    assert some[-1]["nll"] == pytest.approx(every[2]["nll"], rel=1e-6)
    trainer = run(config(max_steps=3, logging_strategy="no", **settings), conversations)
    (last,) = trainer.state.log_history
    assert {"nll", "gift/confidence_mean", "gift/weight_mean", "gift/signal_low"} <= last.keys()
    # and none is left for the next training
    trainer.args.logging_strategy, trainer.args.logging_steps = IntervalStrategy.STEPS, 1
    trainer.train()
    assert trainer.state.log_history[0]["nll"] == pytest.approx(every[0]["nll"], rel=1e-6)


@pytest.mark.parametrize("collator", [DataCollatorForGIFT, RowDataCollator])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{}, {"padding_free": True}, {"padding_free": True, "pad_to_multiple_of": 16}],
    ids=["padded", "padding-free", "multiple"],
)
def test_rows_that_are_repeated_are_found(settings, packed, collator):
    # 2 processes × 2 rows: the last batch has one or three rows, and others that are repeated
    rows = [[10, 11, 12, 13, 14], [20, 21, 22]]
    examples = [{"input_ids": row, "labels": row, "confidences": [0.5] * len(row)} for row in rows]
    if packed:  # the first row is two that were joined before
        examples = [{**example, "seq_lengths": n} for example, n in zip(examples, [[2, 3], [3]], strict=True)]
    batch = collator(pad_token_id=0, **settings)(examples)
    for remainder, expected in ((1, [rows[0], []]), (3, [rows[0] + rows[1], rows[0]])):
        counted = []
        for process in range(2):
            accelerator = SimpleNamespace(
                num_processes=2,
                process_index=process,
                gradient_state=SimpleNamespace(end_of_dataloader=True, remainder=remainder),
            )
            real = real_rows(batch, accelerator).expand_as(batch["labels"])
            counted.append(batch["input_ids"][real & (batch["input_ids"] != 0)].tolist())
            accelerator.gradient_state.end_of_dataloader = False
            assert real_rows(batch, accelerator) is None
        assert counted == expected


def test_rows_joined_by_a_collator_of_ones_own_are_all_counted_and_warned_of(caplog):
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([{"input_ids": [10, 11]}] * 2)
    accelerator = SimpleNamespace(
        num_processes=2, process_index=1, gradient_state=SimpleNamespace(end_of_dataloader=True, remainder=1)
    )
    for _ in range(2):
        assert real_rows(batch, accelerator) is None
    assert caplog.text.count("does not say how long the rows are that it joins") == 1


@pytest.mark.parametrize("source", ["offline", "online"])
def test_the_lengths_of_rows_are_not_for_the_model(conversations, config, pair, lora, source):
    args = config(confidence_source=source, packing=True, max_length=128, per_device_train_batch_size=2)
    trainer = GIFTSFTTrainer(pair[0], args, train_dataset=conversations, peft_config=lora)
    rows = [trainer.train_dataset[i] for i in range(2)]
    assert trainer.data_collator(rows)["row_lengths"].tolist() == [len(row["input_ids"]) for row in rows]
    given = []
    models = (
        [trainer.model] if source == "offline" else [trainer.model, trainer._confidence_source._online._scorer.model]
    )
    for model in models:
        model.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs.keys()), with_kwargs=True)
    trainer.train()
    assert len(given) >= len(models)
    assert not any({"row_lengths", "confidences"} & names for names in given)


def test_nothing_is_exchanged_between_logs(pair, conversations, config, lora, monkeypatch):
    # The sums of a forward pass stay where they are until they are logged
    calls = []
    reduce = Accelerator.reduce
    monkeypatch.setattr(Accelerator, "reduce", lambda *args, **kwargs: calls.append(1) or reduce(*args, **kwargs))
    args = config(max_steps=4, per_device_train_batch_size=2, logging_steps=4)
    GIFTSFTTrainer(pair[0], args, train_dataset=conversations, peft_config=lora).train()
    assert len(calls) == 1


def test_a_step_without_weight_teaches_nothing_and_warns_once(pair, conversations, config, run, caplog):
    annotated = annotate_dataset(conversations, pair[1])
    zeros = annotated.map(lambda row: {"confidences": [0.0] * len(row["input_ids"])})
    trainer = run(config(confidence_floor=0.0, eos_confidence=None, max_steps=3), zeros)
    assert [entry["loss"] for entry in trainer.state.log_history[:3]] == [0.0] * 3
    assert all(not gradient.any() for gradient in trainer.recorder.gradients.values())
    assert caplog.text.count("had no weight at all and taught nothing") == 1
