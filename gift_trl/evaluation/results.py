"""
The results of an evaluation, as files that a user can open.

```
RESULTS/
  evaluation.yaml                 what was run: models, tasks, seeds, engine, versions
  MODEL/TASK/generations.jsonl    one line for each problem and sample, in this order
  MODEL/TASK/grades.jsonl         one line for each generation: its score, and the answer that was found in it
  MODEL/TASK/summary.json         the figures of a table, with their intervals, and what was left out
  MODEL/TASK/skipped.jsonl        problems that could not be asked, with the reason
  MODEL/TASK/timing.json          seconds of the generation: apart from the rest, which is the same in every run
```

Names of models and tasks are those of the configuration, and nothing in the files names a local path.
"""

import json
import os
import re
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import yaml

from gift_trl.evaluation.statistics import Interval


CONFIG_FILE = "evaluation.yaml"
GENERATIONS_FILE = "generations.jsonl"
GRADES_FILE = "grades.jsonl"
SUMMARY_FILE = "summary.json"
SKIPPED_FILE = "skipped.jsonl"
TIMING_FILE = "timing.json"
# What a task is for: what the training aims at, or what the model should not lose by it
ROLES = ("target", "retention")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@-]*")


@dataclass(frozen=True)
class Generation:
    """
    One answer of a model.

    Args:
        problem (`int`):
            Index of the problem's row in the data, before `limit`.
        sample (`int`):
            Number of the sample, counted over all seeds.
        seed (`int`):
            Seed it was drawn with.
        prompt (`str`):
            The prompt as the model saw it, with special tokens.
        prompt_ids (`list[int]` or `None`):
            Its token ids. `None` where an evaluation harness does not tell.
        reference (`Any`):
            The right answer: text, or several texts of which each is right.
        text (`str`):
            The answer, without special tokens.
        ids (`list[int]` or `None`):
            Its token ids, with the one at which it stopped.
        finish_reason (`str` or `None`):
            `"stop"` if the model ended the answer, `"length"` if it was cut off.
        fields (`dict[str, Any]`):
            Further fields of the row, such as its id, subject or level.
    """

    problem: int
    sample: int
    seed: int
    prompt: str
    prompt_ids: list[int] | None
    reference: Any
    text: str
    ids: list[int] | None
    finish_reason: str | None
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grade:
    """
    What one answer is worth.

    Args:
        problem, sample (`int`):
            As in [`Generation`].
        score (`float`):
            From 0 to 1.
        answer (`str` or `None`):
            What the metric took for the answer, `None` if it found none.
    """

    problem: int
    sample: int
    score: float
    answer: str | None = None


@dataclass(frozen=True)
class Skip:
    """
    A problem that is not in the figures.

    Args:
        problem (`int`):
            As in [`Generation`].
        reason (`str`):
            Why it was left out.
    """

    problem: int
    reason: str


