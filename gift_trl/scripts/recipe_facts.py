"""What `gift-trl recipe` finds out about a pair of models and its data, without any weights."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from datasets import Features, load_dataset_builder
from jinja2 import TemplateError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from gift_trl.annotation.texts import check_conversations
from gift_trl.data_files import load_local_data
from gift_trl.model_pair import end_of_turn_token_ids
from gift_trl.scripts.recipe_writer import Setting
from gift_trl.scripts.recipes import recipes_folder


# Linear layers that choose among experts: an update of theirs sends tokens elsewhere
_ROUTERS = ("gate", "router")
# Columns that are a question and its answer, in data as it is published
_QUESTIONS = ("prompt", "problem", "question", "instruction", "query", "input", "inputs")
_ANSWERS = ("completion", "solution", "answer", "response", "output", "target", "targets")
_QUESTION, _ANSWER = "QUESTION", "ANSWER"


@dataclass(frozen=True)
class TemplateFacts:
    """
    What a chat template does with a question and its answer.

    Args:
        notes (`Sequence[str]`):
            Sentences for a reader.
        template_kwargs (`dict[str, Any]`):
            Variables that it should be told.
    """

    notes: Sequence[str]
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def linear_target_modules(model: PreTrainedModel) -> list[str]:
    """
    The linear layers of the attention and feed-forward blocks.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model, which may be on the meta device.

    Returns:
        `list[str]`: Last parts of their names, in the order of the first layer. The head and the routers of experts are
        left out.

    Raises:
        `ValueError`: If there are none.
    """
    head = model.get_output_embeddings()
    names = [
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    found = [name for name in dict.fromkeys(names) if name not in _ROUTERS]
    if not found:
        raise ValueError(f"`{type(model).__name__}` has no linear layer to adapt beside its head.")
    return found


def read_template(
    tokenizer: PreTrainedTokenizerBase, model: str | PreTrainedModel, revision: str | None = None
) -> TemplateFacts:
    """
    Looks at how the instruct model's chat format begins and ends.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the instruct model.
        model (`str` or [`~transformers.PreTrainedModel`]):
            Instruct model, whose generation configuration may list tokens that end a turn.
        revision (`str`, *optional*):
            Its revision on the Hub.

    Returns:
        [`TemplateFacts`]: What was found.

    Raises:
        `ValueError`: If there is no chat template, or it refuses a question and an answer.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"The tokenizer of `{model}` has no chat template, so it is not an instruct model's. Name the instruct model that "
            "was post-trained from the base model."
        )
    template, kwargs, notes = str(tokenizer.get_chat_template()), {}, []
    if "enable_thinking" in template:
        kwargs["enable_thinking"] = False
        notes += [
            "It thinks or does not, as `enable_thinking` says: off here, since the answers of the data hold no thoughts."
        ]
    if "strftime_now" in template:
        if "date_string" in template:
            kwargs["date_string"] = time.strftime("%d %b %Y")
        notes += [
            "It writes the date: the day of this recipe, whenever it is run."
            if "date_string" in kwargs
            else "It writes the day on which it is applied, so that another day's run has other tokens."
        ]
    question, answer = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
    try:
        prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True, **kwargs)
        chat = tokenizer.apply_chat_template([question, answer], tokenize=False, **kwargs)
    except (TemplateError, ValueError) as error:
        raise ValueError(f"The chat template of `{model}` refuses a question and an answer: {error}.") from error
    stops = end_of_turn_token_ids(tokenizer, model, revision=revision)
    return TemplateFacts([*_describe(tokenizer, prompt, chat, stops), *notes], kwargs)


def can_mask_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """
    Whether `assistant_only_loss` is possible with a chat template.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with a chat template.

    Returns:
        `bool`: Whether the template marks the answers, or TRL has one in its place that does.
    """
    try:
        return has_generation_markers(tokenizer.chat_template) or bool(get_training_chat_template(tokenizer))
    except ValueError:
        return False


