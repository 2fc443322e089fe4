"""SFTTrainer's behaviours with GIFTSFTTrainer in its place: at exponent 0, both log the same numbers."""

import copy
import inspect
import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
    get_constant_schedule,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from gift_trl import GIFTSFTTrainer, annotate_dataset
from gift_trl.training import DataCollatorForGIFT


CLOCK = ("runtime", "per_second")
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}]
# Renders tools and a switch of its own, so that a row which loses either is tokenised otherwise
TEMPLATE = (
    "{% if tools %}{{ '<|start|>tools\n' + (tools | tojson) + '<|end|>\n' }}{% endif %}"
    "{% if shout is defined and shout %}{{ '<|start|>system\nSHOUT<|end|>\n' }}{% endif %}"
)


@pytest.fixture
def formats(conversations, tokenizer):
    """The same eight conversations in every format that SFTTrainer takes."""
    chats = [row["prompt"] + row["completion"] for row in conversations]
    messages = Dataset.from_dict({"messages": chats})
    texts = [" ".join(turn["content"] for turn in chat) for chat in chats]
    ids = [tokenizer(text).input_ids for text in texts]
    masks = [[0] * 4 + [1] * (len(row) - 4) for row in ids]
    standard = [{name: row[name][0]["content"] for name in ("prompt", "completion")} for row in conversations]
    return {
        "text": Dataset.from_dict({"text": texts}),
        "text with the end": Dataset.from_dict({"text": [text + "<|end|>" for text in texts]}),
        "messages": messages,
        "turns": Dataset.from_dict({"messages": [a + b for a, b in zip(chats, reversed(chats), strict=True)]}),
        "from/value": Dataset.from_dict(
            {"conversations": [[{"from": t["role"], "value": t["content"]} for t in chat] for chat in chats]}
        ),
        "prompt-completion": Dataset.from_list(standard),
        "conversational prompt-completion": conversations,
        "ids": Dataset.from_dict({"input_ids": ids}),
        "ids and labels": Dataset.from_dict(
            {
                "input_ids": ids,
                "labels": [
                    [i if m else -100 for i, m in zip(*pair, strict=True)] for pair in zip(ids, masks, strict=True)
                ],
            }
        ),
        "ids and mask": Dataset.from_dict(
            {"input_ids": ids, "completion_mask": masks, "attention_mask": [[1] * len(row) for row in ids]}
        ),
        "ids and assistant mask": Dataset.from_dict({"input_ids": ids, "assistant_masks": masks}),
        "tools": messages.add_column("tools", [TOOLS, TOOLS] * 4),
        "tools as JSON": messages.add_column("tools", [json.dumps(TOOLS)] * 8),
        "template arguments": messages.add_column("chat_template_kwargs", [{"shout": r % 2 == 0} for r in range(8)]),
        "columns of one's own": messages.add_column("source", ["web"] * 8).add_column("score", [0.5] * 8),
        "question and answer": Dataset.from_list(
            [{"question": row["prompt"], "answer": row["completion"]} for row in standard]
        ),
    }


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE + tokenizer.chat_template
    return tokenizer


@pytest.fixture
def train(pair, config, lora, chat_tokenizer):
    """Constructs either class with the same arguments, and trains."""

    def run(trainer_class, dataset, settings=None, *, make=lambda _: {}, resume=None, **kwargs):
        defaults = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 3, "max_steps": 2}
        args = config(**{**defaults, **(settings or {})})
        if trainer_class is SFTTrainer:
            fields = SFTConfig.__dataclass_fields__.items()
            args = SFTConfig(**{name: getattr(args, name) for name, field in fields if field.init})
        defaults = {
            "model": pair[0],
            "processing_class": copy.deepcopy(chat_tokenizer),
            "peft_config": copy.deepcopy(lora),
        }
        # `make` gives what two trainers cannot share
        trainer = trainer_class(args=args, train_dataset=dataset, **{**defaults, **kwargs, **make(trainer_class)})
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def assert_same_logs(gift, sft, counted=None):
    """
    Whatever SFTTrainer logs, in training and evaluation, GIFTSFTTrainer logs too, with the same value; where `counted` is
    another trainer, with its count of tokens.
    """
    assert len(gift.state.log_history) == len(sft.state.log_history)
    names = set()
    for ours, theirs in zip(gift.state.log_history, sft.state.log_history, strict=True):
        for name, value in theirs.items():
            if not name.endswith(CLOCK):
                if name == "num_tokens" and counted is not None:
                    (value,) = (
                        log[name] for log in counted.state.log_history if log["step"] == ours["step"] and name in log
                    )
                assert ours[name] == pytest.approx(value, rel=1e-6), name
                names.add(name)
        if "loss" in theirs and gift.args.logging_steps == 1:
            assert ours["gift/weight_mean"] == 1.0
            aux_loss = gift.router_aux_loss_coef * theirs.get("aux_loss", 0.0)
            assert ours["nll"] + aux_loss == pytest.approx(theirs["loss"], rel=1e-6)
    assert {"loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"} <= names
    return names


