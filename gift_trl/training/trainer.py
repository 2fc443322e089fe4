"""`GIFTSFTTrainer`: stage 2 of GIFT."""

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from huggingface_hub import ModelCard
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, PredictionOutput, TrainOutput
from trl import SFTTrainer
from trl.data_utils import get_dataset_column_names
from trl.trainer.utils import get_config_model_id

from gift_trl.annotation.provenance import library_versions, read_provenance
from gift_trl.annotation.tokenization import prepare_processing_class
from gift_trl.cards import GIFT_CITATION, Source, TrainingFacts, is_hub_id, write_card
from gift_trl.checkpoints import ADAPTER_FILE, CARD_FILE
from gift_trl.model_pair import end_of_turn_token_ids
from gift_trl.training.callback import StageCallback, adapter_config
from gift_trl.training.checks import (
    check_folders,
    check_supported,
    check_target_names,
    choose_instruct_model,
    choose_processing_class,
    complete_config,
    require_confidences,
)
from gift_trl.training.compatibility import check_trl_hooks
from gift_trl.training.confidences import ConfidenceSource, share_weights
from gift_trl.training.config import GIFTConfig
from gift_trl.training.data_collator import NOT_FOR_THE_MODEL, DataCollatorForGIFT, RowDataCollator
from gift_trl.training.learning_signal import LearningSignal, real_rows
from gift_trl.training.loss import weighted_loss
from gift_trl.training.model_card import (
    dataset_sources,
    learning_signal,
    make_adapter_card,
    run_links,
    training_settings,
    without_peft_card,
)
from gift_trl.training.preparation import cut_confidences, pack_with_confidences
from gift_trl.training.resume import (
    check_checkpoint,
    clear_checkpoint,
    data_digest,
    explain_full_disk,
    find_checkpoint,
    finish_rotation,
    logged_tokens,
)
from gift_trl.training.token_rows import check_token_rows
from gift_trl.training.weights import token_weights


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


