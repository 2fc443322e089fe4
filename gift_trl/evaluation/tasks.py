"""A task: the data, what is asked about each row, how answers are drawn, and how they are graded."""

import copy
import hashlib
import json
import re
import string
from collections import deque
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.dataclasses import type_validator

from gift_trl.data_files import load_local_data, read_yaml
from gift_trl.evaluation.metrics import METRICS
from gift_trl.evaluation.results import Skip, check_name


@dataclass(frozen=True)
class Fields:
    """
    Which columns hold what.

    Args:
        question (`str`):
            Column with the question.
        answer (`str`):
            Column with the right answer: text, a number, or a list of texts.
        choices (`str` or `list[str]`, *optional*):
            Column with the list of choices (or the dictionary of them by letter), or a column for each.
        answer_form (`str`, *optional*):
            With `choices`, how the column says which one is right: by its `"index"` from 0, its `"letter"` or its `"text"`. By
            default a number is an index, and a text whichever of the two others it can be.
        id (`str`, *optional*):
            Column that identifies a row.
        keep (`list[str]`):
            Further columns to write beside the answers, such as subject and level.
        answer_list (`str`, *optional*, defaults to `"any"`):
            What a list of several answers means: `"any"` of them is right, or `"all"` belong to the right answer.
        answer_pattern (`str`, *optional*):
            Regular expression that takes the right answer out of the column: its first group at its last match.
    """

    question: str = "question"
    answer: str = "answer"
    choices: str | list[str] | None = None
    answer_form: Literal["index", "letter", "text"] | None = None
    id: str | None = None
    keep: list[str] = field(default_factory=list)
    answer_list: Literal["any", "all"] = "any"
    answer_pattern: str | None = None

    def columns(self) -> list[str]:
        """Every column that is read."""
        choices = [self.choices] if isinstance(self.choices, str) else self.choices or []
        return list(dict.fromkeys([self.question, self.answer, *choices, *([self.id] if self.id else []), *self.keep]))


@dataclass(frozen=True)
class PromptFormat:
    """
    How a row is asked about. In both texts, `{question}`, `{choices}` (one a line, as `A. …`) and `{COLUMN}` are filled in,
    and `{{`, `}}` stand for braces.

    Args:
        user (`str`, *optional*, defaults to `"{question}"`):
            The user's message.
        system (`str`, *optional*):
            The system message.
        chat (`bool`, *optional*, defaults to `True`):
            Whether the messages go through the model's chat template. If not, the model continues the user's message as
            plain text.
    """

    user: str = "{question}"
    system: str | None = None
    chat: bool = True


@dataclass(frozen=True)
class Sampling:
    """
    How answers are drawn. Nothing else is applied, whatever the checkpoint's generation configuration says.

    Args:
        max_new_tokens (`int`):
            Longest answer.
        temperature (`float`, *optional*, defaults to `1.0`):
            What the logits are divided by; 0 takes the likeliest token.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability of the likeliest tokens that are drawn from.
        top_k (`int`, *optional*, defaults to `0`):
            Number of the likeliest tokens that are drawn from; 0 for all.
        n (`int`, *optional*, defaults to `1`):
            Number of answers to each problem, for each seed.
    """

    max_new_tokens: int
    temperature: int | float = 1.0
    top_p: int | float = 1.0
    top_k: int = 0
    n: int = 1

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or above"),
            "top_p": (0 < self.top_p <= 1, "above 0 and up to 1"),
            "top_k": (self.top_k >= 0, "0 (for all tokens) or above"),
            "n": (self.n >= 1, "at least 1"),
        }
        for name, (holds, range_) in limits.items():
            if not holds:
                raise ValueError(f"`sampling.{name}` is {getattr(self, name)}: it has to be {range_}.")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"`sampling.temperature` is 0, so that all {self.n} answers are the same: set `n` to 1.")


