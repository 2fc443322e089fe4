"""Rows of the chat format's tokens that the base model has not trained."""

from dataclasses import fields

import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from gift_trl import GIFTSFTTrainer
from gift_trl.training.token_rows import _checkpoint_names


START, END = 1, 2


@pytest.fixture
def untrained(pair, tokenizer, tmp_path):
    """Folder of a copy of the base model whose rows of `<|start|>` and `<|end|>` nothing has trained."""

    def make(change):
        model = AutoModelForCausalLM.from_pretrained(pair[0])
        with torch.no_grad():
            change(model.model.embed_tokens.weight)
            change(model.lm_head.weight)
        model.save_pretrained(tmp_path / "untrained")
        tokenizer.save_pretrained(tmp_path / "untrained")
        return str(tmp_path / "untrained")

    return make


def shrink(weight):
    weight[[START, END]] *= 1e-3


def make_equal(weight):
    weight[END] = weight[START]


def construct(base, config, dataset, lora, instruct=None, **settings):
    trainer = GIFTSFTTrainer(
        base, config(**settings), train_dataset=dataset, peft_config=lora, instruct_model=instruct
    )
    model = trainer.model.get_base_model()
    return trainer, model.model.embed_tokens.weight, model.lm_head.weight


@pytest.mark.parametrize(
    ("change", "reason"), [(shrink, "norm .*, the vocabulary's median is"), (make_equal, "equal to the row of")]
)
def test_untrained_rows_are_warned_of_and_borrowed(
    pair, conversations, config, lora, untrained, caplog, change, reason, tmp_path
):
    base = untrained(change)
    _, embedding, _ = construct(base, config, conversations, lora)
    (message,) = [record.message for record in caplog.records if "look untrained" in record.message]
    assert "2 tokens of the chat format" in message and "borrow_instruct_token_rows: true" in message
    assert "`<|start|>` (model.embed_tokens.weight: " in message and "lm_head.weight: " in message
    assert all(part in message for part in reason.split(" .*, "))
    own = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert torch.equal(embedding, own["model.embed_tokens.weight"])

    caplog.clear()
    trainer, embedding, head = construct(base, config, conversations, lora, borrow_instruct_token_rows=True)
    assert "look untrained" not in caplog.text
    instruct = AutoModelForCausalLM.from_pretrained(pair[1]).state_dict()
    trainer.train()
    for name, weight in (("model.embed_tokens.weight", embedding), ("lm_head.weight", head)):
        expected = own[name].clone()
        expected[[START, END]] = instruct[name][[START, END]]
        assert torch.equal(weight, expected), name
    # and they are no part of the adapter, which is merged into a model that has them
    trainer.save_model(tmp_path / "adapter")
    assert not any(
        "embed" in name or "head" in name for name in load_file(tmp_path / "adapter/adapter_model.safetensors")
    )
    assert "| instruct model's embedding rows | `<\\|start\\|>`, `<\\|end\\|>` |" in (
        tmp_path / "adapter/README.md"
    ).read_text(encoding="utf-8")


def test_the_head_of_what_is_never_predicted_is_no_matter(pair, conversations, config, lora, untrained, caplog):
    # `<|start|>` stands in prompts only; of such tokens base models often have an untrained row in the head
    base = untrained(lambda weight: None)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight[START] *= 1e-3
    model.save_pretrained(base)
    construct(base, config, conversations, lora)
    assert "look untrained" not in caplog.text
    everything = conversations.map(
        lambda row: {"messages": row["prompt"] + row["completion"]}, remove_columns=conversations.column_names
    )
    construct(base, config, everything.map(lambda row: {"messages": row["messages"] * 2}), lora)
    assert "`<|start|>` (lm_head.weight: norm" in caplog.text


def test_a_stream_is_not_read_ahead(pair, conversations, config, lora, untrained, caplog):
    read = []

    def rows():
        for row in conversations:
            read.append(1)
            yield row

    counts = []
    for source in ("offline", "online"):
        read.clear()
        stream = IterableDataset.from_generator(rows)
        if source == "online":
            construct(untrained(shrink), config, stream, lora, confidence_source="online", max_steps=1)
            assert "`<|start|>` (model.embed_tokens.weight: " in caplog.text  # from a rendered chat
        else:
            SFTTrainer(
                pair[0],
                SFTConfig(**{f.name: getattr(config(max_steps=1), f.name) for f in fields(SFTConfig) if f.init}),
                train_dataset=stream,
                peft_config=lora,
            )
        counts.append(len(read))
    assert counts[1] <= counts[0] + 2  # its first row, for the columns


def test_names_in_a_checkpoint_may_have_other_prefixes():
    keys = [
        "language_model.model.embed_tokens.weight",
        "vision_tower.embeddings.weight",
        "language_model.lm_head.weight",
    ]
    assert _checkpoint_names("model.language_model.embed_tokens.weight", keys) == keys[:1]
    assert _checkpoint_names("lm_head.weight", keys) == keys[2:]
    assert _checkpoint_names("transformer.wte.weight", ["wte.weight"]) == ["wte.weight"]
    assert _checkpoint_names("wte.weight", ["transformer.wte.weight"]) == ["transformer.wte.weight"]


def test_trained_rows_are_left_alone(pair, conversations, config, lora, caplog):
    # The base model has not seen these tokens, but its rows are like those of any other
    _, embedding, _ = construct(pair[0], config, conversations, lora, borrow_instruct_token_rows=True)
    assert "look untrained" not in caplog.text
    own = AutoModelForCausalLM.from_pretrained(pair[0]).state_dict()["model.embed_tokens.weight"]
    assert torch.equal(embedding, own)


def test_rows_that_the_instruct_model_has_not_trained_either_are_no_matter(
    conversations, config, lora, untrained, caplog
):
    base = untrained(shrink)
    construct(base, config, conversations, lora, instruct_model_name_or_path=base)
    assert "look untrained" not in caplog.text


def test_a_loaded_instruct_model_lends_too(pair, conversations, config, lora, untrained):
    instruct = AutoModelForCausalLM.from_pretrained(pair[1])
    options = {"instruct_model_name_or_path": None, "borrow_instruct_token_rows": True}
    _, embedding, _ = construct(untrained(shrink), config, conversations, lora, instruct, **options)
    assert torch.equal(embedding[END], instruct.model.embed_tokens.weight[END])


def test_rows_that_are_trained_are_not_borrowed(pair, conversations, config, untrained):
    base = untrained(shrink)
    with pytest.raises(ValueError, match="without an adapter every weight is trained"):
        construct(base, config, conversations, None, borrow_instruct_token_rows=True)
    lora = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match="the loaded model scores the tokens"):
        model = AutoModelForCausalLM.from_pretrained(base)
        construct(model, config, conversations, LoraConfig(), annotator="base", borrow_instruct_token_rows=True)
    with pytest.raises(ValueError, match="holds the instruct model's rows frozen, but the embedding"):
        construct(base, config, conversations, lora, borrow_instruct_token_rows=True)
