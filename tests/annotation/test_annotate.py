import copy
import json
import shutil

import numpy as np
import pytest
import torch
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    Json,
    List,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config
from trl import SFTConfig, SFTTrainer

from gift_trl import annotate_dataset
from gift_trl.annotation import load_annotated_dataset, read_provenance, save_annotated_dataset
from gift_trl.annotation.engine import token_budget_batches
from gift_trl.annotation.tokenization import tokenize_dataset
from gift_trl.model_pair import check_same_architecture, end_of_turn_token_ids


def reference_confidences(folder, input_ids, labels):
    """Batch 1, whole logits, float64."""
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    rows = []
    for ids, targets in zip(input_ids, labels, strict=True):
        with torch.no_grad():
            p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1).exp()
        q = [0.0] * len(ids)
        for t in range(1, len(ids)):
            if targets[t] != -100:
                q[t] = p[t - 1, ids[t]].item()
        rows.append(q)
    return rows


def text_rows(conversations):
    return Dataset.from_dict({"text": [row["completion"][0]["content"] for row in conversations]})


@pytest.mark.parametrize("kind", ["conversations", "text", "prompt-completion", "messages", "assistant-only"])
def test_confidences_are_the_instruct_model_s_probabilities(pair, conversations, kind):
    args = SFTConfig(bf16=False, assistant_only_loss=kind == "assistant-only")
    if kind == "text":
        dataset = text_rows(conversations)
    elif kind == "prompt-completion":
        dataset = conversations.map(
            lambda row: {"prompt": row["prompt"][0]["content"], "completion": " " + row["completion"][0]["content"]},
            remove_columns=conversations.column_names,
        )
    elif kind in ("messages", "assistant-only"):
        dataset = conversations.map(
            lambda row: {"messages": row["prompt"] + row["completion"]}, remove_columns=conversations.column_names
        )
    else:
        dataset = conversations
    annotated = annotate_dataset(dataset, pair[1], args=args, tokens_per_batch=100)
    expected = reference_confidences(pair[1], annotated["input_ids"], annotated["labels"])
    targets = 0
    for row, q in zip(annotated, expected, strict=True):
        assert row["confidences"][0] == 0.0
        assert len(row["confidences"]) == len(row["input_ids"])
        np.testing.assert_allclose(row["confidences"], q, rtol=1e-5, atol=0)
        targets += sum(label != -100 for label in row["labels"][1:])
    # A test on uniform probabilities would show little
    flat = np.array([c for row in annotated["confidences"] for c in row])
    assert (flat > 0).sum() == targets
    assert flat.max() > 0.9 and flat[flat > 0].min() < 0.05


def test_tokenised_as_sft_trainer_does(pair, tokenizer, conversations, tmp_path):
    args = SFTConfig(str(tmp_path), bf16=False, max_length=24, report_to="none")
    sft = SFTTrainer(pair[0], args, train_dataset=conversations, processing_class=tokenizer)
    annotated = annotate_dataset(conversations, pair[1], args=args)
    assert annotated["input_ids"][:] == sft.train_dataset["input_ids"][:]
    assert annotated["labels"][:] == sft.train_dataset["labels"][:]


def test_columns_order_and_format(pair, conversations):
    annotated = annotate_dataset(conversations, pair[1])
    assert annotated.column_names == ["prompt", "completion", "input_ids", "labels", "confidences", "original_index"]
    assert str(annotated.features["confidences"].feature.dtype) == "float32"
    assert annotated["completion"][:] == conversations["completion"][:]


def test_batching_does_not_change_confidences(pair, conversations, tmp_path):
    one, all_at_once = (
        annotate_dataset(conversations, pair[1], tokens_per_batch=n, cache_dir=tmp_path / str(n)) for n in (1, 10_000)
    )
    assert [read_provenance(annotated)[0].tokens_per_batch for annotated in (one, all_at_once)] == [1, 10_000]
    for a, b in zip(one["confidences"], all_at_once["confidences"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_batches_hold_every_row_within_the_budget():
    lengths = [5, 50, 7, 7, 30, 1, 12, 50]
    batches = token_budget_batches(lengths, 60)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[row] for row in batch) <= 60 for batch in batches)
    assert len(batches) < len(lengths)


def test_loaded_model_is_left_as_it_was(pair, conversations):
    model = AutoModelForCausalLM.from_pretrained(pair[1]).train()
    model.model.layers[1].eval()
    annotate_dataset(conversations, model)
    assert model.training and model.model.layers[0].training
    assert not any(module.training for module in model.model.layers[1].modules())
    assert "forward" not in model.__dict__
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model(input_ids=torch.tensor([[5, 6]])).logits.shape == (1, 2, 384)


