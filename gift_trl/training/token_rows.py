"""Embedding rows of the chat format's tokens, which a base model may never have trained."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE, SAFETENSORS_SINGLE_FILE
from jinja2 import TemplateError
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from gift_trl.annotation.scoring import unwrap_model
from gift_trl.model_pair import end_of_turn_token_ids


if TYPE_CHECKING:
    from peft import PeftModel


logger = get_logger(__name__)

# Rows of the training data in which the tokens of the chat format are looked for
_ROWS_READ = 64
# Rows of the vocabulary that give its usual norm, and other rows of added tokens that one is compared with
_ROWS_SAMPLED = 4096
_ROWS_COMPARED = 512
# A trained row is neither half as long as the median one, nor twice as long as all but 1 % of them, nor points where the
# row of another added token does; and training on chats moves a row by more than this part of its length
_SHORTEST, _LONGEST, _SAME_DIRECTION, _UNMOVED = 0.5, 2.0, 0.99, 0.05


def check_token_rows(
    model: "PreTrainedModel | PeftModel",
    instruct_model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | IterableDataset,
    *,
    load_kwargs: Mapping[str, Any] | None = None,
    borrow: bool = False,
) -> list[str]:
    """
    Looks for tokens of the chat format whose rows the base model has not trained, and borrows the instruct model's.

    A row looks untrained if its norm lies far outside those of the vocabulary, or if it is equal to the row of another
    added token; and if the instruct model's row differs from it. Such a row tells the base model nothing, or something
    random, where the instruct model has learnt that a turn begins or ends. The adapter would be trained to make up for
    it, and then merged into a model that needs no such thing.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained. With `borrow`, rows of its embedding and of its head are replaced.
        instruct_model (`str` or [`~transformers.PreTrainedModel`]):
            Instruct model. Of a model on the Hub that is not in the cache, nothing is downloaded without `borrow`, and
            then no more than the files that hold the rows.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the run.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Prepared training data; its first rows tell which tokens the chat format uses. For a stream, a rendered chat
            does.
        load_kwargs (`Mapping[str, Any]`, *optional*):
            Where the instruct model is on the Hub and in its cache, as for
            [`~transformers.AutoModelForCausalLM.from_pretrained`]: `revision`, `subfolder`, `cache_dir`, `token`.
        borrow (`bool`, *optional*, defaults to `False`):
            Whether to put the instruct model's rows in place of untrained ones. They are not trained.

    Returns:
        `list[str]`: Tokens whose rows were borrowed.

    Raises:
        `ValueError`: If rows are to be borrowed for a model whose embedding or head is itself trained, or the instruct
            model's cannot be found.
        `OSError`: If rows are to be borrowed and the Hub cannot be asked.
    """
    base = unwrap_model(model)
    matrices = _matrices(base)
    if borrow and (trained := [name for name, weight in matrices.items() if weight is None or weight.requires_grad]):
        raise ValueError(
            f"`borrow_instruct_token_rows` holds the instruct model's rows frozen, but {' and '.join(trained)} would be "
            "trained. Train an adapter (`use_peft`) that leaves embedding and head alone, or unset it."
        )
    weights = {name: weight for name, weight in matrices.items() if weight is not None}
    used, predicted = _chat_token_ids(tokenizer, dataset, instruct_model, (load_kwargs or {}).get("revision"))
    found: dict[int, list[str]] = {}
    embedding = getattr(base.get_input_embeddings(), "weight", None)
    for name, weight in weights.items():
        with _gathered(weight):
            if weight.is_meta or weight.numel() == 0:  # read by the first process only, under FSDP
                continue
            # What is never predicted tells nothing of the head
            reasons = _untrained_rows(weight, sorted(used if weight is embedding else predicted), tokenizer)
            if not reasons:
                continue
            try:
                rows = _instruct_rows(instruct_model, load_kwargs or {}, name, weight, list(reasons), download=borrow)
            except (OSError, ValueError, KeyError, SafetensorError):
                if borrow:
                    raise
                continue  # without them nothing can be said
            for (token_id, reason), row in zip(reasons.items(), () if rows is None else rows, strict=False):
                own, row = weight[token_id].float(), row.to(weight.device).float()
                if (row - own).norm() > _UNMOVED * max(row.norm(), own.norm()):
                    found.setdefault(token_id, []).append(f"{name}: {reason}")
            if rows is None and borrow:
                raise _not_found(name)
    if borrow and found:
        ids = sorted(found)
        for name, weight in weights.items():
            with _gathered(weight, modify=True), torch.no_grad():
                if weight.is_meta or weight.numel() == 0:
                    continue
                rows = _instruct_rows(instruct_model, load_kwargs or {}, name, weight, ids, download=True)
                if rows is None:
                    raise _not_found(name)
                weight[ids] = rows.to(weight.device, weight.dtype)
        return [_text(tokenizer, token_id) for token_id in ids]
    if found:
        shown = ", ".join(f"{_text(tokenizer, i)} ({'; '.join(reasons)})" for i, reasons in list(found.items())[:4])
        logger.warning(
            f"The base model's rows of {len(found)} tokens of the chat format look untrained, and the instruct model's "
            f"differ from them: {shown}. The adapter would be trained to make up for that, and merged into a model that "
            "has learnt these tokens. Set `borrow_instruct_token_rows: true` to train with the instruct model's rows, "
            "held frozen."
        )
    return []


def _not_found(name: str) -> ValueError:
    return ValueError(
        f"The instruct model's safetensors hold nothing that corresponds to `{name}` of the base model, whose rows are to "
        "be borrowed. Unset `borrow_instruct_token_rows`."
    )


def _matrices(model: PreTrainedModel) -> dict[str, nn.Parameter | None]:
    """Embedding and head by the names of their weights; `None` for one that an adapter trains."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices: dict[str, nn.Parameter | None] = {}
    module: Any
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            matrices["the embedding or head"] = None
        elif module is not None and id(module.weight) in names:
            matrices[names[id(module.weight)]] = module.weight  # a tied head is the embedding
    return matrices


