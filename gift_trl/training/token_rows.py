"""Embedding rows of the chat format's tokens, which a base model may never have trained."""

import contextlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE, SAFETENSORS_SINGLE_FILE
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

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
    revision: str | None = None,
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
            Prepared training data; its first rows tell which tokens the chat format uses.
        revision (`str`, *optional*):
            Revision of the instruct model on the Hub.
        borrow (`bool`, *optional*, defaults to `False`):
            Whether to put the instruct model's rows in place of untrained ones. They are not trained.

    Returns:
        `list[str]`: Tokens whose rows were borrowed.

    Raises:
        `ValueError`: If rows are to be borrowed for a model whose embedding or head is itself trained, or the instruct
            model's cannot be read.
    """
    base = model.get_base_model() if is_peft_model(model) else model
    matrices = _matrices(base)
    if borrow and (trained := [name for name, weight in matrices.items() if weight is None or weight.requires_grad]):
        raise ValueError(
            f"`borrow_instruct_token_rows` holds the instruct model's rows frozen, but {' and '.join(trained)} would be "
            "trained. Train an adapter (`use_peft`) that leaves embedding and head alone, or unset it."
        )
    ids = _chat_token_ids(tokenizer, dataset, instruct_model, revision)
    found: dict[int, list[str]] = {}
    borrowed = set()
    for name, weight in matrices.items():
        if weight is None or not ids:
            continue
        with _gathered(weight, modify=borrow):
            if weight.is_meta or weight.numel() == 0:  # read by the first process only, under FSDP
                continue
            reasons = _untrained_rows(weight, ids, tokenizer)
            if not reasons:
                continue
            rows = _instruct_rows(instruct_model, revision, name, list(reasons), download=borrow)
            if rows is None:
                if borrow:
                    raise ValueError(
                        f"The instruct model's `{name}` cannot be read, whose rows are to be borrowed. Give it as a folder "
                        "or a Hub repository with safetensors, or unset `borrow_instruct_token_rows`."
                    )
                continue
            for (token_id, reason), row in zip(reasons.items(), rows, strict=True):
                own, row = weight[token_id].float(), row.to(weight.device).float()
                if (row - own).norm() <= _UNMOVED * max(row.norm(), own.norm()):
                    continue
                found.setdefault(token_id, []).append(f"{name}: {reason}")
                if borrow:
                    with torch.no_grad():
                        weight[token_id] = row.to(weight.dtype)
                    borrowed.add(token_id)
    if found and not borrow:
        shown = ", ".join(f"{_text(tokenizer, i)} ({'; '.join(reasons)})" for i, reasons in list(found.items())[:4])
        logger.warning(
            f"The base model's rows of {len(found)} tokens of the chat format look untrained, and the instruct model's "
            f"differ from them: {shown}. The adapter would be trained to make up for that, and merged into a model that "
            "has learnt these tokens. Set `borrow_instruct_token_rows: true` to train with the instruct model's rows, "
            "held frozen."
        )
    return [_text(tokenizer, token_id) for token_id in sorted(borrowed)]


def _matrices(model: PreTrainedModel) -> dict[str, nn.Parameter | None]:
    """Embedding and head by the names of their weights; `None` for one that an adapter trains."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices = {}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            matrices["the embedding or head"] = None
        elif module is not None and id(module.weight) in names:
            matrices[names[id(module.weight)]] = module.weight  # a tied head is the embedding
    return matrices


@contextlib.contextmanager
def _gathered(weight: nn.Parameter, *, modify: bool) -> Iterator[None]:
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
) -> list[int]:
    special = set(tokenizer.added_tokens_decoder) | set(
        end_of_turn_token_ids(tokenizer, instruct_model, revision=revision)
    )
    used = {int(token_id) for row in islice(dataset, _ROWS_READ) for token_id in row["input_ids"]}
    return sorted(special & used)


def _untrained_rows(weight: torch.Tensor, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    with torch.no_grad():
        vocabulary = weight.shape[0]
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
    model: str | PreTrainedModel, revision: str | None, name: str, ids: list[int], *, download: bool
) -> torch.Tensor | None:
    if not isinstance(model, str):
        parameter = dict((model.get_base_model() if is_peft_model(model) else model).named_parameters()).get(name)
        if parameter is None:
            return None
        with _gathered(parameter, modify=False):
            return parameter[ids].detach().clone()
    options = {
        "revision": revision,
        "local_files_only": not download,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    index = cached_file(model, SAFETENSORS_INDEX_FILE, **options)
    file, key = SAFETENSORS_SINGLE_FILE, None
    if index is not None:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        key = _checkpoint_name(name, list(weight_map))
        file = weight_map.get(key)
    path = None if file is None else cached_file(model, file, **options)
    if path is None:
        return None
    with safe_open(path, framework="pt") as tensors:
        key = _checkpoint_name(name, list(tensors.keys())) if key is None else key
        if key is None:
            return None
        rows = tensors.get_slice(key)
        return torch.cat([rows[token_id : token_id + 1] for token_id in ids])


def _checkpoint_name(name: str, keys: list[str]) -> str | None:
    # A checkpoint may leave out the base model's prefix, or have one more
    if name in keys:
        return name
    matching = [key for key in keys if key.endswith(f".{name}") or name.endswith(f".{key}")]
    return matching[0] if len(matching) == 1 else None
