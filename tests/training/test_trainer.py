import copy
import json
import os
import shutil
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from gift_trl import GIFTConfig, GIFTSFTTrainer, annotate_dataset
from gift_trl.annotation import read_provenance
from gift_trl.annotation.provenance import add_provenance
from gift_trl.training.checks import check_target_names


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if a model's weights are read."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded before the error")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", refuse)


def construct(pair, config, dataset, **kwargs):
    return GIFTSFTTrainer(pair[0], kwargs.pop("args", None) or config(), train_dataset=dataset, **kwargs)


def test_needs_an_instruct_model_or_confidences(pair, config, conversations, no_weights):
    with pytest.raises(
        ValueError, match=r"no instruct model, and the dataset 'train' has no `confidences`.*SFTTrainer"
    ):
        construct(pair, config, conversations, args=config(instruct_model_name_or_path=None))


def test_evaluation_data_needs_confidences_too(pair, config, conversations):
    annotated = annotate_dataset(conversations, pair[1])
    with pytest.raises(ValueError, match=r"the dataset 'eval' has no `confidences`"):
        construct(pair, config, annotated, args=config(instruct_model_name_or_path=None), eval_dataset=conversations)


def test_annotated_data_needs_no_instruct_model(pair, config, conversations, run, adapter_weights):
    annotated = annotate_dataset(conversations, pair[1], args=config())
    without = run(config(instruct_model_name_or_path=None, max_steps=2), annotated)
    with_it = run(config(max_steps=2), annotated)
    for name, value in adapter_weights(with_it).items():
        assert torch.equal(value, adapter_weights(without)[name])


@pytest.mark.parametrize("given_as", ["argument", "object", "SFTConfig"])
def test_instruct_model_may_be_given_to_the_constructor(pair, config, conversations, run, given_as):
    instruct = AutoModelForCausalLM.from_pretrained(pair[1]) if given_as == "object" else pair[1]
    args = config(instruct_model_name_or_path=None)
    if given_as == "SFTConfig":
        names = [name for name, f in SFTConfig.__dataclass_fields__.items() if f.init]
        args = SFTConfig(**{name: getattr(args, name) for name in names})
    trainer = run(args, conversations, instruct_model=instruct)
    expected = run(config(), conversations)
    assert isinstance(trainer.args, GIFTConfig)
    assert trainer.state.log_history[0]["loss"] == expected.state.log_history[0]["loss"]


def test_gift_base_t_scores_with_the_base_model(pair, config, conversations, run, lora):
    trainer = run(config(annotator="base"), conversations)
    expected = annotate_dataset(conversations, pair[0], args=config())
    assert trainer.train_dataset["confidences"][:] == expected["confidences"][:]
    # A model that already has an adapter is scored without it
    from peft import get_peft_model

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[0]), lora)
    trainer = GIFTSFTTrainer(adapted, config(annotator="base"), train_dataset=conversations)
    assert trainer.train_dataset["confidences"][:] == expected["confidences"][:]
    # and data scored by the base model is refused by a run that wants the instruct model's confidences
    with pytest.raises(ValueError, match=r"were made by `base` for another run: weights"):
        construct(pair, config, expected)


def test_annotations_of_another_run_are_refused(pair, config, conversations):
    other = AutoTokenizer.from_pretrained(pair[1])
    other.chat_template = other.chat_template.replace("<|start|>", "<|end|>")
    annotated = annotate_dataset(conversations, pair[1], other)
    with pytest.raises(ValueError, match=r"another run: chat_template \(annotated with \w+, this run has \w+\)"):
        construct(pair, config, annotated)


