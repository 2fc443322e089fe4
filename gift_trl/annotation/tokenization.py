"""Rows as SFTTrainer would tokenise them: the ids that are scored are the ids that are trained on."""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import is_conversational, is_conversational_from_value

from gift_trl.annotation.rows import RowStatistics, check_token_columns, measure_rows
from gift_trl.annotation.texts import check_conversations, check_texts, message_keys


EMPTY_COMPLETION = "no target token"
PROMPT_FILLS_LENGTH = "prompt fills max_length"


@dataclass
class _SFTPreparation:
    # What `SFTTrainer._prepare_dataset` reads from its trainer. Calling TRL's own preparation, rather than one that
    # resembles it, is what makes a standalone annotation fit the training.
    _tokenizer: PreTrainedTokenizerBase
    chat_template: str | None
    completion_only_loss: bool


def prepare_processing_class(processing_class: PreTrainedTokenizerBase, args: SFTConfig) -> PreTrainedTokenizerBase:
    """
    Applies `args.eos_token` and `args.chat_template_path` to a copy of the tokenizer, as SFTTrainer does to its own.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the instruct model.
        args ([`~trl.SFTConfig`]):
            Training arguments.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`]: The tokenizer to tokenise with.

    Raises:
        `ValueError`: If the chat template is to be cloned from another tokenizer, or the end-of-sequence token is
            unknown.
    """
    tokenizer = copy.deepcopy(processing_class)
    if args.chat_template_path is not None:
        if not (os.path.isfile(args.chat_template_path) and args.chat_template_path.endswith((".jinja", ".j2"))):
            raise ValueError(
                f"`chat_template_path` names `{args.chat_template_path}`, which is no Jinja file. Cloning a template "
                "from another tokenizer adds tokens to the base model that the instruct model does not have. Leave "
                "it unset (the instruct model's template is used), or give a `.jinja` file."
            )
        with open(args.chat_template_path, encoding="utf-8") as file:
            tokenizer.chat_template = file.read()
    if args.eos_token is not None:
        if args.eos_token not in tokenizer.get_vocab():
            raise ValueError(
                f"`eos_token` is {args.eos_token!r}, which is not in the instruct model's vocabulary. Leave it unset, "
                "or name the token that ends a turn in its chat format."
            )
        tokenizer.eos_token = args.eos_token
    return tokenizer


def tokenize_dataset(
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase,
    args: SFTConfig,
    *,
    formatting_func: Callable[[dict[str, Any]], str] | None = None,
    dataset_name: str = "train",
) -> Dataset:
    """
    Tokenises a dataset with SFTTrainer's own preparation, in the original order, without truncation or packing.

    Args:
        dataset ([`~datasets.Dataset`]):
            Any dataset SFTTrainer takes: language modeling or prompt-completion, standard or conversational, or
            already tokenised.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the instruct model.
        args ([`~trl.SFTConfig`]):
            Training arguments.
        formatting_func (`Callable`, *optional*):
            SFTTrainer's formatting function.
        dataset_name (`str`, *optional*, defaults to `"train"`):
            Name of the dataset in progress bars.

    Returns:
        [`~datasets.Dataset`]: The dataset with the columns `input_ids` and `labels`.

    Raises:
        `ValueError`: If the dataset is empty, a row holds no text or messages where it should, or `assistant_only_loss`
            is set for data that is not conversational.
    """
    if len(dataset) == 0:
        raise ValueError(f"The {dataset_name} dataset is empty. Check its path, split and `max_samples`.")
    check_token_columns(dataset)
    example = dataset[0]
    _check_columns(example, args, formatting_func, dataset_name)
    if "input_ids" not in example:
        check_texts(
            dataset,
            args.dataset_text_field,
            dataset_name,
            formatted=formatting_func is not None,
            assistant_only_loss=args.assistant_only_loss,
        )
    chat_template = None
    if args.assistant_only_loss:
        if not is_conversational(example) and "input_ids" not in example:
            raise ValueError(
                f"`assistant_only_loss=True`, but the {dataset_name} dataset is not conversational. Unset it, or give "
                "rows of messages with roles."
            )
        if processing_class.chat_template is None:
            raise ValueError(
                "`assistant_only_loss=True`, but the tokenizer has no chat template. Use the instruct model's tokenizer, "
                "or set `chat_template_path` to a Jinja file."
            )
        if not has_generation_markers(processing_class.chat_template):
            chat_template = get_training_chat_template(processing_class)
    completion_only_loss = _completion_only_loss(dataset, args)
    if completion_only_loss and formatting_func is not None:
        raise ValueError(
            f"A `formatting_func` turns the {dataset_name} dataset into plain text, in which no completion is marked, but "
            "the loss is on completions only. Set `completion_only_loss=False`, or leave `formatting_func` out."
        )
    sft_args = copy.copy(args)
    sft_args.max_length, sft_args.shuffle_dataset = None, False
    preparation: Any = _SFTPreparation(processing_class, chat_template, completion_only_loss)
    return SFTTrainer._prepare_dataset(
        preparation, dataset, processing_class, sft_args, False, formatting_func, dataset_name
    )


def completions_only(dataset: Dataset, args: SFTConfig) -> bool | None:
    """
    Whether only the completions of a dataset become targets.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset as it is given to [`tokenize_dataset`].
        args ([`~trl.SFTConfig`]):
            Training arguments.

    Returns:
        `bool` or `None`: `completion_only_loss` as it is in effect; `None` where it has none, since no completion is
        marked or the `labels` are given.
    """
    columns = dataset.column_names
    marked = "completion_mask" in columns if "input_ids" in columns else "prompt" in columns
    return _completion_only_loss(dataset, args) if marked and "labels" not in columns else None


