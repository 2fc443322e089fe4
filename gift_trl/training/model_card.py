"""The model card of an adapter trained with GIFT."""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig
from transformers import is_wandb_available
from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url

from gift_trl.annotation.provenance import Provenance, library_versions
from gift_trl.training.config import GIFTConfig


logger = get_logger(__name__)

PAPER = "https://huggingface.co/papers/2605.01256"
GIFT_CITATION = """@inproceedings{gift2026,
    title         = {{GIFT: Guided Fine-Tuning and Transfer for Enhancing Instruction-Tuned Language Models}},
    booktitle     = {Annual Meeting of the Association for Computational Linguistics (ACL)},
    year          = 2026,
    eprint        = {2605.01256},
    archivePrefix = {arXiv},
}"""
_TRL_CITATION = """@software{trl,
    title = {{TRL: Transformers Reinforcement Learning}},
    url   = {https://github.com/huggingface/trl},
}"""
# Ends a card that nobody has changed since
_MARK = "<!-- written by gift_trl: {} -->"


@dataclass
class AdapterFacts:
    """
    What the card of an adapter says.

    Args:
        name (`str`):
            Name of the adapter.
        hub_id (`str` or `None`):
            Its id on the Hub.
        base_model (`str`):
            Model the adapter was trained on: Hub id or folder.
        instruct_model (`str` or `None`):
            Model to merge it into: Hub id or folder.
        dataset (`str` or `None`):
            Training data: Hub id or path.
        peft_type (`str` or `None`):
            Type of the adapter; `None` if a whole model was trained.
        tags (`list[str]`):
            Tags.
        settings (`dict[str, Any]`):
            Settings of GIFT and of the training by name.
        links (`dict[str, str]`):
            Addresses of the logged run by name.
    """

    name: str
    base_model: str
    instruct_model: str | None
    hub_id: str | None = None
    dataset: str | None = None
    peft_type: str | None = "LORA"
    tags: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)


def training_settings(
    args: GIFTConfig,
    num_processes: int,
    peft_config: PeftConfig | None,
    provenances: Sequence[Provenance],
    borrowed_tokens: Sequence[str],
) -> dict[str, Any]:
    """
    What a card says of a training.

    Args:
        args ([`GIFTConfig`]):
            Configuration of the trainer.
        num_processes (`int`):
            Number of processes.
        peft_config ([`~peft.PeftConfig`] or `None`):
            Configuration of the adapter.
        provenances (`Sequence[Provenance]`):
            Where the confidences of the training data come from.
        borrowed_tokens (`Sequence[str]`):
            Tokens trained with the instruct model's rows.

    Returns:
        `dict[str, Any]`: Settings by name.
    """
    settings = {
        name: getattr(args, name)
        for name in (
            *("annotator", "confidence_source", "confidence_exponent", "confidence_floor", "eos_confidence"),
            "weight_normalization",
        )
    }
    if borrowed_tokens:
        settings["instruct model's embedding rows"] = ", ".join(borrowed_tokens)
    for provenance in provenances:
        commit = "" if provenance.commit is None else f" at {provenance.commit}"
        settings["confidences"] = f"{provenance.rows} rows by {provenance.model}{commit}, {provenance.dtype}"
    cut = (args.per_device_train_batch_size, args.gradient_accumulation_steps, num_processes)
    plain = args.to_dict()  # names in place of enumerations
    settings["length"] = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    settings["rows per step"] = (
        f"{math.prod(cut)} = {' × '.join(map(str, cut))} (per device × accumulation steps × processes)"
    )
    settings["optimizer"] = (
        f"{plain['optim']}, learning rate {args.learning_rate:g}, {plain['lr_scheduler_type']} schedule"
    )
    settings["max_length"] = args.max_length
    settings["packing"] = args.packing_strategy if args.packing else "no"
    settings["seed"] = args.seed
    if peft_config is not None:
        settings["adapter"] = peft_config.peft_type.value
        described = peft_config.to_dict()
        for name in ("r", "lora_alpha", "lora_dropout"):
            if described.get(name) is not None:
                settings[name] = described[name]
        targets = described.get("target_modules")
        if targets is not None:
            names = [targets] if isinstance(targets, str) else sorted({name.rpartition(".")[2] for name in targets})
            settings["target_modules"] = ", ".join(names)
    return settings


def run_links() -> dict[str, str]:
    """
    Addresses of the current run at the services that log it.

    Returns:
        `dict[str, str]`: Addresses by the name of the service.
    """
    links = {"Trackio": get_trackio_space_url(), "Comet": get_comet_experiment_url()}
    if is_wandb_available():
        import wandb

        links["Weights & Biases"] = wandb.run.url if wandb.run is not None else None
    return {name: url for name, url in links.items() if url is not None}