@pytest.fixture
def hub_cache(pair, monkeypatch, tmp_path):
    """The pair as two repositories in a Hub cache, as a download leaves them."""
    for name, folder in zip(("base", "inst"), pair, strict=True):
        repository = tmp_path / "hub" / f"models--org--{name}"
        (repository / "refs").mkdir(parents=True)
        commit = {"base": "a", "inst": "b"}[name] * 40
        (repository / "refs" / "main").write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)
    for module in ("huggingface_hub.constants", "transformers.utils.hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_provenance_of_hub_models_is_checked(pair, config, conversations, hub_cache):
    annotated = annotate_dataset(conversations, "org/inst")
    (provenance,) = read_provenance(annotated)
    assert (provenance.model, provenance.commit) == ("org/inst", "b" * 40)
    # The same weights under another name belong to the run, other weights do not
    for name in ("org/inst", pair[1]):
        construct(pair, config, annotated, args=config(instruct_model_name_or_path=name))
    wrong = annotate_dataset(conversations, "org/base")
    with pytest.raises(ValueError, match="were made by `org/base` for another run: weights"):
        construct(pair, config, wrong, args=config(instruct_model_name_or_path="org/inst"))


def test_data_masked_otherwise_is_refused(pair, config, conversations):
    messages = conversations.map(
        lambda row: {"messages": row["prompt"] + row["completion"]}, remove_columns=conversations.column_names
    )
    annotated = annotate_dataset(messages, pair[1])
    with pytest.raises(ValueError, match=r"assistant_only_loss \(annotated with False, this run has True\)"):
        construct(pair, config, annotated, args=config(assistant_only_loss=True))


def test_data_with_other_targets_is_refused(pair, config, conversations, caplog):
    annotated = annotate_dataset(conversations, pair[1])
    messages = conversations.map(
        lambda row: {"messages": row["prompt"] + row["completion"]}, remove_columns=conversations.column_names
    )
    whole = annotate_dataset(messages, pair[1])
    assert [read_provenance(data)[0].completion_only_loss for data in (annotated, whole)] == [True, None]
    refused = pytest.raises(ValueError, match=r"completion_only_loss \(annotated with True, this run has False\)")
    with refused:
        construct(pair, config, annotated, args=config(completion_only_loss=False))
    with refused:
        construct(pair, config, whole, args=config(completion_only_loss=False), eval_dataset=annotated)
    # Where no completion is marked, it says nothing
    for value in (True, False, None):
        construct(pair, config, whole, args=config(completion_only_loss=value))
    construct(pair, config, annotated)
    assert not caplog.records
    # Without the columns, an unset `completion_only_loss` looks like a False one
    bare = annotated.select_columns(["input_ids", "labels", "confidences"])
    construct(pair, config, bare, args=config(completion_only_loss=True))
    assert not caplog.records
    construct(pair, config, bare)
    assert "Only the completions of the train dataset are targets" in caplog.text


@pytest.mark.parametrize("given", [True, False, None])
def test_masks_of_tokens_are_on_record(pair, config, given):
    tokens = {"input_ids": [[5, 6, 7, 8]], "completion_mask": [[0, 0, 1, 1]]}
    args = config(completion_only_loss=given)
    marked = annotate_dataset(Dataset.from_dict(tokens), pair[1], args=args)
    assert read_provenance(marked)[0].completion_only_loss is bool(given)
    labelled = annotate_dataset(Dataset.from_dict({**tokens, "labels": [[-100, 6, 7, 8]]}), pair[1], args=args)
    assert read_provenance(labelled)[0].completion_only_loss is None


@pytest.mark.filterwarnings("ignore:.*keep_end.*:FutureWarning")
def test_rows_cut_otherwise_are_refused(pair, config, conversations, caplog):
    starts, ends = (
        annotate_dataset(conversations, pair[1], args=config(max_length=32, truncation_mode=mode))
        for mode in ("keep_start", "keep_end")
    )
    with pytest.raises(ValueError, match=r"truncation_mode \(annotated with keep_start, this run has keep_end\)"):
        construct(pair, config, starts, args=config(max_length=32, truncation_mode="keep_end"))
    packed = {"packing": True, "max_length": 32}
    # This strategy keeps the start, whatever `truncation_mode` says
    with pytest.raises(ValueError, match=r"truncation_mode \(annotated with keep_end, this run has keep_start\)"):
        construct(pair, config, ends, args=config(**packed))
    construct(pair, config, ends, args=config(max_length=32, truncation_mode="keep_end"))
    construct(pair, config, starts, args=config(**packed))
    # Nothing was cut
    whole = annotate_dataset(conversations, pair[1])
    construct(pair, config, whole, args=config(max_length=32, truncation_mode="keep_end"))
    construct(pair, config, whole, args=config(**packed, packing_strategy="wrapped"))
    assert not caplog.records
    for i, strategy in enumerate(("bfd_split", "wrapped")):
        construct(pair, config, starts, args=config(**packed, packing_strategy=strategy))
        assert len(caplog.records) == i + 1
        assert f"`packing_strategy='{strategy}'` would train on what was cut off too" in caplog.text
    caplog.clear()
    construct(pair, config, whole, args=config(**packed, packing_strategy="wrapped"), eval_dataset=starts)
    assert "rows of the eval dataset were cut to 32 tokens" in caplog.text


def test_rows_that_end_otherwise_are_refused(pair, config, conversations, tokenizer):
    args = config(eos_token="<|start|>")
    text = annotate_dataset(Dataset.from_dict({"text": ["One, two.", "Blue."]}), pair[1])
    with pytest.raises(ValueError, match=r"eos_token \(annotated with <\|end\|>, this run has <\|start\|>\)"):
        construct(pair, config, text, args=args)
    # The chat template, and token ids, know nothing of it
    tokens = Dataset.from_dict({"input_ids": text["input_ids"][:]})
    for data in (conversations, tokens):
        annotated = annotate_dataset(data, pair[1])
        assert read_provenance(annotated)[0].eos_token is None
        construct(pair, config, annotated, args=args)
    other = copy.deepcopy(tokenizer)
    other.chat_template = other.chat_template.replace("'<|end|>'", "eos_token")
    annotated = annotate_dataset(conversations, pair[1], other)
    assert read_provenance(annotated)[0].eos_token == "<|end|>"
    with pytest.raises(ValueError, match=r"run: eos_token"):
        construct(pair, config, annotated, args=args, processing_class=other)


def test_older_annotations_are_told_by_their_columns(pair, config, conversations):
    annotated = annotate_dataset(conversations, pair[1])
    (provenance,) = read_provenance(annotated)
    older = replace(provenance, completion_only_loss=None, truncation_mode=None, eos_token=None)
    construct(pair, config, add_provenance(annotated, older))
    with pytest.raises(ValueError, match=r"completion_only_loss \(annotated with True, this run has False\)"):
        construct(pair, config, annotated, args=config(completion_only_loss=False))


def test_empty_answers_are_warned_of(pair, config, conversations, caplog):
    data = conversations.map(
        lambda row, i: {"completion": [{"role": "assistant", "content": "Yes." * (i < 6)}]}, with_indices=True
    )
    annotated = annotate_dataset(data, pair[1])
    for dataset in (data, annotated, annotated.select_columns(["input_ids", "labels", "confidences"])):
        caplog.clear()
        construct(pair, config, dataset, args=config(completion_only_loss=True))
        assert caplog.text.count("2 of 8 rows of the train dataset have an empty answer, the first being row 6") == 1
    caplog.clear()
    construct(pair, config, conversations, args=config(completion_only_loss=True), eval_dataset=annotated)
    assert caplog.text.count("2 of 8 rows of the eval dataset have an empty answer") == 1


def test_confidences_of_unknown_origin_are_warned_of(pair, config, caplog):
    dataset = Dataset.from_dict({"input_ids": [[5, 6]], "confidences": [[0.0, 0.5]]})
    construct(pair, config, dataset)
    assert "say nothing of where they come from" in caplog.text


def test_an_instruct_model_scores_with_its_adapter(pair, config, conversations, run, lora):
    instruct = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[1]), copy.deepcopy(lora))
    expected = annotate_dataset(conversations, instruct, AutoTokenizer.from_pretrained(pair[1]), args=config())
    without = annotate_dataset(conversations, pair[1], args=config())
    assert expected["confidences"][:] != without["confidences"][:]
    means = []
    for source in ("offline", "online"):
        args = config(instruct_model_name_or_path=None, confidence_source=source)
        trainer = run(args, conversations, instruct_model=instruct)
        means.append(trainer.state.log_history[0]["gift/confidence_mean"])
        if source == "offline":
            assert trainer.train_dataset["confidences"][:] == expected["confidences"][:]
    assert means[0] == pytest.approx(means[1], rel=1e-5)


