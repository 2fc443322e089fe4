"""
The held-out questions of the lab, and what models get right of them.

The quick start asks them through `gift-trl evaluate`, as tasks on files (recipes/quickstart/evaluation.yaml). The experiment,
which asks a thousand models, draws the same answers from models in memory and keeps only what was right.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gift_trl.evaluation.generation import Request, TransformersEngine
from gift_trl.evaluation.results import Results
from gift_trl.evaluation.tasks import Sampling
from gift_trl.lab.corpora import corpus_rng, make_target_problem
from gift_trl.lab.problems import ANSWER_MARK, RETENTION_TASKS, Problem, make_list_task, make_problem


# The evaluation sets are the same for every model and every seed of the pair.
_TARGET_SEED, _RETENTION_SEED, _SHORT_SEED = 777, 778, 779
_PROBLEM_TOKENS, _LIST_TASK_TOKENS = 64, 18
# Names of the tasks of target, short and retention in an evaluation, and of their files
TASKS = ("long_problems", "short_problems", "list_tasks")


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


def write_questions(evaluation_set: EvaluationSet, folder: Path) -> None:
    """
    Writes the questions as the data of the `TASKS`, one JSON-lines file each.

    Args:
        evaluation_set ([`EvaluationSet`]):
            The questions.
        folder (`Path`):
            Existing folder.
    """
    problems = [
        [{"question": problem.question, "answer": str(problem.answer)} for problem in several]
        for several in (evaluation_set.target, evaluation_set.short)
    ]
    # Of a sum, what counts is its result, which the mark tells from the answer to a list task
    list_tasks = [
        {
            "kind": kind,
            "question": question,
            "answer": f"{ANSWER_MARK} {final_number(answer)}" if kind == "calc" else answer,
        }
        for kind, question, answer in evaluation_set.retention
    ]
    for name, rows in zip(TASKS, (*problems, list_tasks), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def read_scores(results: Results, model: str) -> Scores:
    """
    What a model got right in an evaluation on the files of [`write_questions`].

    Args:
        results ([`~gift_trl.evaluation.results.Results`]):
            The results.
        model (`str`):
            Name of the model in them.

    Returns:
        [`Scores`]: What it got right.
    """
    return Scores(*(tuple(score == 1 for (score,) in results.runs[model, task].scores.values()) for task in TASKS))


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


def generate_answers(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    questions: Sequence[str],
    max_new_tokens: int,
    *,
    batch_size: int = 256,
) -> list[str]:
    """
    Answers questions greedily, each as the only message of a chat, with the engine of `gift-trl evaluate`.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with the chat template.
        questions (`Sequence[str]`):
            The questions.
        max_new_tokens (`int`):
            Longest answer.
        batch_size (`int`, *optional*, defaults to `256`):
            Questions answered at the same time. Questions of like length go together, to save padding.

    Returns:
        `list[str]`: The answers, without special tokens, in the order of the questions.
    """
    prompts = processing_class.apply_chat_template(
        [[{"role": "user", "content": question}] for question in questions], add_generation_prompt=True
    )["input_ids"]
    requests = [Request("lab", index, 0, 0, ids, max_new_tokens) for index, ids in enumerate(prompts)]
    requests.sort(key=lambda request: len(request.prompt_ids))
    batches = [requests[first : first + batch_size] for first in range(0, len(requests), batch_size)]
    engine = TransformersEngine(model, [processing_class.eos_token_id])
    answers = [""] * len(prompts)
    for batch in engine.generate(batches, Sampling(max_new_tokens, temperature=0)):
        texts = processing_class.batch_decode([completion.ids for _, completion in batch], skip_special_tokens=True)
        for (request, _), text in zip(batch, texts, strict=True):
            answers[request.problem] = text
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