@dataclass(frozen=True)
class Summary:
    """
    The figures of one model on one task; shares and scores are from 0 to 1, intervals are 95 % bootstraps over problems.

    Args:
        metric (`dict[str, Any]`):
            `name` of the metric, and its options.
        num_problems (`int`):
            Number of problems that were graded.
        num_samples (`int`):
            Number n of samples of each.
        average ([`~gift_trl.evaluation.statistics.Interval`]):
            Average@n: mean score over the samples of a problem, then over the problems.
        pass_at_k (`dict[int, Interval]`):
            Unbiased estimate of the chance that one of k samples is right, for the powers of two up to n. Empty where
            scores are not 0 or 1.
        majority (`Interval`, *optional*):
            Majority@n: score of the most frequent answer. `None` for a single sample, and where scores are not 0 or 1.
        truncated (`float`, *optional*):
            Share of the answers that were cut off. `None` where that is not known.
        never_stopped (`float`, *optional*):
            Share of the problems of which no answer ended by itself.
        mean_tokens (`float`, *optional*):
            Mean number of generated tokens.
        skipped (`tuple[Skip, ...]`):
            What was left out, and why.
        unchecked (`int`):
            Number of answers whose check took too long. They count as wrong.
    """

    metric: dict[str, Any]
    num_problems: int
    num_samples: int
    average: Interval
    pass_at_k: dict[int, Interval] = field(default_factory=dict)
    majority: Interval | None = None
    truncated: float | None = None
    never_stopped: float | None = None
    mean_tokens: float | None = None
    skipped: tuple[Skip, ...] = ()
    unchecked: int = 0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Summary":
        """The summary that [`to_dict`] made the dictionary of."""
        return cls(
            **{
                **values,
                "average": Interval(**values["average"]),
                "pass_at_k": {int(k): Interval(**interval) for k, interval in values["pass_at_k"].items()},
                "majority": Interval(**values["majority"]) if values["majority"] else None,
                "skipped": tuple(Skip(**skip) for skip in values["skipped"]),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON holds them."""
        return {
            **vars(self),
            "average": self.average._asdict(),
            "pass_at_k": {k: interval._asdict() for k, interval in self.pass_at_k.items()},
            "majority": self.majority._asdict() if self.majority else None,
            "skipped": [vars(skip) for skip in self.skipped],
        }


@dataclass(frozen=True)
class TaskResults:
    """
    One model on one task.

    Args:
        model, task (`str`):
            Names.
        folder (`Path`):
            Where its files are.
    """

    model: str
    task: str
    folder: Path

    @cached_property
    def summary(self) -> Summary:
        """The figures."""
        return _read(self.folder / SUMMARY_FILE, Summary.from_dict)

    @cached_property
    def grades(self) -> list[Grade]:
        """Every grade, by problem and sample."""
        return list(read_lines(self.folder / GRADES_FILE, Grade))

    @cached_property
    def scores(self) -> dict[int, list[float]]:
        """The scores of every problem's samples."""
        scores: dict[int, list[float]] = {}
        for grade in self.grades:
            scores.setdefault(grade.problem, []).append(grade.score)
        return scores

    @cached_property
    def timing(self) -> dict[str, float]:
        """`seconds` of the generation on the clock, added up over resumed runs; empty if not known."""
        return _read(self.folder / TIMING_FILE, dict) if (self.folder / TIMING_FILE).is_file() else {}

    def generations(self, problems: Collection[int] | None = None) -> Iterator[Generation]:
        """
        Reads the generations one by one, since they may be large.

        Args:
            problems (`Collection[int]`, *optional*):
                Problems to read. Defaults to all.

        Yields:
            [`Generation`]: By problem and sample.
        """
        for generation in read_lines(self.folder / GENERATIONS_FILE, Generation):
            if problems is None or generation.problem in problems:
                yield generation


@dataclass(frozen=True)
class Results:
    """
    A folder of results.

    Args:
        folder (`Path`):
            The folder.
        config (`dict[str, Any]`):
            What `evaluation.yaml` holds: `models` and `tasks` by name, `baseline`, `engine`, `seeds`, `versions`. A task
            has a `role` (`"target"` or `"retention"`), a `description` and a `metric`.
        runs (`dict[tuple[str, str], TaskResults]`):
            Complete results by model and task.
        missing (`tuple[tuple[str, str], ...]`):
            Models and tasks that are not complete.
    """

    folder: Path
    config: dict[str, Any]
    runs: dict[tuple[str, str], TaskResults]
    missing: tuple[tuple[str, str], ...] = ()

    @property
    def models(self) -> list[str]:
        """Names of the models, in the order of the configuration."""
        return list(self.config["models"])

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order of the configuration."""
        return list(self.config["tasks"])

    @property
    def baseline(self) -> str:
        """The model that the others are compared with."""
        return self.config["baseline"]

    def role(self, task: str) -> str:
        """One of `ROLES`."""
        return self.config["tasks"][task]["role"]


def load_results(folder: str | os.PathLike) -> Results:
    """
    Reads a folder that `gift-trl evaluate` wrote. Generations and grades are read when they are asked for.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.

    Returns:
        [`Results`]: Its content.

    Raises:
        `FileNotFoundError`: If it is no such folder.
        `ValueError`: If a file in it cannot be read.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"'{folder}' holds no {CONFIG_FILE}: name the `output_dir` of a `gift-trl evaluate` run."
        )
    config = read_config(folder)
    runs, missing = {}, []
    for model in config["models"]:
        for task in config["tasks"]:
            results = TaskResults(model, task, folder / model / task)
            if (results.folder / SUMMARY_FILE).is_file():
                runs[model, task] = results
            else:
                missing.append((model, task))
    return Results(folder, config, runs, tuple(missing))


def read_config(folder: Path) -> dict[str, Any]:
    """
    Reads `evaluation.yaml`.

    Args:
        folder (`Path`):
            Folder of results.

    Returns:
        `dict[str, Any]`: See [`Results`].

    Raises:
        `ValueError`: If it cannot be read.
    """
    path = folder / CONFIG_FILE
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not all(isinstance(config[key], dict) for key in ("models", "tasks")):
            raise TypeError("models and tasks are no mappings")
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise _unreadable(path) from error
    return config


def check_name(name: Any, kind: str) -> str:
    """
    Checks a name that becomes the name of a folder.

    Args:
        name (`Any`):
            Name of a model or a task.
        kind (`str`):
            What it names, for the message.

    Returns:
        `str`: The name.

    Raises:
        `ValueError`: If it cannot name a folder.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot be the name of a {kind}, which becomes the name of a folder: use letters, digits and any of "
            "`.`, `_`, `+`, `@`, `-`, a letter or digit first."
        )
    return name


def read_lines(path: Path, kind: type) -> Iterator[Any]:
    """
    Reads a JSON-lines file.

    Args:
        path (`Path`):
            The file.
        kind (`type`):
            Dataclass of a line.

    Yields:
        The lines.

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If a line cannot be read; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}': run the evaluation again, it fills in what is missing.")
    # Not `splitlines`, which also splits at separators that JSON leaves as they are within a string
    with open(path, encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield kind(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise _unreadable(path, f"line {number} of ") from error


def to_line(item: Any) -> str:
    """
    One line of a JSON-lines file.

    Args:
        item (`Any`):
            Instance of a dataclass.

    Returns:
        `str`: The line with its end.
    """
    line = json.dumps(vars(item), ensure_ascii=False, allow_nan=False) + "\n"
    # Half of a surrogate pair, as JSON data can hold, cannot be written as UTF-8
    return line.encode(errors="replace").decode()


def write_lines(path: Path, items: Iterable[Any]) -> None:
    """
    Writes a JSON-lines file whole or not at all.

    Args:
        path (`Path`):
            The file to be.
        items (`Iterable[Any]`):
            Instances of a dataclass.
    """
    with write_file(path) as file:
        file.writelines(map(to_line, items))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """
    Writes a JSON file whole or not at all.

    Args:
        path (`Path`):
            The file to be.
        values (`dict[str, Any]`):
            Its content.
    """
    with write_file(path) as file:
        file.write(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """
    Writes `evaluation.yaml` whole or not at all.

    Args:
        folder (`Path`):
            Folder of results, which is made if it is missing.
        config (`dict[str, Any]`):
            See [`Results`].
    """
    with write_file(folder / CONFIG_FILE) as file:
        file.write(yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=119))


@contextmanager
def write_file(path: Path, mode: str = "w") -> Iterator[IO]:
    """
    Writes a file whole or not at all.

    Args:
        path (`Path`):
            The file to be. Missing folders are made.
        mode (`str`, *optional*, defaults to `"w"`):
            `"w"` for text, `"wb"` for bytes.

    Yields:
        The open file, which takes the place of `path` at the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read(path: Path, make: Any) -> Any:
    try:
        return make(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _unreadable(path) from error


def _unreadable(path: Path, part: str = "") -> ValueError:
    return ValueError(
        f"Cannot read {part}'{path}'. If it was changed or copied in part, remove it and run the evaluation again: what is "
        "missing is made anew, from the generations where they are there."
    )
