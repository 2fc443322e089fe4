"""`gift-trl recipe`: a recipe that runs as it is, and refusals of pairs and data that would not."""

import copy
import json
from importlib import resources

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, MixtralConfig, Qwen3Config

from gift_trl.scripts import recipe, train
from gift_trl.scripts.recipe_facts import data_settings, linear_target_modules, read_template


ROWS = [
    {"question": "How many?", "answer": "Two.", "level": 1},
    {"question": "How many?", "answer": "Three.", "level": 2},
]


@pytest.fixture
def data(tmp_path) -> str:
    path = tmp_path / "My data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def write(pair, data: str, output, *more: str) -> dict:
    recipe.main(["--base", pair[0], "--instruct", pair[1], "--dataset", data, "--output", str(output), *more])
    return yaml.safe_load(output.read_text())


def test_what_is_written_runs(pair, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "new" / "recipe.yaml"
    found = write(pair, data, output)
    assert "gift-trl train --config" in capsys.readouterr().out
    assert found["prompt_column"] == "question" and found["completion_column"] == "answer"
    assert found["per_device_train_batch_size"] == 8 and found["global_batch_size"] == 256
    text = output.read_text()
    assert "# not used: level; see prompt_template" in text
    assert "# - A turn ends with <|end|>, and generation stops at <|end|>." in text
    assert "# - It writes no token that begins a text." in text
    train.main(["--config", str(output), "--use_cpu", "--num_train_epochs", "3"])
    adapter = load_file(tmp_path / found["output_dir"] / "adapter_model.safetensors")
    assert len({name.split(".")[-3] for name in adapter}) == 7
    assert (tmp_path / found["merge_output_dir"] / "model.safetensors").is_file()


def test_messages_train_the_answers(pair, tmp_path, make_model, tokenizer):
    path = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}]
    path.write_text(json.dumps({"messages": chat}) + "\n")
    assert write(pair, str(path), tmp_path / "recipe.yaml")["assistant_only_loss"] is True
    make_model(tmp_path / "unmarked")
    unmarked = copy.deepcopy(tokenizer)
    unmarked.chat_template = unmarked.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    unmarked.save_pretrained(tmp_path / "unmarked")
    assert "assistant_only_loss" not in write(
        (pair[0], str(tmp_path / "unmarked")), str(path), tmp_path / "other.yaml"
    )
    assert "every turn of the data is a target" in (tmp_path / "other.yaml").read_text()


def test_the_paper_s_data_by_name(pair, tmp_path, capsys):
    recipe.main(["--base", pair[0], "--instruct", pair[1], "--dataset", "medical", "--max_length", "1024"])
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["dataset_name"] == "openlifescienceai/medmcqa" and found["completion_choices"] == ["A", "B", "C", "D"]
    assert found["max_length"] == 1024
    by_id = write(pair, "openlifescienceai/medmcqa", tmp_path / "recipe.yaml", "--max_length", "1024")
    assert by_id == found


def test_what_is_there_is_kept(pair, data, tmp_path):
    output = tmp_path / "recipe.yaml"
    output.write_text("precious")
    with pytest.raises(FileExistsError, match="replace it with `--overwrite`"):
        write(pair, data, output)
    assert output.read_text() == "precious"
    write(pair, data, output, "--overwrite")
    assert output.read_text() != "precious"


def test_models_that_are_no_pair(pair, make_model, tokenizer, data, tmp_path):
    make_model(tmp_path / "narrow", hidden_size=16)
    with pytest.raises(ValueError, match="they differ in hidden_size"):
        write((str(tmp_path / "narrow"), pair[1]), data, tmp_path / "recipe.yaml")
    make_model(tmp_path / "plain")
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="has no chat template, so it is not an instruct model's"):
        write((pair[0], str(tmp_path / "plain")), data, tmp_path / "recipe.yaml")
    with pytest.raises(FileNotFoundError, match="has no readable model configuration"):
        write((pair[0], str(tmp_path / "nowhere")), data, tmp_path / "recipe.yaml")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds an adapter, and no model: merge it"):
        write((pair[0], str(tmp_path / "adapter")), data, tmp_path / "recipe.yaml")
    assert not (tmp_path / "recipe.yaml").exists()


def test_a_gpu_that_is_too_small(pair, data, tmp_path):
    found = write(pair, data, tmp_path / "recipe.yaml", "--gpu_memory_gb", "1.2")
    assert found["per_device_train_batch_size"] < 8
    with pytest.raises(ValueError, match=r"on 64 GPUs of 1 GB.*smaller `--max_length`.$"):
        write(pair, data, tmp_path / "other.yaml", "--gpu_memory_gb", "1")
    with pytest.raises(ValueError, match=r"on 1 GPU of 1 GB.*leave out `--load_in_4bit`"):
        write(pair, data, tmp_path / "other.yaml", "--gpu_memory_gb", "1", "--load_in_4bit")
    found = write(pair, data, tmp_path / "other.yaml", "--load_in_4bit")
    assert found["load_in_4bit"] is True