def test_the_instruct_model_under_the_trained_adapter_scores_without_it(pair, config, conversations, lora, run):
    # Instruct-SFT with one object: what is trained is an adapter around the model that scores
    instruct = AutoModelForCausalLM.from_pretrained(pair[1])
    adapted = get_peft_model(instruct, lora)
    expected = annotate_dataset(conversations, pair[1], args=config())["confidences"][:]
    settings = {"instruct_model_name_or_path": None, "max_steps": 3, "learning_rate": 0.5}
    kwargs = {"instruct_model": instruct, "processing_class": AutoTokenizer.from_pretrained(pair[1])}
    trainer = GIFTSFTTrainer(adapted, config(**settings), train_dataset=conversations, **kwargs)
    assert trainer.train_dataset["confidences"][:] == expected
    trainer.train()
    (found,) = trainer._confidence_source.annotate([("test", conversations, False)])
    assert found["confidences"][:] == expected
    # What is given as the instruct model has an adapter of its own, and that one would be trained
    with pytest.raises(ValueError, match="shares its weights with the model to be trained"):
        GIFTSFTTrainer(
            instruct, config(**settings), train_dataset=conversations, **{**kwargs, "instruct_model": adapted}
        )


def test_confidences_of_a_model_built_in_memory_are_warned_of(pair, config, conversations, caplog):
    # Neither a name nor weights on a disk tell it from another one
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    one, other = (AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(pair[1])) for _ in range(2))
    for model in (one, other):
        model.config._name_or_path = ""
    annotated = annotate_dataset(conversations, one, tokenizer, args=config())
    kwargs = {"args": config(instruct_model_name_or_path=None), "processing_class": tokenizer}
    for _ in range(2):
        construct(pair, config, annotated, instruct_model=other, **kwargs)
    assert caplog.text.count("so it is not checked that the two are one") == 1
    # A model that is named is another one
    with pytest.raises(ValueError, match=r"another run: model \(annotated with \(in memory\)"):
        construct(pair, config, annotated, instruct_model=AutoModelForCausalLM.from_pretrained(pair[1]), **kwargs)


