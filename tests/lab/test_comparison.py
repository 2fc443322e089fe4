"""The methods are settings of one recipe: a miniature of the comparison, from annotation to evaluation."""

import dataclasses
import math
from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from gift_trl.evaluation.config import ModelSpec
from gift_trl.evaluation.grading import grade_generations
from gift_trl.evaluation.results import Generation, load_results
from gift_trl.evaluation.run import evaluate
from gift_trl.evaluation.tasks import load_task_data
from gift_trl.lab.comparison import METHODS, make_target_dataset, run_comparison
from gift_trl.lab.evaluation import (
    TASKS,
    evaluate_model,
    final_number,
    generate_answers,
    make_evaluation_set,
    read_scores,
    write_questions,
)
from gift_trl.lab.results import Setting
from gift_trl.scripts.evaluate import main as evaluate_command
from gift_trl.scripts.quickstart import load_evaluation
from gift_trl.training import GIFTConfig


@pytest.fixture(scope="module")
def evaluation_set():
    return make_evaluation_set(num_target=6, num_short=4, num_per_task=1)


@pytest.fixture(scope="module")
def evaluation(evaluation_set, tmp_path_factory):
    """The quick start's tasks on a few questions."""
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "data").mkdir()
    write_questions(evaluation_set, folder / "data")
    return load_evaluation(folder)