@dataclass(frozen=True)
class Task:
    """
    A task of an evaluation, as a YAML file describes it.

    Args:
        name (`str`):
            Name of its folder of results. That of the file if a file does not say.
        dataset (`str`):
            Hub id; JSON, JSON-lines, CSV or Parquet file; or folder written by `save_to_disk`.
        sampling ([`Sampling`]):
            How answers are drawn.
        metric (`dict[str, Any]`):
            `name` of one of the package's metrics, and options of its `compute`. The name alone will do in YAML.
        description (`str`, *optional*):
            What it is, in a sentence.
        role (`str`, *optional*, defaults to `"target"`):
            `"target"`: what the training aims at; `"retention"`: what the model should not lose by it.
        dataset_config (`str` or `list[str]`, *optional*):
            Configuration on the Hub, or several, one after the other.
        data_files (`str` or `list[str]`, *optional*):
            File or files of the dataset, one after the other, where a split is no folder of its own. The split of a file is
            `"train"`; `"train[:100]"` takes the first hundred rows of each.
        revision (`str`, *optional*):
            Branch, tag or commit of the dataset on the Hub.
        split (`str`, *optional*, defaults to `"test"`):
            Split. That of a single file does not matter.
        fields ([`Fields`], *optional*):
            Which columns hold what.
        prompt ([`PromptFormat`], *optional*):
            How a row is asked about.
        answer_pattern (`str`, *optional*):
            Regular expression that takes the answer out of what a model wrote: the first group that took part in its last
            match, over lines too. Without a match there is no answer, which is wrong. By default the metric looks for the
            answer itself.
        limit (`int`, *optional*):
            Number of rows to use, from the start.
    """

    name: str
    dataset: str
    sampling: Sampling
    metric: dict[str, Any]
    description: str = ""
    role: Literal["target", "retention"] = "target"
    dataset_config: str | list[str] | None = None
    data_files: str | list[str] | None = None
    revision: str | None = None
    split: str = "test"
    fields: Fields = Fields()
    prompt: PromptFormat = PromptFormat()
    answer_pattern: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        check_name(self.name, "task")
        if self.metric.get("name") not in METRICS:
            raise ValueError(
                f"Task `{self.name}`: there is no metric {self.metric.get('name')!r}: use one of {', '.join(METRICS)}."
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"Task `{self.name}`: `limit` is {self.limit}: it has to be at least 1.")
        for where, pattern in (("", self.answer_pattern), ("fields.", self.fields.answer_pattern)):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise ValueError(
                    f"Task `{self.name}`: `{where}answer_pattern` is no regular expression ({error}): {pattern!r}."
                ) from error
        _placeholders(self)


@dataclass(frozen=True)
class Problem:
    """
    A row of a task, asked and answered.

    Args:
        index (`int`):
            Number of the row in the data.
        messages (`tuple[dict[str, str], ...]`):
            Messages, in the form of chat templates.
        reference (`str` or `list[str]`):
            The right answer: text, the letter of the right choice, or several right texts.
        fields (`dict[str, Any]`):
            Columns to keep, with the texts of the choices as `choices`.
    """

    index: int
    messages: tuple[dict[str, str], ...]
    reference: str | list[str]
    fields: dict[str, Any]