def assert_same_rows(ours, theirs):
    for name in ("input_ids", "labels", "seq_lengths"):
        assert (name in ours.column_names) == (name in theirs.column_names)
        if name in ours.column_names:
            assert ours[name][:] == theirs[name][:], name


@pytest.fixture
def same(train):
    def check(dataset, settings=None, **kwargs):
        sft = train(SFTTrainer, dataset, settings, **kwargs)
        gift = train(GIFTSFTTrainer, dataset, {"confidence_exponent": 0.0, **(settings or {})}, **kwargs)
        assert_same_logs(gift, sft)
        assert_same_rows(gift.train_dataset, sft.train_dataset)
        return gift, sft

    return check


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("text", {}),
        ("text", {"eos_token": "<|start|>"}),
        ("text with the end", {}),
        ("messages", {}),
        ("messages", {"assistant_only_loss": True}),
        ("turns", {"assistant_only_loss": True, "max_length": 40}),
        ("from/value", {}),
        ("prompt-completion", {}),
        ("prompt-completion", {"completion_only_loss": True, "max_length": 20}),
        ("prompt-completion", {"completion_only_loss": False}),
        ("conversational prompt-completion", {}),
        ("conversational prompt-completion", {"completion_only_loss": False, "assistant_only_loss": True}),
        ("conversational prompt-completion", {"completion_only_loss": True, "assistant_only_loss": True}),
        ("ids", {}),
        ("ids", {"max_length": 12}),
        ("ids and labels", {"max_length": 12}),
        ("ids and mask", {"completion_only_loss": True}),
        ("ids and mask", {}),
        ("ids and assistant mask", {}),
        ("tools", {}),
        ("tools as JSON", {}),
        ("template arguments", {}),
        ("columns of one's own", {}),
        ("columns of one's own", {"remove_unused_columns": False}),
        ("columns of one's own", {"packing": True, "max_length": 64}),
    ],
)
def test_formats_and_masks(formats, same, name, settings):
    same(formats[name], settings)


@pytest.mark.parametrize("name", ["messages", "conversational prompt-completion", "ids and labels"])
@pytest.mark.parametrize(
    "settings",
    [
        {"packing_strategy": "bfd"},
        {"packing_strategy": "bfd_split"},
        {"packing_strategy": "wrapped"},
        {"packing_strategy": "wrapped", "padding_free": True},
        {"packing_strategy": "bfd_split", "shuffle_dataset": True, "gradient_accumulation_steps": 2},
        {"packing_strategy": "bfd", "eval_packing": False},
        {"packing": False, "eval_packing": True},
    ],
)
def test_packing(formats, same, name, settings):
    # 32 tokens are fewer than the longest rows have, so that each strategy cuts what it cuts
    settings = {
        "packing": True,
        "max_length": 32,
        "per_device_train_batch_size": 2,
        "eval_strategy": "steps",
        **settings,
    }
    gift, sft = same(formats[name], {**settings, "eval_steps": 2}, eval_dataset=formats[name])
    assert_same_rows(gift.eval_dataset, sft.eval_dataset)


