"""From generations to grades and figures; makes no generation, so that it can be repeated at no cost."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from datasets.utils import tqdm
from huggingface_hub.utils import chunk_iterable

from gift_trl.evaluation.metrics import load_metric
from gift_trl.evaluation.results import (
    GENERATIONS_FILE,
    GRADES_FILE,
    SKIPPED_FILE,
    SUMMARY_FILE,
    Generation,
    Grade,
    Skip,
    Summary,
    read_lines,
    write_json,
    write_lines,
)
from gift_trl.evaluation.statistics import Interval, average_at_n, bootstrap_interval, majority_at_n, pass_at_k
from gift_trl.evaluation.tasks import find_answer


logger = get_logger(__name__)

# Answers graded between two steps of the progress bar
_BATCH = 256
_CHOICES = "choices"
# Answers that a warning names
_LISTED = 5


def check_metric(metric: dict[str, Any], task: str) -> None:
    """
    Checks that a metric can be loaded and has the options that are set, before there is anything to grade.

    Args:
        metric (`dict[str, Any]`):
            `name` of the metric, and its options.
        task (`str`):
            Name of the task in messages.

    Raises:
        `ValueError`: If it has not.
    """
    name, options = _split(metric)
    try:
        known = list(inspect.signature(load_metric(name)._compute).parameters)[2:]
    except ImportError as error:
        raise ValueError(f"Task `{task}`: the metric `{name}` cannot be loaded: {error}") from error
    known = [option for option in known if option != _CHOICES]
    if unknown := [option for option in options if option not in known]:
        raise ValueError(
            f"Task `{task}`: the metric `{name}` has no option `{'`, `'.join(unknown)}`: its options are "
            f"{', '.join(known) or 'none'}."
        )


def grade(folder: Path, metric: dict[str, Any], answer_pattern: str | None, description: str = "Grading") -> Summary:
    """
    Grades the generations in a folder, and writes grades and summary beside them.

    Args:
        folder (`Path`):
            Folder of a model and task.
        metric (`dict[str, Any]`):
            `name` of the metric, and its options.
        answer_pattern (`str`, *optional*):
            As in [`~gift_trl.evaluation.tasks.Task`].
        description (`str`, *optional*):
            Label of the progress bar.

    Returns:
        [`Summary`]: The figures.
    """
    lengths: dict[int, list[tuple[int | None, str | None]]] = {}

    def generations() -> Iterator[Generation]:
        for generation in read_lines(folder / GENERATIONS_FILE, Generation):
            tokens = None if generation.ids is None else len(generation.ids)
            lengths.setdefault(generation.problem, []).append((tokens, generation.finish_reason))
            yield generation

    unchecked: list[tuple[int, int]] = []
    grades = grade_generations(generations(), metric, answer_pattern, description, unchecked)
    skipped = list(read_lines(folder / SKIPPED_FILE, Skip))
    if unchecked:
        places = ", ".join(f"problem {problem}, sample {sample}" for problem, sample in unchecked[:_LISTED])
        logger.warning(
            f"{len(unchecked)} answers in '{folder.name}' took too long to check and count as wrong: {places}"
            f"{', …' if len(unchecked) > _LISTED else ''}. With `metric: {{name: {metric['name']}, time_limit: SECONDS}}` they get "
            "more time."
        )
    summary = summarize(grades, lengths, metric, skipped, len(unchecked))
    write_lines(folder / GRADES_FILE, grades)
    write_json(folder / SUMMARY_FILE, summary.to_dict())
    return summary


def grade_generations(
    generations: Iterator[Generation],
    metric: dict[str, Any],
    answer_pattern: str | None,
    description: str = "Grading",
    unchecked: list[tuple[int, int]] | None = None,
) -> list[Grade]:
    """
    Grades answers.

    Args:
        generations (`Iterator[Generation]`):
            The answers.
        metric, answer_pattern, description:
            As in [`grade`].
        unchecked (`list[tuple[int, int]]`, *optional*):
            Is given problem and sample of each answer whose check was cut off.

    Returns:
        `list[Grade]`: The grades in the same order.
    """
    name, options = _split(metric)
    loaded = load_metric(name)
    grades: list[Grade] = []
    with tqdm(desc=description, unit="answer", leave=False) as progress:
        for batch in map(list, chunk_iterable(generations, _BATCH)):
            texts = [g.text if answer_pattern is None else find_answer(answer_pattern, g.text) for g in batch]
            asked = [(g, text) for g, text in zip(batch, texts, strict=True) if text is not None]
            results: Iterator[tuple[float, Any]] = iter(())
            if asked:
                choices = [g.fields.get(_CHOICES) for g, _ in asked]
                computed = loaded.compute(
                    predictions=[text for _, text in asked],
                    references=[g.reference for g, _ in asked],
                    **options,
                    **({_CHOICES: choices} if name == "multiple_choice_accuracy" and all(choices) else {}),
                )
                results = zip(computed["scores"], computed["answers"], strict=True)
                if unchecked is not None and "cut_off" in computed:
                    unchecked += [
                        (g.problem, g.sample) for (g, _), cut in zip(asked, computed["cut_off"], strict=True) if cut
                    ]
            for generation, text in zip(batch, texts, strict=True):
                score, answer = (0.0, None) if text is None else next(results)
                grades.append(Grade(generation.problem, generation.sample, float(score), answer))
            progress.update(len(batch))
    return grades


def summarize(
    grades: list[Grade],
    lengths: dict[int, list[tuple[int | None, str | None]]],
    metric: dict[str, Any],
    skipped: list[Skip],
    unchecked: int = 0,
) -> Summary:
    """
    Makes the figures.

    Args:
        grades (`list[Grade]`):
            Grades of every problem's samples.
        lengths (`dict[int, list[tuple[int | None, str | None]]]`):
            Tokens and finish reason of every problem's samples.
        metric (`dict[str, Any]`):
            `name` of the metric, and its options.
        skipped (`list[Skip]`):
            What was left out.
        unchecked (`int`, *optional*, defaults to `0`):
            Number of answers whose check was cut off.

    Returns:
        [`Summary`]: The figures.

    Raises:
        `ValueError`: If the problems have not equally many samples.
    """
    scores: dict[int, list[float]] = {}
    answers: dict[int, list[str | None]] = {}
    for one in grades:
        scores.setdefault(one.problem, []).append(one.score)
        answers.setdefault(one.problem, []).append(one.answer)
    if len({len(row) for row in scores.values()}) != 1:
        raise ValueError("The problems have not equally many answers: remove their file of generations and run again.")
    matrix = np.array(list(scores.values()))
    num_samples = matrix.shape[1]
    average = bootstrap_interval(average_at_n(matrix))
    binary = bool(np.isin(matrix, (0.0, 1.0)).all())
    powers = [2**i for i in range(num_samples.bit_length()) if 2**i <= num_samples] if binary else []
    samples = [sample for row in lengths.values() for sample in row]
    reasons = [[reason for _, reason in row] for row in lengths.values()]
    tokens = [count for count, _ in samples if count is not None]
    known = all(reason is not None for _, reason in samples)
    return Summary(
        metric=metric,
        num_problems=len(matrix),
        num_samples=num_samples,
        average=average,
        # The mean of a problem's scores is pass@1
        pass_at_k={k: average if k == 1 else bootstrap_interval(pass_at_k(matrix, k)) for k in powers},
        majority=_majority(answers, matrix) if binary and num_samples > 1 else None,
        truncated=sum(reason == "length" for _, reason in samples) / len(samples) if known else None,
        never_stopped=sum("stop" not in row for row in reasons) / len(reasons) if known else None,
        mean_tokens=sum(tokens) / len(tokens) if tokens else None,
        skipped=tuple(skipped),
        unchecked=unchecked,
    )


def _majority(answers: dict[int, list[str | None]], matrix: np.ndarray) -> Interval:
    return bootstrap_interval(majority_at_n(list(answers.values()), matrix))


def _split(metric: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return metric["name"], {key: value for key, value in metric.items() if key != "name"}
