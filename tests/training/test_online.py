"""`confidence_source="online"`: the same loss as confidences made before the training."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from gift_trl import GIFTSFTTrainer, annotate_dataset


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"weight_normalization": "tokens", "confidence_exponent": 2.0, "eos_confidence": None},
        {"weight_normalization": "microbatch", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"packing": True, "max_length": 128, "per_device_train_batch_size": 2},
        {"padding_free": True, "max_length": None, "per_device_train_batch_size": 4},
        {"max_length": 20},
        {"annotator": "base"},
    ],
    ids=["padded", "accumulation", "tokens", "microbatch", "packing", "padding-free", "truncated", "base"],
)
def test_online_trains_as_offline(conversations, config, run, relative_difference, adapter_weights, settings):
    offline = run(config(max_steps=3, **settings), conversations)
    online = run(config(max_steps=3, confidence_source="online", **settings), conversations)
    assert "confidences" not in online.train_dataset.column_names
    assert relative_difference(adapter_weights(online), adapter_weights(offline)) < 1e-6
    for ours, theirs in zip(online.state.log_history[:3], offline.state.log_history[:3], strict=True):
        for name in ("loss", "nll", "gift/confidence_mean", "gift/weight_mean", "gift/signal_low", "gift/signal_high"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


def test_online_scores_streams_and_evaluation_sets(
    pair, conversations, config, run, adapter_weights, relative_difference
):
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 2}
    # A stream is read in order; so is this set
    offline = run(
        config(**settings, train_sampling_strategy="sequential"), conversations, eval_dataset={"a": conversations}
    )
    stream = conversations.to_iterable_dataset()
    online = run(config(**settings, confidence_source="online"), stream, eval_dataset={"a": conversations})
    assert relative_difference(adapter_weights(online), adapter_weights(offline)) < 1e-6
    ours, theirs = (
        next(entry for entry in trainer.state.log_history if "eval_a_loss" in entry) for trainer in (online, offline)
    )
    for name in ("eval_a_loss", "eval_nll", "eval_gift/confidence_mean", "eval_gift/signal_mid"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert online.evaluate(conversations)["eval_loss"] == pytest.approx(ours["eval_a_loss"], rel=1e-6)


def test_rows_made_on_the_fly(pair, tokenizer, conversations, config, run, adapter_weights, relative_difference):
    """Neither tokenised nor stored: the collator does it, anew for every batch."""
    pad = DataCollatorForLanguageModeling(pad_token_id=0)

    def collate(rows):
        chats = [row["prompt"] + row["completion"] for row in rows]
        ids = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in chats]
        return pad([{"input_ids": row, "labels": row} for row in ids])

    settings = {"max_steps": 2, "per_device_train_batch_size": 4}
    made = run(
        config(
            confidence_source="online",
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            **settings,
        ),
        conversations,
        data_collator=collate,
    )
    stored = run(config(completion_only_loss=False, **settings), conversations)
    # The chat template ends a conversation with a line break, which prompt-completion rows have too
    assert relative_difference(adapter_weights(made), adapter_weights(stored)) < 1e-6


def test_the_instruct_model_stays_as_it_is(pair, conversations, config, run):
    instruct = AutoModelForCausalLM.from_pretrained(pair[1])
    before = {name: value.clone() for name, value in instruct.state_dict().items()}
    run(
        config(instruct_model_name_or_path=None, confidence_source="online", learning_rate=0.5, max_steps=3),
        conversations,
        instruct_model=instruct,
    )
    assert not instruct.training
    for name, value in instruct.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in instruct.parameters())


def test_what_cannot_be_scored_online_is_refused(pair, conversations, config, lora):
    model = AutoModelForCausalLM.from_pretrained(pair[0])

    def construct(dataset=conversations, model=pair[0], settings=None, **kwargs):
        args = config(**{"confidence_source": "online", **(settings or {})})
        return GIFTSFTTrainer(model, args, train_dataset=dataset, peft_config=lora, **kwargs)

    with pytest.raises(ValueError, match=r"has `confidences`, and `confidence_source` is 'online'"):
        construct(annotate_dataset(conversations, pair[1]))
    with pytest.raises(ValueError, match="must stay as it is, and the one given is to be trained"):
        construct(model=model, settings={"annotator": "base"})
    with pytest.raises(ValueError, match="must stay as it is, and the one given is to be trained"):
        construct(model=model, instruct_model=model, settings={"instruct_model_name_or_path": None})
    with pytest.raises(ValueError, match="must stay as it is, and the one given is to be trained"):
        adapted = get_peft_model(model, copy.deepcopy(lora))
        construct(model=adapted, instruct_model=model, settings={"instruct_model_name_or_path": None})
    with pytest.raises(ValueError, match="would be scored without the first"):
        construct(settings={"packing": True, "packing_strategy": "wrapped"})
    with pytest.raises(ValueError, match="scores in the processes of the run"):
        construct(settings={"annotation_engine": "vllm", "annotation_base_url": "http://localhost:1"})
    with pytest.raises(ValueError, match="choose one of"):
        construct(settings={"confidence_source": "sometimes"})


def test_wrong_tokens_are_refused_at_the_first_batch(pair, config, lora):
    rows = [[5, 6, 7, 400], [8, 9, 10, 11]]
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    args = config(confidence_source="online")
    trainer = GIFTSFTTrainer(pair[0], args, train_dataset=dataset, peft_config=lora)
    with pytest.raises(ValueError, match=r"the token id 400, but the instruct model's vocabulary has 384 rows"):
        trainer.train()
