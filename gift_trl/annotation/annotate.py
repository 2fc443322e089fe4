"""`annotate_dataset`: stage 1 of GIFT."""

import os
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from gift_trl.annotation.annotator import Annotator


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
    engine: str = "transformers",
    base_url: str | None = None,
    served_model_name: str | None = None,
    concurrency: int = 16,
    tokens_per_batch: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    dataset_name: str = "train",
) -> Dataset:
    """
    Tokenises a dataset as [`~trl.SFTTrainer`] does and adds the instruct model's confidence of every target token.

    The confidence is `q_t = p_{θ_I}(y_t | x, y_<t)`, the probability that the instruct model θ_I gives to the
    reference token, from the [GIFT paper](https://huggingface.co/papers/2605.01256). It belongs to the very token ids
    that are trained on: text is never tokenised twice.

    What a named model has scored is kept in a cache, by the content of the tokens and weights: the same call returns at
    once, and one that was killed goes on where it was, to the same last bit. Under `accelerate launch` or `torchrun`,
    every process scores its share.

    Args:
        dataset ([`~datasets.Dataset`]):
            Any dataset SFTTrainer takes: language modeling or prompt-completion, standard or conversational, or
            already tokenised with `input_ids` and optionally `labels`.
        instruct_model (`str` or [`~transformers.PreTrainedModel`]):
            Model that scores the tokens: a Hub id, a checkpoint folder or a loaded model. A name is loaded in the
            checkpoint's own dtype unless `model_init_kwargs` says otherwise, and freed afterwards. A loaded model is
            scored with every time, since nothing identifies its weights.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer, with its chat template. Defaults to the one of `instruct_model`.
        args ([`~trl.SFTConfig`], *optional*):
            Training arguments: `max_length`, `truncation_mode`, `completion_only_loss`, `assistant_only_loss`,
            `dataset_text_field`, `eos_token`, `chat_template_path` and `dataset_num_proc` are read. Give the ones the
            training will use. Defaults to `SFTConfig()`.
        revision (`str`, *optional*):
            Revision of the instruct model on the Hub.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of [`~transformers.AutoModelForCausalLM.from_pretrained`]. `device_map="auto"`, the
            default of a single process with GPUs, spreads a model that is too large for one of them.
        formatting_func (`Callable`, *optional*):
            SFTTrainer's formatting function.
        packing (`bool`, *optional*):
            Whether the rows will be packed. Rows to be packed are scored whole, and packing cuts them afterwards, so
            that every q is the one of the full context. Defaults to `args.packing`.
        engine (`str`, *optional*, defaults to `"transformers"`):
            `"transformers"` scores in this process. `"vllm"` asks the vLLM server at `base_url`, which must serve
            `instruct_model`.
        base_url (`str`, *optional*):
            Address of the server's OpenAI-compatible interface, such as `http://localhost:8000/v1`.
        served_model_name (`str`, *optional*):
            Name of the instruct model at the server. Needed only if it serves several.
        concurrency (`int`, *optional*, defaults to `16`):
            Number of requests a process keeps in flight at the server.
        tokens_per_batch (`int`, *optional*):
            Upper bound of the padded number of tokens in one forward pass. Defaults to what fits into half of the free
            memory of the GPU, and to 1024 on a CPU. It moves the confidences by rounding only.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Folder of the cache. Defaults to `gift_trl/annotations` in the Hugging Face home (`HF_HOME`).
        dataset_name (`str`, *optional*, defaults to `"train"`):
            Name of the dataset in messages and progress bars.

    Returns:
        [`~datasets.Dataset`]: The rows, in order and with their columns, plus `input_ids`, `labels`, `confidences` and
        `original_index`. `confidences` is a list of float32 as long as `input_ids`, whose entry `i` is the probability
        of token `i` given the tokens before it, and 0.0 where the label is `-100` and at position 0. `original_index` is
        the row's index in `dataset`; a dataset that has such a column keeps its own. Rows without a target token are
        left out and listed by reason in the provenance, see [`read_provenance`].

    Raises:
        `ValueError`: If the data or the model cannot be scored; the message says which row and what to do.
        `FileNotFoundError`: If the model is not found.
        `OSError`: If the confidences find no room on the disk, or the server does not answer.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from gift_trl import annotate_dataset

    >>> dataset = load_dataset("trl-lib/Capybara", split="train")
    >>> annotated = annotate_dataset(dataset, "Qwen/Qwen2.5-7B-Instruct")
    ```
    """
    with Annotator(
        instruct_model,
        processing_class,
        args=args,
        revision=revision,
        model_init_kwargs=model_init_kwargs,
        formatting_func=formatting_func,
        engine=engine,
        base_url=base_url,
        served_model_name=served_model_name,
        concurrency=concurrency,
        tokens_per_batch=tokens_per_batch,
        cache_dir=cache_dir,
    ) as annotator:
        return annotator.annotate(dataset, packing=packing, dataset_name=dataset_name)
