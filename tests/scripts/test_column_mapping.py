"""What a recipe makes of the columns of published data, without a script of its own."""

import copy
from importlib import resources

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from trl import DatasetMixtureConfig, SFTConfig

from gift_trl.annotation.tokenization import tokenize_dataset
from gift_trl.scripts.arguments import GIFTScriptArguments
from gift_trl.scripts.columns import map_columns
from gift_trl.scripts.data import load_recipe_datasets
from gift_trl.scripts.train import main, make_parser, set_accumulation_steps


# As MedMCQA is published: the options in a column each, the right one as a class label, -1 where it is not told
CHOICES = Features(
    {name: Value("string") for name in ("question", "opa", "opb", "messages")} | {"cop": ClassLabel(names=["a", "b"])}
)
TEMPLATE = "{question}\nA. {opa}\nB. {opb}\n\nPut the letter into \\boxed{{}}."
SETTINGS = {"prompt_template": TEMPLATE, "completion_column": "cop", "completion_choices": ["A", "B"]}


def choices(**changes) -> Dataset:
    row = {"question": "Is water {wet}?", "opa": "Yes", "opb": "No", "cop": 0, "messages": "?"}
    return Dataset.from_list([row, {**row, "cop": 1} | changes], features=CHOICES)


def test_choices_become_a_question_and_a_letter():
    found = map_columns(choices(), GIFTScriptArguments(**SETTINGS, system_prompt="Be brief.", prompt_suffix=" Now."))
    assert found.column_names == ["prompt", "completion"]
    question = "Is water {wet}?\nA. Yes\nB. No\n\nPut the letter into \\boxed{}. Now."
    assert found[1] == {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": "B"}],
    }
    streamed = map_columns(choices().to_iterable_dataset(), GIFTScriptArguments(**SETTINGS))
    assert [row["completion"][0]["content"] for row in streamed] == ["A", "B"]


def test_an_answer_of_several_columns():
    settings = GIFTScriptArguments(prompt_column="question", completion_template="{opb} {opa}")
    assert map_columns(choices(), settings)[0]["completion"][0]["content"] == "No Yes"
    settings = GIFTScriptArguments(**SETTINGS, completion_template="{opa}, so it is {cop}.")
    assert map_columns(choices(), settings)[1]["completion"][0]["content"] == "Yes, so it is B."


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"opb": None}, "has no text in the column `opb` (it holds None)"),
        ({"question": " "}, "has no text in the column `question`"),
        ({"cop": -1}, "has -1 in the column `cop`, and `completion_choices` are 0 to 1"),
    ],
)
def test_incomplete_rows_stop_or_are_left_out(changes, reason, caplog):
    with pytest.raises(ValueError) as error:
        map_columns(choices(**changes), GIFTScriptArguments(**SETTINGS))
    assert f"Row 1 of the data {reason}" in str(error.value) and "skip_empty_rows" in str(error.value)
    assert len(map_columns(choices(**changes), GIFTScriptArguments(**SETTINGS, skip_empty_rows=True))) == 1
    assert "1 of 2 rows are left out" in caplog.text


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prompt_template": "{question"}, "expected '}' before end of string"),
        ({"prompt_template": "{}?"}, "needs the name of a column in braces"),
        ({"prompt_template": "{question.upper}"}, "nothing else in them"),
        ({"prompt_template": "{question!r}"}, "nothing else in them"),
        ({"prompt_template": "nothing"}, "needs the name of a column"),
        ({"prompt_template": "{opz}"}, "and no column `opz`"),
        ({"prompt_column": "question"}, "both say what the prompt is"),
        ({"completion_column": None}, "belong together"),
        ({"completion_template": "{opa}"}, "does not name that column: write `{cop}` in it"),
        ({"completion_choices": None, "completion_template": "{cop}"}, "both say what the completion is"),
        ({"completion_column": None, "completion_template": "{cop}"}, "in `completion_column` mean, which is not set"),
        ({"chat_template_kwargs": "thinking"}, "is no JSON"),
        ({"chat_template_kwargs": "[1]"}, "write a JSON object"),
        ({"sample_seed": 1}, "draws `max_samples` rows"),
        ({"global_batch_size": 0}, "`global_batch_size` is 0"),
        (
            {"prompt_template": None, "completion_column": None, "completion_choices": None, "skip_empty_rows": True},
            "looks",
        ),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match="(?s)" + message.replace("(", r"\(")):
        map_columns(choices(), GIFTScriptArguments(**{**SETTINGS, **settings}))


def test_variables_of_the_chat_template(tokenizer):
    """Qwen3's template: an answer without thoughts begins after an empty block, which is then no target."""
    qwen = copy.deepcopy(tokenizer)
    qwen.chat_template = (resources.files("trl") / "chat_templates" / "qwen3.jinja").read_text()

    def targets(**settings) -> str:
        rows = map_columns(choices(), GIFTScriptArguments(**SETTINGS, **settings))
        row = tokenize_dataset(rows, qwen, SFTConfig("unused", bf16=False, use_cpu=True))[1]
        return qwen.decode([token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0])

    assert targets() == "<think>\n\n</think>\n\nB<|im_end|>\n"
    assert targets(chat_template_kwargs={"enable_thinking": False}) == "B<|im_end|>\n"
    text = Dataset.from_list([{"text": "Water is wet."}])
    with pytest.raises(ValueError, match="which is not applied to plain text"):
        map_columns(text, GIFTScriptArguments(chat_template_kwargs={"enable_thinking": False}))


def test_rows_are_drawn_alike_every_time(recipe, tmp_path):
    recipe()
    settings = {"dataset_name": str(tmp_path / "data.jsonl"), "max_samples": 4}

    def draw(**more) -> list:
        args = GIFTScriptArguments(**settings, **more)
        return load_recipe_datasets(args, DatasetMixtureConfig(), evaluate=False, seed=0)[0]["question"]

    first, drawn = draw(), draw(sample_seed=1)
    assert drawn == draw(sample_seed=1) != first and drawn != draw(sample_seed=2)
    assert first[0] == "What is two plus two?"


def test_the_global_batch_is_that_of_the_recipe(recipe, fails, monkeypatch):
    def steps(processes: int, *argv: str) -> int:
        parsed = make_parser().parse_args_and_config(["--config", recipe(global_batch_size=256), *argv])
        monkeypatch.setattr("transformers.TrainingArguments.world_size", property(lambda _: processes))
        set_accumulation_steps(*parsed[:2])
        return parsed[1].gradient_accumulation_steps

    assert [steps(n) for n in (1, 2, 8, 64)] == [64, 32, 8, 1]
    assert steps(8, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "32") == 32
    assert steps(8, "--global_batch_size", "none") == 1
    with pytest.raises(ValueError, match="which 3 processes × 4 rows"):
        steps(3)
    with pytest.raises(ValueError, match=r"needs 64 \(1 processes × 4 rows × 64 steps\)"):
        steps(1, "--gradient_accumulation_steps", "32")


def test_a_global_batch_trains(recipe, tmp_path):
    main(["--config", recipe(global_batch_size=8, per_device_train_batch_size=2, num_train_epochs=1)])
    assert [path.name for path in (tmp_path / "adapter").glob("checkpoint-*")] == ["checkpoint-1"]