@pytest.mark.parametrize("lora_on", [True, False], ids=["LoRA", "full"])
def test_a_trained_model_does_not_annotate(pair, config, conversations, lora, lora_on):
    model = AutoModelForCausalLM.from_pretrained(pair[0])
    args = config(annotator="base", max_steps=3, learning_rate=0.5)
    trainer = GIFTSFTTrainer(model, args, train_dataset=conversations, peft_config=lora if lora_on else None)
    expected = trainer.train_dataset["confidences"][:]
    trainer.train()
    if lora_on:
        (found,) = trainer._confidence_source.annotate([("test", conversations, False)])
        for a, b in zip(found["confidences"], expected, strict=True):
            assert a == pytest.approx(b, rel=1e-5)
    else:
        with pytest.raises(ValueError, match="has been trained since"):
            trainer.evaluate(conversations)


def test_a_model_that_trains_in_mixed_precision_annotates_without_it(pair, config, conversations, lora):
    # accelerate wraps the forward pass of the model that is trained in autocast, which changes its logits and no weight
    model = AutoModelForCausalLM.from_pretrained(pair[0])
    args = config(annotator="base", bf16=True, learning_rate=0.5)
    trainer = GIFTSFTTrainer(model, args, train_dataset=conversations, peft_config=lora)
    expected = trainer.train_dataset["confidences"][:]
    trainer.train()
    (found,) = trainer._confidence_source.annotate([("test", conversations, False)])
    assert found["confidences"][:] == expected
    trainer.evaluate(conversations)


def test_deepspeed_leaves_confidences_in_float32(pair, config, conversations, lora, monkeypatch):
    # Its integration casts whatever is a floating-point number in a batch to the dtype of the model
    trainer = construct(pair, config, conversations, peft_config=lora)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin)
    prepared = trainer._prepare_inputs({**batch, "other": torch.ones(1)})
    assert prepared["other"].dtype == torch.bfloat16
    assert prepared["confidences"].dtype == torch.float32
    assert torch.equal(prepared["confidences"], batch["confidences"])
    assert torch.equal(prepared["labels"], batch["labels"])


def test_two_instruct_models_are_one_too_many(pair, config, conversations, no_weights):
    with pytest.raises(ValueError, match="Name one"):
        construct(pair, config, conversations, instruct_model=pair[0])


