"""Confidences of each batch as it comes, from a frozen instruct model beside the one that is trained."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gift_trl.annotation.checks import check_tokenizer
from gift_trl.annotation.engine import together
from gift_trl.annotation.head import add_scoring_head
from gift_trl.annotation.loading import check_scoring_model, load_scoring_model
from gift_trl.annotation.scoring import ModelScorer, unwrap_model
from gift_trl.training.data_collator import NOT_FOR_THE_MODEL


# What a batch holds for the loss or the trainer, and not for a forward pass that scores
_NOT_FOR_SCORING = (*NOT_FOR_THE_MODEL, "output_router_logits", "use_cache")


class OnlineConfidences:
    """
    Scores every batch with a frozen model: `q_t = p(y_t | x, y_<t)`.

    The model is loaded and placed as for an annotation ahead of training (whole on each GPU under DDP and DeepSpeed
    ZeRO-1 and -2, in parts under ZeRO-3), and in parts under FSDP too. It scores in evaluation mode, without gradients,
    and in the dtype of its checkpoint whatever the precision of the training.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Model id, checkpoint folder, or a loaded model that nothing trains.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the run, which must be that of the model.
        load_kwargs (`dict[str, Any]`):
            Keyword arguments of [`~transformers.AutoModelForCausalLM.from_pretrained`], such as `revision`.
        device (`torch.device`):
            Device of the training, for a model that is loaded already.

    Raises:
        `ValueError`: If the model is no causal language model, is sharded already, or has another vocabulary.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        load_kwargs: dict[str, Any],
        device: torch.device,
    ):
        config_kwargs = {name: load_kwargs.get(name) for name in ("revision", "trust_remote_code")}
        scoring_model: Any = model
        self._vocabulary = check_scoring_model(model, **config_kwargs).vocab_size
        self._bos_token_id = processing_class.bos_token_id
        if isinstance(model, str):
            check_tokenizer(processing_class, model, **config_kwargs)
            scoring_model, run = load_scoring_model(model, load_kwargs, shard=True)
        else:
            if not (getattr(model, "is_quantized", False) or hasattr(model, "hf_device_map")):
                scoring_model = scoring_model.to(device)
            run = None
        add_scoring_head(unwrap_model(scoring_model))
        self._scorer = ModelScorer(scoring_model.eval(), run)
        self._checked = False

    def score(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """
        Scores a batch.

        Under ZeRO-3 and FSDP every process must score as many batches as the others.

        Args:
            inputs (`Mapping[str, torch.Tensor]`):
                Batch of the data collator.

        Returns:
            `torch.Tensor` of shape `(batch, seq_len)`, float32: Confidences, aligned with the labels.

        Raises:
            `ValueError`: If the first batch shows that the confidences would be wrong: token ids beyond the model's
                vocabulary, rows that begin twice, an architecture with unknown logits, or weights that are not finite.
        """
        inputs = {name: value for name, value in inputs.items() if name not in _NOT_FOR_SCORING}
        device = inputs["labels"].device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            if self._checked:
                return self._scorer.score_collated(inputs)
            # What is wrong in one process ends all of them
            together(lambda: self._check_tokens(inputs["input_ids"]))
            together(lambda: self._scorer.check(inputs["input_ids"][0].cpu()))
            confidences = self._scorer.score_collated(inputs)
            together(lambda: _check_finite(confidences))
        self._checked = True
        return confidences

    def _check_tokens(self, input_ids: torch.Tensor) -> None:
        largest = int(input_ids.max())
        if largest >= self._vocabulary:
            raise ValueError(
                f"The first batch holds the token id {largest}, but the instruct model's vocabulary has "
                f"{self._vocabulary} rows. Use the instruct model's tokenizer."
            )
        if self._bos_token_id is not None and (input_ids[:, :2] == self._bos_token_id).all(dim=1).any():
            raise ValueError(
                "A row of the first batch begins with two beginning-of-sequence tokens: the text or chat template has "
                "one, and the tokenizer adds another. Remove it from the text."
            )


def _check_finite(confidences: torch.Tensor) -> None:
    if not torch.isfinite(confidences).all():
        raise ValueError(
            "The instruct model gives probabilities that are not finite: its weights are damaged, or too large for its "
            "dtype. Set another `dtype` in `instruct_model_init_kwargs`."
        )
