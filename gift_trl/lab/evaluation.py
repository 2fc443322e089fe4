"""
Evaluation of the lab's models: greedy answers in the chat layout, scored by exact match on held-out problems.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gift_trl.lab.corpora import corpus_rng, make_target_problem
from gift_trl.lab.problems import ANSWER_MARK, RETENTION_TASKS, Problem, make_list_task, make_problem


# The evaluation sets are the same for every model and every seed of the pair.
_TARGET_SEED, _RETENTION_SEED, _SHORT_SEED = 777, 778, 779
_PROBLEM_TOKENS, _LIST_TASK_TOKENS = 64, 18


@dataclass(frozen=True)
class EvaluationSet:
    """
    The questions every model is asked.

    Parameters:
        target (`tuple[Problem, ...]`):
            Held-out problems of the target task.
        short (`tuple[Problem, ...]`):
            Problems of one to three operations, which the instruct model was post-trained for.
        retention (`tuple[tuple[str, str, str], ...]`):
            List tasks as name, question and answer: what the instruct model knew besides word problems.
    """

    target: tuple[Problem, ...]
    short: tuple[Problem, ...]
    retention: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Scores:
    """
    What one model got right, question by question, so that two models can be compared in pairs.

    Parameters:
        target (`tuple[bool, ...]`):
            Target problems.
        short (`tuple[bool, ...]`):
            Short problems.
        retention (`tuple[bool, ...]`):
            List tasks. Every task has the same number of questions, so the mean over questions is that over tasks.
    """

    target: tuple[bool, ...]
    short: tuple[bool, ...]
    retention: tuple[bool, ...]

    @cached_property
    def accuracies(self) -> dict[str, float]:
        """Accuracy in percent on `"target"`, `"short"` and `"retention"`."""
        return {
            name: 100 * sum(correct) / len(correct)
            for name, correct in (("target", self.target), ("short", self.short), ("retention", self.retention))
        }


def make_evaluation_set(num_target: int = 600, num_short: int = 200, num_per_task: int = 40) -> EvaluationSet:
    """
    Draws the evaluation questions.

    Args:
        num_target (`int`, *optional*, defaults to `600`):
            Number of target problems.
        num_short (`int`, *optional*, defaults to `200`):
            Number of short problems.
        num_per_task (`int`, *optional*, defaults to `40`):
            Number of questions of each of the `RETENTION_TASKS`.

    Returns:
        [`EvaluationSet`]: The questions.
    """
    target_rng, short_rng, retention_rng = (
        corpus_rng("held-out", seed) for seed in (_TARGET_SEED, _SHORT_SEED, _RETENTION_SEED)
    )
    return EvaluationSet(
        target=tuple(make_target_problem(target_rng) for _ in range(num_target)),
        short=tuple(make_problem(short_rng, short_rng.randint(1, 3)) for _ in range(num_short)),
        retention=tuple(
            (task, *make_list_task(retention_rng, task)) for task in RETENTION_TASKS for _ in range(num_per_task)
        ),
    )


def evaluate_model(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    evaluation_set: EvaluationSet,
) -> Scores:
    """
    Lets a model answer the evaluation questions and marks its answers.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with the chat template and left padding.
        evaluation_set ([`EvaluationSet`]):
            The questions.

    Returns:
        [`Scores`]: What the model got right.
    """
    problems = [*evaluation_set.target, *evaluation_set.short]
    questions = [problem.question for problem in problems]
    answers = generate_answers(model, processing_class, questions, _PROBLEM_TOKENS)
    solved = [final_number(answer) == str(problem.answer) for answer, problem in zip(answers, problems, strict=True)]
    questions = [question for _, question, _ in evaluation_set.retention]
    answers = generate_answers(model, processing_class, questions, _LIST_TASK_TOKENS)
    retained = [
        final_number(answer) == final_number(right) if name == "calc" else answer == right
        for answer, (name, _, right) in zip(answers, evaluation_set.retention, strict=True)
    ]
    num_target = len(evaluation_set.target)
    return Scores(tuple(solved[:num_target]), tuple(solved[num_target:]), tuple(retained))


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    questions: Sequence[str],
    max_new_tokens: int,
    *,
    batch_size: int = 256,
) -> list[str]:
    """
    Answers questions greedily, each as the only message of a chat.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with the chat template and left padding.
        questions (`Sequence[str]`):
            The questions.
        max_new_tokens (`int`):
            Longest answer.
        batch_size (`int`, *optional*, defaults to `256`):
            Questions answered at the same time. Questions of like length go together, to save padding.

    Returns:
        `list[str]`: The answers, without special tokens, in the order of the questions.
    """
    model.eval()
    prompts = processing_class.apply_chat_template(
        [[{"role": "user", "content": question}] for question in questions], add_generation_prompt=True
    )["input_ids"]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        batch = processing_class.pad({"input_ids": [prompts[row] for row in rows]}, return_tensors="pt")
        generated = model.generate(**batch.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
        texts = processing_class.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text
    return answers


def final_number(answer: str) -> str | None:
    """
    Returns what an answer gives as its result.

    Args:
        answer (`str`):
            The answer.

    Returns:
        `str` or `None`: The word after the last `####`, `None` when there is none.
    """
    _, mark, result = answer.rpartition(ANSWER_MARK)
    words = result.split()
    return words[0] if mark and words else None
