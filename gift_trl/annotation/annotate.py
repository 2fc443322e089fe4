"""`annotate_dataset`: stage 1 of GIFT."""

import os
from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import release_memory
from datasets import Dataset, List, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from trl import SFTConfig
from trl.trainer.utils import create_model_from_path

from gift_trl.annotation.provenance import (
    Provenance,
    add_provenance,
    hash_chat_template,
    hash_vocabulary,
    identify_commit,
    identify_weights,
    library_versions,
    model_name,
)
from gift_trl.annotation.scoring import score_tokens, unwrap_model
from gift_trl.annotation.tokenization import (
    find_rows_with_targets,
    prepare_processing_class,
    tokenize_dataset,
    truncate_rows,
)
from gift_trl.model_pair import end_of_turn_token_ids, load_config, load_tokenizer


logger = get_logger(__name__)


def annotate_dataset(
    dataset: Dataset,
    instruct_model: str | PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | None = None,
    *,
    args: SFTConfig | None = None,
    revision: str | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    formatting_func: Callable[[dict[str, Any]], str] | None = None,
    packing: bool | None = None,
    tokens_per_batch: int = 4096,
    dataset_name: str = "train",
) -> Dataset:
    """
    Tokenises a dataset as [`~trl.SFTTrainer`] does and adds the instruct model's confidence of every target token.

    The confidence is `q_t = p_{θ_I}(y_t | x, y_<t)`, the probability that the instruct model θ_I gives to the
    reference token, from the [GIFT paper](https://huggingface.co/papers/2605.01256). It belongs to the very token ids
    that are trained on: text is never tokenised twice.

    Args:
        dataset ([`~datasets.Dataset`]):
            Any dataset SFTTrainer takes: language modeling or prompt-completion, standard or conversational, or
            already tokenised with `input_ids` and optionally `labels`.
        instruct_model (`str` or [`~transformers.PreTrainedModel`]):
            Model that scores the tokens: a Hub id, a checkpoint folder or a loaded model. A name is loaded in the
            checkpoint's own dtype unless `model_init_kwargs` says otherwise, and freed afterwards.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer, with its chat template. Defaults to the one of `instruct_model`.
        args ([`~trl.SFTConfig`], *optional*):
            Training arguments: `max_length`, `truncation_mode`, `completion_only_loss`, `assistant_only_loss`,
            `dataset_text_field`, `eos_token`, `chat_template_path` and `dataset_num_proc` are read. Give the ones the
            training will use. Defaults to `SFTConfig()`.
        revision (`str`, *optional*):
            Revision of the instruct model on the Hub.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of [`~transformers.AutoModelForCausalLM.from_pretrained`].
        formatting_func (`Callable`, *optional*):
            SFTTrainer's formatting function.
        packing (`bool`, *optional*):
            Whether the rows will be packed. Rows to be packed are scored whole, and packing cuts them afterwards, so
            that every q is the one of the full context. Defaults to `args.packing`.
        tokens_per_batch (`int`, *optional*, defaults to `4096`):
            Upper bound of the padded number of tokens in one forward pass.
        dataset_name (`str`, *optional*, defaults to `"train"`):
            Name of the dataset in messages and progress bars.

    Returns:
        [`~datasets.Dataset`]: The rows, in order and with their columns, plus `input_ids`, `labels` and
        `confidences`: a list of float32 as long as `input_ids`, whose entry `i` is the probability of token `i` given
        the tokens before it, and 0.0 where the label is `-100` and at position 0. Rows without a target token are
        left out and counted by reason in the provenance, see [`read_provenance`].

    Raises:
        `ValueError`: If the data or the model cannot be scored; the message says which row and what to do.
        `FileNotFoundError`: If the model is not found.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from gift_trl import annotate_dataset

    >>> dataset = load_dataset("trl-lib/Capybara", split="train")
    >>> annotated = annotate_dataset(dataset, "Qwen/Qwen2.5-7B-Instruct")
    ```
    """
    # TRL turns bf16 on by default, which fails on a machine without a GPU; scoring does not read it
    args = SFTConfig(bf16=False) if args is None else args
    packing = args.packing if packing is None else packing
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"The {dataset_name} dataset is a `{type(dataset).__name__}`, which cannot be scored ahead of training. "
            "Materialise it as a `datasets.Dataset` (for example by loading it without streaming)."
        )
    if "confidences" in dataset.column_names:
        raise ValueError(
            f"The {dataset_name} dataset already has a `confidences` column. Remove the columns `input_ids`, `labels` "
            "and `confidences` to annotate it again."
        )
    load_kwargs = dict(model_init_kwargs or {})
    revision = load_kwargs.setdefault("revision", revision)
    config_kwargs = {"revision": revision, "trust_remote_code": load_kwargs.get("trust_remote_code", False)}
    check_scoring_model(instruct_model, **config_kwargs)
    if processing_class is None:
        processing_class = load_tokenizer(instruct_model, **config_kwargs)
    # Before the scoring, since it also finds a checkpoint without safetensors
    commit, weights = identify_commit(instruct_model, revision), identify_weights(instruct_model, revision)
    tokenizer = prepare_processing_class(processing_class, args)

    whole = tokenize_dataset(dataset, tokenizer, args, formatting_func=formatting_func, dataset_name=dataset_name)
    cut = whole if packing else truncate_rows(whole, args)
    kept, dropped = find_rows_with_targets(cut, whole)
    if not kept:
        raise ValueError(
            f"No row of the {dataset_name} dataset has a token to learn from ({dropped}). Raise `max_length`, or check "
            "that the completions are not empty and the masks not all zero."
        )
    rows, whole = (cut, whole) if len(kept) == len(cut) else (cut.select(kept), whole.select(kept))
    truncated = sum(len(a) < len(b) for a, b in zip(rows["input_ids"], whole["input_ids"], strict=True))

    own_model = isinstance(instruct_model, str)
    model = _load_scoring_model(instruct_model, load_kwargs) if own_model else instruct_model
    try:
        confidences = score_tokens(
            model,
            rows["input_ids"][:],
            rows["labels"][:],
            row_names=kept,
            tokens_per_batch=tokens_per_batch,
            description=f"Scoring {dataset_name} dataset",
        )
        dtype = str(model.dtype).removeprefix("torch.")
    finally:
        if own_model:
            del model
            release_memory()
    annotated = rows.add_column("confidences", confidences, feature=List(Value("float32")))
    provenance = Provenance(
        model=model_name(instruct_model),
        commit=commit,
        weights=weights,
        dtype=dtype,
        vocabulary=hash_vocabulary(tokenizer),
        chat_template=hash_chat_template(tokenizer.chat_template),
        assistant_only_loss=args.assistant_only_loss,
        completion_only_loss=args.completion_only_loss,
        max_length=None if packing else args.max_length,
        end_of_turn_token_ids=end_of_turn_token_ids(tokenizer, instruct_model, **config_kwargs),
        rows=len(annotated),
        truncated=truncated,
        dropped=dropped,
        versions=library_versions(),
    )
    if dropped:
        logger.warning(
            f"{sum(dropped.values())} of {len(dataset)} rows of the {dataset_name} dataset were left out: "
            + ", ".join(f"{count} × {reason}" for reason, count in dropped.items())
            + "."
        )
    return add_provenance(annotated, provenance)