@pytest.mark.parametrize(
    "settings",
    [
        {"padding_free": True, "max_length": None},
        {"pad_to_multiple_of": 8},
        {"padding_free": True, "max_length": None, "pad_to_multiple_of": 8},
        {"shuffle_dataset": True},
        {"dataset_num_proc": 2, "max_length": 20},
        {"train_sampling_strategy": "group_by_length"},
        {"train_sampling_strategy": "sequential"},
        {"train_sampling_strategy": "batch_rebalance"},
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 2, "weight_normalization": "tokens"},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        *(
            [{"activation_checkpointing": True}]
            if "activation_checkpointing" in SFTConfig.__dataclass_fields__
            else []
        ),
        {"neftune_noise_alpha": 5.0},
        {"bf16": True},
        {"optim": "adamw_torch", "max_grad_norm": 0.1, "lr_scheduler_type": "linear", "warmup_steps": 1},
        {"auto_find_batch_size": True},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 3},
        {"dataloader_num_workers": 1},
        {"include_num_input_tokens_seen": "all"},
        {"model_init_kwargs": {"attn_implementation": "eager", "dtype": "bfloat16"}},
        {"seed": 3, "data_seed": 7},
        {"logging_steps": 2, "max_steps": -1, "num_train_epochs": 1.5},
    ],
)
def test_settings(formats, same, settings):
    same(formats["conversational prompt-completion"], settings)


def lora_config(**overrides):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **overrides})


