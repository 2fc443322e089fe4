"""The sweep of the scale on a task: the answers are those of merged checkpoints, and are kept like any other."""

import json
import warnings

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from gift_trl.evaluation.comparison import compare_results
from gift_trl.evaluation.generation import TransformersEngine
from gift_trl.evaluation.results import load_results
from gift_trl.evaluation.run import evaluate
from gift_trl.evaluation.scale_sweep import sweep_task
from gift_trl.evaluation.tasks import load_task
from gift_trl.lab.evaluation import make_evaluation_set
from gift_trl.merging import merge_adapter
from gift_trl.merging.sweep import ScaleScore, Sweep
from gift_trl.scripts.sweep import main


@pytest.fixture
def adapter(pair, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    config = LoraConfig(
        r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def task(sums):
    # Some of the tiny model's answers have one of these words in them
    return load_task({**sums, "metric": {"name": "rouge"}, "sampling": {"max_new_tokens": 12}})


@pytest.fixture
def loaded(monkeypatch):
    generate, models = TransformersEngine.generate, []

    def count(self, batches, sampling):
        models.append(self.model)
        return generate(self, batches, sampling)

    monkeypatch.setattr(TransformersEngine, "generate", count)
    return models


def answers(results, model):
    return [generation.ids for generation in results.runs[model, "sums"].generations()]


def test_answers_are_those_of_merged_checkpoints(configure, pair, adapter, task, tmp_path):
    common = {"use_cpu": True, "tokens_per_batch": 100}
    sweep = sweep_task(adapter, pair[1], [1, 0, 0.5], task, tmp_path / "sweep", **common)
    found = load_results(tmp_path / "sweep")
    assert found.models == ["instruct", "scale_0.5", "scale_1"]
    models = {"instruct": pair[1]}
    for scale in (0.5, 1):
        merge_adapter(adapter, pair[1], tmp_path / f"scale_{scale}", scale=scale)
        models[f"scale_{scale}"] = str(tmp_path / f"scale_{scale}")
    merged = evaluate(configure(models=models, tasks=[task_fields(task)], output_dir=str(tmp_path / "merged")))
    assert all(answers(found, name) == answers(merged, name) for name in models)
    assert len({str(answers(found, name)) for name in models}) == 3
    averages = [merged.runs[name, "sums"].summary.average for name in models]
    assert [entry.score for entry in sweep.scores] == [pytest.approx(100 * average.mean) for average in averages]
    facts = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert facts["best_scale"] == sweep.best.scale and len(facts["scores"]) == 3
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    # The same differences as those of the report, which compares with the instruct model
    for model, difference in compare_results([tmp_path / "sweep"]).differences.items():
        entry = next(e for e in sweep.scores if f"scale_{e.scale:g}" == model[0])
        if sweep.best.scale == 0:
            assert entry.difference[0] == pytest.approx(100 * difference.interval.mean)


def task_fields(task):
    return {
        "name": task.name,
        "dataset": task.dataset,
        "fields": {"question": "ask", "answer": "right", "id": "uid"},
        "sampling": {"max_new_tokens": task.sampling.max_new_tokens},
        "metric": dict(task.metric),
    }


def test_a_sweep_goes_on_and_mixes_nothing(pair, adapter, task, tmp_path, loaded):
    common = {"use_cpu": True, "tokens_per_batch": 100}
    first = sweep_task(adapter, pair[1], [0.5], task, tmp_path / "sweep", **common)
    assert len(loaded) == 1 and first.best.difference is None
    sweep = sweep_task(adapter, pair[1], [0.5, 2], task, tmp_path / "sweep", **common)
    assert len(loaded) == 2 and sweep.scores[0].score == first.scores[0].score
    other = AutoModelForCausalLM.from_pretrained(pair[1])
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(other, config).save_pretrained(tmp_path / "other")
    with pytest.raises(FileExistsError, match=r"`adapter\.weights` was"):
        sweep_task(tmp_path / "other", pair[1], [0.5], task, tmp_path / "sweep", **common)
    assert len(loaded) == 2


def test_factors_that_differ_in_the_seventh_digit(pair, adapter, task, tmp_path, loaded):
    common = {"use_cpu": True, "tokens_per_batch": 100}
    sweep = sweep_task(adapter, pair[1], [0.5, 0.50000001], task, tmp_path / "sweep", **common)
    assert [entry.scale for entry in sweep.scores] == [0.5, 0.50000001] and len(loaded) == 2
    assert load_results(tmp_path / "sweep").models == ["scale_0.5", "scale_0.50000001"]


def test_an_adapter_that_cannot_be_merged(pair, adapter, task, tmp_path, loaded):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "init_lora_weights": "pissa"}))
    with pytest.raises(ValueError, match="Cannot merge"):
        sweep_task(adapter, pair[1], [0.5], task, tmp_path / "sweep", use_cpu=True)
    assert not loaded and not (tmp_path / "sweep").exists()


