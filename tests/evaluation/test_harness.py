"""Tasks of lm-eval: their answers in the same folder as ours, problem by problem, on local data without the Hub."""

import builtins
import copy
import json
from pathlib import Path

import pytest
import yaml
from tokenizers import processors
from transformers import PreTrainedModel

from gift_trl.evaluation.comparison import compare_results
from gift_trl.evaluation.config import HarnessTask, make_config
from gift_trl.evaluation.report import write_evaluation_report
from gift_trl.evaluation.run import evaluate, regrade


lm_eval = pytest.importorskip("lm_eval")
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager

COLOURS = [("sky", "blue"), ("grass", "green"), ("blood", "red"), ("snow", "white"), ("coal", "black")]


@pytest.fixture
def colours(tmp_path):
    """A task of lm-eval with choices, one with generated answers, and a group of both."""
    rows = [{"thing": thing, "colour": colour} for thing, colour in COLOURS]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "colours.jsonl")}},
        "test_split": "test",
        "doc_to_text": "What colour is {{thing}}?",
        "metadata": {"version": 1},
    }
    choices = [colour for _, colour in COLOURS]
    one = {
        **common,
        "task": "colour_choices",
        "output_type": "multiple_choice",
        "doc_to_choice": choices,
        "doc_to_target": "{{" + repr(choices) + ".index(colour)}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    other = {
        **common,
        "task": "colour_words",
        "output_type": "generate_until",
        "doc_to_target": "{{colour}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5},
        "metric_list": [{"metric": "exact_match", "ignore_case": True}],
    }
    for task in (one, other):
        (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


@pytest.fixture
def harness(configure, colours, pair):
    """Makes a configuration with tasks of lm-eval."""

    def make(*tasks, **values):
        tasks = [
            {"task": str(colours / f"{task}.yaml")} if isinstance(task, str) else task
            for task in tasks or ("colour_choices",)
        ]
        return configure(**{"tasks": None, "lm_eval": tasks, **values})

    return make


class Asked:
    """The token ids that a model is called with, row by row, and after how many calls it breaks off."""

    def __init__(self):
        self.rows, self.calls, self.limit = [], 0, None

    def note(self, ids):
        self.calls += 1
        if self.calls == self.limit:
            raise KeyboardInterrupt
        self.rows += ids.tolist()

    def clear(self):
        self.__init__()


@pytest.fixture
def asked(monkeypatch):
    asked, call, generate = Asked(), HFLM._model_call, HFLM._model_generate

    def noted_call(self, inps, *args, **kwargs):
        asked.note(inps)
        return call(self, inps, *args, **kwargs)

    def noted_generate(self, context, *args, **kwargs):
        asked.note(context)
        return generate(self, context, *args, **kwargs)

    monkeypatch.setattr(HFLM, "_model_call", noted_call)
    monkeypatch.setattr(HFLM, "_model_generate", noted_generate)
    return asked


def test_answers_and_scores_of_every_problem_are_kept(harness, sums, pair, tmp_path):
    config = harness(
        "colour_choices", "colour_words", tasks=[sums], models={"instruct": pair[1], "base": pair[0]}, seeds=[3]
    )
    results = evaluate(config)
    assert results.tasks == ["sums", "colour_choices", "colour_words"] and results.missing == ()
    assert [results.role(task) for task in results.tasks] == ["target", "retention", "retention"]
    run = results.runs["instruct", "colour_choices"]
    generations = list(run.generations())
    assert [g.problem for g in generations] == list(range(5)) and {g.seed for g in generations} == {3}
    first = generations[0]
    assert first.prompt.startswith("<|start|>user\nWhat colour is sky?<|end|>\n<|start|>assistant\n")
    assert (first.reference, first.prompt_ids, first.finish_reason) == ("blue", None, None)
    for g, grade in zip(generations, run.grades, strict=True):
        assert (
            g.text in dict(COLOURS).values()
            and grade.score == float(g.text == g.reference) == g.fields["metrics"]["acc"]
        )
        assert set(g.fields["metrics"]) == {"acc", "acc_norm"} and g.fields["task"] == "colour_choices"
    summary = run.summary
    assert summary.metric == {"name": "acc"} and summary.num_problems == 5 and summary.truncated is None
    # The figure is the harness's own
    theirs = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(pair[1]), "dtype": "float32", "add_bos_token": False},
        tasks=[str(tmp_path / "colour_choices.yaml")],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=True,
        device="cpu",
        bootstrap_iters=0,
    )
    assert summary.average.mean == pytest.approx(theirs["results"]["colour_choices"]["acc,none"])
    # Paired with another model, as any other task
    difference = compare_results([results.folder]).differences["base", "colour_choices"].interval
    other = results.runs["base", "colour_choices"].summary.average.mean
    assert difference.mean == pytest.approx(other - summary.average.mean)
    write_evaluation_report([results.folder], tmp_path / "report")
    assert "colour_choices" in (tmp_path / "report" / "report.md").read_text()
    assert str(tmp_path) not in (results.folder / "evaluation.yaml").read_text()
    assert not list(results.folder.rglob("*cache*"))


def test_what_is_finished_is_not_asked_again(harness, asked):
    first = evaluate(harness("colour_choices", "colour_words"))
    files = {path: path.read_bytes() for path in first.folder.rglob("*.json*") if path.name != "timing.json"}
    assert asked.calls
    asked.clear()
    second = evaluate(harness("colour_choices", "colour_words"))
    assert asked.calls == 0 and second.missing == ()
    for path in files:
        if path.name in ("grades.jsonl", "summary.json"):
            path.unlink()
    regrade(str(first.folder))
    assert asked.calls == 0 and {path: path.read_bytes() for path in files} == files
    changed = evaluate(harness({**_fields(harness), "metric": "acc_norm"}))
    assert asked.calls == 0 and changed.runs["instruct", "colour_choices"].summary.metric == {"name": "acc_norm"}