@pytest.mark.parametrize(
    "peft_config",
    [
        lora_config(use_rslora=True),
        lora_config(use_dora=True),
        lora_config(lora_dropout=0.2),
        lora_config(bias="all", rank_pattern={"q_proj": 2}),
        lora_config(modules_to_save=["lm_head"]),
        lora_config(modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=False),
        lora_config(trainable_token_indices=[1, 2]),
        lora_config(target_modules=[], target_parameters=["mlp.gate_proj.weight"]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoHaConfig(r=2, target_modules="all-linear"),
        None,
    ],
)
def test_adapters_and_full_fine_tuning(formats, same, peft_config):
    gift, sft = same(formats["messages"], make=lambda _: {"peft_config": copy.deepcopy(peft_config)})
    theirs = dict(sft.model.named_parameters())
    assert {n for n, p in gift.model.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.items() if p.requires_grad
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_models_that_are_objects(pair, formats, same, checkpointing):
    def make(_):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(pair[0])
        return {"model": get_peft_model(model, lora_config()), "peft_config": None}

    same(formats["messages"], {"gradient_checkpointing": checkpointing}, make=make)


def test_quantised_models(make_model, tmp_path, formats, same, lora):
    folder = str(make_model(tmp_path / "model", hidden_size=64, intermediate_size=128))
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    settings = {"instruct_model_name_or_path": folder}
    gift, _ = same(formats["messages"], settings, model=folder, quantization_config=quantization)
    assert gift.model.is_loaded_in_4bit
    assert {p.dtype for p in gift.model.parameters() if p.requires_grad} == {torch.bfloat16}


@pytest.fixture
def mixture(tmp_path, tokenizer):
    """A mixture of four experts."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = MixtralForCausalLM(
        MixtralConfig(vocab_size=384, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=256, **sizes)
    )
    model.save_pretrained(tmp_path / "mixture")
    tokenizer.save_pretrained(tmp_path / "mixture")
    return str(tmp_path / "mixture")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"router_aux_loss_coef": 0.5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"router_aux_loss_coef": 0.5, "packing": True, "max_length": 64},
        {"router_aux_loss_coef": 0.0},
    ],
)
def test_mixtures_of_experts(mixture, formats, same, settings):
    peft_config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    settings = {"instruct_model_name_or_path": mixture, "eval_strategy": "steps", "eval_steps": 2, **settings}
    gift, _ = same(
        formats["messages"], settings, model=mixture, peft_config=peft_config, eval_dataset=formats["messages"]
    )
    assert ("aux_loss" in gift.state.log_history[0]) == (settings.get("router_aux_loss_coef") != 0.0)


def accuracy(prediction):
    predicted, labels = prediction.predictions[:, :-1].argmax(-1), prediction.label_ids[:, 1:]
    targets = labels != -100
    return {
        "accuracy": float((predicted == labels)[targets].mean()),
        "largest": float(prediction.predictions[:, :-1].max(-1)[targets].mean()),
    }


@pytest.mark.filterwarnings("ignore:.*logits.*:FutureWarning")  # TRL deprecates the logits of evaluation
@pytest.mark.parametrize(
    ("sets", "settings", "kwargs"),
    [
        (["messages", "turns"], {"metric_for_best_model": "eval_turns_loss"}, {}),
        (["messages", "turns"], {"assistant_only_loss": True, "packing": True, "max_length": 64}, {}),
        ("messages", {"eval_on_start": True, "load_best_model_at_end": True, "save_strategy": "steps"}, {}),
        ("messages", {}, {"compute_metrics": accuracy}),
        (
            "messages",
            {"eval_accumulation_steps": 1},
            {"compute_metrics": accuracy, "preprocess_logits_for_metrics": lambda logits, labels: logits * 2},
        ),
        ("text", {}, {}),
    ],
)
def test_evaluation_sets(formats, same, sets, settings, kwargs):
    data = formats[sets] if isinstance(sets, str) else DatasetDict({name: formats[name] for name in sets})
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, **settings}
    gift, _ = same(formats["messages"], settings, eval_dataset=data, **kwargs)
    assert sum("eval_runtime" in entry or "eval_turns_runtime" in entry for entry in gift.state.log_history) >= 2


@pytest.mark.parametrize(
    ("trained", "evaluated"),
    [
        ("messages", "conversational prompt-completion"),
        ("text", "prompt-completion"),
        ("prompt-completion", "ids and mask"),
        ("conversational prompt-completion", "text"),
        ("ids and labels", "ids and mask"),
        ("ids", "prompt-completion"),
    ],
)
def test_the_training_set_says_what_is_masked(formats, same, trained, evaluated):
    same(formats[trained], {"eval_strategy": "steps", "eval_steps": 2}, eval_dataset=formats[evaluated])


@pytest.mark.filterwarnings("ignore:.*logits.*:FutureWarning")
def test_evaluation_after_training(formats, train):
    trainers = [
        train(
            trainer_class,
            formats["conversational prompt-completion"],
            {"confidence_exponent": 0.0},
            eval_dataset={"a": formats["messages"]},
            compute_metrics=accuracy,
        )
        for trainer_class in (SFTTrainer, GIFTSFTTrainer)
    ]
    for data in (None, "a", formats["messages"], formats["text"], {"b": formats["ids"], "c": formats["tools"]}):
        theirs, ours = (trainer.evaluate(data) for trainer in trainers)
        for name, value in theirs.items():
            if not name.endswith(CLOCK):
                assert ours[name] == pytest.approx(value, rel=1e-6), name
    theirs, ours = (trainer.evaluate(formats["prompt-completion"], metric_key_prefix="test") for trainer in trainers)
    assert ours["test_loss"] == pytest.approx(theirs["test_loss"], rel=1e-6)
    theirs, ours = (trainer.predict(trainer.train_dataset) for trainer in trainers)
    assert (ours.label_ids == theirs.label_ids).all()
    torch.testing.assert_close(torch.tensor(ours.predictions), torch.tensor(theirs.predictions))
    assert ours.metrics["test_accuracy"] == theirs.metrics["test_accuracy"]
    assert ours.metrics["test_loss"] == pytest.approx(theirs.metrics["test_loss"], rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_length": 20},
        {"max_length": None},
        {"packing": True, "max_length": 40},
        {"packing": True, "max_length": 40, "packing_strategy": "wrapped"},
        {"packing": True, "max_length": 40, "packing_strategy": "bfd_split", "shuffle_dataset": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ],
)
def test_streams(formats, train, pair, config, chat_tokenizer, settings):
    data = formats["conversational prompt-completion"]
    # Whole rows, so that it is the stream that is cut
    annotated = annotate_dataset(data, pair[1], chat_tokenizer, args=config(max_length=None))
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, **settings}
    sft, gift = (
        train(cls, rows.to_iterable_dataset(), {**settings, **ours}, eval_dataset=rows.to_iterable_dataset())
        for cls, rows, ours in ((SFTTrainer, data, {}), (GIFTSFTTrainer, annotated, {"confidence_exponent": 0.0}))
    )
    assert_same_logs(gift, sft)


@pytest.mark.parametrize("source", ["offline", "online"])
@pytest.mark.parametrize("name", ["question and answer", "prompt-completion"])
def test_formatting_functions(formats, same, name, source):
    def formatting_func(row):
        return " -> ".join(str(row[column]) for column in sorted(row) if column != "text")

    settings = {"completion_only_loss": False} if name == "prompt-completion" else {}
    settings = {**settings, "eval_strategy": "steps", "eval_steps": 2, "confidence_source": source}
    # A column that would be taken without the function
    data = formats[name].add_column("text", ["raw"] * 8) if name == "question and answer" else formats[name]
    same(data, settings, formatting_func=formatting_func, eval_dataset=data)


def test_a_text_field_of_another_name(formats, same):
    same(formats["text"].rename_column("text", "story"), {"dataset_text_field": "story"})


@pytest.mark.filterwarnings("ignore:.*keep_end.*:FutureWarning")
def test_rows_cut_at_the_front(formats, same):
    same(formats["messages"], {"max_length": 20, "truncation_mode": "keep_end"})


def test_a_chat_template_from_a_file(formats, same, chat_tokenizer, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(chat_tokenizer.chat_template.replace("<|start|>", "<|end|>"))
    gift, _ = same(formats["messages"], {"chat_template_path": str(path)})
    assert gift.processing_class.chat_template == path.read_text()


@pytest.mark.parametrize("packing", [False, True])
def test_data_that_is_prepared_already(formats, train, packing):
    settings = {"packing": packing, "max_length": 48}
    prepared = train(GIFTSFTTrainer, formats["messages"], settings).train_dataset
    settings |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "eval_strategy": "steps", "eval_steps": 1}
    sft = train(SFTTrainer, prepared, settings, eval_dataset=prepared)
    gift = train(GIFTSFTTrainer, prepared, {"confidence_exponent": 0.0, **settings}, eval_dataset=prepared)
    assert_same_logs(gift, sft)


class Diary(TrainerCallback):
    """Which events a callback is told of, with which objects."""

    def __init__(self):
        self.entries = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(args, state, control, **kwargs):
            self.entries.append((name, state.global_step, sorted(k for k, v in kwargs.items() if v is not None)))

        return note


def test_callbacks(formats, same):
    diaries = []

    def make(_):
        diaries.append(Diary())
        return {"callbacks": [diaries[-1]]}

    settings = {"eval_strategy": "steps", "eval_steps": 1, "gradient_accumulation_steps": 2}
    same(formats["messages"], settings, make=make, eval_dataset=formats["messages"])
    assert diaries[0].entries == diaries[1].entries
    assert ("on_evaluate", 2) in {entry[:2] for entry in diaries[1].entries}


@pytest.mark.parametrize("given_as", ["objects", "class"])
def test_optimizers(pair, formats, same, given_as):
    def make(_):
        if given_as == "class":
            return {"optimizer_cls_and_kwargs": (torch.optim.Adagrad, {"lr": 0.03})}
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[0]), lora_config())
        optimizer = torch.optim.Adagrad([p for p in model.parameters() if p.requires_grad], lr=0.03)
        return {"model": model, "peft_config": None, "optimizers": (optimizer, get_constant_schedule(optimizer))}

    gift, _ = same(formats["messages"], {"max_steps": 3}, make=make)
    assert {entry["learning_rate"] for entry in gift.state.log_history[:3]} == {0.03}


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_resuming(formats, train, relative_difference, adapter_weights, exponent):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    settings |= {"per_device_train_batch_size": 3, "confidence_exponent": exponent}
    whole = train(GIFTSFTTrainer, formats["messages"], settings)
    checkpoint = f"{whole.args.output_dir}/checkpoint-2"
    resumed = train(GIFTSFTTrainer, formats["messages"], settings, resume=checkpoint)
    assert relative_difference(adapter_weights(resumed), adapter_weights(whole)) == 0.0
    if exponent == 0.0:
        # SFTTrainer goes on from our checkpoint, too; it counts the tokens from 0 again
        sft = train(SFTTrainer, formats["messages"], settings, resume=checkpoint)
        assert_same_logs(resumed, sft, counted=whole)


class MasksEnds:
    """A collator's mixin that takes the end-of-turn tokens out of the targets."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        batch["labels"] = batch["labels"].masked_fill(batch["labels"] == 2, -100)
        return batch


class OurCollator(MasksEnds, DataCollatorForGIFT):
    pass


class TheirCollator(MasksEnds, DataCollatorForLanguageModeling):
    pass


def test_a_collator_of_one_s_own(formats, same):
    def make(trainer_class):
        return {"data_collator": (TheirCollator if trainer_class is SFTTrainer else OurCollator)(pad_token_id=0)}

    gift, _ = same(formats["messages"], make=make)
    plain, _ = same(formats["messages"])
    assert gift.state.log_history[0]["loss"] != pytest.approx(plain.state.log_history[0]["loss"], rel=1e-3)


def test_the_constructor_takes_what_sft_s_takes():
    ours, theirs = (list(inspect.signature(cls).parameters.values()) for cls in (GIFTSFTTrainer, SFTTrainer))
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [(p.name, p.kind, p.default) for p in theirs]
    assert [p.name for p in ours[len(theirs) :]] == ["instruct_model"]


@pytest.mark.parametrize(
    ("name", "settings", "kwargs", "error"),
    [
        ("text", {"assistant_only_loss": True}, {}, ValueError),
        ("prompt-completion", {}, {"formatting_func": str}, ValueError),
        ("prompt-completion", {"eos_token": "<|nothing|>"}, {}, ValueError),
        ("messages", {"loss_type": "nothing"}, {}, ValueError),
        ("messages", {"packing": True, "packing_strategy": "nothing"}, {}, ValueError),
        ("messages", {"router_aux_loss_coef": 0.1}, {}, ValueError),
    ],
)
def test_what_sft_refuses_is_refused(formats, train, name, settings, kwargs, error):
    for trainer_class, source in ((SFTTrainer, "offline"), (GIFTSFTTrainer, "offline"), (GIFTSFTTrainer, "online")):
        with pytest.raises(error):
            train(trainer_class, formats[name], {"confidence_source": source, **settings}, **kwargs)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("text", {}),
        ("turns", {"assistant_only_loss": True}),
        ("prompt-completion", {}),
        ("ids and mask", {"completion_only_loss": True}),
        ("tools", {}),
        ("columns of one's own", {}),
        ("question and answer", {}),
        ("text", {"shuffle_dataset": True}),
        ("messages", {"packing": True, "max_length": 40}),
    ],
)
def test_online_rows_are_those_of_sft(formats, same, name, settings):
    def formatting_func(row):
        return f"{row['question']} -> {row['answer']}"

    kwargs = {"formatting_func": formatting_func} if name == "question and answer" else {}
    same(formats[name], {"max_steps": 1, "confidence_source": "online", **settings}, **kwargs)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("text", {}),
        ("turns", {"assistant_only_loss": True}),
        ("conversational prompt-completion", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
        ("messages", {"packing": True, "max_length": 40}),
        ("messages", {"packing": True, "max_length": 40, "packing_strategy": "bfd_split"}),
        ("messages", {"packing": True, "max_length": 40, "packing_strategy": "wrapped"}),
        ("messages", {"padding_free": True, "max_length": None}),
        ("messages", {"gradient_checkpointing": True}),
    ],
)
def test_only_the_weights_are_new(formats, train, name, settings):
    # At the first step the models are equal, and the loss of SFTTrainer is logged as `nll` beside the weighted one
    sft = train(SFTTrainer, formats[name], {"max_steps": 1, **settings}).state.log_history[0]
    gift = train(GIFTSFTTrainer, formats[name], {"max_steps": 1, **settings}).state.log_history[0]
    assert gift["nll"] == pytest.approx(sft["loss"], rel=1e-6)
    assert abs(gift["loss"] - sft["loss"]) > 1e-4
    for name in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert gift[name] == pytest.approx(sft[name], rel=1e-6)
