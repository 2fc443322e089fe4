import pytest
from huggingface_hub import ModelCard

from gift_trl import GIFTSFTTrainer
from gift_trl.training.model_card import AdapterFacts, make_adapter_card, may_be_replaced


def test_cards_of_a_run(pair, conversations, config, run, tmp_path):
    trainer = run(config(save_strategy="steps", save_steps=1), conversations)
    trainer.save_model()
    trainer.save_model(tmp_path / "elsewhere")
    for folder in ("out", "out/checkpoint-1", "elsewhere"):
        card = ModelCard.load(tmp_path / folder / "README.md")
        assert "More Information Needed" not in card.content, folder
        assert str(tmp_path) not in card.content and pair[0] not in card.content, folder
        # The pair has no name on the Hub, and a folder of this machine is no name
        assert card.data.base_model is None
        assert set(card.data.tags) == {"trl", "gift", "lora"} and card.data.library_name == "peft"
        assert "the base model `base`" in card.text and "merged into `instruct`" in card.text
        assert "| confidences | 8 rows by instruct, float32 |" in card.text
        assert "| rows per step | 8 = 8 × 1 × 1 (per device × accumulation steps × processes) |" in card.text
        assert "eprint        = {2605.01256}" in card.text


@pytest.mark.parametrize(
    "text",
    [
        b"---\n{}\n---\n\n# Ours\n\nWhat we found.\n",
        b"---\n{}\n---\n\n# Ours\n\nWhat we found.\n\n## Use\n\n[More Information Needed]\n",
        "# What we found, in Latin letters of 1987: caf\u00e9".encode("latin-1"),
    ],
    ids=["whole", "with a gap", "not UTF-8"],
)
def test_a_card_that_a_person_wrote_stays(pair, conversations, config, run, tmp_path, text, caplog):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_bytes(text)
    try:
        trainer = run(config(save_strategy="steps", save_steps=1), conversations)  # a checkpoint writes a card too
        assert b"What we found" in (tmp_path / "out" / "README.md").read_bytes()
        trainer.save_model()
    except UnicodeDecodeError:  # PEFT's own reading of it, after the weights are there
        pass
    assert b"What we found" in (tmp_path / "out" / "README.md").read_bytes()
    assert (tmp_path / "out" / "checkpoint-1" / "adapter_model.safetensors").is_file()
    assert "was written or changed by a person" in caplog.text


def test_a_card_that_a_person_has_extended_stays(pair, conversations, config, run, tmp_path):
    trainer = run(config(), conversations)
    trainer.save_model()
    card = tmp_path / "out" / "README.md"
    assert may_be_replaced(card)
    card.write_text(card.read_text().replace("## Training", "## What we found\n\nMuch.\n\n## Training"))
    trainer.save_model()
    trainer.create_model_card()
    assert "Much." in card.read_text()


def test_a_card_never_costs_a_training(pair, conversations, config, run, tmp_path, monkeypatch, caplog):
    trainer = run(config(), conversations)
    monkeypatch.setattr(GIFTSFTTrainer, "_make_card", lambda *_: 1 / 0)
    trainer.save_model()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert "The model card was not written" in caplog.text and "ZeroDivisionError" in caplog.text


def test_card_of_models_on_the_hub():
    facts = AdapterFacts(
        name="adapter",
        hub_id="me/adapter",
        base_model="Qwen/Qwen2.5-7B",
        instruct_model="Qwen/Qwen2.5-7B-Instruct",
        dataset="AI-MO/NuminaMath-CoT",
        tags=["trl", "gift"],
    )
    card = make_adapter_card(facts)
    assert card.data.base_model == "Qwen/Qwen2.5-7B" and card.data.base_model_relation == "adapter"
    assert card.data.datasets == "AI-MO/NuminaMath-CoT"
    assert "[Qwen/Qwen2.5-7B-Instruct](https://huggingface.co/Qwen/Qwen2.5-7B-Instruct)" in card.text
    assert "https://huggingface.co/datasets/AI-MO/NuminaMath-CoT" in card.text
    assert 'merge_adapter("me/adapter", "Qwen/Qwen2.5-7B-Instruct", "merged")' in card.text


def test_a_whole_model_is_no_adapter(pair, conversations, config, tmp_path):
    trainer = GIFTSFTTrainer(pair[0], config(), train_dataset=conversations)
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers" and "lora" not in card.data.tags
    assert "merge" not in card.text
