"""Problems on which two models differ, chosen by a rule that favours neither."""

import hashlib
import heapq
from collections.abc import Callable
from dataclasses import dataclass

from tqdm.auto import tqdm

from gift_trl.evaluation.comparison import Comparison
from gift_trl.evaluation.results import GRADES_FILE, Generation, Grade, TaskResults, read_lines


NUM_EXAMPLES = 10
RULE = (
    "Half of them are problems that the reference model does worse on, half problems it does better on, as far as there are. Of "
    "every model and task, the problem comes first whose mean score over the samples differs most, and equal ones come in an "
    "order drawn once and for all from the names and the number of the problem; models and tasks take turns in such an order. "
    "Shown are the first of the better model's best answers and the first of the worse model's worst."
)


@dataclass(frozen=True)
class Answer:
    """
    An answer of a model.

    Args:
        model (`str`):
            The model.
        mean (`float`):
            Its mean score over all samples of the problem.
        score (`float`):
            Score of this answer.
        text (`str`):
            The answer.
        finish_reason (`str` or `None`):
            `"stop"` or `"length"`.
        extracted (`str` or `None`):
            What the metric took for the answer.
    """

    model: str
    mean: float
    score: float
    text: str
    finish_reason: str | None
    extracted: str | None


@dataclass(frozen=True)
class Example:
    """
    A problem on which a model differs from the reference.

    Args:
        task (`str`):
            The task.
        problem (`int`):
            Number of the problem.
        prompt, reference (`str`):
            What was asked, and the right answer.
        answers (`tuple[Answer, Answer]`):
            The model's answer and the reference model's.
    """

    task: str
    problem: int
    prompt: str
    reference: str
    answers: tuple[Answer, Answer]


def choose_examples(comparison: Comparison, count: int = NUM_EXAMPLES) -> list[Example]:
    """
    Chooses problems on which a model and the reference differ, by `RULE`, and reads what was answered.

    Args:
        comparison ([`Comparison`]):
            The comparison.
        count (`int`, *optional*, defaults to 10):
            Number of examples.

    Returns:
        `list[Example]`: At most as many, those that the models do better on than the reference first.
    """
    better, worse = (_ranked(comparison, sign) for sign in (1, -1))
    # What one direction lacks, the other may fill
    num_better = max(count - count // 2, count - len(worse))
    chosen = [(*entry, max) for entry in better[:num_better]]
    chosen += [(*entry, min) for entry in worse[: count - len(chosen)]]
    problems: dict[tuple[str, str], set[int]] = {}
    for model, task, problem, _ in chosen:
        for name in (model, comparison.reference):
            problems.setdefault((name, task), set()).add(problem)
    bar = tqdm(problems.items(), desc="Reading examples", unit="run", delay=2)
    attempts = {pair: _read_attempts(comparison.runs[pair], wanted) for pair, wanted in bar}
    examples = []
    for model, task, problem, ours in chosen:
        theirs = min if ours is max else max
        answers = (
            _pick(model, attempts[model, task][problem], ours),
            _pick(comparison.reference, attempts[comparison.reference, task][problem], theirs),
        )
        asked = attempts[model, task][problem][0][1]
        reference = (
            " | ".join(map(str, asked.reference)) if isinstance(asked.reference, list) else str(asked.reference)
        )
        examples.append(Example(task, problem, asked.prompt, reference, answers))
    return examples


def _ranked(comparison: Comparison, sign: int) -> list[tuple[str, str, int]]:
    """Problems on which the difference has the sign, in the order in which they are shown."""
    entries = []
    for (model, task), difference in comparison.differences.items():
        points = sign * difference.points
        here = [
            (-points[i], _draw(model, task, problem), problem)
            for i, problem in enumerate(difference.problems.tolist())
            if points[i] > 0
        ]
        entries += [
            (rank, _draw(model, task), (model, task, problem))
            for rank, (_, _, problem) in enumerate(heapq.nsmallest(NUM_EXAMPLES, here))
        ]
    return [entry for _, _, entry in sorted(entries)]


def _draw(*names: str | int) -> str:
    return hashlib.sha256("/".join(map(str, names)).encode()).hexdigest()


def _read_attempts(run: TaskResults, problems: set[int]) -> dict[int, list[tuple[Grade, Generation]]]:
    """Every graded answer to the problems."""
    grades = {
        (grade.problem, grade.sample): grade
        for grade in read_lines(run.folder / GRADES_FILE, Grade)
        if grade.problem in problems
    }
    attempts: dict[int, list[tuple[Grade, Generation]]] = {}
    for generation in run.generations(problems):
        grade = grades.get((generation.problem, generation.sample))
        if grade is not None:
            attempts.setdefault(generation.problem, []).append((grade, generation))
    if missing := sorted(problems - attempts.keys()):
        raise ValueError(
            f"'{run.folder}' holds a grade of problem {missing[0]} but not what was graded: remove {GRADES_FILE} there and run "
            "the evaluation again."
        )
    return attempts


def _pick(model: str, attempts: list[tuple[Grade, Generation]], pick: Callable) -> Answer:
    """The first of the best or of the worst answers."""
    grade, generation = pick(attempts, key=lambda attempt: attempt[0].score)
    mean = sum(grade.score for grade, _ in attempts) / len(attempts)
    return Answer(model, mean, grade.score, generation.text, generation.finish_reason, grade.answer)