class GIFTSFTTrainer(SFTTrainer):
    """
    Trainer for Guided Fine-Tuning and Transfer (GIFT).

    GIFT ([paper](https://huggingface.co/papers/2605.01256)) trains an adapter φ on a *base* model and merges it into
    the *instruct* model. The cross-entropy ℓ_t of a target token is weighted by the probability q_t that the instruct
    model gives to it:

        L(φ) = Σ_t w_t · ℓ_t(φ),   w_t = max(q_t, confidence_floor) ** confidence_exponent

    What changes with respect to [`~trl.SFTTrainer`]: the dataset carries a `confidences` column (made here with
    [`annotate_dataset`] if it is missing), the loss is weighted by it and normalised over the whole optimizer step,
    tokenizer and chat template default to the instruct model's, and `nll`, `gift/confidence_mean`, `gift/weight_mean` and
    the shares of the loss by confidence (`gift/signal_low`, `_mid`, `_high`) are logged beside SFTTrainer's metrics.
    With `args.confidence_source="online"`, a frozen instruct model scores every batch as it comes. Everything else is
    inherited. Merge the trained adapter with [`merge_adapter`].

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Base model to be trained, as for SFTTrainer.
        args ([`GIFTConfig`], *optional*):
            Configuration of the trainer. An [`~trl.SFTConfig`] or [`~transformers.TrainingArguments`] is completed
            with the defaults of [`GIFTConfig`].
        instruct_model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            Instruct model, if it is not named by `args.instruct_model_name_or_path`. Needed unless every dataset
            already has a `confidences` column. One with an adapter scores with it, unless it is the model to be
            trained.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. Defaults to the instruct model's, with its chat template.
        train_dataset, eval_dataset, data_collator, compute_metrics, callbacks, optimizers, \
optimizer_cls_and_kwargs, preprocess_logits_for_metrics, quantization_config, peft_config, formatting_func:
            As for [`~trl.SFTTrainer`].

    Raises:
        `ValueError`: If there is neither an instruct model nor a `confidences` column, if base and instruct model do
            not fit together, if the confidences belong to another run, or if an argument has no meaning for GIFT.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from gift_trl import GIFTConfig, GIFTSFTTrainer
    >>> from peft import LoraConfig

    >>> trainer = GIFTSFTTrainer(
    ...     model="Qwen/Qwen2.5-7B",
    ...     args=GIFTConfig(instruct_model_name_or_path="Qwen/Qwen2.5-7B-Instruct"),
    ...     train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    ...     peft_config=LoraConfig(target_modules="all-linear"),
    ... )
    >>> trainer.train()
    ```
    """

    # For type checkers: narrower than in SFTTrainer, or left to it
    args: GIFTConfig
    model: Any
    loss_is_scaled_for_ga: Any
    _signature_columns: Any

    _tag_names = ["trl", "sft", "gift"]
    _name = "GIFT"
    _paper = {
        "title": "GIFT: Guided Fine-Tuning and Transfer for Enhancing Instruction-Tuned Language Models",
        "id": "2605.01256",
        "citation": GIFT_CITATION,
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: GIFTConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: "PeftConfig | None" = None,
        formatting_func: Callable[[dict], str] | None = None,
        *,
        instruct_model: "str | PreTrainedModel | PeftModel | None" = None,
    ):
        check_trl_hooks()
        args = complete_config(model, args)
        check_supported(model, args, compute_loss_func, peft_config, processing_class, data_collator, eval_dataset)
        instruct_model = choose_instruct_model(instruct_model, args)
        self._instruct_model = instruct_model
        for callback in callbacks or ():
            if isinstance(callback, StageCallback):
                args = callback.before_annotation(args, adapter_config(model, peft_config))
        knows_tokenizer = instruct_model is not None or processing_class is not None

        if train_dataset is None:
            raise ValueError("`train_dataset` is required. Give a `Dataset` or `IterableDataset`.")
        if not isinstance(train_dataset, (Dataset, IterableDataset)):
            raise TypeError(
                f"`train_dataset` is a `{type(train_dataset).__name__}`. Give a `Dataset` or `IterableDataset`: one split "
                "of a `DatasetDict`, or `Dataset.from_list(rows)`."
            )
        require_confidences(train_dataset, eval_dataset, instruct_model)
        if args.borrow_instruct_token_rows and instruct_model is None:
            raise ValueError(
                "`borrow_instruct_token_rows` is set, but there is no instruct model to borrow from. Set "
                "`instruct_model_name_or_path`."
            )
        self._dataset_sources = dataset_sources(train_dataset)
        self._data_digest = data_digest(train_dataset, args.dataset_text_field)
        self._check_checkpoint_early(model, args, adapter_config(model, peft_config))
        processing_class = choose_processing_class(model, instruct_model, args, processing_class)
        check_folders(model, instruct_model, args, adapter_config(model, peft_config))
        check_target_names(model, peft_config, args)
        if args.confidence_source == "online":
            prepare_processing_class(processing_class, args)  # refuses what the annotation would
        self._confidence_source = ConfidenceSource(
            args,
            instruct_model,
            model,
            processing_class,
            formatting_func,
            check_tokenizer=knows_tokenizer,
            train_columns=get_dataset_column_names(train_dataset),
        )
        # Before the base model is loaded, so that only one of the two models is in memory at a time
        eval_sets = eval_dataset if isinstance(eval_dataset, Mapping) else {"eval": eval_dataset}
        eval_packing = args.packing if args.eval_packing is None else args.eval_packing
        train_dataset, *annotated = self._confidence_source.annotate(
            [("train", train_dataset, args.packing), *((name, data, eval_packing) for name, data in eval_sets.items())]
        )
        eval_dataset = (
            dict(zip(eval_sets, annotated, strict=True)) if isinstance(eval_dataset, Mapping) else annotated[0]
        )

        self._packed: weakref.WeakSet[Dataset | IterableDataset] = weakref.WeakSet()
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            # Annotated rows are formatted and tokenised already
            formatting_func=formatting_func if self._confidence_source.is_online else None,
        )

        if data_collator is None:
            # SFTTrainer refuses a custom collator in padding-free mode, so its own is replaced by ours afterwards
            own: Any = self.data_collator
            collator = RowDataCollator if self._confidence_source.is_online else DataCollatorForGIFT
            self.data_collator = collator(
                pad_token_id=own.pad_token_id,
                padding_free=own.padding_free,
                return_position_ids=own.return_position_ids,
                pad_to_multiple_of=own.pad_to_multiple_of,
            )
        # "microbatch" is a mean over the forward passes: dividing it by their number is left to the trainer
        self.loss_is_scaled_for_ga = args.weight_normalization != "microbatch"

        instruct_kwargs = {"revision": args.instruct_model_revision, "trust_remote_code": args.trust_remote_code}
        ids = set(end_of_turn_token_ids(self._tokenizer, instruct_model, **instruct_kwargs))
        self._provenances = read_provenance(train_dataset)
        for provenance in self._provenances:
            ids.update(provenance.end_of_turn_token_ids)
        self._end_of_turn_token_ids = torch.tensor(sorted(ids), dtype=torch.long)
        init_kwargs: Any = self.args.model_init_kwargs or {}
        self._base_source = _source(model, init_kwargs.get("revision"))
        self._instruct_source = (
            _source(instruct_model, args.instruct_model_revision) if instruct_model is not None else None
        )
        self._signal = LearningSignal()
        self._borrowed_tokens: list[str] = []
        instruct_init_kwargs: Any = args.instruct_model_init_kwargs or {}
        if instruct_model is not None and instruct_model is not model and not share_weights(instruct_model, model):
            self._borrowed_tokens = check_token_rows(
                self.model,
                instruct_model,
                self._tokenizer,
                self.train_dataset,
                load_kwargs={"revision": args.instruct_model_revision, **instruct_init_kwargs},
                borrow=args.borrow_instruct_token_rows,
            )
        self._confidence_source.training_starts(self.model, self.accelerator.device)

    def _check_checkpoint_early(self, model: Any, args: GIFTConfig, peft_config: "PeftConfig | None") -> None:
        # Whether it has to be there, `train` decides
        wanted: Any = args.resume_from_checkpoint
        checkpoint = find_checkpoint(args, "auto" if str(wanted).lower() == "true" else wanted)
        if checkpoint is None:
            return
        init_kwargs: Any = args.model_init_kwargs or {}
        instruct = self._instruct_model
        facts = TrainingFacts(
            base_model=_source(model, init_kwargs.get("revision")),
            instruct_model=None if instruct is None else _source(instruct, args.instruct_model_revision),
            data=self._data_digest,
            settings=training_settings(args, args.world_size, peft_config, [], []),
        )
        check_checkpoint(checkpoint, args, facts, peft_config, loaded=False)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        if dataset in self._packed:
            return dataset  # evaluating a dictionary of sets comes by twice, and packed rows are not packed again
        if self._confidence_source.is_online:
            dataset = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
            if packing:
                self._packed.add(dataset)
            return dataset
        # SFTTrainer truncates `input_ids` and `labels` only, and packing keeps only these two: the confidences are cut
        # and packed here alike
        dataset, sft_args = cut_confidences(dataset, args, packing=packing, dataset_name=dataset_name)
        dataset = super()._prepare_dataset(dataset, processing_class, sft_args, False, None, dataset_name)
        if packing:
            dataset = pack_with_confidences(dataset, args, dataset_name=dataset_name)
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        if packing:
            self._packed.add(dataset)
        return dataset

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        resume_from_checkpoint = find_checkpoint(self.args, resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            peft_config = adapter_config(self.model)
            check_checkpoint(resume_from_checkpoint, self.args, self._training_facts(), peft_config, loaded=True)
        if resume_from_checkpoint is not None and self.args.should_save:
            finish_rotation(self.args, resume_from_checkpoint)
        self._signal.clear("train")
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, StageCallback):
                callback.before_training(self, resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "confidences" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "confidences"]

    def evaluate(
        self,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        # A dataset given here is annotated like those given at construction; a name selects one of those
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            require_confidences(None, eval_dataset, self._instruct_model)
            packing = self.args.packing if self.args.eval_packing is None else self.args.eval_packing
            if isinstance(eval_dataset, Mapping):
                annotated = self._confidence_source.annotate((n, data, packing) for n, data in eval_dataset.items())
                eval_dataset = dict(zip(eval_dataset, annotated, strict=True))
            else:
                (eval_dataset,) = self._confidence_source.annotate([(metric_key_prefix, eval_dataset, packing)])
        return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def predict(
        self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        # Predictions belong to rows: none is left out, and none is cut, as if the rows were to be packed
        require_confidences(None, {metric_key_prefix: test_dataset}, self._instruct_model)
        annotated: Any
        (annotated,) = self._confidence_source.annotate([(metric_key_prefix, test_dataset, True)])
        if isinstance(annotated, Dataset) and len(annotated) < len(test_dataset):
            raise ValueError(
                f"{len(test_dataset) - len(annotated)} rows have no token to predict, and would be missing from the "
                "predictions. Leave them out of `test_dataset`."
            )
        return super().predict(annotated, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared = super()._prepare_inputs(inputs)
        if "confidences" in inputs:
            # DeepSpeed's integration has cast them to the model's dtype: numerator and denominator would weigh otherwise
            prepared["confidences"] = inputs["confidences"].to(self.args.device)
        return prepared

    def _batch_weights(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if "confidences" not in inputs and self._confidence_source.is_online:
            # Kept in the batch: the denominator of a step needs them before its first loss
            inputs["confidences"] = self._confidence_source.score(inputs)
        if "confidences" not in inputs:
            raise ValueError(
                "The batch has no `confidences`, so there is nothing to weigh the loss with. Let the data collator "
                "keep them: use or extend `gift_trl.training.DataCollatorForGIFT`."
            )
        self._end_of_turn_token_ids = self._end_of_turn_token_ids.to(inputs["labels"].device)
        return token_weights(
            inputs["confidences"],
            inputs["labels"],
            exponent=self.args.confidence_exponent,
            floor=self.args.confidence_floor,
            eos_confidence=self.args.eos_confidence,
            end_of_turn_token_ids=self._end_of_turn_token_ids,
        )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        # The denominator of the loss, counted where the trainer counts it: once an optimizer step, over all of its
        # accumulation steps and processes
        if len(batch_samples) == 0 or self.args.weight_normalization == "microbatch":
            return None
        if self.args.weight_normalization == "weights":
            total: Any = sum(self._batch_weights(batch).sum() for batch in batch_samples)
        else:
            total = sum((batch["labels"][:, 1:] != -100).sum() for batch in batch_samples)
        total = total.to(device, torch.float32)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            # Tensor-parallel ranks are given the same batch
            total = self.accelerator.gather(total).sum() / self.get_tp_size()
        return total

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        weights = self._batch_weights(inputs)
        q = inputs["confidences"][:, 1:]
        passes = []

        def forward(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            if kwargs.get("fused_lm_head"):
                passes.append(outputs)
            return outputs

        # SFTTrainer runs the forward pass and keeps its metrics. Its loss, the plain cross-entropy, is not used.
        sft_inputs = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}
        result = super().compute_loss(forward, sft_inputs, return_outputs=return_outputs)
        if len(passes) != 1:
            raise RuntimeError(
                f"SFTTrainer ran {len(passes)} forward passes with its fused head, where GIFT knows one. Install the "
                "versions of gift_trl's `constraints.txt`, or a newer gift_trl."
            )
        outputs = passes[0]

        mask = outputs.label_mask
        weights, q = weights.to(mask.device), q.to(mask.device)
        loss, empty = weighted_loss(
            outputs.log_probs,
            mask,
            weights,
            normalization=self.args.weight_normalization,
            denominator=num_items_in_batch,
        )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The denominator counts every process, and the gradients are averaged over them
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:
            # The load-balancing loss of mixture-of-experts models is a mean of each forward pass, as in SFTTrainer
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps

        mode = "train" if self.model.training else "eval"
        counted = mask
        if mode == "eval" and (real := real_rows(inputs, self.accelerator)) is not None:
            counted = mask & real.expand_as(inputs["labels"])[:, 1:].to(mask.device)
        self._signal.add(mode, q, weights, -outputs.log_probs.detach(), counted, empty)
        return (loss, result[1]) if return_outputs else loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that goes on from its last step inside of an epoch would train one step more
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if kwargs.get("resume_from_checkpoint") is not None:
            # SFTTrainer counts from zero again. In later epochs, it is what it is already
            self._total_train_tokens = max(self._total_train_tokens, logged_tokens(self.state.log_history))
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:
            clear_checkpoint(Path(self._get_output_dir(trial=trial)), self.state.global_step)
        self.accelerator.wait_for_everyone()
        with explain_full_disk(Path(str(self.args.output_dir))):
            super()._save_checkpoint(model, trial)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._signal.gather("train", self.accelerator)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._signal.gather("train", self.accelerator)  # of the steps since the last log
        return super()._finalize_training(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._signal.clear("eval")
        output = super().evaluation_loop(*args, **kwargs)
        self._signal.gather("eval", self.accelerator)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        for name, value in self._signal.take(mode).items():
            self._metrics[mode][name].append(value)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        with without_peft_card(), explain_full_disk(folder):
            super().save_model(output_dir, _internal_call)
        if self.is_world_process_zero():
            self._training_facts().write(folder)
            if (folder / ADAPTER_FILE).exists():
                write_card(folder / CARD_FILE, lambda: self._make_card(self._card_name()))

    def create_model_card(  # type: ignore[override]  # as in TRL
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        if self.is_world_process_zero():
            card = Path(str(self.args.output_dir)) / CARD_FILE
            write_card(card, lambda: self._make_card(model_name or self._card_name(), dataset_name, tags))

    def _card_name(self) -> str:
        return (self.args.hub_model_id or Path(str(self.args.output_dir)).resolve().name).split("/")[-1]

    def _make_card(self, name: str, dataset_name: str | None = None, tags: str | list[str] | None = None) -> ModelCard:
        facts = self._training_facts()
        if dataset_name is not None and dataset_name not in [dataset.name for dataset in facts.datasets]:
            on_hub = is_hub_id(dataset_name)
            facts.datasets.append(Source(dataset_name if on_hub else Path(dataset_name).name, on_hub=on_hub))
        tags = [*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])]
        return make_adapter_card(facts, name, hub_id=self.args.hub_model_id, tags=tags)

    def _training_facts(self) -> TrainingFacts:
        peft_config = adapter_config(self.model)
        return TrainingFacts(
            base_model=self._base_source,
            instruct_model=self._instruct_source,
            datasets=list(self._dataset_sources),
            data=self._data_digest,
            peft_type=None if peft_config is None else peft_config.peft_type.value,
            settings=training_settings(
                self.args, self.accelerator.num_processes, peft_config, self._provenances, self._borrowed_tokens
            ),
            links=run_links(),
            signal=learning_signal(self.state.log_history),
            versions=library_versions(),
        )


def _source(model: "str | PreTrainedModel | PeftModel", revision: str | None) -> Source:
    if isinstance(model, str):
        return Source.of_model(model, revision)
    return Source.of_model(get_config_model_id(model.config), was_loaded=False)
