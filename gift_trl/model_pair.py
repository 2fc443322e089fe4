"""What a base model and its instruct model must share for GIFT: shapes, vocabulary, and how a turn ends."""

import copy
import os
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.utils import ADAPTER_CONFIG_NAME, find_adapter_config_file
from trl.trainer.utils import get_config_model_id


# Named in the error when they differ. Everything else that matters shows in the parameter shapes.
_DIMENSIONS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_SHAPELESS = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}


def load_config(model: str | PreTrainedModel, **kwargs: Any) -> PreTrainedConfig:
    """
    Configuration of a model that is given by name, by folder or as an object; reads no weights.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Model id, checkpoint folder or instantiated model.
        kwargs (`dict[str, Any]`):
            Keyword arguments of [`~transformers.AutoConfig.from_pretrained`], such as `revision`.

    Returns:
        [`~transformers.PreTrainedConfig`]: The configuration.

    Raises:
        `FileNotFoundError`: If there is neither such a folder nor such a repository within reach.
        `ValueError`: If it has code of its own, and `trust_remote_code` is not set.
    """
    if not isinstance(model, str):
        return model.config
    try:
        return AutoConfig.from_pretrained(model, **kwargs)
    except (OSError, ValueError) as error:
        if _needs_trust(error):
            raise
        if os.path.isfile(os.path.join(model, ADAPTER_CONFIG_NAME)):
            raise FileNotFoundError(
                f"`{model}` holds an adapter, and no model: merge it into the instruct model first (`gift-trl merge`), and "
                "give the folder of the merged model."
            ) from error
        raise FileNotFoundError(
            f"`{model}` has no readable model configuration: {str(error).splitlines()[0]} Give a folder that "
            "`save_pretrained` wrote, or the id of a model repository on the Hub."
        ) from error


def load_tokenizer(model: str | PreTrainedModel, **kwargs: Any) -> PreTrainedTokenizerBase:
    """
    Tokenizer that belongs to a model given by name, by folder or as an object.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Model id, checkpoint folder, or a model that remembers where it was loaded from.
        kwargs (`dict[str, Any]`):
            Keyword arguments of [`~transformers.AutoTokenizer.from_pretrained`], such as `revision`.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`]: The tokenizer.

    Raises:
        `ValueError`: If no tokenizer can be found there, or it has code of its own and `trust_remote_code` is not set.
    """
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    try:
        if not name:
            raise OSError("the model was built in memory and names no checkpoint.")
        return AutoTokenizer.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        if _needs_trust(error):
            raise
        raise ValueError(
            f"No tokenizer was found for the model `{name}`: {str(error).splitlines()[0]} Pass the instruct model's "
            "tokenizer as `processing_class`."
        ) from error


def _needs_trust(error: Exception) -> bool:
    # Transformers' own words name the cause and the remedy
    return "trust_remote_code=True" in str(error)


def check_same_architecture(
    model: str | PreTrainedModel,
    other: str | PreTrainedModel,
    *,
    model_kwargs: dict[str, Any] | None = None,
    other_kwargs: dict[str, Any] | None = None,
) -> None:
    """
    Checks from the configurations alone that two models have the same architecture and vocabulary size.

    GIFT trains an adapter on the base model and adds it to the instruct model: θ'_I = θ_I + M(φ) needs every parameter
    of one to exist, in the same shape, in the other.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Model to be trained, usually the base model.
        other (`str` or [`~transformers.PreTrainedModel`]):
            Model it is paired with, usually the instruct model.
        model_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments to load the configuration of `model` with.
        other_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments to load the configuration of `other` with.

    Raises:
        `ValueError`: If they differ; the message names what differs.
    """
    config = load_config(model, **(model_kwargs or {})).get_text_config()
    other_config = load_config(other, **(other_kwargs or {})).get_text_config()
    differences = [
        f"{key} ({getattr(config, key, None)} against {getattr(other_config, key, None)})"
        for key in _DIMENSIONS
        if getattr(config, key, None) != getattr(other_config, key, None)
    ]
    if not differences:
        differences = _shape_differences(config, other_config)
    if differences:
        names = [m if isinstance(m, str) else get_config_model_id(m.config) or "(in memory)" for m in (model, other)]
        raise ValueError(
            f"The models `{names[0]}` and `{names[1]}` do not fit together; they differ in {', '.join(differences)}. "
            "GIFT needs a base model and the instruct model that was post-trained from it. Name the matching pair."
        )