def test_rows_without_targets_are_counted_by_reason(pair, conversations):
    long = {
        "prompt": [{"role": "user", "content": "word " * 100}],
        "completion": [{"role": "assistant", "content": "Yes."}],
    }
    dataset = Dataset.from_list([*conversations.select(range(3)), long])
    annotated = annotate_dataset(dataset, pair[1], args=SFTConfig(bf16=False, max_length=60))
    (provenance,) = read_provenance(annotated)
    assert provenance.truncated == 0, "a row that is left out is not counted as cut"
    assert provenance.rows == len(annotated) == 3
    assert provenance.dropped == {"prompt fills max_length": [3]}
    masked = annotate_dataset(
        Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]], "labels": [[-100, -100, -100], [-100, 9]]}), pair[1]
    )
    assert read_provenance(masked)[0].dropped == {"no target token": [0]}


def test_empty_answers_are_warned_of(pair, tokenizer, caplog):
    def answers(*texts):
        turns = [{"role": "user", "content": "Is water wet?"}]
        return [[*turns, {"role": "assistant", "content": text}] for text in texts]

    kinds = [
        Dataset.from_dict({"prompt": ["a"] * 4, "completion": ["b", "", "<|end|>", " c"]}),
        Dataset.from_dict({"messages": answers("Yes.", "", "", "No.")}),
        # The template writes a line break after the end of the turn
        Dataset.from_list([{"prompt": a[:1], "completion": a[1:]} for a in answers("Yes.", "", "", "No.")]),
    ]
    for dataset in kinds:
        args = SFTConfig(bf16=False, assistant_only_loss="messages" in dataset.column_names)
        annotated = annotate_dataset(dataset, pair[1], args=args)
        assert len(annotated) == 4, "SFTTrainer trains on them too"
        (record,) = caplog.records
        assert "2 of 4 rows of the train dataset have an empty answer, the first being row 1: " in record.message
        caplog.clear()
    # Under the loss on whole rows, the question is learnt from; and an answer may be one token
    one = tokenizer.encode("four")[:1]
    annotate_dataset(kinds[1], pair[1])
    annotate_dataset(Dataset.from_dict({"input_ids": [[5, *one, 2]], "labels": [[-100, *one, 2]]}), pair[1])
    assert not caplog.records


def test_rows_to_be_packed_are_scored_whole(pair, conversations):
    args = SFTConfig(bf16=False, max_length=30, packing=True)
    whole = annotate_dataset(conversations, pair[1], args=args)
    assert max(len(ids) for ids in whole["input_ids"]) > 30
    assert read_provenance(whole)[0].truncated == 0
    cut = annotate_dataset(conversations, pair[1], args=args, packing=False)
    assert max(len(ids) for ids in cut["input_ids"]) == 30
    assert read_provenance(cut)[0].truncated > 0


def test_bfloat16_is_as_close_as_a_plain_bfloat16_pass(pair, conversations):
    exact = annotate_dataset(conversations, pair[1])
    rough = annotate_dataset(conversations, pair[1], model_init_kwargs={"dtype": "bfloat16"})
    assert read_provenance(rough)[0].dtype == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.bfloat16).eval()
    ours, plain = 0.0, 0.0
    for row, q32, q16 in zip(rough, exact["confidences"], rough["confidences"], strict=True):
        ids = torch.tensor(row["input_ids"])
        with torch.no_grad():
            p = model(input_ids=ids[None]).logits[0].float().softmax(-1)
        loop = torch.zeros(len(ids)).index_copy(0, torch.arange(1, len(ids)), p[:-1].gather(1, ids[1:, None])[:, 0])
        loop = loop.where(torch.tensor(row["labels"]) != -100, 0.0)
        ours += (torch.tensor(q16) - torch.tensor(q32)).square().sum().item()
        plain += (loop - torch.tensor(q32)).square().sum().item()
    assert 0 < ours <= plain * 1.1


def test_provenance_travels_with_the_dataset(pair, conversations, tmp_path):
    annotated = annotate_dataset(conversations, pair[1])
    (provenance,) = read_provenance(annotated)
    assert provenance.model == "instruct"
    assert provenance.end_of_turn_token_ids == [2]
    moved = annotated.shuffle(seed=0).select(range(4)).map(lambda row: {"extra": 1})
    assert read_provenance(moved) == [provenance]
    save_annotated_dataset(annotated, tmp_path / "annotated")
    loaded = load_annotated_dataset(tmp_path / "annotated")["train"]
    assert read_provenance(loaded) == [provenance]
    assert loaded.to_list() == annotated.to_list()
    # Any tool opens it, without the provenance
    assert load_dataset(str(tmp_path / "annotated"), split="train")["confidences"][:] == annotated["confidences"][:]
    with pytest.raises(FileExistsError):
        save_annotated_dataset(annotated, tmp_path / "annotated")