@pytest.fixture(scope="module")
def comparison(lab_pair, evaluation_set, evaluation):
    args = GIFTConfig(
        "unused",
        max_steps=2,
        per_device_train_batch_size=4,
        max_length=128,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    settings = [Setting("A", 1e-2), Setting("Z", 1e-2)]
    return run_comparison(
        lab_pair, settings, args, peft_config, evaluation, seed=0, num_examples=16, evaluation_set=evaluation_set
    )


def test_every_method_ran_in_every_setting(comparison, evaluation_set):
    assert [str(result.setting) for result in comparison.settings] == [
        "mix A, learning rate 1e-2",
        "mix Z, learning rate 1e-2",
    ]
    for result in comparison.settings:
        assert [outcome.method for outcome in result.results] == [method.name for method in METHODS]
        assert math.isclose(sum(result.tokens), 100)
        for outcome in result.results:
            assert math.isclose(sum(outcome.signal), 100, rel_tol=1e-6)
            assert len(outcome.scores.target) == len(evaluation_set.target)
            assert len(outcome.scores.retention) == len(evaluation_set.retention)
            assert math.isfinite(outcome.training_loss)


def test_every_answer_is_kept_and_models_can_be_added(comparison, evaluation, evaluation_set, lab_pair, tmp_path):
    results = load_results(evaluation.output_dir)
    methods = [method.name for method in METHODS]
    assert results.models == ["instruct", "base", *(f"{m}@{mix}-1e-2" for mix in "AZ" for m in methods)]
    assert results.baseline == "instruct" and results.missing == ()
    assert [results.role(task) for task in results.tasks] == ["target", "retention", "retention"]
    for model, scores in (("base", comparison.base), ("GIFT@Z-1e-2", comparison.settings[1].by_method["GIFT"].scores)):
        assert read_scores(results, model) == scores
        generations = list(results.runs[model, "long_problems"].generations())
        assert [g.prompt for g in generations] == [f"<user> {p.question} <bot>" for p in evaluation_set.target]
    # As the recipe's header says
    recipe = tmp_path / "evaluation.yaml"
    shipped = Path("recipes/quickstart/evaluation.yaml").read_text(encoding="utf-8")
    recipe.write_text(
        shipped.replace("outputs/quickstart/", f"{Path(evaluation.output_dir).parent}/"), encoding="utf-8"
    )
    evaluate_command(["--config", str(recipe), "--models", f"by-hand={lab_pair[1]}"])
    after = load_results(evaluation.output_dir)
    assert after.models == [*results.models, "by-hand"] and after.baseline == "instruct"
    assert read_scores(after, "by-hand") == comparison.instruct


def test_methods_train_different_models_or_with_different_weights(comparison):
    for result in comparison.settings:
        losses = [outcome.training_loss for outcome in result.results]
        assert len(set(losses)) == len(METHODS)


def test_example_is_a_row_of_the_first_mix(comparison, evaluation_set):
    rows = make_target_dataset("A", 0, 16, evaluation_set)
    answers = {row["prompt"][0]["content"]: row["completion"][0]["content"] for row in rows}
    text = " ".join(token for token, _ in comparison.example.tokens)
    assert text == f"{answers[comparison.example.question]} <eos>"
    assert all(0 < confidence <= 1 for _, confidence in comparison.example.tokens)


def test_no_setting_is_refused(lab_pair):
    with pytest.raises(ValueError, match="at least one `Setting`"):
        run_comparison(lab_pair, [], None, None, None, seed=0)


def test_training_rows_hold_no_question_of_the_evaluation():
    evaluation_set = make_evaluation_set()
    asked = {problem.question for problem in evaluation_set.target}
    assert len(asked) == 600
    assert not asked & {row["prompt"][0]["content"] for row in make_target_dataset("A", 3)}


def test_answers_are_marked_by_exact_match(monkeypatch, evaluation_set):
    answers = {problem.question: f"so #### 3 #### {problem.answer} ." for problem in evaluation_set.target}
    answers |= {problem.question: f"{problem.answer}" for problem in evaluation_set.short}
    answers |= {question: answer for _, question, answer in evaluation_set.retention}
    wrong = evaluation_set.target[0]
    answers[wrong.question] = f"#### {wrong.answer + 1}"
    copied = next(question for task, question, _ in evaluation_set.retention if task == "copy")
    answers[copied] = answers[copied] + " a"
    monkeypatch.setattr(
        "gift_trl.lab.evaluation.generate_answers",
        lambda model, tokenizer, questions, max_new_tokens: [answers[question] for question in questions],
    )
    scores = evaluate_model(None, None, evaluation_set)
    assert scores.target == (False, *[True] * 5)
    assert scores.short == (False,) * 4
    assert sum(scores.retention) == len(evaluation_set.retention) - 1
    assert scores.accuracies["short"] == 0


def test_the_experiment_draws_the_answers_of_the_evaluation(make_model, evaluation, tmp_path):
    # Random weights this large give every question another answer
    folder = str(make_model(tmp_path / "model", initializer_range=0.5))
    config = dataclasses.replace(
        evaluation, output_dir=str(tmp_path / "results"), models={"random": ModelSpec(folder)}
    )
    results = evaluate(config)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for task in config.tasks:
        generations = list(results.runs["random", task.name].generations())
        assert len({g.text for g in generations}) > 1
        questions = [problem.messages[0]["content"] for problem in load_task_data(task).problems]
        answers = generate_answers(model, tokenizer, questions, task.sampling.max_new_tokens)
        assert [g.text for g in generations] == answers


@pytest.mark.parametrize(
    "text",
    "{} | #### {} | 1 + 2 = 3 ; #### {} | #### {} #### | #### {} x y | #### 21 #### {} | #### | x #### {} ; #### 0 | a {} |".split(
        "|"
    ),
)
def test_both_ways_give_the_same_verdicts(text, evaluation, evaluation_set, monkeypatch):
    """The experiment's, and those of the tasks in the recipe: of right answers in forms that models find."""
    problems = {task.name: (task, load_task_data(task).problems) for task in evaluation.tasks}
    rights = {p.question: str(p.answer) for p in (*evaluation_set.target, *evaluation_set.short)}
    rights |= {question: final_number(right) or right for _, question, right in evaluation_set.retention}
    answers = {question: text.format(right).strip() for question, right in rights.items()}
    monkeypatch.setattr(
        "gift_trl.lab.evaluation.generate_answers",
        lambda model, tokenizer, questions, max_new_tokens: [answers[question] for question in questions],
    )
    scores = evaluate_model(None, None, evaluation_set)
    for name, field in zip(TASKS, ("target", "short", "retention"), strict=True):
        task, rows = problems[name]
        generations = [
            Generation(row.index, 0, 0, "", None, row.reference, answers[row.messages[0]["content"]], None, None)
            for row in rows
        ]
        grades = grade_generations(iter(generations), task.metric, task.answer_pattern)
        assert tuple(grade.score == 1 for grade in grades) == getattr(scores, field)


@pytest.mark.parametrize(
    ("answer", "number"), [("1 + 2 = 3 ; #### 3", "3"), ("#### 3 #### 4 x", "4"), ("3", None), ("####", None)]
)
def test_final_number(answer, number):
    assert final_number(answer) == number
