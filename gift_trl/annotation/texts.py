"""Texts and conversations before SFTTrainer tokenises them: a row that it would stumble over is named."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Json, LargeList, List, Value

from gift_trl.annotation.rows import CHUNK_ROWS


class _Format(NamedTuple):
    columns: Sequence[str]
    is_conversational: bool
    role: str = "role"
    content: str = "content"


def check_texts(
    dataset: Dataset, text_field: str, dataset_name: str, *, formatted: bool, assistant_only_loss: bool
) -> None:
    """
    Checks that the columns which SFTTrainer tokenises hold texts, or messages with roles.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset that is not tokenised.
        text_field (`str`):
            Name of the column with plain text.
        dataset_name (`str`):
            Name of the dataset in messages.
        formatted (`bool`):
            Whether a `formatting_func` gives the plain text.
        assistant_only_loss (`bool`):
            Whether only assistant turns are targets.

    Raises:
        `ValueError`: If a row holds something else, or has no assistant turn with `assistant_only_loss`; the message
            names row and column.
    """
    form = _format_of(dataset, text_field, formatted=formatted)
    assistant_only_loss = assistant_only_loss and form.is_conversational
    rows = dataset.select_columns(list(form.columns)).with_format(None)
    tables = rows.with_format("arrow")
    for start in range(0, len(rows) if form.columns else 0, CHUNK_ROWS):
        suspects = start + _suspects(tables[start : start + CHUNK_ROWS], rows, form, assistant_only_loss)
        found = rows[suspects.tolist()] if len(suspects) else {}
        for i, row in enumerate(suspects):
            problem = _problem({name: found[name][i] for name in form.columns}, form, assistant_only_loss)
            if problem is not None:
                raise ValueError(f"Row {row} of the {dataset_name} dataset {problem}")


def check_conversations(keys: Collection[str], dataset_name: str) -> None:
    """
    Checks that messages in a column `conversations` are of the kind that is read there.

    Args:
        keys (`Collection[str]`):
            Keys of a message.
        dataset_name (`str`):
            Name of the dataset in messages.

    Raises:
        `ValueError`: If they are those of a column `messages`.
    """
    if "role" in keys and "from" not in keys:
        raise ValueError(
            f"The column `conversations` of the {dataset_name} dataset holds messages with `role` and `content`, and only "
            "`from` and `value` are read there. Rename the column to `messages`."
        )


def message_keys(messages: Any) -> Collection[str]:
    """
    Keys of the first message of a conversation.

    Args:
        messages (`Any`):
            What a row holds in a column of conversations.

    Returns:
        `Collection[str]`: The keys, none if it is no list of messages.
    """
    first = messages[0] if isinstance(messages, list) and messages else None
    return first.keys() if isinstance(first, dict) else ()


def _format_of(dataset: Dataset, text_field: str, *, formatted: bool) -> _Format:
    """The columns that SFTTrainer reads, as it goes by their names and the first row."""
    names, first = dataset.column_names, dataset[0]
    if "prompt" in names:
        columns = [name for name in ("prompt", "completion") if name in names]
        if any(isinstance(first[name], list) for name in columns):
            return _Format(columns, is_conversational=True)
        return _Format([*columns, text_field] if text_field in names and not formatted else columns, False)
    has_text = text_field in names or formatted
    if "conversations" in names and (
        "from" in message_keys(first["conversations"]) or not (has_text or "messages" in names)
    ):
        return _Format(["conversations"], True, "from", "value")
    if "messages" in names and (isinstance(first["messages"], list) or not has_text):
        return _Format(["messages"], True)
    return _Format([text_field] if text_field in names and not formatted else [], False)


def _suspects(table: pa.Table, dataset: Dataset, form: _Format, assistant_only_loss: bool) -> np.ndarray:
    """Rows that may be wrong by what Arrow knows of them: all of them where it does not know."""
    suspect, answered = (np.zeros(len(table), dtype=bool) for _ in range(2))
    for name in form.columns:
        feature, column = dataset.features[name], table[name].combine_chunks()
        if not form.is_conversational and isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
            suspect |= pc.is_null(column).to_numpy(zero_copy_only=False)
        elif form.is_conversational and _is_conversation(feature, form):
            suspect |= pc.fill_null(pc.list_value_length(column), 0).to_numpy() == 0
            messages, rows = pc.list_flatten(column), pc.list_parent_indices(column).to_numpy()
            roles = pc.struct_field(messages, form.role)
            lacks = pc.or_(pc.is_null(roles), pc.is_null(pc.struct_field(messages, form.content)))
            suspect[rows[lacks.to_numpy(zero_copy_only=False)]] = True
            is_answer = pc.fill_null(pc.equal(roles, "assistant"), False)
            answered[rows[is_answer.to_numpy(zero_copy_only=False)]] = True
        else:
            suspect[:] = True
    return np.flatnonzero(suspect | ~answered if assistant_only_loss else suspect)


def _is_conversation(feature: Any, form: _Format) -> bool:
    message = feature.feature if isinstance(feature, (List, LargeList)) else None
    return (
        isinstance(message, dict)
        and {form.role, form.content} <= message.keys()
        and message[form.role] == Value("string")
        and not isinstance(message[form.content], Json)
    )


def _problem(row: dict[str, Any], form: _Format, assistant_only_loss: bool) -> str | None:
    for name, value in row.items():
        if not form.is_conversational:
            if not isinstance(value, str):
                return f"holds {_shorten(value)} in the column `{name}`, not a text. Fill or remove the row."
            continue
        if not isinstance(value, list) or not value:
            return (
                f"holds {_shorten(value)} in the column `{name}`, not a list of messages. Give every row messages there, "
                "or remove the row."
            )
        for message in value:
            if lacking := _lacking_key(message, form):
                return f"has a message without `{lacking}` in the column `{name}`: {_shorten(message)}. Fill or remove the row."
    if assistant_only_loss and not any(
        message[form.role] == "assistant" for messages in row.values() for message in messages
    ):
        return (
            "has no assistant turn, and `assistant_only_loss` learns from nothing else. Remove the row, or unset it."
        )
    return None


def _lacking_key(message: Any, form: _Format) -> str | None:
    if not isinstance(message, dict) or message.get(form.role) is None:
        return form.role
    if message.get(form.content) is not None:
        return None
    # An assistant may call a tool, or think, and say nothing; what a tool says may stand under another key
    others = [value for key, value in message.items() if key not in (form.role, "name")]
    says = message[form.role] != "user" and any(isinstance(value, (str, list, dict)) and value for value in others)
    return None if says else form.content


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
