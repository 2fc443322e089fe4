"""An evaluation: what it writes, that a killed one goes on, and that nothing of another configuration is mixed in."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from transformers import PreTrainedModel

from gift_trl.evaluation import run
from gift_trl.evaluation.comparison import compare_results
from gift_trl.evaluation.generation import TransformersEngine
from gift_trl.evaluation.report_text import describe_warnings
from gift_trl.evaluation.results import load_results
from gift_trl.evaluation.run import evaluate, regrade
from gift_trl.scripts.evaluate import describe_results


# `timing.json` holds seconds; everything else is the same in every run
DIFFERENT = {"timing.json", ".lock"}


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in DIFFERENT)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def no_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded before the error")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", refuse)


@pytest.fixture
def counted(monkeypatch):
    """Counts the answers that are generated."""
    generate, keys = TransformersEngine._generate, []

    def count(self, batch, sampling):
        keys.extend((request.task, *request.key) for request in batch)
        return generate(self, batch, sampling)

    monkeypatch.setattr(TransformersEngine, "_generate", count)
    return keys


def test_every_answer_is_kept(configure, pair, tokenizer):
    results = evaluate(configure(models={"instruct": pair[1], "base": pair[0]}, seeds=[0, 7]))
    assert (results.models, results.tasks, results.missing) == (["instruct", "base"], ["sums"], ())
    for model in results.models:
        ran = results.runs[model, "sums"]
        generations = list(ran.generations())
        assert [(g.problem, g.sample, g.seed) for g in generations] == [
            (problem, sample, 7 * (sample > 1)) for problem in range(6) for sample in range(4)
        ]
        first = generations[4]
        assert first.prompt == tokenizer.decode(first.prompt_ids)
        assert first.prompt == "<|start|>user\nWhat is 0 plus 1?<|end|>\n<|start|>assistant\n"
        assert (first.reference, first.fields) == ("1", {"uid": "row-0-1"})
        for g in generations:
            assert (g.finish_reason == "stop") == (g.ids[-1] == tokenizer.eos_token_id)
            assert g.finish_reason == "stop" or len(g.ids) == 12
            assert g.text == tokenizer.decode(g.ids, skip_special_tokens=True)
        summary = ran.summary
        assert (summary.metric, summary.num_problems, summary.num_samples) == ({"name": "exact_match"}, 6, 4)
        assert list(summary.pass_at_k) == [1, 2, 4] and summary.pass_at_k[1] == summary.average
        reasons = [[g.finish_reason for g in generations[first : first + 4]] for first in range(0, 24, 4)]
        assert summary.truncated == sum(row.count("length") for row in reasons) / 24
        assert summary.never_stopped == sum("stop" not in row for row in reasons) / 6
        assert summary.mean_tokens == sum(len(g.ids) for g in generations) / 24
        assert ran.timing["seconds"] > 0
    files = contents(results.folder)
    paths = [str(path).encode() for path in (Path(pair[1]).parent, results.folder.parent)]
    assert not any(path in content for path in paths for content in files.values())
    assert results.config["tasks"]["sums"]["dataset"] == "sums.jsonl"


def test_answers_do_not_depend_on_batches_or_on_the_other_models_and_tasks(configure, pair, sums, tmp_path):
    whole = evaluate(configure(models={"base": pair[0], "instruct": pair[1]}, tasks=[{**sums, "name": "other"}, sums]))
    alone = evaluate(configure(output_dir=str(tmp_path / "alone"), tokens_per_batch=1))
    one, other = (contents(r.folder / "instruct" / "sums") for r in (whole, alone))
    assert one == other


def test_what_is_there_is_kept_and_what_is_missing_added(configure, pair, sums, counted):
    evaluate(configure())
    before = contents(Path(configure().output_dir) / "instruct" / "sums")
    counted.clear()
    results = evaluate(
        configure(models={"base": pair[0], "instruct": pair[1]}, tasks=[sums, {**sums, "name": "more"}])
    )
    assert len(counted) == 36 and results.missing == ()
    assert contents(results.folder / "instruct" / "sums") == before
    assert results.baseline == "instruct"
    counted.clear()
    results = evaluate(configure(models={"base": pair[0]}, baseline="base"))
    assert counted == [] and results.models == ["base", "instruct"] and results.tasks == ["sums", "more"]
    assert results.baseline == "base"


def test_another_metric_grades_again_and_generates_nothing(configure, sums, counted):
    first = evaluate(configure())
    generations = contents(first.folder)["instruct/sums/generations.jsonl"]
    counted.clear()
    changed = {
        **sums,
        "metric": {"name": "rouge", "use_stemmer": False},
        "role": "retention",
        "answer_pattern": r"^(\S+)",
    }
    second = evaluate(configure(tasks=[changed]))
    assert counted == [] and contents(second.folder)["instruct/sums/generations.jsonl"] == generations
    assert second.runs["instruct", "sums"].summary.metric == {"name": "rouge", "use_stemmer": False}
    assert second.role("sums") == "retention"


def test_another_answer_pattern_or_metric_grades_the_answers_of_all_models_again(configure, pair, sums, counted):
    both = {"base": pair[0], "instruct": pair[1]}
    folder = evaluate(configure(models=both)).folder
    counted.clear()
    results = evaluate(configure(tasks=[{**sums, "answer_pattern": r"^(.)"}]))
    for model in both:  # also of the one that is not named
        grades = results.runs[model, "sums"].grades
        assert any(grade.answer for grade in grades) and all(len(grade.answer or "x") == 1 for grade in grades)
    results = evaluate(configure(tasks=[{**sums, "metric": "rouge"}]))
    assert counted == [] and {run.summary.metric["name"] for run in results.runs.values()} == {"rouge"}
    assert results.folder == folder and len(results.runs) == 2


def test_grading_again_from_the_files_alone(configure, counted):
    folder = evaluate(configure()).folder
    before = contents(folder)
    counted.clear()
    for name in ("grades.jsonl", "summary.json"):
        (folder / "instruct" / "sums" / name).unlink()
    (folder.parent / "sums.jsonl").unlink()
    regrade(str(folder))
    assert counted == [] and contents(folder) == before


@pytest.mark.parametrize("moment", range(4))
def test_a_run_that_fails_goes_on_where_it_was(configure, tmp_path, monkeypatch, moment):
    expected = contents(evaluate(configure(output_dir=str(tmp_path / "whole"))).folder)
    generate, calls, done = TransformersEngine._generate, [], []

    def fail(self, batch, sampling):
        calls.append(batch)
        if len(calls) > moment:
            raise KeyboardInterrupt
        done.extend(request.key for request in batch)
        return generate(self, batch, sampling)

    config = configure()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TransformersEngine, "_generate", fail)
        evaluate(config)
    part = Path(config.output_dir) / "instruct" / "sums" / "generations.part-00000.jsonl"
    torn = part.stat().st_size // 3 if moment % 2 else 0
    if torn:  # as a kill leaves it that comes during a write
        lines = part.read_bytes().splitlines(keepends=True)
        part.write_bytes(b"".join(lines)[: -len(lines[-1]) // 2])
        done = [tuple(json.loads(line)[key] for key in ("problem", "sample")) for line in lines[:-1]]
    assert load_results(config.output_dir).missing == (("instruct", "sums"),)
    repeated = []

    def remember(self, batch, sampling):
        repeated.extend(request.key for request in batch)
        return generate(self, batch, sampling)

    monkeypatch.setattr(TransformersEngine, "_generate", remember)
    evaluate(config)
    # Only the batch of a torn line is made again, and its whole lines are not written twice
    assert len(set(repeated) & set(done)) <= 3 * bool(torn)
    assert contents(Path(config.output_dir)) == expected


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("run", "join_parts"),  # every answer is in the parts
        ("parts", "remove_parts"),  # joined, and the parts still there
        ("grading", "write_lines"),  # joined, without grades
        ("grading", "write_json"),  # grades without figures
        ("run", "_prepare"),  # nothing but the lock
    ],
)
def test_a_run_that_ends_between_two_files_goes_on(configure, tmp_path, monkeypatch, counted, module, name):
    expected = contents(evaluate(configure(output_dir=str(tmp_path / "whole"))).folder)
    number = len(counted)
    config = configure()

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"gift_trl.evaluation.{module}.{name}", fail)
        evaluate(config)
    assert load_results(config.output_dir).missing if name != "_prepare" else True
    evaluate(config)
    assert contents(Path(config.output_dir)) == expected
    assert len(counted) == 2 * number, "an answer was lost, or made twice"


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_where_it_was(configure, sums, tmp_path, monkeypatch):
    tasks = [{**sums, "sampling": {"max_new_tokens": 40, "n": 6}}]
    expected = contents(evaluate(configure(output_dir=str(tmp_path / "whole"), tasks=tasks)).folder)
    generate = TransformersEngine._generate

    def slowly(self, batch, sampling):
        time.sleep(0.2)
        return generate(self, batch, sampling)

    monkeypatch.setattr(TransformersEngine, "_generate", slowly)
    rng, config = random.Random(0), configure(tasks=tasks)
    folder = Path(config.output_dir)
    fork, killed, parts = multiprocessing.get_context("fork"), 0, 0
    while not (folder / "evaluation.yaml").is_file() or load_results(folder).missing:
        process = fork.Process(target=evaluate, args=(config,))
        process.start()
        process.join(rng.uniform(0.3, 1.5))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
        parts += any(path.stat().st_size for path in folder.rglob("*.part-*"))
        assert killed < 100
    assert parts >= 2, "no kill came while answers were being generated"
    assert contents(folder) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [1]}, r"evaluation: `seeds` was \[0\], is \[1\]"),
        ({"models": {"instruct": "BASE"}}, "model `instruct`: `model` was 'instruct', is 'base'; .*`weights` was"),
        ({"dtype": "bfloat16"}, "model `instruct`: `dtype` was 'float32', is 'bfloat16'"),
        ({"sampling": {"temperature": 0.5}}, r"task `sums`: `sampling\.temperature` was 1\.0, is 0\.5"),
        ({"limit": 3}, "task `sums`: `limit` was None, is 3; `num_problems` was 6, is 3; `data` was"),
    ],
)
def test_answers_of_another_configuration(configure, pair, request, change, message):
    folder = evaluate(configure()).folder
    before = contents(folder)
    config = _changed(configure, pair, change)
    request.getfixturevalue("no_weights")
    with pytest.raises(FileExistsError, match=f"holds answers of `instruct` to task `sums` under another .*{message}"):
        evaluate(config)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            {"chat_template_kwargs": {"style": "a", "day": "b"}},
            {"chat_template_kwargs": {"style": "a"}},
            r"`chat_template_kwargs\.day` was 'b', is None",
        ),
        ({"init_kwargs": {"dtype": "bfloat16"}}, {}, r"`init_kwargs\.dtype` was 'bfloat16', is None"),
        ({"init_kwargs": {"attn_implementation": "eager"}}, {}, None),
    ],
)
def test_a_setting_of_the_model_that_is_taken_away(configure, pair, request, before, after, message):
    evaluate(configure(models={"instruct": {"model": pair[1], **before}}))
    request.getfixturevalue("no_weights")
    config = configure(models={"instruct": {"model": pair[1], **after}})
    if message is None:
        assert evaluate(config).missing == ()
        return
    with pytest.raises(FileExistsError, match=message):
        evaluate(config)


def _changed(configure, pair, change):
    if "models" in change:
        change = {"models": {"instruct": pair[0]}}
    config = configure(**{key: value for key, value in change.items() if key not in ("limit", "sampling")})
    task = config.tasks[0]
    task = replace(task, limit=change.get("limit"), sampling=replace(task.sampling, **change.get("sampling", {})))
    return replace(config, tasks=(task,))


def test_overwriting_throws_away_only_what_belongs_to_another_configuration(configure, pair, sums, counted):
    both = {"base": pair[0], "instruct": pair[1]}
    folder = evaluate(configure(models=both)).folder
    kept = contents(folder / "base")
    counted.clear()
    evaluate(configure(models={"base": pair[0], "instruct": pair[0]}, overwrite=True))
    assert len(counted) == 12 and contents(folder / "base") == kept
    files = [contents(folder / name / "sums")["generations.jsonl"] for name in both]
    assert files[0] == files[1]


def test_a_folder_of_something_else(configure, tmp_path, no_weights):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="holds something else than results of an evaluation"):
        evaluate(configure(overwrite=True))
    assert (tmp_path / "results" / "thesis.txt").read_text() == "precious"


def test_a_model_with_an_adapter_beside_it(configure, pair, tmp_path, no_weights):
    shutil.copytree(pair[1], tmp_path / "instruct")
    (tmp_path / "instruct" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter beside the model"):
        evaluate(configure(models={"instruct": str(tmp_path / "instruct")}))


def test_two_evaluations_at_once(configure, no_weights):
    folder = Path(configure().output_dir)
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(FileExistsError, match="Another evaluation is writing to"):
        evaluate(configure())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"models": {}}, "There is no model to evaluate: set `models`"),
        ({"tasks": []}, "There is no task to evaluate: set `tasks`"),
        ({"models": ["a"]}, r"`models` is \['a'\]: map names to Hub ids or folders"),
        ({"models": {"A": "x", "a": "y"}}, "Two models are named 'a'"),
        ({"models": {"a/b": "x"}}, "'a/b' cannot be the name of a model"),
        ({"models": {"a": {"path": "x"}}}, "Model `a` has no field `path`: its fields are model, revision"),
        ({"tasks": "TWICE"}, "Two tasks are named 'sums'"),
        ({"baseline": "c"}, "`baseline` is 'c', and the models are instruct"),
        ({"seeds": [1, 1]}, r"`seeds` is \[1, 1\]: give at least one, and none twice"),
        ({"engine": "sglang"}, "`engine` is 'sglang', and has to be Literal"),
        ({"engine": "vllm"}, "needs the URL of the server that holds `instruct`: set `base_url`"),
        ({"tokens_per_batch": 0}, "`tokens_per_batch` is 0"),
        ({"models": {"a": "nowhere/at-all"}}, "`nowhere/at-all` has no readable model configuration"),
        ({"tasks": [{"task": "nothing"}]}, "There is no task 'nothing'"),
    ],
)
def test_configurations_that_make_no_sense(configure, sums, no_weights, values, message):
    if values.get("tasks") == "TWICE":
        values = {"tasks": [sums, sums]}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(configure(**values))


def test_options_that_the_metric_has_not(configure, sums, no_weights):
    with pytest.raises(
        ValueError, match="`exact_match` has no option `ignore_caps`: its options are ignore_case, ignore_p"
    ):
        evaluate(configure(tasks=[{**sums, "metric": {"name": "exact_match", "ignore_caps": True}}]))


def test_rows_and_prompts_that_cannot_be_asked_are_counted_and_listed(configure, sums, tmp_path, caplog):
    rows = [{"ask": "?", "right": "x"}, {"ask": "long " * 400, "right": "y"}, {"ask": "?", "right": None}]
    rows.append({"ask": "almost too long " * 13, "right": "z"})
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums |= {"fields": {"question": "ask", "answer": "right"}, "sampling": {"max_new_tokens": 200}}
    results = evaluate(configure(tasks=[sums]))
    summary = results.runs["instruct", "sums"].summary
    assert summary.num_problems == 2
    assert [skip.problem for skip in summary.skipped] == [1, 2]
    assert "tokens fills the model's 256 positions" in summary.skipped[0].reason
    assert summary.skipped[1].reason == "no answer in the column `right`"
    assert "1 of 3 prompts of task `sums` leave `instruct` less than 200 (`max_new_tokens`)" in caplog.text
    last = list(results.runs["instruct", "sums"].generations())[-1]
    assert len(last.prompt_ids) + len(last.ids) <= 256 and last.problem == 3
    # Grading again needs neither data nor tokenizer, and knows of them
    (tmp_path / "sums.jsonl").unlink()
    assert regrade(str(results.folder)).runs["instruct", "sums"].summary == summary


def test_no_prompt_fits(configure, sums, no_weights):
    task = {**sums, "prompt": {"user": "{question}" * 40}}
    with pytest.raises(
        ValueError, match="No prompt of task `sums` leaves `instruct` room for an answer within its 256"
    ):
        evaluate(configure(tasks=[task]))


def test_an_answer_of_100_megabytes(configure):
    results = evaluate(configure())
    path = results.folder / "instruct" / "sums" / "generations.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    huge = json.loads(lines[0])
    huge["text"] = "0 " * (50 * 2**20)
    path.write_text(json.dumps(huge) + "\n" + "".join(lines[1:]))
    started = time.monotonic()
    assert regrade(str(results.folder)).runs["instruct", "sums"].summary.num_problems == 6
    assert time.monotonic() - started < 60


def test_an_answer_that_hangs_the_checker_is_counted_and_named(configure, sums, caplog):
    results = evaluate(configure())
    path = results.folder / "instruct" / "sums" / "generations.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    hanging = {**json.loads(lines[1]), "text": r"\boxed{(x+1)^{100000000}}", "reference": "x"}
    path.write_text(lines[0] + json.dumps(hanging) + "\n" + "".join(lines[2:]))
    results = evaluate(configure(tasks=[{**sums, "metric": {"name": "math_accuracy", "time_limit": 0.5}}]))
    run = results.runs["instruct", "sums"]
    assert run.summary.unchecked == 1 and run.grades[1].score == 0.0 and run.summary.num_problems == 6
    assert "1 answers in 'sums' took too long to check and count as wrong: problem 0, sample 1" in caplog.text
    assert "instruct, sums: 1 answers took too long to check and count as wrong" in describe_results(results)
    assert "1 answers of instruct to sums took too long to check" in " ".join(
        describe_warnings(compare_results([results.folder]))
    )


def test_a_damaged_part_is_named(configure):
    config = configure()
    folder = Path(config.output_dir) / "instruct" / "sums"
    folder.mkdir(parents=True)
    (folder / "generations.part-00000.jsonl").write_text('nonsense\n{"problem": 0, "sample": 0}\n')
    with pytest.raises(ValueError, match=r"part-00000.jsonl' cannot be read at byte 0, in its middle"):
        run.read_done(folder)


def test_versions_of_the_libraries_that_differ_are_told(configure, caplog):
    folder = evaluate(configure()).folder
    values = yaml.safe_load((folder / "evaluation.yaml").read_text())
    values["versions"]["torch"] = "1.0"
    (folder / "evaluation.yaml").write_text(yaml.safe_dump(values))
    evaluate(configure())
    assert "made with other versions of torch" in caplog.text


@pytest.mark.slow
def test_two_processes_write_what_one_does(configure, pair, sums, tmp_path):
    expected = contents(evaluate(configure(models={"instruct": pair[1], "base": pair[0]})).folder)
    settings = {
        "models": {"instruct": pair[1], "base": pair[0]},
        "tasks": [sums],
        "use_cpu": True,
        "tokens_per_batch": 150,
    }
    (tmp_path / "eval.yaml").write_text(
        yaml.safe_dump({**settings, "output_dir": str(tmp_path / "two")}, sort_keys=False)
    )
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import sys\n"
        "from accelerate import PartialState\n"
        "from gift_trl.scripts import evaluate\n"
        "evaluate.main(sys.argv[1:])\n"
        "assert PartialState().num_processes == 2, PartialState()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(probe), "--config"]
    done = subprocess.run([*command, str(tmp_path / "eval.yaml")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("average score") == 1
    assert contents(tmp_path / "two") == expected
