from huggingface_hub import ModelCard

from gift_trl import GIFTSFTTrainer
from gift_trl.training.model_card import AdapterFacts, make_adapter_card


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


def test_a_card_that_a_person_wrote_stays(pair, conversations, config, run, tmp_path):
    trainer = run(config(), conversations)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "README.md").write_text("---\n{}\n---\n\n# Ours\n\nWhat we found.\n")
    trainer.save_model()
    assert "What we found." in (tmp_path / "out" / "README.md").read_text()


def test_card_of_models_on_the_hub():
    facts = AdapterFacts(
        name="adapter",
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
    assert 'merge_adapter("adapter", "Qwen/Qwen2.5-7B-Instruct", "merged")' in card.text


def test_a_whole_model_is_no_adapter(pair, conversations, config, tmp_path):
    trainer = GIFTSFTTrainer(pair[0], config(), train_dataset=conversations)
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers" and "lora" not in card.data.tags
    assert "merge" not in card.text