@contextlib.contextmanager
def _gathered(weight: nn.Parameter, *, modify: bool = False) -> Iterator[None]:
    if not hasattr(weight, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0 if modify else None):
        yield


def _chat_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | IterableDataset,
    instruct_model: str | PreTrainedModel,
    revision: str | None,
) -> tuple[set[int], set[int]]:
    """Added tokens and those that end a turn, among the tokens of some rows and among their targets."""
    ends = set(end_of_turn_token_ids(tokenizer, instruct_model, revision=revision))
    special = set(tokenizer.added_tokens_decoder) | ends
    is_stored = isinstance(dataset, Dataset) and dataset.format["type"] != "custom"
    if is_stored and {"input_ids", "labels"} <= set(dataset.column_names):
        rows = dataset.select(range(min(_ROWS_READ, len(dataset)))).with_format(None)
        used = {token_id for row in rows["input_ids"] for token_id in row}
        predicted = {label for row in rows["labels"] for label in row[1:]}
        return special & used, special & predicted
    # A stream or a transform is not read ahead of the training
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    try:
        used = set(tokenizer.apply_chat_template(chat, return_dict=False))
    except (ValueError, TemplateError):  # there is no template, or one for other chats
        return set(), set()
    return special & used, ends & used


def _untrained_rows(weight: torch.Tensor, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    with torch.no_grad():
        vocabulary = weight.shape[0]
        ids = [token_id for token_id in ids if token_id < vocabulary]
        if not ids:
            return {}
        norms = weight[:: max(1, vocabulary // _ROWS_SAMPLED)].float().norm(dim=1)
        median, longest = norms.median().item(), norms.quantile(0.99).item()
        # Rows nothing trains: those beyond the tokenizer's vocabulary, and reserved tokens among the added ones
        others = [i for i in (*tokenizer.added_tokens_decoder, *range(len(tokenizer), vocabulary)) if i < vocabulary]
        others = sorted(set(others[:_ROWS_COMPARED]) | set(ids))
        rows = nn.functional.normalize(weight[ids].float(), dim=1)
        cosines = rows @ nn.functional.normalize(weight[others].float(), dim=1).T
        reasons = {}
        for i, token_id in enumerate(ids):
            cosines[i, others.index(token_id)] = -1.0
            norm = weight[token_id].float().norm().item()
            if not _SHORTEST * median <= norm <= _LONGEST * longest:
                reasons[token_id] = f"norm {norm:.3g}, the vocabulary's median is {median:.3g}"
            elif cosines[i].max() > _SAME_DIRECTION:
                reasons[token_id] = f"equal to the row of {_text(tokenizer, others[int(cosines[i].argmax())])}"
    return reasons


def _text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    return f"`{tokenizer.convert_ids_to_tokens(token_id) or token_id}`"


def _instruct_rows(
    model: str | PreTrainedModel,
    load_kwargs: Mapping[str, Any],
    name: str,
    weight: torch.Tensor,
    ids: list[int],
    *,
    download: bool,
) -> torch.Tensor | None:
    if not isinstance(model, str):
        parameter = dict(unwrap_model(model).named_parameters()).get(name)
        if parameter is None:
            return None
        with _gathered(parameter):
            return parameter[ids].detach().clone()
    options = {
        **{key: load_kwargs[key] for key in ("revision", "subfolder", "cache_dir", "token") if load_kwargs.get(key)},
        "local_files_only": not download,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_gated_repo": download,
        "_raise_exceptions_for_connection_errors": download,
    }
    index = cached_file(model, SAFETENSORS_INDEX_FILE, **options)
    if index is None:
        files = [SAFETENSORS_SINGLE_FILE]
    else:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        files = sorted({weight_map[key] for key in _checkpoint_names(name, weight_map)})
    for file in files:
        path = cached_file(model, file, **options)
        if path is None:
            continue
        with safe_open(path, framework="pt") as tensors:
            for key in _checkpoint_names(name, tensors.keys()):
                rows = tensors.get_slice(key)
                if rows.get_shape() == list(weight.shape):
                    return torch.cat([rows[token_id : token_id + 1] for token_id in ids])
    return None


def _checkpoint_names(name: str, keys: Iterable[str]) -> list[str]:
    # A checkpoint may have other prefixes than the model that is made of it; then its module's own name decides
    keys = list(keys)
    if name in keys:
        return [name]
    ending = ".".join(name.split(".")[-2:])
    return sorted(key for key in keys if key == ending or key.endswith(f".{ending}"))