@dataclass(frozen=True)
class TaskData:
    """
    What a task asks.

    Args:
        task ([`Task`]):
            The task.
        problems (`tuple[Problem, ...]`):
            Its problems.
        skipped (`tuple[Skip, ...]`):
            Rows that cannot be asked or graded.
    """

    task: Task
    problems: tuple[Problem, ...]
    skipped: tuple[Skip, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the problems, as 64 hexadecimal digits."""
        content = [[p.index, p.messages, p.reference, p.fields] for p in self.problems]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def load_task(source: str | dict[str, Any], folder: Path | None = None, **overrides: Any) -> Task:
    """
    Reads a task.

    Args:
        source (`str` or `dict[str, Any]`):
            Path of a YAML file, name of a shipped task, or the fields themselves. Fields with the key `task`, a path or
            name, change that one, in a file too.
        folder (`Path`, *optional*):
            Where the shipped tasks are.
        overrides (`dict[str, Any]`):
            Fields that win over it; `None` is left out.

    Returns:
        [`Task`]: The task.

    Raises:
        `ValueError`: If a field is unknown, missing or of the wrong type; the message names it.
        `FileNotFoundError`: If there is no such file.
    """
    values = _read_task(source, folder)
    values = _merged(values, {key: value for key, value in overrides.items() if value not in (None, {})})
    where = f"Task `{values.get('name', '(without a name)')}`"
    if isinstance(values.get("metric"), str):
        values["metric"] = {"name": values["metric"]}
    for key, kind in (("fields", Fields), ("prompt", PromptFormat), ("sampling", Sampling)):
        if key in values:
            values[key] = from_mapping(kind, values[key], f"{where}, `{key}`")
    return from_mapping(Task, values, where)


def _read_task(source: str | dict[str, Any], folder: Path | None) -> dict[str, Any]:
    if isinstance(source, dict):
        values = dict(source)
        base = values.pop("task", None)
        return values if base is None else _merged(_read_task(base, folder), values)
    path = Path(source).expanduser()
    if not path.is_file() and folder is not None and path.suffix == "" and path.name == str(source):
        path = folder / f"{source}.yaml"
    if not path.is_file():
        shipped = sorted(file.stem for file in folder.glob("*.yaml")) if folder is not None else []
        raise FileNotFoundError(
            f"There is no task '{source}': give the path of a YAML file, or one of {', '.join(shipped) or 'none shipped'}."
        )
    values = read_yaml(path, f"task '{path}'")
    if not isinstance(values, dict):
        raise ValueError(f"The task '{path}' holds no fields: write a YAML mapping.")
    return _read_task({"name": path.stem, **values}, folder)


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Changes win; within a section they win field by field."""
    merged = copy.deepcopy(values)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both and key != "metric" else value
    return merged


def from_mapping(kind: type, values: Any, where: str) -> Any:
    """
    Makes a dataclass of what YAML holds.

    Args:
        kind (`type`):
            Dataclass.
        values (`Any`):
            Fields by name.
        where (`str`):
            What it is, for messages.

    Returns:
        The instance.

    Raises:
        `ValueError`: If a field is unknown, missing, or of the wrong type or range.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}: write a mapping of fields.")
    known = {entry.name: entry.type for entry in fields(kind)}
    if unknown := [str(name) for name in values if name not in known]:
        raise ValueError(f"{where} has no field `{'`, `'.join(unknown)}`: its fields are {', '.join(known)}.")
    for name, value in values.items():
        try:
            type_validator(name, value, known[name])
        except TypeError as error:
            raise ValueError(f"{where}: `{name}` is {value!r}, and has to be {_described(known[name])}.") from error
    try:
        return kind(**values)
    except TypeError as error:  # a field without a default
        missing = [e.name for e in fields(kind) if e.name not in values and e.name in str(error)]
        raise ValueError(f"{where} needs `{'`, `'.join(missing)}`.") from error


def _described(kind: Any) -> str:
    text = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
    return text.replace("typing.", "").replace("| None", "or null")


def load_task_data(task: Task) -> TaskData:
    """
    Loads the rows of a task and makes problems of them.

    Args:
        task ([`Task`]):
            The task.

    Returns:
        [`TaskData`]: Problems, and what was left out.

    Raises:
        `ValueError`: If the data cannot be loaded, has not the columns, or holds no row that can be asked.
        `FileNotFoundError`: If there is no such file.
    """
    rows = _load_rows(task)
    wanted = list(dict.fromkeys([*task.fields.columns(), *_placeholders(task)]))
    if missing := [column for column in wanted if column not in rows.column_names]:
        raise ValueError(
            f"Task `{task.name}`: the data has the columns {', '.join(rows.column_names)}, and no column "
            f"`{'`, `'.join(missing)}`. Name the right ones in `fields` (and `prompt`)."
        )
    rows = rows.select_columns(wanted)
    if task.limit is not None:
        rows = rows.take(min(task.limit, len(rows)))
    problems, skipped = [], []
    for index, row in enumerate(rows):
        try:
            problems.append(_make_problem(task, index, row))
        except ValueError as error:
            skipped.append(Skip(index, str(error)))
    if not problems:
        reason = f"; the first: {skipped[0].reason}" if skipped else ""
        raise ValueError(
            f"Task `{task.name}`: none of the {len(rows)} rows of `{task.dataset}` can be asked{reason}. Check `split`, "
            "`limit` and `fields`."
        )
    return TaskData(task, tuple(problems), tuple(skipped))


def _load_rows(task: Task) -> Dataset:
    local = load_local_data(task.dataset)
    if local is not None:
        if task.split not in local and len(local) > 1:
            raise ValueError(
                f"Task `{task.name}`: the data has the splits {sorted(local)}, and no split `{task.split}`."
            )
        return local[task.split if task.split in local else next(iter(local))]
    configs = task.dataset_config if isinstance(task.dataset_config, list) else [task.dataset_config]
    files = task.data_files if isinstance(task.data_files, list) else [task.data_files]
    try:
        parts = [
            load_dataset(task.dataset, name, data_files=file, revision=task.revision, split=task.split)
            for name in configs
            for file in files
        ]
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError, ValueError) as error:
        raise ValueError(
            f"Task `{task.name}`: the dataset `{task.dataset}` (configuration {task.dataset_config}, files "
            f"{task.data_files or 'all'}, split `{task.split}`, revision {task.revision or 'main'}) cannot be loaded: {str(error).splitlines()[0]} Check these, go online, or "
            "name a local copy as `dataset`."
        ) from error
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _placeholders(task: Task) -> list[str]:
    """Columns that the prompt names."""
    names = []
    for key in ("user", "system"):
        try:
            parts = list(string.Formatter().parse(getattr(task.prompt, key) or ""))
        except ValueError as error:
            raise ValueError(_bad_template(task, key, str(error))) from error
        for _, name, specification, conversion in parts:
            if name is not None and (not name.isidentifier() or specification or conversion):
                raise ValueError(_bad_template(task, key, f"`{{{name}}}` names no column"))
            if name == "choices" and task.fields.choices is None:
                raise ValueError(_bad_template(task, key, "`{choices}` needs `fields.choices`"))
            if name not in (None, "question", "choices"):
                names.append(name)
    return names


def _bad_template(task: Task, key: str, problem: str) -> str:
    return (
        f"Task `{task.name}`: `prompt.{key}` cannot be filled in: {problem}. Write `{{{{` and `}}}}` for braces that are meant "
        "as such."
    )


def _make_problem(task: Task, index: int, row: dict[str, Any]) -> Problem:
    question = row[task.fields.question]
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"no question in the column `{task.fields.question}`")
    choices = _choices(task.fields, row)
    kept = {name: row[name] for name in ([task.fields.id] if task.fields.id else []) + task.fields.keep}
    values = {**row, "question": question}
    if choices is not None:
        kept["choices"] = choices
        values["choices"] = "\n".join(f"{letter}. {text}" for letter, text in zip(_LETTERS, choices, strict=False))
    texts = {"system": task.prompt.system, "user": task.prompt.user}
    messages = tuple(
        {"role": role, "content": text.format_map(values)} for role, text in texts.items() if text is not None
    )
    return Problem(index, messages, _reference(task.fields, row, choices), kept)


_LETTERS = string.ascii_uppercase


def _choices(names: Fields, row: dict[str, Any]) -> list[str] | None:
    if names.choices is None:
        return None
    if isinstance(names.choices, list):
        choices = [row[name] for name in names.choices]
    else:
        choices = row[names.choices]
        if isinstance(choices, dict):  # in which Arrow keeps a key that other rows have
            choices = [choices[key] for key in sorted(choices) if choices[key] is not None]
    texts = [] if not isinstance(choices, list) else [_as_text(choice) for choice in choices]
    if not 2 <= len(texts) <= len(_LETTERS) or not all(texts):
        raise ValueError(f"no choices in `{names.choices}`")
    return texts


def _reference(names: Fields, row: dict[str, Any], choices: list[str] | None) -> str | list[str]:
    value = row[names.answer]
    if isinstance(value, list):
        texts = [_as_text(item) for item in value]
        if not texts or not all(texts):
            raise ValueError(f"no answer in the column `{names.answer}`")
        value = ", ".join(texts) if names.answer_list == "all" else texts[0] if len(texts) == 1 else texts
        if isinstance(value, list):
            return value
    text = _as_text(value)
    if text and names.answer_pattern is not None:
        text = find_answer(names.answer_pattern, text) or ""
    if not text:
        raise ValueError(f"no answer in the column `{names.answer}`")
    if choices is None:
        return text
    return _right_letter(names, value, text, choices)


def _right_letter(names: Fields, value: Any, text: str, choices: list[str]) -> str:
    letters, letter = _LETTERS[: len(choices)], text.strip("().").upper()
    found = {
        "index": {letters[int(text)]} if text.isdecimal() and int(text) < len(letters) else set(),
        "letter": {letter} if len(letter) == 1 and letter in letters else set(),
        "text": {letters[choices.index(text)]} if choices.count(text) == 1 else set(),
    }
    forms = [names.answer_form] if names.answer_form else ["letter", "text"] if isinstance(value, str) else ["index"]
    right = set().union(*(found[form] for form in forms))
    if not right:
        raise ValueError(f"the answer {text!r} is none of the {len(choices)} choices")
    if len(right) > 1:
        raise ValueError(
            f"the answer {text!r} is the letter of one choice and the text of another: set `fields.answer_form`"
        )
    return right.pop()


def _as_text(value: Any) -> str:
    """Text of what a column holds; a whole number without a decimal point."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None or value != value else str(value).strip()


def find_answer(pattern: str, text: str) -> str | None:
    """
    Takes an answer out of a text.

    Args:
        pattern (`str`):
            Regular expression, in which `.` stands for line breaks too.
        text (`str`):
            The text.

    Returns:
        `str` or `None`: The first group that took part in its last match (the whole match if it has no group); `None`
        without a match.
    """
    matches = deque(re.finditer(pattern, text, flags=re.DOTALL), maxlen=1)
    if not matches:
        return None
    return next((group for group in matches[0].groups() if group is not None), matches[0][0])
