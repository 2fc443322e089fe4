"""A small pair for any text: it loads, keeps every byte, and ends its turns."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gift_trl.lab.text_pair import make_text_pair
from gift_trl.model_pair import check_same_architecture
from gift_trl.scripts import make_pair


TEXTS = ["Let $x^3 - 2x = 5$. Find $\\frac{1}{x}$.", "Déjà vu: 数学 🙂\n\nAnswer: \\boxed{10}"] * 4
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": TEXTS[0]},
    {"role": "assistant", "content": TEXTS[1]},
]


@pytest.fixture(scope="module")
def text_pair(tmp_path_factory):
    return make_text_pair(TEXTS, tmp_path_factory.mktemp("text") / "pair", vocab_size=300, hidden_size=32)


def test_tokenizer_keeps_every_byte(text_pair):
    tokenizer = AutoTokenizer.from_pretrained(text_pair[1])
    for text in [*TEXTS, "never seen before: ß ☃ \t\r\n"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_chat_template_trains_the_answer_and_its_end(text_pair):
    tokenizer = AutoTokenizer.from_pretrained(text_pair[1])
    assert tokenizer.apply_chat_template(CONVERSATION[:2], add_generation_prompt=True, tokenize=False) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{TEXTS[0]}<|im_end|>\n<|im_start|>assistant\n"
    )
    whole = tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    prompt = tokenizer.apply_chat_template(CONVERSATION[:2], add_generation_prompt=True)["input_ids"]
    assert whole["input_ids"][: len(prompt)] == prompt
    marked = [token for token, mark in zip(whole["input_ids"], whole["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == f"{TEXTS[1]}<|im_end|>"
    assert marked[-1] == tokenizer.eos_token_id


def test_instruct_model_is_near_the_base_model(text_pair):
    check_same_architecture(str(text_pair[0]), str(text_pair[1]))
    base, instruct = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in text_pair)
    for name, weights in base.items():
        assert float((instruct[name] - weights).norm() / weights.norm()) == pytest.approx(0.03, rel=1e-3)
    assert all(torch.isfinite(weights).all() for weights in instruct.values())


def test_generation_stops_at_the_end_of_a_turn(text_pair):
    model = AutoModelForCausalLM.from_pretrained(text_pair[1])
    tokenizer = AutoTokenizer.from_pretrained(text_pair[1])
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    output = model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False)
    assert output.shape[1] <= 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 200}, "the bytes and special tokens alone need 260"),
        ({"hidden_size": 36}, "choose a multiple of twice `num_heads`, which is 4"),
        ({"texts": [" "]}, "no text to train a tokenizer on"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_text_pair(**{"texts": TEXTS, "output_dir": tmp_path / "pair", **changes})
    assert list(tmp_path.iterdir()) == []


def test_command_makes_a_pair_from_a_file(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": text, "answer": text}) + "\n" for text in TEXTS))
    arguments = ["--dataset", str(data), "--output_dir", str(tmp_path / "pair"), "--vocab_size", "300"]
    with pytest.raises(
        ValueError, match=r"Line 1 .* no text in the column `instruction`; its columns are question, answer"
    ):
        make_pair.main(arguments)
    make_pair.main([*arguments, "--hidden_size", "32", "--text_columns", "question", "answer"])
    assert str(tmp_path / "pair" / "instruct") in capsys.readouterr().out
    assert len(AutoTokenizer.from_pretrained(tmp_path / "pair" / "base")) <= 300


@pytest.mark.parametrize(
    ("content", "message"), [("{\n", "Line 1 .* is no JSON"), ("3\n", "no JSON object"), (None, "There is no file")]
)
def test_command_names_what_is_wrong_with_the_file(tmp_path, content, message):
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_text(content)
    with pytest.raises((OSError, ValueError), match=message):
        make_pair.main(["--dataset", str(data), "--output_dir", str(tmp_path / "pair")])


def test_a_pair_replaces_a_pair_only(tmp_path):
    sizes = {"vocab_size": 280, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "models" / "base" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"models' does not look like .* no pair\.json"):
        make_text_pair(TEXTS, tmp_path / "models", **sizes, overwrite=True)
    assert (tmp_path / "models" / "base" / "config.json").read_text() == "{}"
    make_text_pair(TEXTS, tmp_path / "pair", **sizes)
    base, _ = make_text_pair(TEXTS, tmp_path / "pair", **sizes, seed=1, overwrite=True)
    assert '"seed": 1' in (base.parent / "pair.json").read_text()