@pytest.mark.parametrize(
    "columns, expected",
    [
        (["problem", "solution", "messages"], {"assistant_only_loss": True}),
        (["prompt", "messages"], {}),
        (["problem", "solution", "source"], {"prompt_column": "problem", "completion_column": "solution"}),
        (["instruction", "input", "output"], {"prompt_column": "instruction", "completion_column": "output"}),
        (["prompt", "completion"], {"prompt_column": "prompt", "completion_column": "completion"}),
        (["text", "meta"], {}),
    ],
)
def test_columns_are_recognised(columns, expected, tmp_path):
    Dataset.from_list([dict.fromkeys(columns, "x")]).to_parquet(tmp_path / "d.parquet")
    lines, name = data_settings(str(tmp_path / "d.parquet"), None, None)
    assert {line.key: line.value for line in lines} == {"dataset_name": str(tmp_path / "d.parquet"), **expected}
    assert name == "d"


def test_messages_in_a_column_of_another_name(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"conversations": [{"role": "user", "content": "a"}]}))
    with pytest.raises(ValueError, match=r"`conversations` of .* Rename the column to `messages`"):
        data_settings(str(path), None, None)
    # Those of the second are stored as JSON, whose keys are not known here
    for messages in ([{"from": "user", "value": "a"}], [{"from": "user", "value": "a"}, {"from": "gpt"}]):
        path.write_text(json.dumps({"conversations": messages}))
        assert [line.key for line in data_settings(str(path), None, None)[0]] == [
            "dataset_name",
            "assistant_only_loss",
        ]


def test_columns_that_are_not_recognised(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("alpha,beta\n1,2\n")
    with pytest.raises(ValueError, match="among which no question and answer are recognised"):
        data_settings(str(path), None, None)
    lines, _ = data_settings(str(path), "alpha", "beta")
    assert [line.value for line in lines[1:]] == ["alpha", "beta"]
    with pytest.raises(ValueError, match="and none named gamma"):
        data_settings(str(path), "alpha", "gamma")
    with pytest.raises(ValueError, match="belong together"):
        data_settings(str(path), "alpha", None)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        data_settings(str(tmp_path / "nowhere.csv"), None, None)
    with pytest.raises(ValueError, match="it is no local file, and the Hub cannot be asked"):
        data_settings("somebody/something", None, None)


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    "config, expected",
    [
        (LlamaConfig(**SIZES, num_key_value_heads=1), LLAMA),
        (Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=16), LLAMA),
        (GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64), ["c_attn", "c_proj", "c_fc"]),
        (MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=2), LLAMA[:4]),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_linear_layers_are_targets(config, expected):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert linear_target_modules(model) == expected


def notes_of(pair, template: str, **tokens: str) -> tuple[str, dict]:
    tokenizer = AutoTokenizer.from_pretrained(pair[1], **tokens)
    if not template.startswith("{"):
        template = (resources.files("trl") / "chat_templates" / f"{template}.jinja").read_text()
    tokenizer.chat_template = template
    facts = read_template(tokenizer, pair[1])
    return "\n".join(facts.notes), facts.template_kwargs


def test_notes_on_chat_templates(pair):
    notes, kwargs = notes_of(pair, "qwen3", eos_token="<|im_end|>")
    assert (
        "A turn ends with <|im_end|>, and generation stops at" in notes and "as `enable_thinking` says: off" in notes
    )
    assert kwargs == {"enable_thinking": False} and "Before an answer" not in notes
    notes, kwargs = notes_of(pair, "qwen2_5", eos_token="<|im_end|>")
    assert (
        "Without a system message it writes one of its own: '<|im_start|>system You are Qwen" in notes and not kwargs
    )
    notes, kwargs = notes_of(pair, "llama3_2", bos_token="<|begin|>", eos_token="<|eot_id|>")
    assert "It writes the date: the day of this recipe" in notes and kwargs.keys() == {"date_string"}
    assert "A text begins with <|begin|>." in notes
    turn = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\\n' }}{% endfor %}"
    notes, _ = notes_of(pair, turn + "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")
    assert "which is no token that ends a turn" in notes
    notes, _ = notes_of(pair, turn + "{% if add_generation_prompt %}{{ 'bot>' }}{% endif %}")
    assert "An answer does not begin as it is asked for: '\\nbot>'" in notes
    thoughts = "{% for m in messages %}{{ m['role'] + ':' + ('<think></think>' if m['role'] == 'assistant' else '') + m['content'] }}"
    notes, _ = notes_of(pair, thoughts + "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")
    assert "Before an answer it writes '<think></think>', which is trained on." in notes
    with pytest.raises(ValueError, match="refuses a question and an answer: no"):
        notes_of(pair, "{{ raise_exception('no') }}")