def test_the_command(pair, adapter, task, tmp_path, capsys):
    (tmp_path / "plus.yaml").write_text(yaml.safe_dump({**task_fields(task), "dataset": "elsewhere"}))
    arguments = ["--adapter", str(adapter), "--instruct_model", pair[1], "--scales", "0", "1", "--use_cpu"]
    arguments += ["--output_dir", str(tmp_path / "sweep"), "--task", str(tmp_path / "plus.yaml"), "--limit", "4"]
    main([*arguments, "--dataset", task.dataset])
    printed = capsys.readouterr().out
    assert "sums, rouge, percent" in printed and " to the best" in printed and "The best scale on this" in printed
    assert load_results(tmp_path / "sweep").config["tasks"]["sums"]["num_problems"] == 4


def test_the_questions_of_the_lab(pair, adapter, tmp_path, monkeypatch, capsys):
    few = make_evaluation_set(num_target=3, num_short=1, num_per_task=1)
    monkeypatch.setattr("gift_trl.lab.evaluation.make_evaluation_set", lambda: few)
    arguments = ["--adapter", str(adapter), "--instruct_model", pair[1], "--task", "lab", "--scales", "1"]
    main([*arguments, "--use_cpu", "--output_dir", str(tmp_path / "sweep")])
    generations = list(load_results(tmp_path / "sweep").runs["scale_1", "long_problems"].generations())
    assert [g.reference for g in generations] == [str(problem.answer) for problem in few.target]
    assert "long_problems, exact_match, percent" in capsys.readouterr().out
    with pytest.raises(ValueError, match="questions of its own"):
        main([*arguments, "--dataset", "x.jsonl", "--output_dir", str(tmp_path / "other")])


def test_a_test_set_is_no_validation_data(pair, adapter, tmp_path, monkeypatch):
    tasks = []
    monkeypatch.setattr("gift_trl.evaluation.scale_sweep.sweep_task", lambda *args, **kwargs: tasks.append(args[3]))
    arguments = ["--adapter", str(adapter), "--instruct_model", pair[1], "--output_dir", str(tmp_path / "sweep")]
    with pytest.warns(UserWarning, match="the test set of `math500`"):
        main([*arguments, "--task", "math500", "--n", "2"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        main([*arguments, "--task", "math500", "--dataset", "validation.jsonl"])
    assert [(task.dataset, task.sampling.n) for task in tasks] == [
        ("HuggingFaceH4/MATH-500", 2),
        ("validation.jsonl", 16),
    ]


def test_a_server_applies_no_adapter(configure, pair, adapter):
    with pytest.raises(ValueError, match="`tuned` has an adapter, which the engine `vllm` does not apply"):
        configure(models={"tuned": {"model": pair[1], "adapter": str(adapter)}}, engine="vllm", base_url="http://x/v1")


def test_what_chance_may_explain():
    scores = (
        ScaleScore(0.0, 50.0, (45.0, 55.0), (-10.0, -15.0, -5.0)),
        ScaleScore(0.5, 59.0, None, (-1.0, -3.0, 1.0)),
    )
    sweep = Sweep((*scores, ScaleScore(1.0, 60.0)), "x", True)
    assert sweep.best.scale == 1.0 and sweep.not_told_apart() == (0.5,)
    lines = sweep.table().splitlines()
    assert lines[1].endswith("50.0000 [45.0000, 55.0000]  -10.0000 [-15.0000, -5.0000] to the best")
    assert lines[3].endswith("60.0000  <- best")