def test_a_named_instruct_model_is_no_other_object(pair, config, conversations, tmp_path, lora):
    def construct_with(name, folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        args = config(instruct_model_name_or_path=name)
        construct(pair, config, conversations, args=args, instruct_model=model, peft_config=lora)

    with pytest.raises(ValueError, match=r"`instruct_model` is `.*base`, and .* is `.*instruct`. Name one"):
        construct_with(pair[1], pair[0])
    # One folder may be spelled in two ways
    (tmp_path / "link").symlink_to(pair[1])
    for name in (str(tmp_path / "link"), f"{pair[1]}/", os.path.relpath(pair[1])):
        construct_with(name, pair[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"padding_free": True}, "`max_length` is not enforced"),
        ({"packing": True, "max_length": None}, "`max_length` is None"),
        ({"eval_strategy": "epoch"}, "there is no `eval_dataset`"),
        ({"truncation_mode": "middle"}, "`truncation_mode` is 'middle'"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "has no `confidences`. Annotate it"),
    ],
)
def test_errors_come_before_the_annotation(pair, config, conversations, settings, message, no_weights):
    with pytest.raises(ValueError, match=message):
        construct(pair, config, conversations, args=config(**settings))


@pytest.mark.parametrize("role", ["base", "instruct"])
def test_a_model_with_an_adapter_beside_it_is_refused(pair, config, conversations, tmp_path, no_weights, role):
    """transformers would train the base model with that adapter, or score with it, and say nothing."""
    shutil.copytree(pair[role == "instruct"], tmp_path / role)
    (tmp_path / role / "adapter_config.json").write_text("{}")
    models = dict(zip(("base", "instruct"), pair, strict=True)) | {role: str(tmp_path / role)}
    args = config(instruct_model_name_or_path=models["instruct"])
    with pytest.raises(ValueError, match=rf"{role}' holds an adapter beside the model"):
        GIFTSFTTrainer(models["base"], args, train_dataset=conversations)


def test_the_adapter_is_not_saved_beside_a_model(pair, config, conversations, no_weights):
    for folder in pair:
        with pytest.raises(ValueError, match="`output_dir` is the folder of the model"):
            construct(pair, config, conversations, args=config(output_dir=f"{folder}/../{Path(folder).name}"))


@pytest.mark.parametrize("file", ["adapter_config.json", "model.safetensors", "model.safetensors.index.json"])
def test_adapters_and_whole_models_are_not_saved_into_one_folder(
    pair, config, conversations, lora, tmp_path, no_weights, file
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_text("{}")
    holds_adapter = file == "adapter_config.json"
    there, new = ("an adapter", "a whole model") if holds_adapter else ("a whole model", "an adapter")
    with pytest.raises(ValueError, match=rf"holds {there} of an earlier run \({file}\), and {new} would be saved"):
        construct(pair, config, conversations, peft_config=None if holds_adapter else lora)


def test_an_adapter_on_the_head_is_refused(pair, config, conversations, no_weights):
    with pytest.raises(ValueError, match="`lm_head` is among the `target_modules`"):
        construct(pair, config, conversations, peft_config=LoraConfig(target_modules=["q_proj", "lm_head"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["q_proj", "v_porj"]},
            "`target_modules`: `v_porj` matches no module.*did you mean `v_proj`?",
        ),
        ({"target_modules": ["porj"]}, "`target_modules`: `porj` matches no module"),
        (
            {"target_modules": ["q_proj", "model.layers.7.self_attn.v_proj"]},
            "`model.layers.7.self_attn.v_proj` matches no",
        ),
        ({"target_modules": ["q_proj"], "modules_to_save": ["nrom"]}, "`modules_to_save`: `nrom` matches no"),
    ],
)
def test_every_listed_module_must_be_one_of_the_model(pair, config, conversations, no_weights, settings, message):
    with pytest.raises(ValueError, match=message):
        construct(pair, config, conversations, peft_config=LoraConfig(r=4, **settings))


def test_names_that_peft_knows_are_no_typos(config, tmp_path):
    """Of experts that are one parameter now; and a list of whole names."""
    moe = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    moe.save_pretrained(tmp_path / "moe")
    for targets in (["q_proj", "w1", "w2", "w3"], ["model.layers.0.self_attn.q_proj", "self_attn.v_proj"]):
        lora = LoraConfig(r=4, target_modules=targets, modules_to_save=["norm"])
        check_target_names(str(tmp_path / "moe"), lora, config())
        assert lora.target_modules == set(targets)
    with pytest.raises(ValueError, match="`v_porj` matches no module"):
        check_target_names(
            str(tmp_path / "moe"), LoraConfig(r=4, target_modules=["w1", "w2", "w3", "v_porj"]), config()
        )


