"""Folders of results as `gift-trl evaluate` writes them, with the scores that a test wants."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gift_trl.evaluation.grading import summarize
from gift_trl.evaluation.results import (
    GENERATIONS_FILE,
    GRADES_FILE,
    SUMMARY_FILE,
    Generation,
    Grade,
    Skip,
    write_config,
    write_json,
    write_lines,
)


VERSIONS = {"gift_trl": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}


def task_config(role: str = "target", **fields: Any) -> dict[str, Any]:
    sampling = {"max_new_tokens": 4096, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "n": 4}
    settings = {"dataset": "org/data", "revision": "abc", "split": "test", "sampling": sampling, "role": role}
    return {**settings, "metric": {"name": "exact_match"}, "limit": None, "data": "digest", **fields}


def binary(rate: float, problems: int, samples: int = 1, seed: int = 0) -> np.ndarray:
    """Scores of problems of different difficulty; a higher rate solves what a lower one does, for the same seed."""
    rng = np.random.default_rng(seed)
    return (rng.random((problems, samples)) < rate).astype(float)


def write_results(
    folder: Path,
    scores: dict[tuple[str, str], np.ndarray],
    *,
    models: dict[str, Any] | None = None,
    tasks: dict[str, Any] | None = None,
    truncated: dict[str, float] | None = None,
    text: Callable[[str, int, int], str] = lambda model, problem, sample: f"{model} says {problem}/{sample}",
    prompt: Callable[[int], str] = lambda problem: f"<|user|>What is {problem}?<|assistant|>",
    skipped: tuple[Skip, ...] = (),
    first: int = 0,
    **config: Any,
) -> Path:
    """Writes scores of shape `(problems, samples)` by model and task; `truncated` is the share of cut answers by model."""
    named = {kind: list(dict.fromkeys(pair[i] for pair in scores)) for i, kind in enumerate(("models", "tasks"))}
    settings = {
        "models": {name: {"model": f"org/{name}", "commit": "c0ffee"} for name in named["models"]} | (models or {}),
        "tasks": {name: task_config() for name in named["tasks"]} | (tasks or {}),
        "baseline": named["models"][0],
        "engine": "transformers",
        "seeds": [0],
        "versions": VERSIONS,
    }
    write_config(folder, {**settings, **config})
    for (model, task), matrix in scores.items():
        cut = np.random.default_rng(1).random(matrix.shape) < (truncated or {}).get(model, 0.0)
        generations, grades, lengths = [], [], {}
        for (row, sample), score in np.ndenumerate(matrix):
            problem, answer = first + row, str(row) if score == 1 else "wrong"
            reason = "length" if cut[row, sample] else "stop"
            said, ids = text(model, problem, sample), [1, 2, 3]
            generations.append(Generation(problem, sample, 0, prompt(problem), ids, str(row), said, ids, reason, {}))
            grades.append(Grade(problem, sample, float(score), answer))
            lengths.setdefault(problem, []).append((len(ids), reason))
        write_lines(folder / model / task / GENERATIONS_FILE, generations)
        write_lines(folder / model / task / GRADES_FILE, grades)
        write_json(
            folder / model / task / SUMMARY_FILE,
            summarize(grades, lengths, {"name": "exact_match"}, list(skipped)).to_dict(),
        )
    return folder
