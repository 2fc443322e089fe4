"""What a GIFT run refuses, before a model is loaded."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl.data_utils import get_dataset_column_names
from trl.trainer.utils import get_config_model_id

from gift_trl.annotation.provenance import (
    check_provenance,
    hash_chat_template,
    hash_vocabulary,
    identify_weights,
    read_provenance,
)
from gift_trl.annotation.tokenization import prepare_processing_class
from gift_trl.training.config import GIFTConfig


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


logger = get_logger(__name__)


def complete_config(
    model: "str | PreTrainedModel | PeftModel", args: GIFTConfig | TrainingArguments | None
) -> GIFTConfig:
    """Completes SFTTrainer's arguments, or none, with the defaults of [`GIFTConfig`]."""
    if isinstance(args, GIFTConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return GIFTConfig(f"{name.split('/')[-1]}-GIFT")
    # Not `to_dict`, which replaces every field whose name ends in "_token", `eos_token` too, by a placeholder
    return GIFTConfig(**{field.name: getattr(args, field.name) for field in fields(args) if field.init})


def check_supported(
    args: GIFTConfig, compute_loss_func: Callable | None, peft_config: "PeftConfig | None", processing_class: Any
) -> None:
    """Refuses arguments of SFTTrainer that have no meaning for the GIFT loss or for a merge."""
    if compute_loss_func is not None:
        raise ValueError(
            "`compute_loss_func` would replace the GIFT loss. Leave it unset, or subclass `GIFTSFTTrainer` and override "
            "`compute_loss`."
        )
    if args.loss_type == "dft":
        raise ValueError(
            "`loss_type='dft'` weighs tokens by the trained model's own probability, GIFT by the instruct model's. "
            "Leave `loss_type` unset for GIFT, or use `SFTTrainer` for DFT."
        )
    if args.label_smoothing_factor > 0:
        raise ValueError(
            "`label_smoothing_factor` is not defined for the GIFT loss, which weighs the log-probability of the "
            "reference token only. Set it to 0."
        )
    if peft_config is not None and peft_config.is_prompt_learning:
        raise ValueError(
            f"`{peft_config.peft_type.value}` adds virtual tokens and changes no weight, so it cannot be merged into the "
            "instruct model. Use a LoRA configuration."
        )
    if processing_class is not None and not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"`processing_class` is a `{type(processing_class).__name__}`; GIFT is defined for text. Pass the instruct "
            "model's tokenizer."
        )


def require_confidences(train_dataset: Any, eval_dataset: Any, instruct_model: Any) -> None:
    """Refuses data without confidences when there is no instruct model: no silent plain fine-tuning."""
    if instruct_model is not None:
        return
    datasets = {"train": train_dataset}
    datasets.update(eval_dataset if isinstance(eval_dataset, Mapping) else {"eval": eval_dataset})
    missing = [
        name
        for name, dataset in datasets.items()
        if dataset is not None and "confidences" not in get_dataset_column_names(dataset)
    ]
    if missing:
        raise ValueError(
            f"There is no instruct model, and the dataset {' and '.join(repr(name) for name in missing)} has no "
            "`confidences` column, so nothing says how much each token counts. Set `instruct_model_name_or_path` (or "
            "pass `instruct_model`), or annotate the data first with `annotate_dataset`. For plain supervised "
            "fine-tuning, use `SFTTrainer`."
        )


def check_annotation(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase,
    args: GIFTConfig,
    annotator: str | PreTrainedModel | None,
    revision: str | None,
    dataset_name: str,
) -> None:
    """Refuses confidences that another model, tokenizer or chat template made; warns of rows cut shorter than here."""
    run = {"vocabulary": hash_vocabulary(processing_class)}
    if annotator is not None:
        run["chat_template"] = hash_chat_template(prepare_processing_class(processing_class, args).chat_template)
        run["weights"] = identify_weights(annotator, revision)[1]
    provenances = read_provenance(dataset)
    check_provenance(provenances, **run, dataset_name=dataset_name)
    shorter = [p for p in provenances if p.truncated and p.max_length < (args.max_length or float("inf"))]
    if shorter:
        logger.warning(
            f"{shorter[0].truncated} rows of the {dataset_name} dataset were cut to {shorter[0].max_length} tokens "
            f"when they were annotated, and this run allows {args.max_length}. Annotate with this run's `max_length` "
            "to train on the whole rows."
        )
