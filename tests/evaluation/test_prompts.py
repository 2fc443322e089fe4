"""Prompts: the model's own template, one token that begins the text, and the ids at which answers end."""

import copy
import logging

import pytest
from tokenizers import processors
from transformers import GenerationConfig

from gift_trl.evaluation.prompts import make_renderer, make_renderer_of
from gift_trl.evaluation.tasks import load_task, load_task_data


@pytest.fixture
def data(sums):
    """Data of the task with changes."""
    return lambda **changes: load_task_data(load_task({**sums, **changes}))


@pytest.fixture
def llama_like(tokenizer):
    """The tokenizer with a token that begins every text, as Llama's has, and a template that writes it too or not."""

    def make(template: str):
        changed = copy.deepcopy(tokenizer)
        changed.add_special_tokens({"bos_token": "<|begin|>"})
        begin = changed.bos_token_id
        single = "<|begin|>:0 $A:0"
        changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} $B:1", special_tokens=[("<|begin|>", begin)]
        )
        assert changed("a")["input_ids"][0] == begin
        changed.chat_template = template + tokenizer.chat_template
        return changed

    return make


def test_the_prompt_is_what_the_template_gives(pair, data):
    renderer = make_renderer("instruct", pair[1])
    prompts = renderer.render(data(prompt={"system": "Add."}))
    assert renderer.describe(prompts[1]) == (
        "<|start|>system\nAdd.<|end|>\n<|start|>user\nWhat is 0 plus 1?<|end|>\n<|start|>assistant\n"
    )
    assert renderer.max_length == 256


@pytest.mark.parametrize("template", ["{{ bos_token }}", ""])
def test_no_prompt_begins_twice(llama_like, data, template):
    tokenizer = llama_like(template)
    renderer = make_renderer_of("m", tokenizer, [], None)
    begins = [tokenizer.bos_token_id] if template else []
    for ids in renderer.render(data()):
        assert ids[: len(begins) + 1] == [*begins, tokenizer.convert_tokens_to_ids("<|start|>")]
        assert ids.count(tokenizer.bos_token_id) == len(begins)
    # Plain text has the tokenizer's; a text that writes it itself has no second one
    for text in ("{question}", "<|begin|>{question}"):
        for ids in renderer.render(data(prompt={"user": text, "chat": False})):
            assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_a_template_without_the_first_token_is_followed_with_a_warning(llama_like, data, caplog):
    with caplog.at_level(logging.WARNING):
        make_renderer_of("with", llama_like("{{ bos_token }}"), [], None).render(data())
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        make_renderer_of("without", llama_like(""), [], None).render(data())
    assert "`without` has a chat template without the `<|begin|>`" in caplog.text


def test_stop_ids_come_from_configuration_tokenizer_and_template(pair, make_model, tmp_path, tokenizer):
    make_model(tmp_path / "model")
    GenerationConfig(eos_token_id=[7, 9]).save_pretrained(tmp_path / "model")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert make_renderer("m", str(tmp_path / "model")).stop_ids == (end, 7, 9)
    # A base model's end of text is not what ends a turn in the template
    changed = copy.deepcopy(tokenizer)
    changed.eos_token = "<|pad|>"
    assert make_renderer_of("m", changed, [0], None).stop_ids == (0, end)
    changed.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    assert make_renderer_of("m", changed, [0], None).stop_ids == (0,)


def test_answers_are_text_without_the_end(tokenizer):
    renderer = make_renderer_of("m", tokenizer, [], None)
    ids = tokenizer("Blue. <|pad|>Red")["input_ids"]
    assert renderer.answer([*ids, tokenizer.eos_token_id]) == renderer.answer(ids) == "Blue. Red"


def test_a_model_without_a_template(tokenizer, data):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    renderer = make_renderer_of("base", plain, [2], None)
    with pytest.raises(ValueError, match=r"`base` has no chat template, .*or set `prompt\.chat: false`"):
        renderer.render(data())
    ids = renderer.render(data(prompt={"system": "Add.", "user": "Q: {question} A:", "chat": False}))[0]
    assert renderer.describe(ids) == "Add.\n\nQ: What is 0 plus 0? A:"


def test_a_template_that_refuses_a_system_message(tokenizer, data):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    renderer = make_renderer_of("strict", strict, [2], None)
    with pytest.raises(
        ValueError, match=r"`strict` refuses the messages of task `sums` \(no system\).*prompt\.system: null"
    ):
        renderer.render(data(prompt={"system": "Add."}))
    renderer.render(data())


def test_variables_of_the_template(tokenizer, data):
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = "{% if think %}think {% endif %}" + tokenizer.chat_template
    prompts = make_renderer_of("m", thinking, [2], None, {"think": True}).render(data())
    assert tokenizer.decode(prompts[0]).startswith("think <|start|>")