def refuse_adapter_beside(model: str, revision: str | None = None) -> None:
    """
    Refuses a model beside which an adapter lies: transformers would load one with the other, and say nothing.

    Args:
        model (`str`):
            Model id or checkpoint folder.
        revision (`str`, *optional*):
            Revision on the Hub.

    Raises:
        `ValueError`: If an adapter lies there.
    """
    if find_adapter_config_file(model, revision=revision) is not None:
        raise ValueError(
            f"'{model}' holds an adapter beside the model, which would be loaded with it. Merge it into the model, or move "
            "`adapter_config.json` and its weights to a folder of their own."
        )


def _shape_differences(config: PreTrainedConfig, other_config: PreTrainedConfig) -> list[str]:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return []  # a model with code of its own is not built to be measured
    if type(config) is type(other_config) and _sizes(config) == _sizes(other_config):
        return []
    shapes = []
    for c in (config, other_config):
        # The class itself: `from_config` would shard the parameters under DeepSpeed ZeRO-3
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(c)]
        with torch.device("meta"), no_init_weights():
            skeleton = model_class(copy.deepcopy(c))
        shapes.append({name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()})
    names = [name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)]
    return [f"{name} (shape {shapes[0].get(name)} against {shapes[1].get(name)})" for name in sorted(names)[:3]]


def _sizes(config: PreTrainedConfig) -> dict[str, Any]:
    """A configuration without what says nothing of shapes, in which most pairs differ."""
    values = config.to_dict()
    return {k: v for k, v in values.items() if k not in _SHAPELESS and not k.endswith("_token_id")}


def check_same_vocabulary(base_tokenizer: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Checks that the tokenizers of the base and the instruct model give the same meaning to the same id.

    Instruct models rename reserved tokens (`<unused5>` becomes `<start_of_turn>`), so ids that one of the two declares
    as added tokens may differ; ordinary tokens may not.

    Args:
        base_tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the base model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the instruct model.

    Raises:
        `ValueError`: If an ordinary token id means something else in the two; the message shows the first ones.
    """
    conflicts = vocabulary_conflicts(base_tokenizer, tokenizer)
    if conflicts:
        raise ValueError(
            f"The base and the instruct model do not share a vocabulary: {conflicts}. GIFT feeds the same ids to both "
            "models. Name the base model that this instruct model was post-trained from."
        )


def vocabulary_conflicts(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """
    Describes the ordinary token ids to which two tokenizers give different meanings.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        other ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer it is compared with.

    Returns:
        `str` or `None`: Their number and the first ones; `None` if there is none.
    """
    tokens, others = ({i: token for token, i in t.get_vocab().items()} for t in (tokenizer, other))
    added = set(tokenizer.added_tokens_decoder) | set(other.added_tokens_decoder)
    conflicts = [i for i in sorted((tokens.keys() & others.keys()) - added) if tokens[i] != others[i]]
    if not conflicts:
        return None
    shown = ", ".join(f"{i} ({tokens[i]!r} against {others[i]!r})" for i in conflicts[:3])
    return f"{len(conflicts)} token ids mean something else, the first being {shown}"


def end_of_turn_token_ids(
    tokenizer: PreTrainedTokenizerBase, model: str | PreTrainedModel | None = None, **kwargs: Any
) -> list[int]:
    """
    Token ids that end a turn: the tokenizer's `eos_token` and every id at which the model's generation stops.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the instruct model.
        model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Instruct model, whose generation configuration may list further ids (Llama 3 lists three).
        kwargs (`dict[str, Any]`):
            Keyword arguments of [`~transformers.AutoConfig.from_pretrained`], such as `revision`.

    Returns:
        `list[int]`: Sorted token ids; empty if neither names one.
    """
    ids = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    if isinstance(model, str):
        try:
            stop = GenerationConfig.from_pretrained(model, revision=kwargs.get("revision") or "main").eos_token_id
        except OSError:  # a checkpoint need not have one
            stop = load_config(model, **kwargs).get_text_config().eos_token_id
    else:
        stop = None if model is None else model.generation_config.eos_token_id
    if stop is not None:
        ids.update(stop if isinstance(stop, list) else [stop])
    return sorted(ids)
