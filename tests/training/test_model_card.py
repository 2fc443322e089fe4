import json
from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard

from gift_trl import GIFTSFTTrainer
from gift_trl.cards import Source, TrainingFacts, may_be_replaced
from gift_trl.checkpoints import TRAINING_FILE
from gift_trl.training.model_card import dataset_sources, learning_signal, make_adapter_card


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
        assert set(card.data.tags) == {"trl", "sft", "gift", "lora"} and card.data.library_name == "peft"
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


@pytest.mark.parametrize("killed", ["before the card is written", "while the card is written"])
def test_a_process_that_was_killed_leaves_no_card_that_stays(pair, conversations, config, run, killed, monkeypatch):
    trainer = run(config(), conversations)
    card = Path(trainer.args.output_dir, "README.md")
    trainer.save_model()
    whole = card.read_text()

    def write_half(self, path):
        Path(path).write_text(str(self)[:100])
        raise KeyboardInterrupt

    def write_nothing(*args, **kwargs):
        raise KeyboardInterrupt

    if killed.startswith("while"):
        monkeypatch.setattr(ModelCard, "save", write_half)
    else:
        monkeypatch.setattr("gift_trl.training.trainer.write_card", write_nothing)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_model()
    monkeypatch.undo()
    assert pair[0] not in card.read_text()
    trainer.save_model()
    assert card.read_text() == whole


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


def test_facts_of_a_run(pair, conversations, config, run, tmp_path):
    trainer = run(config(max_steps=2), conversations)
    trainer.save_model()
    text = (tmp_path / "out" / TRAINING_FILE).read_text()
    assert str(tmp_path) not in text and pair[0] not in text and pair[1] not in text
    facts = TrainingFacts.from_dict(json.loads(text))
    assert (facts.base_model, facts.instruct_model) == (Source("base"), Source("instruct"))
    assert facts.settings["confidence_exponent"] == 1.0 and facts.settings["r"] == 4
    logs = [log for log in trainer.state.log_history if "gift/signal_low" in log][:2]
    assert facts.signal["step"] == [1, 2]
    assert facts.signal["low"] == [round(log["gift/signal_low"], 4) for log in logs]


def test_long_learning_signals_are_thinned():
    names = ("gift/signal_low", "gift/signal_mid", "gift/signal_high")
    logs = [{"step": 10 * i, **dict.fromkeys(names, i / 1000)} for i in range(1, 251)]
    signal = learning_signal([{"step": 1, "eval_loss": 1.0}, *logs, {"step": 2500, "train_loss": 1.0}])
    assert signal["step"] == [*range(30, 2500, 30), 2500]
    assert signal["mid"][:2] == [0.002, 0.005] and signal["high"][-1] == 0.25
    assert learning_signal([{"step": 1, "loss": 1.0}]) == {}


def test_datasets_are_known_by_their_cache(monkeypatch):
    commit = "06c749b9d3e976922e38512c383711923b3efead"
    files = [
        f"/home/cache/user___data/default/0.0.0/{commit}/cache-9d4f326bc6d727a9.arrow",
        f"/home/cache/user___data/default/0.0.0/{commit}/data-train.arrow",
        f"/home/cache/gsm8k/main/0.0.0/{commit}/gsm8k-train.arrow",
        f"/home/cache/json/default-9d4f326bc6d727a9/0.0.0/{2 * commit}/json-train.arrow",
    ]
    dataset = Dataset.from_dict({"a": [1]})
    assert dataset_sources(dataset) == []
    monkeypatch.setattr(Dataset, "cache_files", [{"filename": name} for name in files])
    assert dataset_sources(dataset) == [Source(name, commit, on_hub=True) for name in ("user/data", "gsm8k")]


def test_card_of_models_on_the_hub():
    facts = TrainingFacts(
        base_model=Source("Qwen/Qwen2.5-7B", on_hub=True),
        instruct_model=Source("Qwen/Qwen2.5-7B-Instruct", on_hub=True),
        datasets=[Source("AI-MO/NuminaMath-CoT", on_hub=True)],
    )
    card = make_adapter_card(facts, "adapter", hub_id="me/adapter", tags=["trl", "gift"])
    assert card.data.base_model == "Qwen/Qwen2.5-7B" and card.data.base_model_relation == "adapter"
    assert card.data.datasets == ["AI-MO/NuminaMath-CoT"]
    assert "[Qwen/Qwen2.5-7B-Instruct](https://huggingface.co/Qwen/Qwen2.5-7B-Instruct)" in card.text
    assert "https://huggingface.co/datasets/AI-MO/NuminaMath-CoT" in card.text
    assert 'merge_adapter("me/adapter", "Qwen/Qwen2.5-7B-Instruct", "merged")' in card.text


def test_a_whole_model_is_no_adapter(pair, conversations, config, tmp_path):
    trainer = GIFTSFTTrainer(pair[0], config(), train_dataset=conversations)
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers" and "lora" not in card.data.tags
    assert "merge" not in card.text