def check_scoring_model(instruct_model: str | PreTrainedModel, **kwargs: Any) -> None:
    """
    Checks, before weights are read, that a model can score tokens in this process.

    Args:
        instruct_model (`str` or [`~transformers.PreTrainedModel`]):
            Model id, checkpoint folder or loaded model.
        kwargs (`dict[str, Any]`):
            Keyword arguments of [`~transformers.AutoConfig.from_pretrained`], such as `revision`.

    Raises:
        `ValueError`: If it is no causal language model, or its weights would be sharded over the processes.
        `FileNotFoundError`: If it is not found.
    """
    config = load_config(instruct_model, **kwargs)
    if isinstance(instruct_model, str):
        architecture = (config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)])[0]
    else:
        architecture = type(unwrap_model(instruct_model)).__name__
    # Models that read images generate text too, and remote code has names of its own
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    if architecture not in known and "auto_map" not in config.to_dict():
        raise ValueError(
            f"The model `{instruct_model if isinstance(instruct_model, str) else config.name_or_path}` is a "
            f"`{architecture}`, which is no causal language model. Name the instruct model to be merged into."
        )
    # Both would hand every process a part of the weights, and the probabilities of a part are wrong without a word
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
    if is_deepspeed_zero3_enabled() or fsdp:
        raise ValueError(
            f"The instruct model cannot be scored under {'FSDP' if fsdp else 'DeepSpeed ZeRO-3'}, which loads only "
            "part of its weights in each process. Annotate first, with `gift-trl annotate --config RECIPE "
            "--annotation_output_dir DIR` in one process, and train with `--dataset DIR`."
        )


def _load_scoring_model(name: str, load_kwargs: dict[str, Any]) -> PreTrainedModel:
    state = PartialState()
    load_kwargs = dict(load_kwargs)
    load_kwargs.setdefault("dtype", "auto")
    distributed = state.num_processes > 1
    if distributed:
        load_kwargs["device_map"] = None
    model = create_model_from_path(name, **load_kwargs)
    if distributed and "quantization_config" not in load_kwargs and not getattr(model, "is_quantized", False):
        model = model.to(state.device)
    return model.requires_grad_(False).eval()