def test_packed_evaluation_sets_are_packed_once(pair, config, conversations, lora):
    args = config(packing=True, max_length=128, per_device_eval_batch_size=1)
    trainer = construct(pair, config, conversations, args=args, peft_config=lora)
    alone = trainer.evaluate(conversations)
    together = trainer.evaluate({"x": conversations})
    assert together["eval_x_loss"] == pytest.approx(alone["eval_loss"], rel=1e-6)


def test_one_dataset_may_be_packed_for_evaluation_only(pair, config, conversations):
    annotated = annotate_dataset(conversations, pair[1])
    args = config(eval_packing=True, max_length=128)
    trainer = construct(pair, config, annotated, args=args, eval_dataset=annotated)
    assert len(trainer.train_dataset) == 8 > len(trainer.eval_dataset)


def test_a_prediction_leaves_nothing_behind(pair, config, conversations, lora):
    trainer = construct(pair, config, conversations, peft_config=lora)
    before = trainer.evaluate(conversations.select([0]))["eval_nll"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL deprecates the logits of predict
        trainer.predict(trainer.train_dataset)
    assert trainer.evaluate(conversations.select([0]))["eval_nll"] == before


@pytest.mark.filterwarnings("ignore:.*logits.*:FutureWarning")
def test_a_prediction_annotates_too(pair, config, conversations, lora):
    # Longer than `max_length`, and every row is there
    whole = construct(pair, config, conversations, peft_config=lora).train_dataset.remove_columns("confidences")
    trainer = construct(pair, config, conversations, args=config(max_length=24), peft_config=lora)
    assert trainer.predict(whole).predictions.shape[:2] == (8, max(map(len, whole["input_ids"])))
    unlabelled = whole.map(lambda row, i: {"labels": [-100] * len(row["labels"])} if i == 3 else {}, with_indices=True)
    with pytest.raises(ValueError, match="1 rows have no token to predict"):
        trainer.predict(unlabelled)


def test_arguments_of_a_wrong_type(pair, config, conversations):
    with pytest.raises(TypeError, match="`peft_config` is a `dict`"):
        construct(pair, config, conversations, peft_config={"r": 4})
    with pytest.raises(TypeError, match="`train_dataset` is a `list`"):
        construct(pair, config, conversations.to_list())
    with pytest.raises(ValueError, match="`train_dataset` is required"):  # as in SFTTrainer
        construct(pair, config, None)


def test_rows_without_a_target_are_left_out(pair, config, conversations):
    annotated = annotate_dataset(conversations, pair[1])
    half = annotated.map(lambda row, i: {"labels": [-100] * len(row["labels"])} if i % 2 else {}, with_indices=True)
    assert len(construct(pair, config, half).train_dataset) == 4


def test_a_column_named_seq_lengths_is_a_column(pair, config, conversations):
    annotated = annotate_dataset(conversations, pair[1])
    named = annotated.add_column("seq_lengths", [[len(row)] for row in annotated["input_ids"]])
    trainer = construct(pair, config, named, args=config(max_length=24))
    assert max(map(len, trainer.train_dataset["input_ids"])) == 24


def test_annotating_beside_a_trainer(pair, config, conversations, lora):
    trainer = construct(pair, config, conversations, peft_config=lora)
    annotated = annotate_dataset(conversations, pair[1])
    assert trainer.evaluate(annotated)["eval_nll"] == trainer.evaluate(conversations)["eval_nll"]


def test_arguments_of_a_class_of_ones_own(pair, config, conversations, tmp_path):
    @dataclass
    class OwnConfig(SFTConfig):
        own: int = 3

    args = OwnConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, learning_rate=3e-4)
    trainer = GIFTSFTTrainer(pair[0], args, train_dataset=conversations, instruct_model=pair[1])
    assert isinstance(trainer.args, GIFTConfig)
    assert trainer.args.own == 3 and trainer.args.learning_rate == 3e-4


def test_models_that_do_not_fit_are_refused(pair, config, conversations, tmp_path, make_model, no_weights):
    for name, overrides, message in (
        ("narrow", {"hidden_size": 16}, r"differ in hidden_size \(32 against 16\)"),
        ("words", {"vocab_size": 400}, r"differ in vocab_size \(384 against 400\)"),
        ("bias", {"attention_bias": True}, r"differ in model.layers.0.self_attn.k_proj.bias \(shape None against"),
    ):
        make_model(tmp_path / name, **overrides)
        with pytest.raises(ValueError, match=message):
            construct(pair, config, conversations, args=config(instruct_model_name_or_path=str(tmp_path / name)))


