"""What a GIFT run refuses, before a model is loaded."""

import contextlib
import copy
import difflib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import ParallelismConfig
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftType, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.initialization import no_init_weights
from transformers.integrations import integration_utils
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from trl.data_utils import get_dataset_column_names
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import get_config_model_id

from gift_trl.annotation.checks import warn_of_empty_answers
from gift_trl.annotation.engine import together
from gift_trl.annotation.provenance import (
    Provenance,
    hash_chat_template,
    hash_vocabulary,
    identify_commit,
    identify_weights,
    model_name,
    read_provenance,
)
from gift_trl.annotation.tokenization import prepare_processing_class
from gift_trl.merging.conversion import build_skeleton
from gift_trl.model_pair import (
    check_same_architecture,
    check_same_vocabulary,
    load_config,
    load_tokenizer,
    refuse_adapter_beside,
)
from gift_trl.training.callback import adapter_config
from gift_trl.training.config import GIFTConfig


if TYPE_CHECKING:
    from peft import PeftModel


logger = get_logger(__name__)

_MODEL_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


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
    given = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
    config = GIFTConfig(**{name: value for name, value in given.items() if name in GIFTConfig.__dataclass_fields__})
    for name in given.keys() - GIFTConfig.__dataclass_fields__.keys():  # of a subclass of the user's own
        setattr(config, name, given[name])
    return config


def check_supported(
    model: "str | PreTrainedModel | PeftModel",
    args: GIFTConfig,
    compute_loss_func: Callable | None,
    peft_config: PeftConfig | None,
    processing_class: Any,
    data_collator: Any,
    eval_dataset: Any,
) -> None:
    """Refuses what has no meaning for the GIFT loss, and what SFTTrainer would refuse after the data was annotated."""
    for name in args.report_to or ():  # a list by now
        # Known by functions of like names; those that have none, as the library says when it is begun with
        if not getattr(integration_utils, f"is_{name.removesuffix('_ml')}_available", lambda: True)():
            raise ImportError(
                f"`report_to` names {name}, which is not installed, or disabled: install it, or set `report_to: none`."
            )
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
    parallelism = args.parallelism_config
    if parallelism is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        parallelism = ParallelismConfig()  # what `accelerate launch` says
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            "Context and sequence parallelism shard a row over several processes, and GIFT's token weights are not "
            "sharded with it. Set `cp_size` and `sp_size` to 1; use ZeRO or FSDP to save memory."
        )
    if args.label_smoothing_factor > 0:
        raise ValueError(
            "`label_smoothing_factor` is not defined for the GIFT loss, which weighs the log-probability of the "
            "reference token only. Set it to 0."
        )
    if type(data_collator) is DataCollatorForLanguageModeling and args.confidence_source == "offline":
        raise ValueError(
            "`DataCollatorForLanguageModeling` drops the `confidences` column. Pass a `DataCollatorForGIFT`, or leave "
            "`data_collator` unset."
        )
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"`peft_config` is a `{type(peft_config).__name__}`. Give a `peft.PeftConfig`, such as `peft.LoraConfig`."
        )
    adapter = adapter_config(model, peft_config)
    if args.borrow_instruct_token_rows and adapter is None:
        raise ValueError(
            "`borrow_instruct_token_rows` holds the instruct model's rows frozen, and without an adapter every weight is "
            "trained. Pass a `peft_config` (`use_peft: true`), or unset it."
        )
    if args.borrow_instruct_token_rows and args.annotator == "base" and not isinstance(model, str):
        raise ValueError(
            "With `annotator='base'` the loaded model scores the tokens, and `borrow_instruct_token_rows` changes it. Give the "
            "base model by its name, or unset one of the two."
        )
    if args.packing and args.max_length is None:
        raise ValueError("Packing joins rows up to `max_length` tokens, but `max_length` is None. Set it.")
    if args.padding_free and not args.packing and args.max_length is not None:
        raise ValueError(
            "With `padding_free=True` and without packing, `max_length` is not enforced. Set `max_length` to None, or pack."
        )
    if args.truncation_mode not in ("keep_start", "keep_end"):
        raise ValueError(f"`truncation_mode` is {args.truncation_mode!r}; choose 'keep_start'.")
    if args.eval_strategy != "no" and eval_dataset is None:
        raise ValueError(
            f"`eval_strategy` is '{IntervalStrategy(args.eval_strategy).value}', but there is no `eval_dataset`. Pass "
            "one, or set `eval_strategy` to 'no'."
        )
    targets = getattr(adapter, "target_modules", None)
    if not isinstance(targets, str) and any(t.rpartition(".")[2] == "lm_head" for t in targets or ()):
        raise ValueError(
            "`lm_head` is among the `target_modules`, and TRL's loss bypasses an adapter on it, so that it would never be "
            "trained. Remove it."
        )
    if adapter is not None and adapter.is_prompt_learning:
        raise ValueError(
            f"`{PeftType(adapter.peft_type).value}` adds virtual tokens and changes no weight, so it cannot be "
            "merged into the instruct model. Use a LoRA configuration."
        )
    if processing_class is not None and not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"`processing_class` is a `{type(processing_class).__name__}`; GIFT is defined for text. Pass the instruct "
            "model's tokenizer."
        )


