"""Wrong inputs: each ends with one message that names the cause and the remedy, before weights are read."""

import json
from pathlib import Path

import pytest
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from gift_trl.scripts import annotate, train


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded before the error")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", refuse)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"confidence_exponant": 2.0}, "Unknown arguments from config file: ['--confidence_exponant', '2.0']"),
        ({"confidence_exponent": -1.0}, "`confidence_exponent` is -1.0; it must be a finite number of at least 0"),
        ({"weight_normalization": "batch"}, "`weight_normalization` is 'batch'; choose one of"),
        ({"model_name_or_path": None}, "Nothing says which model to train: set `model_name_or_path`"),
        ({"instruct_model_name_or_path": None}, "nothing says what to merge into: set `instruct_model_name_or_path`"),
        (
            {"instruct_model_name_or_path": None, "merge_output_dir": None},
            "There is no instruct model, and the dataset 'train' has no `confidences` column",
        ),
        ({"instruct_model_name_or_path": "nowhere/at-all"}, "`nowhere/at-all` has no readable model configuration"),
        ({"use_peft": None}, "no adapter is trained: set `use_peft: true`"),
        ({"dataset_name": None}, "The recipe names no data: set `dataset_name`"),
        ({"dataset_name": "missing.jsonl"}, "There is no file `missing.jsonl`"),
        ({"prompt_column": "problem"}, "no column `problem`. Set `prompt_column`"),
        ({"completion_column": None}, "`prompt_column` and `completion_column` (or the templates"),
        ({"eval_strategy": "epoch"}, "no split `test`. Set `dataset_test_split` (or `test_split_size`"),
        ({"dataset_train_split": "trian"}, "The data has the splits ['train'], and no split `trian`"),
        ({"resume_from_checkpoint": True}, "holds no checkpoint"),
        ({"loss_type": "dft"}, "`loss_type='dft'` weighs tokens by the trained model's own probability"),
        ({"max_samples": 0}, "`max_samples` is 0"),
        ({"eval_strategy": False}, "`eval_strategy` is False in the recipe, because YAML reads an unquoted no"),
        (
            {"dataset_streaming": True, "eval_strategy": "epoch", "test_split_size": 0.5, "max_steps": 1},
            "`test_split_size` cannot split a stream",
        ),
        ({"merge_output_dir": "{output_dir}/merged"}, "lie in one another"),
        ({"lora_modules_to_save": ["lm_head"]}, "in the recipe of a training `merge_saved_modules: ignore`"),
        ({"merge_saved_modules": "keep"}, "`merge_saved_modules` is 'keep'; choose `replace` or `ignore`"),
    ],
)
def test_recipe(recipe, fails, tmp_path, overrides, message):
    if "{output_dir}" in str(overrides):
        overrides = {name: value.format(output_dir=tmp_path / "adapter") for name, value in overrides.items()}
    assert message in fails(train.main, "--config", recipe(**overrides))


def test_recipe_file(recipe, fails, tmp_path):
    assert "There is no recipe file `nothing.yaml`" in fails(train.main, "--config", "nothing.yaml")
    Path(recipe()).write_text("learning_rate: [1")
    assert "The recipe is not valid YAML" in fails(train.main, "--config", str(tmp_path / "recipe.yaml"))
    assert "--learning_rat" in fails(train.main, "--config", recipe(), "--learning_rates", "1")


def test_output_that_would_be_lost(recipe, fails, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "model.safetensors").write_text("precious")
    message = fails(train.main, "--config", recipe())
    assert "merged" in message and "overwrite" in message
    assert (tmp_path / "merged" / "model.safetensors").read_text() == "precious"
    assert "it is not overwritten" in fails(train.main, "--config", recipe(merge_overwrite=True))


def test_models_of_another_shape(recipe, fails, tmp_path, make_model):
    make_model(tmp_path / "narrow", hidden_size=16)
    message = fails(train.main, "--config", recipe(instruct_model_name_or_path=str(tmp_path / "narrow")))
    assert "they differ in hidden_size (32 against 16)" in message and "Name the matching pair" in message


def test_model_that_is_no_causal_language_model(recipe, fails, tmp_path, tokenizer):
    bert = BertForMaskedLM(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    config = recipe(instruct_model_name_or_path=str(tmp_path / "bert"))
    message = fails(annotate.main, "--config", config, "--annotation_output_dir", str(tmp_path / "out"))
    assert "is a `BertForMaskedLM`, which is no causal language model" in message
    assert not (tmp_path / "out").exists()


def test_row_without_text(recipe, fails, tmp_path):
    config = recipe()
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    rows[3]["answer"] = "  "
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "Row 3 of the data has no text in the column `answer`" in fails(train.main, "--config", config)


def test_annotate_needs_a_place_to_write(recipe, fails):
    assert "set `--annotation_output_dir`" in fails(annotate.main, "--config", recipe())