def test_joined_datasets_keep_every_provenance(pair, conversations, tmp_path):
    parts = [annotate_dataset(conversations, folder) for folder in pair]
    joined = concatenate_datasets(parts)
    assert [p.model for p in read_provenance(joined)] == ["base", "instruct"]
    save_annotated_dataset({"train": joined, "test": parts[1]}, tmp_path / "joined")
    loaded = load_annotated_dataset(tmp_path / "joined")
    assert [p.model for p in read_provenance(loaded["train"])] == ["base", "instruct"]
    assert [p.model for p in read_provenance(loaded["test"])] == ["instruct"]


def test_end_of_turn_ids_without_a_generation_config(pair, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    model.config.eos_token_id = [2, 7]
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert end_of_turn_token_ids(tokenizer, str(tmp_path)) == [2, 7]


def test_nan_is_refused_with_the_row(pair, conversations):
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    with torch.no_grad():
        model.model.embed_tokens.weight[300] = float("nan")
    ids = [[5, 6, 7], [5, 6], [5], [5, 300, 7], [6, 7]]
    dataset = Dataset.from_dict({"input_ids": ids, "labels": ids})
    with pytest.raises(ValueError, match=r"NaN or infinite probabilities for 1 rows, the first being row 3"):
        annotate_dataset(dataset, model)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"input_ids": [[5, 6], [5, 999]]}, r"Row 1 holds the token id 999, .* 384 rows"),
        ({"input_ids": [[5] * 300]}, r"Row 0 is 300 tokens long, but the model has 256 positions. Set `max_length`"),
        ({"input_ids": [[5, 6]], "labels": [[-100, -100]]}, r"No row of the train dataset has a token to learn from"),
        ({"question": ["a"]}, r"columns \['question'\], and none that can be trained on"),
        ({"text": ["a"], "image": ["b"]}, r"holds images"),
        ({"input_ids": [[5, 6, 7, 8]], "seq_lengths": [[2, 2]]}, r"is packed already"),
        ({"text": []}, r"The train dataset is empty"),
        ({"input_ids": [[5, 6]], "labels": [[5, 999]]}, r"Row 0 holds the token id 999"),
        ({"input_ids": [[5, 6], [5, 6]], "labels": [[5, 6], [5]]}, r"Row 1 has 2 token ids and 1 labels"),
        ({"input_ids": [[5, 6], [5, -1]]}, r"Row 1 holds a negative token id"),
        ({"input_ids": [[5, 6]], "labels": [[5, -1]]}, r"Row 0 holds a negative token id, or a negative label"),
        ({"text": ["a b"], "labels": [1]}, r"The column `labels` holds .* not lists of token ids"),
        ({"input_ids": [[5, 6], None]}, r"Row 1 has no `input_ids`"),
        ({"text": ["a b"], "original_index": ["x"]}, r"a column `original_index` that holds no integers"),
        ({"input_ids": [[5, 6]], "confidences": [[0.0, 0.1]]}, r"already has a `confidences` column"),
    ],
)
def test_bad_rows(pair, rows, message):
    with pytest.raises(ValueError, match=message):
        annotate_dataset(Dataset.from_dict(rows), pair[1])


