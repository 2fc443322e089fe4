"""Configuration of the GIFT trainer."""

import math
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from gift_trl.annotation.annotator import ENGINES


WEIGHT_NORMALIZATIONS = ("weights", "tokens", "microbatch")
ANNOTATORS = ("instruct", "base")
CONFIDENCE_SOURCES = ("offline", "online")


@dataclass
class GIFTConfig(SFTConfig):
    r"""
    Configuration class for the [`GIFTSFTTrainer`].

    This class includes only the parameters that are specific to GIFT, Guided Fine-Tuning and Transfer
    ([paper](https://huggingface.co/papers/2605.01256)). Every parameter of [`~trl.SFTConfig`] is inherited.

    The loss of a target token is its cross-entropy ℓ times the weight `w = max(q, confidence_floor) **
    confidence_exponent`, where q is the probability the instruct model gives to the token. Baselines of the paper are
    settings: `confidence_exponent=0` is Shadow-FT, `annotator="base"` is GIFT-BaseT, and `confidence_exponent=0` with
    the instruct model as the model to train is Instruct-SFT.

    Parameters:
        > Parameters that control the instruct model

        instruct_model_name_or_path (`str`, *optional*):
            Hub id or folder of the instruct model: it scores the target tokens, its tokenizer and chat template are
            used for both models, and the adapter is to be merged into it. Not needed for a dataset that already has
            a `confidences` column.
        instruct_model_revision (`str`, *optional*):
            Revision of the instruct model on the Hub (branch name, tag or commit hash).
        instruct_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`] when the instruct model is
            loaded from a name. Without a `dtype`, it is loaded in the dtype of its checkpoint.
        annotator (`str`, *optional*, defaults to `"instruct"`):
            Which model scores the target tokens: `"instruct"`, or `"base"`, the model to be trained before training
            (GIFT-BaseT in the paper). Tokenizer and chat template are the instruct model's in both cases.
        borrow_instruct_token_rows (`bool`, *optional*, defaults to `False`):
            Whether tokens of the chat format whose rows in the base model's embedding and head look untrained (a warning
            names them) get the instruct model's rows for the training. They are held frozen, and are no part of the
            adapter: the merge is not affected, as the instruct model has them.

        > Parameters that control the annotation

        confidence_source (`str`, *optional*, defaults to `"offline"`):
            When the tokens are scored. `"offline"`: before the training, once, after which the instruct model is freed.
            `"online"`: each batch as it comes, with the instruct model frozen beside the one that is trained, which
            takes its memory and one of its forward passes for every step; for streams and for data that differ in
            every epoch. Both give the same loss on the same data.

        annotation_engine (`str`, *optional*, defaults to `"transformers"`):
            What scores the target tokens: `"transformers"`, in the processes of the run, or `"vllm"`, a running vLLM
            server that serves the instruct model.
        annotation_base_url (`str`, *optional*):
            Address of that server's OpenAI-compatible interface, such as `http://localhost:8000/v1`.
        annotation_served_model_name (`str`, *optional*):
            Name of the instruct model at that server. Needed only if it serves several.
        annotation_concurrency (`int`, *optional*, defaults to `16`):
            Number of requests that a process keeps in flight at the server.
        annotation_tokens_per_batch (`int`, *optional*):
            Upper bound of the padded number of tokens in one forward pass of the instruct model. Defaults to what fits
            into half of the free memory of the GPU, and to 1024 on a CPU.
        annotation_cache_dir (`str`, *optional*):
            Folder in which confidences are kept, so that no token is scored twice. Defaults to `gift_trl/annotations`
            in the Hugging Face home (`HF_HOME`).

        > Parameters that control the token weights

        confidence_exponent (`float`, *optional*, defaults to `1.0`):
            Exponent of the confidence. `1.0` is the paper's method, `0.0` gives every token the weight 1.
        confidence_floor (`float`, *optional*, defaults to `1e-4`):
            Smallest confidence before the exponent is applied, between 0 and 1.
        eos_confidence (`float` or `None`, *optional*, defaults to `1.0`):
            Confidence of the tokens that end a turn, in place of the annotated one: the instruct model often ends its
            own answers elsewhere, and an adapter that never learns to stop is of no use. `None` keeps the annotated
            confidence.
        weight_normalization (`str`, *optional*, defaults to `"weights"`):
            What the sum Σ w·ℓ of an optimizer step is divided by:

            - `"weights"`: Σ w over the whole optimizer step, that is over gradient accumulation steps and processes.
              The gradient does not depend on how the batch is cut.
            - `"tokens"`: the number of target tokens of the whole optimizer step, as SFTTrainer does: the paper's
              equation up to a constant. Exact however the batch is cut, too.
            - `"microbatch"`: Σ w of each forward pass, averaged over accumulation steps and processes, as in the
              paper's released code (which does not divide by the accumulation steps). The gradient depends on how the
              batch is cut.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "instruct_model_init_kwargs"]

    # Parameters that control the instruct model
    instruct_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of the instruct model: it scores the target tokens, its tokenizer and chat "
            "template are used for both models, and the adapter is to be merged into it."
        },
    )
    instruct_model_revision: str | None = field(
        default=None,
        metadata={"help": "Revision of the instruct model on the Hub (branch name, tag or commit hash)."},
    )
    instruct_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `AutoModelForCausalLM.from_pretrained` when the instruct model is loaded "
            "from a name. Without a `dtype`, it is loaded in the dtype of its checkpoint."
        },
    )
    annotator: str = field(
        default="instruct",
        metadata={
            "help": "Which model scores the target tokens: 'instruct', or 'base', the model to be trained before "
            "training (GIFT-BaseT in the paper).",
            "choices": ANNOTATORS,
        },
    )

    borrow_instruct_token_rows: bool = field(
        default=False,
        metadata={
            "help": "Whether tokens of the chat format whose rows in the base model's embedding and head look untrained "
            "get the instruct model's rows for the training, held frozen. The merge is not affected."
        },
    )

    # Parameters that control the annotation
    confidence_source: str = field(
        default="offline",
        metadata={
            "help": "When the tokens are scored: 'offline', once before the training, or 'online', each batch as it "
            "comes, with the instruct model frozen beside the one that is trained (for streams and augmented data).",
            "choices": CONFIDENCE_SOURCES,
        },
    )
    annotation_engine: str = field(
        default="transformers",
        metadata={
            "help": "What scores the target tokens: 'transformers', in the processes of the run, or 'vllm', a running "
            "vLLM server that serves the instruct model.",
            "choices": ENGINES,
            "aliases": ["--engine"],
        },
    )
    annotation_base_url: str | None = field(
        default=None,
        metadata={
            "help": "Address of the vLLM server's OpenAI-compatible interface, such as http://localhost:8000/v1.",
            "aliases": ["--base_url"],
        },
    )
    annotation_served_model_name: str | None = field(
        default=None,
        metadata={"help": "Name of the instruct model at that server. Needed only if it serves several."},
    )
    annotation_concurrency: int = field(
        default=16, metadata={"help": "Number of requests that a process keeps in flight at the server."}
    )
    annotation_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Upper bound of the padded number of tokens in one forward pass of the instruct model. Defaults to "
            "what fits into half of the free memory of the GPU, and to 1024 on a CPU."
        },
    )
    annotation_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which confidences are kept, so that no token is scored twice. Defaults to "
            "gift_trl/annotations in HF_HOME."
        },
    )

    # Parameters that control the token weights
    confidence_exponent: float = field(
        default=1.0,
        metadata={"help": "Exponent of the confidence. 1 is the paper's method, 0 gives every token the weight 1."},
    )
    confidence_floor: float = field(
        default=1e-4,
        metadata={"help": "Smallest confidence before the exponent is applied, between 0 and 1."},
    )
    eos_confidence: float | None = field(
        default=1.0,
        metadata={
            "help": "Confidence of the tokens that end a turn, in place of the annotated one. None keeps the "
            "annotated confidence."
        },
    )
    weight_normalization: str = field(
        default="weights",
        metadata={
            "help": "What the sum of weighted losses of an optimizer step is divided by: 'weights' (the sum of the "
            "weights of the whole optimizer step), 'tokens' (its number of target tokens: the paper's equation up to "
            "a constant) or 'microbatch' (the sum of the weights of each forward pass, as in the paper's released "
            "code).",
            "choices": WEIGHT_NORMALIZATIONS,
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("confidence_exponent", "confidence_floor", "eos_confidence"):
            value = getattr(self, name)
            optional = name == "eos_confidence"
            if isinstance(value, bool) or not isinstance(value, (int, float, *([type(None)] if optional else []))):
                raise ValueError(
                    f"`{name}` is {value!r}; it must be a number"
                    + (", or `null` (None) to keep the annotated confidence." if optional else ".")
                )
        if self.gradient_accumulation_steps < 1:
            raise ValueError(
                f"`gradient_accumulation_steps` is {self.gradient_accumulation_steps}; it must be at least 1."
            )
        if "revision" in (self.instruct_model_init_kwargs or {}):
            raise ValueError("Name the revision in `instruct_model_revision`, not in `instruct_model_init_kwargs`.")
        if not (math.isfinite(self.confidence_exponent) and self.confidence_exponent >= 0):
            raise ValueError(
                f"`confidence_exponent` is {self.confidence_exponent}; it must be a finite number of at least 0 (1 is "
                "the paper's method, 0 plain cross-entropy)."
            )
        if not 0 <= self.confidence_floor <= 1:
            raise ValueError(
                f"`confidence_floor` is {self.confidence_floor}; it is a probability and must lie between 0 and 1."
            )
        if self.eos_confidence is not None and not 0 <= self.eos_confidence <= 1:
            raise ValueError(
                f"`eos_confidence` is {self.eos_confidence}; it is a probability and must lie between 0 and 1, or be "
                "None to keep the annotated confidence."
            )
        if self.weight_normalization not in WEIGHT_NORMALIZATIONS:
            raise ValueError(
                f"`weight_normalization` is {self.weight_normalization!r}; choose one of {WEIGHT_NORMALIZATIONS}."
            )
        if self.annotation_engine not in ENGINES:
            raise ValueError(f"`annotation_engine` is {self.annotation_engine!r}; choose one of {ENGINES}.")
        if self.annotation_base_url is not None and self.annotation_engine == "transformers":
            raise ValueError(
                "`annotation_base_url` is the address of a server, which the engine 'transformers' does not ask. Set "
                "`annotation_engine: vllm`, or remove the address."
            )
        for name in ("annotation_concurrency", "annotation_tokens_per_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1.")
        if self.annotator not in ANNOTATORS:
            raise ValueError(f"`annotator` is {self.annotator!r}; choose one of {ANNOTATORS}.")
        if self.confidence_source not in CONFIDENCE_SOURCES:
            raise ValueError(f"`confidence_source` is {self.confidence_source!r}; choose one of {CONFIDENCE_SOURCES}.")
        if self.confidence_source == "online" and self.annotation_engine != "transformers":
            raise ValueError(
                f"`confidence_source='online'` scores in the processes of the run, and `annotation_engine` is "
                f"'{self.annotation_engine}'. Set `confidence_source: offline`, or leave the engine at 'transformers'."
            )
        if (
            self.confidence_source == "online"
            and (self.packing or self.eval_packing)
            and self.packing_strategy != "bfd"
        ):
            raise ValueError(
                f"`packing_strategy='{self.packing_strategy}'` splits rows, and with `confidence_source='online'` the "
                "second part would be scored without the first. Set `packing_strategy: bfd`, or `confidence_source: "
                "offline`, which scores rows before they are split."
            )

    def annotation_options(self) -> dict[str, Any]:
        """The parameters that control the annotation, as keyword arguments of [`annotate_dataset`]."""
        return {
            "engine": self.annotation_engine,
            "base_url": self.annotation_base_url,
            "served_model_name": self.annotation_served_model_name,
            "concurrency": self.annotation_concurrency,
            "tokens_per_batch": self.annotation_tokens_per_batch,
            "cache_dir": self.annotation_cache_dir,
        }
