"""`GIFTSFTTrainer`: stage 2 of GIFT."""

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import torch
from accelerate.logging import get_logger
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import EvalPrediction
from trl import SFTTrainer, pack_dataset
from trl.data_utils import get_dataset_column_names
from trl.trainer.utils import global_then_local_main_first

from gift_trl.annotation.provenance import read_provenance
from gift_trl.annotation.tokenization import token_slice
from gift_trl.model_pair import (
    check_same_architecture,
    check_same_vocabulary,
    end_of_turn_token_ids,
    load_tokenizer,
)
from gift_trl.training.checks import (
    check_supported,
    choose_instruct_model,
    complete_config,
    require_confidences,
)
from gift_trl.training.compatibility import check_trl_hooks
from gift_trl.training.confidences import ConfidenceSource
from gift_trl.training.config import GIFTConfig
from gift_trl.training.data_collator import DataCollatorForGIFT
from gift_trl.training.loss import weighted_loss
from gift_trl.training.weights import token_weights


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


logger = get_logger(__name__)


class GIFTSFTTrainer(SFTTrainer):
    """
    Trainer for Guided Fine-Tuning and Transfer (GIFT).

    GIFT ([paper](https://huggingface.co/papers/2605.01256)) trains an adapter φ on a *base* model and merges it into
    the *instruct* model. The cross-entropy ℓ_t of a target token is weighted by the probability q_t that the instruct
    model gives to it:

        L(φ) = Σ_t w_t · ℓ_t(φ),   w_t = max(q_t, confidence_floor) ** confidence_exponent

    What changes with respect to [`~trl.SFTTrainer`]: the dataset carries a `confidences` column (made here with
    [`annotate_dataset`] if it is missing), the loss is weighted by it and normalised over the whole optimizer step,
    tokenizer and chat template default to the instruct model's, and `nll`, `gift/confidence_mean` and
    `gift/weight_mean` are logged beside SFTTrainer's metrics. Everything else is inherited. Merge the trained adapter
    with [`merge_adapter`].

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Base model to be trained, as for SFTTrainer.
        args ([`GIFTConfig`], *optional*):
            Configuration of the trainer. An [`~trl.SFTConfig`] or [`~transformers.TrainingArguments`] is completed
            with the defaults of [`GIFTConfig`].
        instruct_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Instruct model, if it is not named by `args.instruct_model_name_or_path`. Needed unless every dataset
            already has a `confidences` column.
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

    _tag_names = ["trl", "gift"]
    _name = "GIFT"
    _paper = {
        "title": "GIFT: Guided Fine-Tuning and Transfer for Enhancing Instruction-Tuned Language Models",
        "id": "2605.01256",
        "citation": (
            "@inproceedings{gift2026,\n"
            "    title     = {{GIFT: Guided Fine-Tuning and Transfer for Enhancing Instruction-Tuned Language Models}},\n"
            "    booktitle = {Annual Meeting of the Association for Computational Linguistics (ACL)},\n"
            "    year      = 2026,\n"
            "    eprint    = {2605.01256},\n"
            "    archivePrefix = {arXiv},\n"
            "}"
        ),
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
        instruct_model: str | PreTrainedModel | None = None,
    ):
        check_trl_hooks()
        args = complete_config(model, args)
        check_supported(args, compute_loss_func, peft_config, processing_class, data_collator, eval_dataset)
        instruct_model = choose_instruct_model(instruct_model, args)
        self._instruct_model = instruct_model
        knows_tokenizer = instruct_model is not None or processing_class is not None

        require_confidences(train_dataset, eval_dataset, instruct_model)
        base_kwargs = {
            "revision": (args.model_init_kwargs or {}).get("revision"),
            "trust_remote_code": args.trust_remote_code,
        }
        instruct_kwargs = {"revision": args.instruct_model_revision, "trust_remote_code": args.trust_remote_code}
        if instruct_model is not None:
            check_same_architecture(model, instruct_model, model_kwargs=base_kwargs, other_kwargs=instruct_kwargs)
            if processing_class is None:
                processing_class = load_tokenizer(instruct_model, **instruct_kwargs)
            try:
                base_tokenizer = load_tokenizer(model, **base_kwargs)
            except ValueError:  # a base checkpoint without tokenizer files has nothing to compare
                base_tokenizer = None
            if base_tokenizer is not None:
                check_same_vocabulary(base_tokenizer, processing_class)
        elif processing_class is None:
            processing_class = load_tokenizer(model, **base_kwargs)

        self._confidence_source = ConfidenceSource(
            args, instruct_model, model, processing_class, formatting_func, check_tokenizer=knows_tokenizer
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
        )

        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                "Context and sequence parallelism shard a row over several processes, and GIFT's token weights are "
                "not sharded with it. Set `cp_size` and `sp_size` to 1; use ZeRO or FSDP to save memory."
            )
        if data_collator is None:
            # SFTTrainer refuses a custom collator in padding-free mode, so its own is replaced by ours afterwards
            own = self.data_collator
            self.data_collator = DataCollatorForGIFT(
                pad_token_id=own.pad_token_id,
                padding_free=own.padding_free,
                return_position_ids=own.return_position_ids,
                pad_to_multiple_of=own.pad_to_multiple_of,
            )
        # "microbatch" is a mean over the forward passes: dividing it by their number is left to the trainer
        self.loss_is_scaled_for_ga = args.weight_normalization != "microbatch"

        ids = set(end_of_turn_token_ids(self._tokenizer, instruct_model, **instruct_kwargs))
        for provenance in read_provenance(train_dataset):
            ids.update(provenance.end_of_turn_token_ids)
        self._end_of_turn_token_ids = sorted(ids)
        # Sums over target tokens since the last log, of every process: Σq, Σw, Σℓ, their number, and the number of
        # forward passes whose weights add up to nothing
        self._signal = {}
        self._confidence_source.training_starts(self.model)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: GIFTConfig,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        if "seq_lengths" in get_dataset_column_names(dataset):
            return dataset  # evaluating a dictionary of sets comes by twice, and packed rows are not packed again
        map_kwargs = {}
        if isinstance(dataset, Dataset):  # IterableDataset.map knows neither
            map_kwargs = {
                "num_proc": args.dataset_num_proc,
                "desc": f"Truncating confidences of {dataset_name} dataset",
            }
        # SFTTrainer truncates `input_ids` and `labels` only, and packing keeps only these two: the confidences are cut
        # here alike, and packed here with TRL's own `pack_dataset`
        sft_args = copy.copy(args)
        sft_args.shuffle_dataset = False
        if packing or _is_cut(dataset, args.max_length):
            sft_args.max_length = None
        elif args.max_length is not None:
            kept = token_slice(args)
            with global_then_local_main_first():
                dataset = dataset.map(lambda row: {"confidences": row["confidences"][kept]}, **map_kwargs)
        dataset = super()._prepare_dataset(dataset, processing_class, sft_args, False, None, dataset_name)
        if packing:
            dataset = dataset.select_columns(["input_ids", "labels", "confidences"])
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=args.seed)
            if map_kwargs:
                map_kwargs["desc"] = f"Packing {dataset_name} dataset"
            with global_then_local_main_first():
                dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, map_kwargs)
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        return dataset

    def _set_signature_columns_if_needed(self):
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
        self._signal.pop("eval", None)  # what a `predict` has left
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

    def _batch_weights(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if "confidences" not in inputs:
            raise ValueError(
                "The batch has no `confidences`, so there is nothing to weigh the loss with. Let the data collator "
                "keep them: use or extend `gift_trl.training.DataCollatorForGIFT`."
            )
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
            total = sum(self._batch_weights(batch).sum() for batch in batch_samples)
        else:
            total = sum((batch["labels"][:, 1:] != -100).sum() for batch in batch_samples)
        total = total.to(device, torch.float32)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            # Tensor-parallel ranks are given the same batch
            total = self.accelerator.gather(total).sum() / self.get_tp_size()
        return total

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weights = self._batch_weights(inputs)
        q = inputs["confidences"][:, 1:]
        passes = []

        def forward(**kwargs):
            outputs = model(**kwargs)
            if kwargs.get("fused_lm_head"):
                passes.append(outputs)
            return outputs

        # SFTTrainer runs the forward pass and keeps its metrics. Its loss, the plain cross-entropy, is not used.
        sft_inputs = {name: value for name, value in inputs.items() if name != "confidences"}
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

        with torch.no_grad():
            sums = [q[mask].sum(), weights.sum(), -outputs.log_probs.sum(), mask.sum(), empty]
            # Reduced without waiting for the device; read when they are logged
            sums = self.accelerator.reduce(torch.stack([s.to(torch.float32) for s in sums]))
        mode = "train" if self.model.training else "eval"
        self._signal[mode] = self._signal.get(mode, 0.0) + sums
        return (loss, result[1]) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        sums = self._signal.pop(mode, None)
        if sums is not None:
            confidence, weight, nll, tokens, empty = sums.tolist()
            if tokens > 0:
                self._metrics[mode]["nll"].append(nll / tokens)
                self._metrics[mode]["gift/confidence_mean"].append(confidence / tokens)
                self._metrics[mode]["gift/weight_mean"].append(weight / tokens)
            if empty > 0:
                logger.warning_once(
                    "At least one batch had no weight at all and taught nothing. Raise `confidence_floor`, or check "
                    "that the rows have target tokens."
                )
        super().log(logs, start_time)


def _is_cut(dataset: Dataset | IterableDataset, max_length: int | None) -> bool:
    """Whether no row is longer, as after an annotation with the same length; found without reading the tokens."""
    if not isinstance(dataset, Dataset) or max_length is None or len(dataset) == 0:
        return False
    lengths = pc.list_value_length(dataset.with_format("arrow")[:]["input_ids"])
    return pc.max(lengths).as_py() <= max_length
