"""The methods are settings of one recipe: a miniature of the comparison, from annotation to evaluation."""

import math

import pytest
from peft import LoraConfig

from gift_trl.lab.comparison import METHODS, make_target_dataset, run_comparison
from gift_trl.lab.evaluation import evaluate_model, final_number, make_evaluation_set
from gift_trl.lab.results import Setting
from gift_trl.training import GIFTConfig


@pytest.fixture(scope="module")
def evaluation_set():
    return make_evaluation_set(num_target=6, num_short=4, num_per_task=1)


@pytest.fixture(scope="module")
def comparison(lab_pair, evaluation_set):
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
        lab_pair, settings, args, peft_config, seed=0, num_examples=16, evaluation_set=evaluation_set
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
        run_comparison(lab_pair, [], None, None, seed=0)


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


@pytest.mark.parametrize(
    ("answer", "number"), [("1 + 2 = 3 ; #### 3", "3"), ("#### 3 #### 4 x", "4"), ("3", None), ("####", None)]
)
def test_final_number(answer, number):
    assert final_number(answer) == number