def test_vocabularies_that_differ_are_refused(pair, config, conversations, tmp_path, make_model, no_weights):
    folder = make_model(tmp_path / "renamed")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        ValueError, match=r"do not share a vocabulary: 2 token ids mean something else, .*'a' against 'b'"
    ):
        construct(pair, config, conversations, args=config(instruct_model_name_or_path=str(folder)))


@pytest.mark.parametrize(
    ("settings", "kwargs", "message"),
    [
        ({"loss_type": "dft"}, {}, "`loss_type='dft'` weighs tokens by the trained model's own probability"),
        ({"label_smoothing_factor": 0.1}, {}, "`label_smoothing_factor` is not defined for the GIFT loss"),
        ({}, {"compute_loss_func": lambda *a, **k: 0.0}, "`compute_loss_func` would replace the GIFT loss"),
        (
            {},
            {"peft_config": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")},
            "`PROMPT_TUNING` adds virtual tokens",
        ),
        ({}, {"processing_class": object()}, "`processing_class` is a `object`"),
    ],
)
def test_what_has_no_meaning_for_gift_is_refused(pair, config, conversations, settings, kwargs, message, no_weights):
    with pytest.raises((ValueError, TypeError), match=message):
        construct(pair, config, conversations, args=config(**settings), **kwargs)


@pytest.mark.parametrize(
    ("peft_config", "message"),
    [
        (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "`PROMPT_TUNING` adds virtual tokens"),
        (LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"), "`lm_head` is among"),
    ],
    ids=["prompt tuning", "head"],
)
def test_an_adapter_that_the_model_has_is_refused_like_one_to_come(pair, config, conversations, peft_config, message):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[0]), peft_config)
    with pytest.raises(ValueError, match=message):
        GIFTSFTTrainer(model, config(), train_dataset=conversations, instruct_model=pair[1])


@pytest.mark.parametrize("source", ["offline", "online"])
def test_a_chat_template_of_another_tokenizer_is_refused(pair, config, conversations, source, no_weights):
    args = config(chat_template_path=pair[0], confidence_source=source)
    with pytest.raises(ValueError, match=r"which is no Jinja file\. Cloning a template"):
        construct(pair, config, conversations, args=args)


@pytest.mark.parametrize("place", ["base", "instruct"])
def test_code_of_a_model_s_own_is_named_with_its_remedy(pair, config, conversations, tmp_path, place):
    folder = tmp_path / "own"
    shutil.copytree(pair[place == "instruct"], folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "configuration_own.py").write_text("raise RuntimeError('ran')\n")
    models = {"base": pair[0], "instruct": pair[1], place: str(folder)}
    with pytest.raises(ValueError, match="Please pass the argument `trust_remote_code=True`"):
        GIFTSFTTrainer(
            models["base"],
            config(instruct_model_name_or_path=models["instruct"]),
            train_dataset=conversations,
        )


@pytest.mark.parametrize("size", ["CP", "SP"])
def test_rows_are_not_sharded_over_processes(pair, config, conversations, monkeypatch, size, no_weights):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{size}_SIZE", "2")
    with pytest.raises(ValueError, match="Context and sequence parallelism shard a row"):
        construct(pair, config, conversations)


def test_evaluation_sets_are_masked_as_the_training_data(pair, config, conversations, lora):
    # As in SFTTrainer: language modeling data makes every token of a prompt-completion set a target
    chats = conversations.map(
        lambda row: {"messages": row["prompt"] + row["completion"]}, remove_columns=conversations.column_names
    )
    trainer = construct(pair, config, chats, eval_dataset=conversations, peft_config=lora)
    alone = construct(pair, config, conversations, eval_dataset=conversations, peft_config=lora)
    assert all(-100 not in row for row in trainer.eval_dataset["labels"])
    assert all(-100 in row for row in alone.eval_dataset["labels"])
    assert trainer.evaluate(conversations)["eval_nll"] == pytest.approx(trainer.evaluate()["eval_nll"], rel=1e-6)


def test_a_collator_that_drops_confidences_is_refused(pair, config, conversations, lora):
    with pytest.raises(ValueError, match="drops the `confidences` column"):
        construct(pair, config, conversations, data_collator=DataCollatorForLanguageModeling(pad_token_id=0))