def make_adapter_card(facts: AdapterFacts) -> ModelCard:
    """
    Writes the card of an adapter. Folders are named by their last part only.

    Args:
        facts ([`AdapterFacts`]):
            What it says.

    Returns:
        [`~huggingface_hub.ModelCard`]: The card.
    """
    is_adapter = facts.peft_type is not None
    base = facts.base_model if is_hub_id(facts.base_model) else None
    data = ModelCardData(
        model_name=facts.name,
        base_model=base,
        base_model_relation="adapter" if base is not None and is_adapter else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        datasets=facts.dataset if facts.dataset is not None and is_hub_id(facts.dataset) else None,
        tags=sorted({*facts.tags, *(["lora"] if facts.peft_type == "LORA" else [])}),
    )
    kind = "An adapter" if is_adapter else "A model"
    instruct = _link(facts.instruct_model) if facts.instruct_model is not None else "the instruct model"
    data_text = f" on {_link(facts.dataset, 'datasets/')}" if facts.dataset is not None else ""
    merge_into = _shown(facts.instruct_model) if facts.instruct_model is not None else "INSTRUCT_MODEL"
    sections = [
        f"# {facts.name}",
        f"{kind} trained{data_text} on the base model {_link(facts.base_model)} with GIFT ([Guided Fine-Tuning and "
        f"Transfer]({PAPER})): the cross-entropy of every token is weighted by the probability that {instruct} gives to it."
        + (f" It is to be merged into {instruct}, and is of little use on the base model." if is_adapter else ""),
    ]
    if is_adapter:
        sections.append(
            "## Use\n\nMerge it with gift_trl, then load the merged model as "
            "any other:\n\n```python\nfrom gift_trl import merge_adapter\nfrom transformers import pipeline\n\n"
            f'merge_adapter("{facts.hub_id or facts.name}", "{merge_into}", "merged")\n'
            'generator = pipeline("text-generation", model="merged")\n```'
        )
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.settings.items())
    sections.append(f"## Training\n\n| setting | value |\n|---|---|\n{rows}")
    if facts.links:
        sections.append("Run: " + ", ".join(f"[{name}]({url})" for name, url in facts.links.items()))
    versions = "\n".join(f"- {name} {version}" for name, version in library_versions().items())
    sections.append(f"### Framework versions\n\n{versions}")
    sections.append(f"## Citation\n\n```bibtex\n{GIFT_CITATION}\n```\n\n```bibtex\n{_TRL_CITATION}\n```")
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections)
    return ModelCard(f"{text}\n\n{_MARK.format(_digest(text))}\n")


def write_card(path: Path, make: Callable[[], ModelCard], *, replace: bool | None = None) -> None:
    """
    Writes a card, unless there is one that a person has written. A card is never a reason to lose a training.

    Args:
        path (`Path`):
            File.
        make (`Callable`):
            Makes the card.
        replace (`bool`, *optional*):
            Whether to write it in any case. Defaults to what [`may_be_replaced`] says.
    """
    if not (may_be_replaced(path) if replace is None else replace):
        logger.warning_once(
            f"`{path.name}` in `{path.parent}` was written or changed by a person, and is left as it is."
        )
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        make().save(path)
    except Exception as error:
        logger.warning(f"The model card was not written to `{path}`: {type(error).__name__}: {error}")


def may_be_replaced(path: str | os.PathLike[str]) -> bool:
    """
    Whether a card says nothing that a person wrote.

    Args:
        path (`str` or `os.PathLike`):
            File.

    Returns:
        `bool`: Whether there is none, or one that [`make_adapter_card`] has made and nobody has changed.
    """
    if not os.path.exists(path):
        return True
    with open(path, encoding="utf-8", errors="replace") as file:
        text, _, mark = file.read().rstrip().rpartition("\n\n")
    return mark == _MARK.format(_digest(text))


def is_hub_id(name: str) -> bool:
    """
    Whether a name can be that of a repository on the Hub, and not that of a folder here.

    Args:
        name (`str`):
            Hub id or path.

    Returns:
        `bool`: Whether it can be a Hub id.
    """
    return not os.path.exists(name) and name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def _shown(name: str) -> str:
    return name if is_hub_id(name) else Path(name).resolve().name


def _link(name: str, kind: str = "") -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})" if is_hub_id(name) else f"`{_shown(name)}`"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
