"""Wrong inputs: each ends with one message that names the cause and the remedy, before weights are read."""

import json
import os
import shutil
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
        ({"instruct_model_name_or_path": "nowhere/at-all"}, "There is no folder 'nowhere/at-all', the Hub cache"),
        (
            {"instruct_model_name_or_path": "nowhere/at-all", "merge_output_dir": None},
            "`nowhere/at-all` has no readable model configuration",
        ),
        ({"use_peft": None}, "no adapter is trained: set `use_peft: true`"),
        ({"dataset_name": None}, "The recipe names no data: set `dataset_name`"),
        ({"dataset_name": "missing.jsonl"}, "There is no file `missing.jsonl`"),
        ({"prompt_column": "problem"}, "no column `problem`. Set `prompt_column`"),
        ({"completion_column": None}, "`prompt_column` and `completion_column` (or the templates"),
        ({"eval_strategy": "epoch"}, 'Set `dataset_test_split`, `test_split_size`, or `eval_strategy: "no"`.'),
        ({"dataset_train_split": "trian"}, "The data has the splits ['train'], and no split `trian`"),
        ({"resume_from_checkpoint": True}, "holds no checkpoint"),
        ({"loss_type": "dft"}, "`loss_type='dft'` weighs tokens by the trained model's own probability"),
        ({"max_samples": 0}, "`max_samples` is 0"),
        (
            {"max_samples": 4.0},
            "`max_samples` is 4.0 in the recipe, where a whole number is meant. Write `max_samples: 4`.",
        ),
        ({"max_steps": 2.5}, "`max_steps` is 2.5 in the recipe, where a whole number is meant."),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` is 0; it must be at least 1"),
        ({"report_to": "swanlab"}, "`report_to` names swanlab, which is not installed"),
        (
            {"dataset_name": "nowhere"},
            "There is no file or folder `nowhere`, and no such dataset on the Hub within reach",
        ),
        ({"dataset_name": __file__}, "is a file of another kind than are read, which are .json, .jsonl"),
        ({"dataset_name": os.path.dirname(__file__)}, "No (supported) data files found in"),
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


@pytest.mark.parametrize("target", ["embed_tokens", "all-linear"])
def test_what_the_merge_would_refuse_is_refused_before_the_training(recipe, fails, tmp_path, make_model, target):
    for name in ("base", "instruct"):
        make_model(tmp_path / name, tie_word_embeddings=True)
    models = {"model_name_or_path": str(tmp_path / "base"), "instruct_model_name_or_path": str(tmp_path / "instruct")}
    config = tmp_path / "instruct" / "config.json"
    if target == "embed_tokens":
        message = fails(train.main, "--config", recipe(**models, lora_target_modules=["q_proj", "embed_tokens"]))
        assert "whose weight the instruct model shares between its embedding and its output layer" in message
        # One reason, and nothing about copies that PEFT saves for it
        assert "things have to be mended" not in message and "merge_saved_modules" not in message
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    inside = str(tmp_path / "instruct" / "merged")
    message = fails(train.main, "--config", recipe(**models, merge_output_dir=inside, lora_target_modules=[target]))
    assert "2 things have to be mended before the training" in message
    assert "The instruct checkpoint is quantised (gptq)" in message and "lies in, or holds the input folder" in message
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("choice", [None, "replace", "ignore"])
def test_copies_that_peft_would_save(recipe, fails, tmp_path, choice):
    # Of an embedding that is a target, the trained adapter will hold a copy of the base model's weights
    settings = {"lora_target_modules": ["q_proj", "embed_tokens"], "merge_saved_modules": choice}
    message = fails(train.main, "--config", recipe(**settings, dataset_name="missing.jsonl"))
    assert ("There is no file" in message) == (choice == "ignore")
    assert ("whole layers" in message) == (choice is None)
    assert ("holds 'model.embed_tokens.weight' whole and updates it too" in message) == (choice == "replace")


def test_targets_that_do_not_exist(recipe, fails):
    message = fails(train.main, "--config", recipe(lora_target_modules=["k_prj"]))
    assert "PEFT cannot put this adapter on the instruct model" in message and "k_prj" in message


def test_disk_of_the_merged_model(recipe, fails, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(os, "access", lambda *args, **kwargs: False)
    message = fails(train.main, "--config", recipe())
    assert "has 0.0 GB free: make room" in message and "cannot be written to: choose" in message


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


def test_annotate_replaces_annotations_only(recipe, fails, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_text("precious")
    arguments = ["--config", recipe(), "--annotation_output_dir", str(tmp_path / "data")]
    assert "exists and is not empty: choose another output folder, or overwrite it (`annotation_overwrite`)" in fails(
        annotate.main, *arguments
    )
    message = fails(annotate.main, *arguments, "--annotation_overwrite")
    assert f"'{tmp_path / 'data'}'" in message and "no gift_provenance.json: it is not overwritten" in message
    assert (tmp_path / "data" / "train.parquet").read_text() == "precious"


def test_annotate_needs_a_place_to_write(recipe, fails):
    assert "set `--annotation_output_dir`" in fails(annotate.main, "--config", recipe())


def test_data_that_is_another_folder(recipe, fails, pair):
    message = fails(train.main, "--config", recipe(dataset_name=pair[0]))
    assert f"`{pair[0]}` cannot be read, or holds no rows" in message