def test_another_filter_is_another_evaluation(harness, asked, colours):
    path = colours / "colour_words.yaml"
    filters = [
        {"name": "whole", "filter": [{"function": "take_first"}]},
        {"name": "word", "filter": [{"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"}]},
    ]
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "filter_list": filters}))
    fields = {"name": "colour_words", "task": str(path)}
    first = evaluate(harness(fields)).runs["instruct", "colour_words"]
    assert first.summary.metric == {"name": "exact_match", "filter": "whole"}
    # Only the scores after the first one were kept, which must not be taken for those after the other
    with pytest.raises(FileExistsError, match="`filter` was 'whole', is 'word'"):
        evaluate(harness({**fields, "filter": "word"}))


def _fields(harness):
    task = harness().lm_eval[0]
    return {"name": task.name, "task": task.task}


def test_a_run_that_is_broken_off_goes_on_where_it_was(harness, asked, tmp_path):
    fields = {**_fields(harness), "batch_size": 1}
    whole = evaluate(harness(fields, output_dir=str(tmp_path / "whole")))
    number = asked.calls
    asked.clear()
    asked.limit = 3
    with pytest.raises(KeyboardInterrupt):
        evaluate(harness(fields))
    folder = Path(harness().output_dir)
    asked.clear()
    # What another model was asked in this folder is not taken for this one's
    with pytest.raises(FileExistsError, match="holds answers of `instruct` to task `colour_choices` under another"):
        evaluate(harness({**fields, "num_fewshot": 0, "system": "Name colours."}))
    assert asked.calls == 0
    results = evaluate(harness(fields))
    assert 0 < asked.calls < number
    for name in ("generations.jsonl", "grades.jsonl", "summary.json", "skipped.jsonl"):
        path = Path("instruct", "colour_choices", name)
        assert (folder / path).read_bytes() == (whole.folder / path).read_bytes()
    assert results.missing == () and not list(folder.rglob("*cache*"))


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("task", ["colour_choices", "colour_words"])
def test_exactly_one_token_begins_a_prompt(harness, asked, make_model, tokenizer, tmp_path, chat, task):
    changed = copy.deepcopy(tokenizer)
    changed.bos_token = "<|pad|>"
    begin = changed.bos_token_id
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|pad|>:0 $A:0", pair="<|pad|>:0 $A:0 $B:1", special_tokens=[("<|pad|>", begin)]
    )
    changed.pad_token = tokenizer.eos_token
    changed.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    make_model(tmp_path / "llama")
    changed.save_pretrained(tmp_path / "llama")
    fields = {"task": str(tmp_path / f"{task}.yaml"), "chat": chat, "batch_size": 1}
    evaluate(harness(fields, models={"instruct": str(tmp_path / "llama")}))
    assert asked.calls
    for ids in asked.rows:
        assert ids[0] == begin and ids.count(begin) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"task": "no_such_task_anywhere"},
            "lm-eval has no task, group or tag 'no_such_task_anywhere'",
            marks=pytest.mark.slow,  # it reads the names of thousands of tasks
        ),
        ({"task": "nowhere.yaml"}, "there is no file 'nowhere.yaml'"),
        ({"metric": "f1"}, "`colour_choices` of lm-eval has no metric `f1`: set `metric` to one of acc, acc_norm"),
        ({"filter": "strict"}, "there is no filter `strict`: set `filter` to one of none"),
        ({"limit": 0}, "`limit` is 0: it has to be at least 1"),
        ({"shots": 3}, "has no field `shots`: its fields are name, task, metric"),
        ({"name": "a/b"}, "'a/b' cannot be the name of a task"),
    ],
)
def test_what_a_task_of_the_harness_cannot_say(harness, change, message, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", None)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        evaluate(harness({**_fields(harness), **change}))
    assert message in str(error.value)


def test_names_that_meet(harness, sums):
    with pytest.raises(ValueError, match="Two tasks are named 'sums'"):
        harness({**_fields(harness), "name": "sums"}, tasks=[sums])


def test_a_model_without_a_template(harness, make_model, tokenizer, tmp_path, monkeypatch):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    make_model(tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    plain.save_pretrained(tmp_path / "plain")
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", None)
    with pytest.raises(
        ValueError, match=r"`instruct` has no chat template, and task `colour_choices`.* or set `chat: false`"
    ):
        evaluate(harness(models={"instruct": str(tmp_path / "plain")}))


def test_servers_are_refused(harness):
    with pytest.raises(ValueError, match="`lm_eval` need the weights here"):
        harness(engine="vllm", base_url="http://localhost:8000/v1")


def test_the_limit_of_the_command_line_and_names_of_shipped_tasks(tmp_path):
    config = make_config({"output_dir": "o", "models": {"a": "b"}, "lm_eval": ["mmlu", "ifeval"]}, limit=7)
    assert config.lm_eval == (HarnessTask("mmlu", "mmlu", limit=7), HarnessTask("ifeval", "ifeval", limit=7))
    with pytest.raises(ValueError, match="`lm_eval` is 'mmlu': list names"):
        make_config({"output_dir": "o", "models": {"a": "b"}, "lm_eval": "mmlu"})


def test_without_lm_eval_the_error_says_what_to_install(harness, monkeypatch):
    own = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")
        return own(name, *args, **kwargs)

    config = harness()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"need lm_eval, which is not installed: pip install 'gift_trl\[lm-eval\]'"):
        evaluate(config)