def written_eos_token(dataset: Dataset, processing_class: PreTrainedTokenizerBase) -> str | None:
    """
    The end-of-sequence token, if the rows of a dataset depend on it.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset as it is given to [`tokenize_dataset`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.

    Returns:
        `str` or `None`: The token, which SFTTrainer writes after plain text, and some chat templates after a turn; `None`
        where neither does.
    """
    example = dataset[0]
    if "input_ids" in example:
        return None
    if is_conversational(example) or is_conversational_from_value(example):
        return processing_class.eos_token if "eos_token" in str(processing_class.chat_template) else None
    return processing_class.eos_token


def _completion_only_loss(dataset: Dataset, args: SFTConfig) -> bool:
    if args.completion_only_loss is not None:
        return args.completion_only_loss
    return {"prompt", "completion"} <= set(dataset.column_names)


def _check_columns(
    example: dict[str, Any], args: SFTConfig, formatting_func: Callable | None, dataset_name: str
) -> None:
    known = {"input_ids", "messages", "conversations", args.dataset_text_field}
    if formatting_func is None and not known & example.keys() and not {"prompt", "completion"} <= example.keys():
        raise ValueError(
            f"The {dataset_name} dataset has the columns {sorted(example)}, and none that can be trained on. Name them "
            f"`prompt` and `completion`, `messages` or `{args.dataset_text_field}`, or map them in the recipe with "
            "`prompt_column` and `completion_column`."
        )
    if known & example.keys() == {"conversations"} and formatting_func is None and "prompt" not in example:
        check_conversations(message_keys(example["conversations"]), dataset_name)
    if "seq_lengths" in example:
        raise ValueError(
            f"The {dataset_name} dataset is packed already (`seq_lengths`), and a pass over joined rows would score each "
            "in the context of the one before it. Annotate the rows first, and let the trainer pack them."
        )
    if "image" in example or "images" in example:
        raise ValueError(
            f"The {dataset_name} dataset holds images. GIFT is defined for text; remove the image columns."
        )


def truncate_rows(dataset: Dataset, args: SFTConfig) -> Dataset:
    """
    Cuts `input_ids`, `labels` and `confidences` to `args.max_length` tokens, as SFTTrainer does the first two.

    Args:
        dataset ([`~datasets.Dataset`]):
            Tokenised dataset.
        args ([`~trl.SFTConfig`]):
            Training arguments.

    Returns:
        [`~datasets.Dataset`]: The dataset with its rows cut.
    """
    if args.max_length is None:
        return dataset
    kept = token_slice(args)
    columns = [name for name in ("input_ids", "labels", "confidences") if name in dataset.column_names]
    with PartialState().main_process_first():
        return dataset.map(
            lambda row: {name: row[name][kept] for name in columns},
            num_proc=args.dataset_num_proc,
            desc="Truncating",
        )


def token_slice(args: SFTConfig) -> slice:
    """
    The part of a row that truncation keeps.

    Args:
        args ([`~trl.SFTConfig`]):
            Training arguments.

    Returns:
        `slice`: Slice of a row's tokens.
    """
    if args.max_length is None:
        return slice(None)
    return slice(-args.max_length, None) if args.truncation_mode == "keep_end" else slice(None, args.max_length)


@dataclass(frozen=True, eq=False)
class SortedRows:
    """
    The rows that are trained on, and what became of the others.

    Args:
        rows ([`~datasets.Dataset`]):
            Rows with a target token, cut if asked.
        names (`np.ndarray` of shape `(rows,)`, int64):
            Their indices in the dataset that was tokenised.
        statistics ([`RowStatistics`]):
            Their lengths and target counts.
        truncated (`int`):
            Number of them that were cut.
        dropped (`dict[str, list[int]]`):
            Indices of the other rows, by reason.
    """

    rows: Dataset
    names: np.ndarray
    statistics: RowStatistics
    truncated: int
    dropped: dict[str, list[int]]

    def reasons(self) -> str:
        """Number of rows left out, by reason."""
        return ", ".join(f"{len(rows)} × {reason}" for reason, rows in self.dropped.items())


def sort_out_rows(dataset: Dataset, whole: RowStatistics, args: SFTConfig, *, truncate: bool) -> SortedRows:
    """
    Truncates the rows and leaves out those in which nothing is predicted.

    Args:
        dataset ([`~datasets.Dataset`]):
            Tokenised dataset.
        whole ([`RowStatistics`]):
            Its rows before truncation, which tell an empty completion from one that was cut off.
        args ([`~trl.SFTConfig`]):
            Training arguments.
        truncate (`bool`):
            Whether to cut the rows to `args.max_length` tokens.

    Returns:
        [`SortedRows`]: The rows.
    """
    cut = whole
    if truncate and args.max_length is not None and (whole.lengths > args.max_length).any():
        dataset = truncate_rows(dataset, args)
        cut = measure_rows(dataset)
    names = np.flatnonzero(cut.targets)
    reasons = {
        PROMPT_FILLS_LENGTH: np.flatnonzero((cut.targets == 0) & (whole.targets > 0)),
        EMPTY_COMPLETION: np.flatnonzero(whole.targets == 0),
    }
    return SortedRows(
        rows=dataset if len(names) == len(dataset) else dataset.select(names),
        names=names,
        statistics=cut.select(names),
        truncated=int((cut.lengths < whole.lengths)[names].sum()),
        dropped={reason: rows.tolist() for reason, rows in reasons.items() if len(rows)},
    )