def chat(*turns):
    """A conversation, in which the user and the assistant take turns."""
    roles = ("user", "assistant") * len(turns)
    return [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


TOOL_CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"text": ["a", "b", None]}, r"Row 2 of the train dataset holds None in the column `text`, not a text"),
        ({"text": [5, 6]}, r"Row 0 .* holds 5 in the column `text`, not a text"),
        ({"prompt": ["a", "b"], "completion": ["c", None]}, r"Row 1 .* holds None in the column `completion`"),
        ({"prompt": ["a"], "completion": [7]}, r"Row 0 .* holds 7 in the column `completion`"),
        ({"prompt": ["a", None], "completion": ["c", "d"]}, r"Row 1 .* holds None in the column `prompt`"),
        (
            {"prompt": [chat("a")], "completion": ["Two."]},
            r"Row 0 .* holds 'Two.' in the column `completion`, not a list of messages",
        ),
        (
            {"prompt": ["a"], "completion": [chat("a")]},
            r"Row 0 .* holds 'a' in the column `prompt`, not a list of messages",
        ),
        (
            {"messages": [chat("a", "b"), None]},
            r"Row 1 .* holds None in the column `messages`, not a list of messages",
        ),
        ({"messages": [chat("a", "b"), []]}, r"Row 1 .* holds \[\] in the column `messages`"),
        ({"messages": ["a"]}, r"Row 0 .* holds 'a' in the column `messages`, not a list of messages"),
        (
            {"messages": [chat("a", "b"), chat("a", None)]},
            r"Row 1 .* message without `content` in the column `messages`",
        ),
        (
            {"messages": [[{"role": None, "content": "a"}]]},
            r"Row 0 .* message without `role` in the column `messages`",
        ),
        (
            {"messages": [[*chat("a"), TOOL_CALL], chat(None, "b")]},
            r"Row 1 .* message without `content` .*: \{'role': 'user'",
        ),
        (
            {"conversations": [[{"from": "user", "value": "a"}], [{"from": "user", "value": None}]]},
            r"Row 1 .* message without `value` in the column `conversations`",
        ),
    ],
)
@pytest.mark.parametrize("stored_as", ["arrow", "json"])
def test_rows_without_text_are_named(tokenizer, rows, message, stored_as):
    # Files of mixed types are loaded as JSON values, of which Arrow knows nothing
    dataset = Dataset.from_dict(rows)
    if stored_as == "json":
        dataset = Dataset.from_dict(rows, features=Features({name: Json() for name in rows}))
    with pytest.raises(ValueError, match=message):
        tokenize_dataset(dataset, tokenizer, SFTConfig(bf16=False))


@pytest.mark.parametrize("stored_as", ["arrow", "json"])
def test_messages_in_a_column_of_another_name(tokenizer, stored_as):
    rows = {"conversations": [chat("a", "b")]}
    features = Features({"conversations": List(Json())}) if stored_as == "json" else None
    dataset, args = Dataset.from_dict(rows, features=features), SFTConfig(bf16=False)
    with pytest.raises(ValueError, match=r"`conversations` of the train dataset.* Rename the column to `messages`"):
        tokenize_dataset(dataset, tokenizer, args)
    expected = tokenize_dataset(dataset.rename_column("conversations", "messages"), tokenizer, args)
    # Beside what is read, it does no harm
    both = tokenize_dataset(dataset.add_column("messages", rows["conversations"]), tokenizer, args)
    assert both["input_ids"][:] == expected["input_ids"][:]


def test_conversations_without_an_assistant_are_named(pair):
    args = SFTConfig(bf16=False, assistant_only_loss=True)
    for dataset in (
        Dataset.from_dict({"messages": [chat("a", "b"), chat("a")]}),
        Dataset.from_dict({"prompt": [chat("a"), chat("a")], "completion": [chat("a", "b")[1:], chat("a")]}),
    ):
        with pytest.raises(
            ValueError, match=r"Row 1 of the train dataset has no assistant turn.*`assistant_only_loss`"
        ):
            annotate_dataset(dataset, pair[1], args=args)
        assert len(annotate_dataset(dataset, pair[1])) == 2


def test_a_tool_call_needs_no_content(pair, tokenizer):
    template = copy.deepcopy(tokenizer)
    template.chat_template = template.chat_template.replace("message['content']", "(message['content'] or 'add')")
    result = {"role": "tool", "content": None, "result": "4"}  # in a template of its own
    dataset = Dataset.from_list([{"messages": [*chat("a"), TOOL_CALL, result]}, {"messages": chat("a", "b")}])
    assert len(annotate_dataset(dataset, pair[1], template)) == 2


def test_one_beginning_of_sequence(pair, tokenizer):
    twice = copy.deepcopy(tokenizer)
    twice.bos_token = "<|start|>"
    rows = Dataset.from_dict({"input_ids": [[1, 5, 1, 1], [5, 6], [1, 1, 7]]})
    with pytest.raises(ValueError, match=r"1 rows begin with two '<\|start\|>' tokens, the first being row 2"):
        annotate_dataset(rows, pair[1], twice)
    assert len(annotate_dataset(rows.select(range(2)), pair[1], twice)) == 2


def test_another_tokenizer_is_refused(pair, conversations, tokenizer):
    vocabulary = tokenizer.get_vocab()
    first, second = (token for token, i in sorted(vocabulary.items(), key=lambda item: item[1])[100:102])
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"][first], state["model"]["vocab"][second] = 101, 100
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        eos_token="<|end|>",
        chat_template=tokenizer.chat_template,
    )
    with pytest.raises(ValueError, match=r"The tokenizer is not that of `instruct`.*2 token ids mean something else"):
        annotate_dataset(conversations, pair[1], other)


