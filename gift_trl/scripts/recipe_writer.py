"""Writes recipes: the same sections, with the paper's settings, for any pair of models and any data."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from gift_trl.planning.memory import needed_memory


GLOBAL_BATCH = 256
MAX_LENGTH = 2048
LORA_RANK = 64
# GiB of the memory of GPUs that are sold
CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180)


class Setting(NamedTuple):
    """A line of a recipe."""

    key: str
    value: Any
    comment: str | None = None


@dataclass(frozen=True)
class RecipeChoices:
    """
    What differs from recipe to recipe.

    Args:
        base, instruct (`str`):
            Hub ids or folders of the two models.
        data (`Sequence[Setting]`):
            Lines that name the data and map its columns.
        target_modules (`Sequence[str]`):
            Last parts of the names of the modules that are adapted.
        rows (`int`):
            Rows of a forward pass.
        output_dir (`str`):
            Folder in which the adapter's and the merged model's folders go.
        base_revision, instruct_revision (`str`, *optional*):
            Revisions on the Hub.
        chat_template_kwargs (`Mapping[str, Any]`):
            Variables of the chat template.
        max_length (`int`, *optional*, defaults to `2048`):
            Tokens of a row, at most.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether the base model is quantised (QLoRA).
        quantise_instruct (`bool`, *optional*, defaults to `False`):
            Whether the instruct model is, too, while it scores the data.
        comments (`Mapping[str, str]`):
            Remarks beside settings, by key.
    """

    base: str
    instruct: str
    data: Sequence[Setting]
    target_modules: Sequence[str]
    rows: int
    output_dir: str
    base_revision: str | None = None
    instruct_revision: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_length: int = MAX_LENGTH
    load_in_4bit: bool = False
    quantise_instruct: bool = False
    comments: Mapping[str, str] = field(default_factory=dict)


def write_recipe(header: Sequence[str], choices: RecipeChoices) -> str:
    """
    Writes a recipe.

    Args:
        header (`Sequence[str]`):
            Lines of its head.
        choices ([`RecipeChoices`]):
            What it says.

    Returns:
        `str`: YAML that `gift-trl train` runs.
    """
    lines = [f"# {line}".rstrip() for line in header]
    for title, settings in _sections(choices).items():
        lines += ["", f"# {title}"]
        for key, value, comment in settings:
            comment = choices.comments.get(key, comment)
            text = f"{key}: {_yaml(value)}".replace(": \n", ":\n", 1)
            lines.append(text if comment is None else f"{text:<31} # {comment}")
    return "\n".join(lines) + "\n"


def _sections(choices: RecipeChoices) -> dict[str, list[Setting]]:
    models = [Setting("model_name_or_path", choices.base)]
    models += [Setting("model_revision", choices.base_revision)] * bool(choices.base_revision)
    models += [Setting("instruct_model_name_or_path", choices.instruct)]
    models += [Setting("instruct_model_revision", choices.instruct_revision)] * bool(choices.instruct_revision)
    models += [Setting("dtype", "bfloat16")]
    if choices.load_in_4bit:
        models += [
            Setting("load_in_4bit", True, "the base model in training; the adapter is merged into bf16 weights"),
            Setting("bnb_4bit_quant_type", "nf4"),
            Setting("use_bnb_nested_quant", True),
        ]
    if choices.quantise_instruct:
        quantisation = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
        models += [Setting("instruct_model_init_kwargs", {"quantization_config": quantisation})]
    data = [*choices.data]
    if choices.chat_template_kwargs:
        data += [Setting("chat_template_kwargs", dict(choices.chat_template_kwargs))]
    data += [Setting("max_length", choices.max_length)]
    return {
        "Model": models,
        "Data": data,
        "GIFT": [
            Setting("confidence_exponent", 1.0, "0: Shadow-FT"),
            Setting("annotator", "instruct", "base: GIFT-BaseT"),
            Setting("eos_confidence", 1.0, "null: what the instruct model gives to the end of a turn"),
            Setting("weight_normalization", "weights", "tokens: the paper's sum, up to a constant"),
            *[Setting("borrow_instruct_token_rows", False)] * ("borrow_instruct_token_rows" in choices.comments),
        ],
        "LoRA": [
            Setting("use_peft", True),
            Setting("lora_r", LORA_RANK),
            Setting("lora_alpha", 2 * LORA_RANK),
            Setting("lora_dropout", 0.05),
            Setting("lora_target_modules", list(choices.target_modules)),
        ],
        "Trainer": [
            Setting("output_dir", f"{choices.output_dir}/gift/adapter"),
            Setting("optim", "adamw_torch"),
            Setting("learning_rate", 2.0e-4),
            Setting("lr_scheduler_type", "linear"),
            Setting("warmup_steps", 0.1, "share of the steps"),
            Setting("num_train_epochs", 1),
            Setting("global_batch_size", GLOBAL_BATCH, "sets gradient_accumulation_steps"),
            Setting("per_device_train_batch_size", choices.rows),
            Setting("bf16", True),
            Setting("logging_steps", 1),
            Setting("save_strategy", "no", '"steps" to be able to resume'),
            Setting("report_to", "none"),
            Setting("seed", 42),
        ],
        "Merge": [
            Setting("merge_output_dir", f"{choices.output_dir}/gift/merged"),
            Setting("merge_scale", 1.0),
        ],
    }


def _yaml(value: Any) -> str:
    if isinstance(value, str) and "\n" in value.strip("\n"):
        return "|-\n" + "\n".join(f"  {line}".rstrip() for line in value.split("\n"))
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=math.inf)
        return "\n" + "\n".join(f"  {line}" for line in text.splitlines())
    if isinstance(value, float):
        return f"{value:.1e}".replace("e-0", "e-") if 0 < value < 0.01 else str(value)
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
    return text.strip().removesuffix("...").strip()


def accumulation_steps(processes: int, rows: int) -> int:
    """
    Accumulation steps that make the global batch.

    Args:
        processes (`int`):
            Number of GPUs.
        rows (`int`):
            Rows of a forward pass on each.

    Returns:
        `int`: The number of steps.

    Raises:
        `ValueError`: If no whole number does.
    """
    if GLOBAL_BATCH % (processes * rows):
        raise ValueError(f"{processes} GPUs × {rows} rows do not divide a global batch of {GLOBAL_BATCH} rows.")
    return GLOBAL_BATCH // (processes * rows)


def gibibytes(size: float) -> str:
    """
    Bytes as text.

    Args:
        size (`float`):
            Number of bytes.

    Returns:
        `str`: GiB with one decimal.
    """
    return f"{size / 2**30:.1f} GiB"


def smallest_card(size: float) -> int | None:
    """
    The smallest GPU that is sold on which an estimate leaves room.

    Args:
        size (`float`):
            Bytes that are estimated.

    Returns:
        `int` or `None`: GiB of its memory; `None` if none is large enough.
    """
    return next((card for card in CARDS if needed_memory(size) <= card), None)