def test_streams_need_confidences(pair, config, conversations, run):
    stream = conversations.to_iterable_dataset()
    with pytest.raises(TypeError, match="cannot be scored ahead of training"):
        construct(pair, config, stream)
    annotated = annotate_dataset(conversations, pair[1], args=config())
    streamed = run(config(max_steps=2, per_device_train_batch_size=4), annotated.to_iterable_dataset())
    assert isinstance(streamed.train_dataset, IterableDataset)
    assert "gift/confidence_mean" in streamed.state.log_history[0]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packing_carries_confidences(pair, config, run, strategy):
    # Every confidence tells which token it belongs to
    rows = [[10 * r + i for i in range(n)] for r, n in enumerate((9, 4, 7, 3, 8), start=1)]
    dataset = Dataset.from_dict(
        {"input_ids": rows, "labels": rows, "confidences": [[0.0] + [t / 100 for t in row[1:]] for row in rows]}
    )
    trainer = construct(
        pair,
        config,
        dataset,
        args=config(packing=True, packing_strategy=strategy, max_length=8, instruct_model_name_or_path=None),
    )
    packed = trainer.train_dataset
    assert set(packed.column_names) - {"seq_lengths"} == {"input_ids", "labels", "confidences"}
    assert len(packed) < len(rows)
    starts = {row[0] for row in rows}
    for row in packed:
        expected = [0.0 if token in starts else token / 100 for token in row["input_ids"]]
        assert row["confidences"] == pytest.approx(expected)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation_cuts_confidences_alike(pair, config, mode):
    rows = [list(range(10, 30)), list(range(40, 45))]
    dataset = Dataset.from_dict({"input_ids": rows, "confidences": [[t / 100 for t in row] for row in rows]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL deprecates keep_end
        args = config(max_length=6, truncation_mode=mode, instruct_model_name_or_path=None)
        trainer = construct(pair, config, dataset, args=args)
    for row in trainer.train_dataset:
        assert len(row["input_ids"]) <= 6
        assert row["confidences"] == pytest.approx([t / 100 for t in row["input_ids"]])


def test_evaluation_sets_may_be_a_dictionary(pair, config, conversations, lora):
    trainer = construct(
        pair,
        config,
        conversations,
        eval_dataset={"a": conversations, "b": conversations.select([0])},
        peft_config=lora,
    )
    metrics = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_nll", "eval_gift/confidence_mean"} <= metrics.keys()


def test_model_card_names_the_method(pair, config, conversations, run, tmp_path):
    trainer = run(config(), conversations)
    trainer.create_model_card(model_name="test")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2605.01256" in card and "gift" in card


def test_a_moved_hook_fails_at_construction(pair, config, conversations, monkeypatch):
    def prepare(self, dataset, tokenizer):
        return dataset

    monkeypatch.setattr(SFTTrainer, "_prepare_dataset", prepare)
    monkeypatch.delattr(Trainer, "_get_num_items_in_batch")
    with pytest.raises(
        RuntimeError, match=r"moved or changed SFTTrainer._prepare_dataset, Trainer._get_num_items_in_batch"
    ):
        construct(pair, config, conversations)


def test_another_loss_than_the_fused_one_is_noticed(pair, config, conversations, monkeypatch, lora):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss

    monkeypatch.setattr(SFTTrainer, "compute_loss", compute_loss)
    with pytest.raises(RuntimeError, match="ran 0 forward passes with its fused head"):
        construct(pair, config, conversations, peft_config=lora).train()


def test_tokens_of_plain_arguments_survive(pair, conversations, tmp_path, lora):
    args = SFTConfig(str(tmp_path), report_to="none", use_cpu=True, eos_token="<|start|>", hub_token="secret")
    trainer = GIFTSFTTrainer(pair[0], args, train_dataset=conversations, instruct_model=pair[1], peft_config=lora)
    assert trainer.args.eos_token == "<|start|>"
    assert trainer.args.hub_token == "secret"


def test_plain_training_arguments_are_completed(pair, conversations, tmp_path, lora):
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, max_steps=1, learning_rate=3e-4)
    trainer = GIFTSFTTrainer(pair[0], args, train_dataset=conversations, instruct_model=pair[1], peft_config=lora)
    assert trainer.args.learning_rate == 3e-4
    assert trainer.args.confidence_exponent == 1.0