def _describe(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: str, stops: Sequence[int]) -> list[str]:
    tokens = [tokenizer.convert_ids_to_tokens(token_id) for token_id in stops]
    end = chat.rpartition(_ANSWER)[2].strip()
    named = f", and generation stops at {' '.join(tokens)}" if tokens else ""
    notes = [
        f"A turn ends with {end}{named}."
        if any(end.startswith(token) for token in tokens)
        else f"After an answer it writes {end!r}, which is no token that ends a turn{named}: the model may not learn to stop."
    ]
    begins = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    notes += [f"A text begins with {tokenizer.bos_token}." if begins else "It writes no token that begins a text."]
    before = " ".join(prompt.partition(_QUESTION)[0].split())
    if "system" in before:
        notes += [f"Without a system message it writes one of its own: {before!r}."]
    if not chat.startswith(prompt):
        notes += [
            f"An answer does not begin as it is asked for: {prompt.partition(_QUESTION)[2]!r} is not in the chat."
        ]
    elif between := chat[len(prompt) : chat.index(_ANSWER)].strip():
        notes += [f"Before an answer it writes {between!r}, which is trained on."]
    return notes


def data_settings(dataset: str, prompt_column: str | None, completion_column: str | None) -> tuple[list[Setting], str]:
    """
    Lines of a recipe that name data and map its columns.

    Args:
        dataset (`str`):
            Local file or folder, Hub id, or the name of a task that is shipped (`math`, `medical`, `summaries`).
        prompt_column, completion_column (`str`, *optional*):
            Columns with the question and the answer, if they are not to be recognised.

    Returns:
        `tuple[list[Setting], str]`: The lines, and a name for folders.

    Raises:
        `ValueError`: If no columns are recognised, those that are named do not exist, or messages are in a column where they
            are not read.
        `FileNotFoundError`: If a local file does not exist.
    """
    tasks = yaml.safe_load((recipes_folder() / "tasks.yaml").read_text(encoding="utf-8"))
    if prompt_column is None and completion_column is None:
        for name, task in tasks.items():
            if dataset in (name, task["dataset"]):
                comments = task.get("comments", {})
                return [Setting(key, value, comments.get(key)) for key, value in task["data"].items()], name
    features = _features_of(dataset)
    columns = None if features is None else list(features)
    lines = [Setting("dataset_name", dataset)]
    name = dataset.rstrip("/").rpartition("/")[2].partition(".")[0].lower()
    if prompt_column is not None and completion_column is not None:
        if columns is not None and (missing := {prompt_column, completion_column} - {*columns}):
            raise ValueError(f"`{dataset}` has the columns {columns}, and none named {' or '.join(sorted(missing))}.")
        return [*lines, Setting("prompt_column", prompt_column), Setting("completion_column", completion_column)], name
    if prompt_column or completion_column:
        raise ValueError("`--prompt_column` and `--completion_column` belong together.")
    if columns is None:
        raise ValueError(
            f"The columns of `{dataset}` are not known here: it is no local file, and the Hub cannot be asked. Name them with "
            "`--prompt_column` and `--completion_column`, or give the name of a task that is shipped: "
            f"{', '.join(tasks)}."
        )
    if {"messages", "conversations", "input_ids"} & {*columns}:
        if not {"messages", "input_ids", "text", "prompt"} & {*columns}:
            message = getattr(features["conversations"], "feature", None)
            check_conversations(message if isinstance(message, dict) else (), dataset)
        if not {"input_ids", "prompt"} & {*columns}:
            lines.append(Setting("assistant_only_loss", True, "false: every turn is a target, as SFTTrainer has it"))
        return lines, name
    question = next((column for column in _QUESTIONS if column in columns), None)
    answer = next((column for column in _ANSWERS if column in columns), None)
    if question is not None and answer is not None:
        others = [column for column in columns if column not in (question, answer)]
        comment = f"not used: {', '.join(others)}; see prompt_template" if others else None
        return [*lines, Setting("prompt_column", question, comment), Setting("completion_column", answer)], name
    if "text" in columns:
        return lines, name
    raise ValueError(
        f"`{dataset}` has the columns {columns}, among which no question and answer are recognised. Name them with "
        "`--prompt_column` and `--completion_column`."
    )


def _features_of(dataset: str) -> Features | None:
    local = load_local_data(dataset)
    if local is not None:
        return next(iter(local.values())).features
    try:
        return load_dataset_builder(dataset).info.features or None
    except (OSError, ValueError):  # not within reach
        return None
