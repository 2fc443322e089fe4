"""The confidences of a trainer's data: checked if they are there, made if they are not, before or during training."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.data_utils import get_dataset_column_names
from trl.trainer.utils import use_adapter

from gift_trl.annotation.annotator import Annotator
from gift_trl.annotation.scoring import unwrap_model
from gift_trl.training.checks import check_annotation
from gift_trl.training.config import GIFTConfig
from gift_trl.training.online import OnlineConfidences


if TYPE_CHECKING:
    from peft import PeftModel


def share_weights(model: Any, other: Any) -> bool:
    """
    Whether two models are one object under the adapters they may be wrapped with.

    Args:
        model, other (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            Models as they are given. One that is named is loaded once more.

    Returns:
        `bool`: Whether what trains one changes the other.
    """
    if model is None or isinstance(model, str) or isinstance(other, str):
        return False
    return unwrap_model(model) is unwrap_model(other)


class ConfidenceSource:
    """
    Gives every dataset of a trainer its `confidences` column, or with `args.confidence_source="online"` every batch.

    Args:
        args ([`GIFTConfig`]):
            Configuration of the trainer.
        instruct_model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            Instruct model. One with an adapter scores with it, unless it is the model to be trained.
        base_model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as given: with `args.annotator="base"` it scores the tokens.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the run.
        formatting_func (`Callable`, *optional*):
            SFTTrainer's formatting function.
        check_tokenizer (`bool`, *optional*, defaults to `True`):
            Whether annotated data must be of this very tokenizer. Without an instruct model the base model's stands in,
            and need not have the same special tokens.
        train_columns (`Sequence[str]`, *optional*):
            Columns of the training data as given, which decide for the evaluation sets too whether only completions are
            targets, as in SFTTrainer.
    """

    def __init__(
        self,
        args: GIFTConfig,
        instruct_model: "str | PreTrainedModel | PeftModel | None",
        base_model: "str | PreTrainedModel | PeftModel",
        processing_class: PreTrainedTokenizerBase,
        formatting_func: Callable[[dict[str, Any]], str] | None,
        *,
        check_tokenizer: bool = True,
        train_columns: Sequence[str] = (),
    ):
        self._args = copy.copy(args)
        if args.completion_only_loss is None and train_columns:
            self._args.completion_only_loss = {"prompt", "completion"} <= set(train_columns)
        self._instruct_model = instruct_model
        self._base_model = base_model
        self._processing_class = processing_class
        self._formatting_func = formatting_func
        self._check_tokenizer = check_tokenizer
        self._trained_model: PreTrainedModel | PeftModel | None = None
        self._online: OnlineConfidences | None = None
        scoring_model, _ = self._scoring_model()
        if not share_weights(scoring_model, base_model):
            return
        if is_peft_model(scoring_model) and scoring_model is not base_model:
            raise ValueError(
                "The instruct model is given with an adapter, and shares its weights with the model to be trained, so that "
                "the adapter would change both. Load one of the two once more, or give its name."
            )
        if self.is_online:
            raise ValueError(
                "With `confidence_source='online'` the model that scores must stay as it is, and the one given is to be "
                "trained. Give its name, so that it is loaded once more, or set `confidence_source` to 'offline'."
            )

    @property
    def is_online(self) -> bool:
        """Whether each batch is scored as it comes."""
        return self._args.confidence_source == "online"

    def training_starts(self, model: "PreTrainedModel | PeftModel", device: torch.device) -> None:
        """
        Says that the base model's weights are no longer its own, and loads the model that scores each batch, if any.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                The model that is trained.
            device (`torch.device`):
                Device of this process.
        """
        self._trained_model = model
        if not self.is_online:
            return
        scoring_model, revision = self._scoring_model()
        load_kwargs = {"revision": revision, **self._load_kwargs()}
        self._online = OnlineConfidences(scoring_model, self._processing_class, load_kwargs, device)

    def score(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """
        Confidences of a batch, with `args.confidence_source="online"`.

        Args:
            inputs (`Mapping[str, torch.Tensor]`):
                Batch of the data collator.

        Returns:
            `torch.Tensor` of shape `(batch, seq_len)`, float32: Confidences, aligned with the labels.
        """
        if self._online is None:
            raise RuntimeError(
                "No model scores batches before `training_starts`, or with `confidence_source='offline'`."
            )
        return self._online.score(inputs)

    def _scoring_model(self) -> tuple[Any, str | None]:
        if self._args.annotator == "base":
            init_kwargs: Any = self._args.model_init_kwargs or {}
            return self._base_model, init_kwargs.get("revision")
        return self._instruct_model, self._args.instruct_model_revision

    def _load_kwargs(self) -> dict[str, Any]:
        args = self._args
        own: Any = args.model_init_kwargs if args.annotator == "base" else args.instruct_model_init_kwargs
        return {"trust_remote_code": args.trust_remote_code, **(own or {})}

    def annotate(
        self, datasets: Iterable[tuple[str, Dataset | IterableDataset | None, bool]]
    ) -> list[Dataset | IterableDataset | None]:
        """
        Annotates datasets, or checks the confidences they have. Leaves them alone where each batch is scored.

        Args:
            datasets (`Iterable[tuple[str, Dataset | IterableDataset | None, bool]]`):
                Name in messages, dataset, and whether it will be packed.

        Returns:
            `list[Dataset | IterableDataset | None]`: The datasets with `confidences`.

        Raises:
            `ValueError`: If the confidences belong to another run, or cannot be made.
        """
        if self.is_online:
            return [self._check_unannotated(name, dataset) for name, dataset, _ in datasets]
        args, annotated = self._args, []
        model, revision = self._scoring_model()
        with contextlib.ExitStack() as stack:
            annotator = None
            for name, dataset, packing in datasets:
                if dataset is not None and "confidences" in get_dataset_column_names(dataset):
                    check_annotation(
                        dataset,
                        self._processing_class if self._check_tokenizer else None,
                        args,
                        None if self._instruct_model is None else model,
                        revision,
                        name,
                    )
                elif dataset is not None:
                    dataset_kwargs: Any = args.dataset_kwargs or {}
                    if dataset_kwargs.get("skip_prepare_dataset"):
                        raise ValueError(
                            f"`skip_prepare_dataset` is set, but the {name} dataset has no `confidences`. Annotate it "
                            "with `annotate_dataset` first, or let the trainer prepare it."
                        )
                    if annotator is None:
                        annotator = stack.enter_context(self._annotator(model, revision, name, stack))
                    dataset = annotator.annotate(dataset, packing=packing, dataset_name=name)
                annotated.append(dataset)
        return annotated

    @staticmethod
    def _check_unannotated(name: str, dataset: Dataset | IterableDataset | None) -> Dataset | IterableDataset | None:
        if dataset is not None and "confidences" in get_dataset_column_names(dataset):
            raise ValueError(
                f"The {name} dataset has `confidences`, and `confidence_source` is 'online', which would score every batch "
                "again. Set it to 'offline', or remove the column."
            )
        return dataset

    def _annotator(
        self,
        model: Any,
        revision: str | None,
        dataset_name: str,
        stack: contextlib.ExitStack,
    ) -> Annotator:
        args = self._args
        init_kwargs = None
        if isinstance(model, str):
            init_kwargs = self._load_kwargs()
        elif share_weights(model, self._base_model):
            # PEFT puts its layers into the very object that was given
            model = self._base_model if self._trained_model is None else self._trained_model
            if is_peft_model(model):
                # The confidences of the trained model are those without the adapter that is trained on it
                stack.enter_context(use_adapter(model, None))
            elif self._trained_model is not None:
                raise ValueError(
                    f"The {dataset_name} dataset has no `confidences`, and the model that is to give them has been "
                    "trained since. Annotate it with `annotate_dataset` before the training."
                )
            # Not through the adapter's forward pass, which accelerate wraps in the autocast of the training
            model = unwrap_model(model)
        return Annotator(
            model,
            self._processing_class,
            args=args,
            revision=revision,
            model_init_kwargs=init_kwargs,
            formatting_func=self._formatting_func,
            **args.annotation_options(),
        )
