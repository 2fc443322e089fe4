"""Rows of any columns as conversations: the question, the answer, and what the chat template is told."""

import string
from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from trl.data_utils import get_dataset_column_names, is_conversational

from gift_trl.scripts.arguments import GIFTScriptArguments


logger = get_logger(__name__)


class _EmptyRow(ValueError):
    """Says what a row lacks."""


def map_columns(
    dataset: Dataset | IterableDataset, script_args: GIFTScriptArguments, kept_columns: tuple[str, ...] = ()
) -> Dataset | IterableDataset:
    """
    Makes conversations of rows, as a recipe says.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The data. What is tokenised already is left as it is.
        script_args ([`GIFTScriptArguments`]):
            What the recipe says about the columns.
        kept_columns (`tuple[str, ...]`, *optional*, defaults to `()`):
            Columns that stay beside `prompt` and `completion`.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The conversations, with `chat_template_kwargs` if the
        recipe has any.

    Raises:
        `ValueError`: If a column does not exist, a row has no text in one, or `chat_template_kwargs` meets data that no
            chat template is applied to.
    """
    if "input_ids" in get_dataset_column_names(dataset):
        return dataset
    if script_args.prompt_column or script_args.prompt_template:
        dataset = _to_conversations(dataset, script_args, kept_columns)
    if script_args.chat_template_kwargs:
        dataset = _add_template_kwargs(dataset, script_args.chat_template_kwargs)
    return dataset


def _to_conversations(
    dataset: Dataset | IterableDataset, script_args: GIFTScriptArguments, kept_columns: tuple[str, ...]
) -> Dataset | IterableDataset:
    columns = get_dataset_column_names(dataset)
    asked, question = _reader(script_args.prompt_column, script_args.prompt_template)
    answered, answer = _reader(
        script_args.completion_column, script_args.completion_template, script_args.completion_choices
    )
    if missing := sorted({*asked, *answered} - set(columns)):
        raise ValueError(
            f"The data has the columns {sorted(columns)}, and no column {' or '.join(f'`{c}`' for c in missing)}. Set "
            "`prompt_column` (or `prompt_template`) and `completion_column` (or `completion_template`) to those of the "
            "question and the answer."
        )
    system = [{"role": "system", "content": script_args.system_prompt}] if script_args.system_prompt else []
    suffix = script_args.prompt_suffix or ""

    def is_complete(row: dict[str, Any]) -> bool:
        try:
            return bool(question(row) and answer(row))
        except _EmptyRow:
            return False

    def to_conversation(row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            texts = question(row) + suffix, answer(row)
        except _EmptyRow as error:
            raise ValueError(
                f"Row {index} of the data {error}. Fill or remove the row, or leave such rows out with "
                "`skip_empty_rows: true`."
            ) from error
        return {
            "prompt": [*system, {"role": "user", "content": texts[0]}],
            "completion": [{"role": "assistant", "content": texts[1]}],
        }

    is_stream = isinstance(dataset, IterableDataset)
    if script_args.skip_empty_rows:
        whole = dataset
        dataset = dataset.filter(is_complete, **({} if is_stream else {"desc": "Looking for empty rows"}))
        if not is_stream and len(dataset) < len(whole):
            PartialState()  # the logger asks it which process this is
            logger.warning(
                f"{len(whole) - len(dataset)} of {len(whole)} rows are left out: a column that is used holds no text there "
                "(`skip_empty_rows`)."
            )
    removed = [name for name in columns if name not in kept_columns]
    options = {} if is_stream else {"desc": "Mapping columns"}
    return dataset.map(to_conversation, with_indices=True, remove_columns=removed, **options)


def _reader(
    column: str | None, template: str | None, choices: list[str] | None = None
) -> tuple[list[str], Callable[[dict[str, Any]], str]]:
    """The columns that a text is made of, and what makes it of a row."""

    def text(row: dict[str, Any], name: str) -> str:
        return _choice(row, name, choices) if choices is not None and name == column else _text(row, name)

    if template is None:
        return [column], lambda row: text(row, column)
    names = template_columns(template)
    return names, lambda row: template.format_map({name: text(row, name) for name in names})


def template_columns(template: str) -> list[str]:
    """
    Columns that a template names.

    Args:
        template (`str`):
            Text with `{COLUMN}` in it; `{{` and `}}` are braces.

    Returns:
        `list[str]`: Their names.

    Raises:
        `ValueError`: If it is no such text.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"{error} in {template!r}: write `{{{{` and `}}}}` for braces that are meant as such."
        ) from error
    names = [name for _, name, _, _ in parts if name is not None]
    if (
        not names
        or any(spec or conversion for _, _, spec, conversion in parts)
        or not all(map(str.isidentifier, names))
    ):
        raise ValueError(
            f"{template!r} needs the name of a column in braces, such as {{question}}, and nothing else in them: write "
            "`{{` and `}}` for braces that are meant as such."
        )
    return list(dict.fromkeys(names))


def _text(row: dict[str, Any], column: str) -> str:
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise _EmptyRow(f"has no text in the column `{column}` (it holds {value!r})")
    return str(value)


def _choice(row: dict[str, Any], column: str, choices: list[str]) -> str:
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(choices):
        raise _EmptyRow(
            f"has {value!r} in the column `{column}`, and `completion_choices` are 0 to {len(choices) - 1}"
        )
    return choices[value]


def _add_template_kwargs(
    dataset: Dataset | IterableDataset, template_kwargs: dict[str, Any]
) -> Dataset | IterableDataset:
    if not is_conversational(next(iter(dataset))):
        raise ValueError(
            "`chat_template_kwargs` are told to the chat template, which is not applied to plain text. Map the columns "
            "(`prompt_column`, `completion_column`), give conversations, or unset it."
        )
    if "chat_template_kwargs" in get_dataset_column_names(dataset):
        raise ValueError("The data has a column `chat_template_kwargs` of its own. Unset that of the recipe.")
    options = {} if isinstance(dataset, IterableDataset) else {"desc": "Adding chat_template_kwargs"}
    return dataset.map(lambda row: {"chat_template_kwargs": template_kwargs}, **options)
