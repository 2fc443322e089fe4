"""The confidences of the datasets that a trainer is given: checked if they are there, made if they are not."""

import contextlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.data_utils import get_dataset_column_names
from trl.trainer.utils import use_adapter

from gift_trl.annotation.annotator import Annotator
from gift_trl.training.checks import check_annotation
from gift_trl.training.config import GIFTConfig


if TYPE_CHECKING:
    from peft import PeftModel


class ConfidenceSource:
    """
    Gives every dataset of a trainer its `confidences` column.

    Args:
        args ([`GIFTConfig`]):
            Configuration of the trainer.
        instruct_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Instruct model.
        base_model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as given: with `args.annotator="base"` it scores the tokens.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the run.
        formatting_func (`Callable`, *optional*):
            SFTTrainer's formatting function.
        check_tokenizer (`bool`, *optional*, defaults to `True`):
            Whether annotated data must be of this very tokenizer. Without an instruct model the base model's stands in,
            and need not have the same special tokens.
    """

    def __init__(
        self,
        args: GIFTConfig,
        instruct_model: str | PreTrainedModel | None,
        base_model: "str | PreTrainedModel | PeftModel",
        processing_class: PreTrainedTokenizerBase,
        formatting_func: Callable[[dict[str, Any]], str] | None,
        *,
        check_tokenizer: bool = True,
    ):
        self._args = args
        self._instruct_model = instruct_model
        self._base_model = base_model
        self._processing_class = processing_class
        self._formatting_func = formatting_func
        self._check_tokenizer = check_tokenizer
        self._trained_model: PreTrainedModel | PeftModel | None = None

    def training_starts(self, model: "PreTrainedModel | PeftModel") -> None:
        """
        Says that the base model's weights are no longer its own.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                The model that is trained.
        """
        self._trained_model = model

    def annotate(
        self, datasets: Iterable[tuple[str, Dataset | IterableDataset | None, bool]]
    ) -> list[Dataset | IterableDataset | None]:
        """
        Annotates datasets, or checks the confidences they have.

        Args:
            datasets (`Iterable[tuple[str, Dataset | IterableDataset | None, bool]]`):
                Name in messages, dataset, and whether it will be packed.

        Returns:
            `list[Dataset | IterableDataset | None]`: The datasets with `confidences`.

        Raises:
            `ValueError`: If the confidences belong to another run, or cannot be made.
        """
        args, annotated = self._args, []
        use_base = args.annotator == "base"
        model = self._base_model if use_base else self._instruct_model
        revision = (args.model_init_kwargs or {}).get("revision") if use_base else args.instruct_model_revision
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
                    if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
                        raise ValueError(
                            f"`skip_prepare_dataset` is set, but the {name} dataset has no `confidences`. Annotate it "
                            "with `annotate_dataset` first, or let the trainer prepare it."
                        )
                    if annotator is None:
                        annotator = stack.enter_context(self._annotator(model, revision, name, stack))
                    dataset = annotator.annotate(dataset, packing=packing, dataset_name=name)
                annotated.append(dataset)
        return annotated

    def _annotator(
        self,
        model: "str | PreTrainedModel | PeftModel",
        revision: str | None,
        dataset_name: str,
        stack: contextlib.ExitStack,
    ) -> Annotator:
        args = self._args
        kwargs = {}
        if isinstance(model, str):
            own = args.model_init_kwargs if args.annotator == "base" else args.instruct_model_init_kwargs
            kwargs["model_init_kwargs"] = {"trust_remote_code": args.trust_remote_code, **(own or {})}
        elif self._trained_model is not None and model is self._base_model:
            # PEFT put its layers into the very object that was given
            model = self._trained_model
            if not is_peft_model(model):
                raise ValueError(
                    f"The {dataset_name} dataset has no `confidences`, and the model that is to give them has been "
                    "trained since. Annotate it with `annotate_dataset` before the training."
                )
        if not isinstance(model, str) and is_peft_model(model):
            # The confidences of the base model are those without the adapter that is trained on it
            stack.enter_context(use_adapter(model, None))
        return Annotator(
            model,
            self._processing_class,
            args=args,
            revision=revision,
            formatting_func=self._formatting_func,
            **args.annotation_options(),
            **kwargs,
        )