def test_confidences_are_those_of_the_labels(pair):
    # Labels that are not the tokens themselves: the probability is that of the label
    rows = {"input_ids": [[5, 6, 7, 8]], "labels": [[5, -100, 9, 8]]}
    annotated = annotate_dataset(Dataset.from_dict(rows), pair[1])
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(pair[1])
        p = model(input_ids=torch.tensor(rows["input_ids"])).logits[0].softmax(-1)
    np.testing.assert_allclose(annotated["confidences"][0], [0, 0, p[1, 9], p[2, 8]], rtol=1e-5)


@pytest.mark.parametrize("kind", ["indices", "torch format", "slices", "memory-mapped"])
def test_any_kind_of_dataset(pair, conversations, kind, tmp_path):
    expected = annotate_dataset(conversations, pair[1])
    rows = expected.select_columns(["input_ids", "labels"])
    if kind == "indices":
        rows = rows.select([3, 1, *range(8)]).select(range(2, 10))
    elif kind == "torch format":
        rows = rows.with_format("torch")
    elif kind == "slices":
        rows = concatenate_datasets([rows.select(range(3)), rows.select(range(3, 8))])
    else:
        rows.save_to_disk(tmp_path / "saved")
        rows = load_from_disk(tmp_path / "saved")
    annotated = annotate_dataset(rows, pair[1], cache_dir=tmp_path / "cache").with_format(None)
    assert annotated["confidences"][:] == expected["confidences"][:]
    assert annotated["input_ids"][:] == expected["input_ids"][:]


def test_bad_models(pair, conversations, tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no readable model configuration"):
        annotate_dataset(conversations, str(tmp_path / "nowhere"))
    bert = BertForMaskedLM(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"is a `BertForMaskedLM`, which is no causal language model"):
        annotate_dataset(conversations, str(tmp_path / "bert"), tokenizer)
    with pytest.raises(TypeError, match=r"`IterableDataset`, which cannot be scored ahead of training"):
        annotate_dataset(IterableDataset.from_generator(lambda: iter([{"text": "a"}])), pair[1])
    with pytest.raises(TypeError, match=r"is a `DatasetDict`. Give a `datasets.Dataset`: one split"):
        annotate_dataset(DatasetDict({"train": conversations}), pair[1])
    with pytest.raises(ValueError, match=r"256 positions. Rows to be packed are scored whole: leave the row out"):
        annotate_dataset(
            Dataset.from_dict({"input_ids": [[5] * 300]}),
            pair[1],
            args=SFTConfig(bf16=False, max_length=200, packing=True),
        )
    shutil.copytree(pair[1], tmp_path / "with_adapter")
    (tmp_path / "with_adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter beside the model"):
        annotate_dataset(conversations, str(tmp_path / "with_adapter"), tokenizer)
    with pytest.raises(ValueError, match=r"No tokenizer was found"):
        annotate_dataset(conversations, AutoModelForCausalLM.from_config(nameless_config(pair)))
    with pytest.raises(ValueError, match=r"`eos_token` is '<none>'"):
        annotate_dataset(conversations, pair[1], args=SFTConfig(bf16=False, eos_token="<none>"))
    with pytest.raises(ValueError, match=r"A `formatting_func` turns the train dataset into plain text"):
        annotate_dataset(conversations, pair[1], formatting_func=lambda row: "text")
    bare = AutoTokenizer.from_pretrained(pair[1])
    bare.chat_template = None
    with pytest.raises(ValueError, match=r"the tokenizer has no chat template"):
        annotate_dataset(conversations, pair[1], bare, args=SFTConfig(bf16=False, assistant_only_loss=True))
    with pytest.raises(ValueError, match=r"no Jinja file"):
        annotate_dataset(conversations, pair[1], args=SFTConfig(bf16=False, chat_template_path=pair[0]))


def nameless_config(pair):
    config = AutoModelForCausalLM.from_pretrained(pair[1]).config
    config._name_or_path = ""
    return config


def test_a_loaded_model_must_have_all_its_weights(pair, conversations):
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    next(model.parameters()).ds_id = 0  # as DeepSpeed marks the parameters it has shared out
    with pytest.raises(ValueError, match=r"holds only a part of its weights .* Name the instruct model instead"):
        annotate_dataset(conversations, model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(ValueError, match=r"holds only a part of its weights"):
        annotate_dataset(conversations, model)


def test_models_are_compared_under_zero3(pair):
    # ZeRO-3 shards whatever `from_config` and `from_pretrained` build, and the models are only measured here
    pytest.importorskip("deepspeed")
    config = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    try:
        check_same_architecture(*pair)
    finally:
        del config
        unset_hf_deepspeed_config()