def choose_instruct_model(instruct_model: Any, args: GIFTConfig) -> str | PreTrainedModel | None:
    """The instruct model of the constructor or of the configuration, which must not name two."""
    named = args.instruct_model_name_or_path
    if instruct_model is None or named is None:
        return named if instruct_model is None else instruct_model
    given = instruct_model if isinstance(instruct_model, str) else get_config_model_id(instruct_model.config)
    one_folder = os.path.isdir(given) and os.path.isdir(named) and os.path.samefile(given, named)
    # Nothing is known of a model that was built in memory
    if given and given != named and not one_folder:
        raise ValueError(
            f"`instruct_model` is `{given}`, and `args.instruct_model_name_or_path` is `{named}`. Name one."
        )
    return instruct_model


def _base_kwargs(args: GIFTConfig) -> dict[str, Any]:
    """What the configuration and the tokenizer of the base model are loaded with."""
    init_kwargs: Any = args.model_init_kwargs or {}
    return {
        "revision": init_kwargs.get("revision"),
        "trust_remote_code": init_kwargs.get("trust_remote_code", args.trust_remote_code),
    }


def choose_processing_class(
    model: Any,
    instruct_model: str | PreTrainedModel | None,
    args: GIFTConfig,
    processing_class: PreTrainedTokenizerBase | None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of the run, by default the instruct model's; refuses models that do not fit together."""
    base_kwargs = _base_kwargs(args)
    if instruct_model is None:
        return load_tokenizer(model, **base_kwargs) if processing_class is None else processing_class
    instruct_kwargs = {"revision": args.instruct_model_revision, "trust_remote_code": args.trust_remote_code}
    check_same_architecture(model, instruct_model, model_kwargs=base_kwargs, other_kwargs=instruct_kwargs)
    if processing_class is None:
        processing_class = load_tokenizer(instruct_model, **instruct_kwargs)
    try:
        base_tokenizer = load_tokenizer(model, **base_kwargs)
    except ValueError:  # a base checkpoint without tokenizer files has nothing to compare
        return processing_class
    check_same_vocabulary(base_tokenizer, processing_class)
    return processing_class


def check_folders(model: Any, instruct_model: Any, args: GIFTConfig, adapter: PeftConfig | None) -> None:
    """Refuses models beside which an adapter lies, and an output folder in which one would come to lie beside a model."""
    output = Path(str(args.output_dir))
    given = ((model, _base_kwargs(args)["revision"]), (instruct_model, args.instruct_model_revision))
    models = {name: revision for name, revision in given if isinstance(name, str)}

    def check() -> None:
        for name, revision in models.items():
            refuse_adapter_beside(name, revision)
            if os.path.isdir(name) and Path(name).resolve() == output.resolve():
                consequence = (
                    "whose weights would be replaced"
                    if adapter is None
                    else "beside which the adapter would lie, and be loaded with it from then on"
                )
                raise ValueError(
                    f"`output_dir` is the folder of the model '{name}', {consequence}. Choose another `output_dir`."
                )
        others = (ADAPTER_CONFIG_NAME,) if adapter is None else _MODEL_FILES
        found = next((file for file in others if (output / file).is_file()), None)
        if found is not None:
            there, new = ("an adapter", "a whole model") if adapter is None else ("a whole model", "an adapter")
            raise ValueError(
                f"`output_dir` ('{output}') holds {there} of an earlier run ({found}), and {new} would be saved beside it: "
                "transformers loads one with the other. Choose another `output_dir`, or move what it holds away."
            )

    _ = args.world_size  # connects the processes
    together(check)


def check_target_names(model: Any, peft_config: PeftConfig | None, args: GIFTConfig) -> None:
    """Refuses names of modules that the model has not: PEFT takes those it finds, and says nothing of the others."""
    named = {field: getattr(peft_config, field, None) for field in ("target_modules", "modules_to_save")}
    listed = {field: names for field, names in named.items() if isinstance(names, (list, set, tuple))}
    if peft_config is None or not listed:
        return
    config = load_config(model, **_base_kwargs(args))
    try:
        skeleton = build_skeleton(config)
    except ValueError:  # a model with code of its own is left to PEFT
        return
    modules = [name for name, _ in (skeleton if isinstance(model, str) else model).named_modules()]
    unknown = {
        field: [
            name
            for name in sorted(names)
            if not any(f".{module}".endswith(f".{name}" if field == "target_modules" else name) for module in modules)
        ]
        for field, names in listed.items()
    }
    if unknown.get("target_modules"):
        # PEFT knows the names that some mixtures of experts had before their experts were one parameter
        with contextlib.suppress(ValueError, NotImplementedError), warnings.catch_warnings(), no_init_weights():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(skeleton, copy.deepcopy(peft_config), low_cpu_mem_usage=True)
            kept = adapted.active_peft_config.target_modules
            unknown["target_modules"] = [name for name in unknown["target_modules"] if name in kept]
    problems = []
    known = sorted({part for module in modules for part in (module, module.rpartition(".")[2])})
    for field, name in ((field, name) for field, names in unknown.items() for name in names):
        meant = difflib.get_close_matches(name, known, n=1)
        question = f"; did you mean `{meant[0]}`?" if meant else "."
        problems.append(f"`{field}`: `{name}` matches no module of the model{question}")
    if problems:
        raise ValueError(f"{' '.join(problems)} PEFT would train an adapter without it.")


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
    processing_class: PreTrainedTokenizerBase | None,
    args: GIFTConfig,
    annotator: str | PreTrainedModel | None,
    revision: str | None,
    dataset_name: str,
) -> None:
    """
    Refuses confidences that belong to another run, and names every field that differs; warns of what cannot be known.
    """
    provenances = read_provenance(dataset)
    columns = set(get_dataset_column_names(dataset))
    if not provenances:
        logger.warning(
            f"The `confidences` of the {dataset_name} dataset say nothing of where they come from, so it is not checked "
            "that they belong to this run's models and chat format. `annotate_dataset`, and folders written by "
            "`gift-trl annotate` and given as `dataset_name`, carry it."
        )
    packing = args.packing if dataset_name == "train" or args.eval_packing is None else args.eval_packing
    for provenance in provenances:
        settings = {**asdict(provenance), "completion_only_loss": _completion_only_loss(provenance, columns)}
        run: dict[str, Any] = {
            "assistant_only_loss": args.assistant_only_loss,
            "completion_only_loss": args.completion_only_loss,
            "eos_token": args.eos_token,
        }
        if (
            settings["completion_only_loss"]
            and not {"prompt", "completion"} & columns
            and not args.completion_only_loss
        ):
            # Unset, it follows from columns that have been removed since
            run["completion_only_loss"] = None
            logger.warning(
                f"Only the completions of the {dataset_name} dataset are targets, as `completion_only_loss` said when it "
                f"was annotated. This run's is {args.completion_only_loss}, or unset while the columns `prompt` and "
                "`completion` are gone. Set it to True, or annotate the original dataset with False to train on whole rows."
            )
        if processing_class is not None:
            run["vocabulary"] = hash_vocabulary(processing_class)
        if annotator is not None:
            if processing_class is not None:
                tokenizer = prepare_processing_class(processing_class, args)
                run["eos_token"] = tokenizer.eos_token
                run["chat_template"] = hash_chat_template(tokenizer.chat_template)
            commit = identify_commit(annotator, revision)
            # The same commit is the same weights; to compare two commits, or a commit and a copy, the weights are needed
            if commit is None or commit != provenance.commit:
                run["weights"] = None if provenance.weights is None else identify_weights(annotator, revision)
                if run["weights"] is None:
                    run["model"] = model_name(annotator)
                    in_memory = not isinstance(annotator, str) and not get_config_model_id(annotator.config)
                    if in_memory and provenance.model == run["model"]:
                        logger.warning_once(
                            f"The `confidences` of the {dataset_name} dataset were made by a model that was built in "
                            "memory, and this run's has no name either, so it is not checked that the two are one. Save "
                            "the model and give its folder."
                        )
        splits = packing and args.packing_strategy != "bfd"
        if provenance.truncated and args.max_length is not None and not splits:
            run["truncation_mode"] = "keep_start" if packing else args.truncation_mode
        differing = [
            f"{name} (annotated with {settings[name]}, this run has {value})"
            for name, value in run.items()
            if value is not None and settings[name] not in (None, value)
        ]
        if differing:
            raise ValueError(
                f"The `confidences` of the {dataset_name} dataset were made by `{provenance.model}` for another run: "
                f"{'; '.join(differing)}. Annotate the original dataset again with this run's instruct model, tokenizer "
                "and settings, or give the run those of the annotation."
            )
        cut_at = provenance.max_length
        if provenance.truncated and splits:
            logger.warning(
                f"{provenance.truncated} rows of the {dataset_name} dataset were cut to {cut_at} tokens when they were "
                f"annotated, and `packing_strategy={args.packing_strategy!r}` would train on what was cut off too. "
                "Annotate with this run's `packing` to train on the whole rows."
            )
        elif provenance.truncated and cut_at is not None and cut_at < (args.max_length or float("inf")):
            logger.warning(
                f"{provenance.truncated} rows of the {dataset_name} dataset were cut to {cut_at} tokens "
                f"when they were annotated, and this run allows {args.max_length}. Annotate with this run's `max_length` "
                "to train on the whole rows."
            )

    if isinstance(dataset, Dataset) and "labels" in columns:
        ends = {token_id for provenance in provenances for token_id in provenance.end_of_turn_token_ids}
        if processing_class is not None and processing_class.eos_token_id is not None:
            ends.add(processing_class.eos_token_id)
        warn_of_empty_answers(dataset, ends, processing_class, dataset_name)


def _completion_only_loss(provenance: Provenance, columns: set[str]) -> bool | None:
    if provenance.truncation_mode is None and {"prompt", "completion"} <= columns:
        # An older annotation has None where it was left to the data
        return provenance.completion_only_loss is not False
    return provenance.completion_only_loss
