"""What a training says of itself: its facts, and the model card of the adapter made of them."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig, PeftModel, PeftType
from transformers import is_wandb_available
from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url

from gift_trl.annotation.provenance import Provenance
from gift_trl.cards import PAPER, Source, TrainingFacts, list_versions, make_card, markdown_table
from gift_trl.training.config import GIFTConfig


_SIGNAL = ("gift/signal_low", "gift/signal_mid", "gift/signal_high")
# Points of the learning signal that are kept: a page shows no more
_MAX_POINTS = 100
# Folder in which datasets keeps what it loaded from the Hub: user___name/config/version/commit
_CACHED_DATASET = re.compile(
    r"[/\\](?P<name>[^/\\]+)[/\\][^/\\]+[/\\][^/\\]+[/\\](?P<commit>[0-9a-f]{40})[/\\][^/\\]+"
)


def dataset_sources(dataset: Dataset | IterableDataset) -> list[Source]:
    """
    Finds the datasets on the Hub that a dataset was loaded from, by where its cache lies.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.

    Returns:
        `list[Source]`: With their commits. Empty for streams, and for what was loaded from files.
    """
    files = [file["filename"] for file in dataset.cache_files] if isinstance(dataset, Dataset) else []
    found = [match for match in map(_CACHED_DATASET.search, files) if match]
    names = dict.fromkeys((match["name"].replace("___", "/"), match["commit"]) for match in found)
    return [Source(name, commit, on_hub=True) for name, commit in names]


@contextmanager
def without_peft_card() -> Iterator[None]:
    """
    Lets PEFT save an adapter without a card.

    Its own is one of placeholders, or puts the base model's folder into ours: whoever was killed before the next line would
    keep it, and take it for a person's from then on.
    """
    write = PeftModel.create_or_update_model_card
    PeftModel.create_or_update_model_card = lambda self, output_dir: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        PeftModel.create_or_update_model_card = write  # type: ignore[method-assign]


def learning_signal(log_history: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """
    The learning signal of a training: means over so many neighbouring logs that few points are left.

    Args:
        log_history (`Sequence[Mapping[str, float]]`):
            What the trainer has logged.

    Returns:
        `dict[str, list[float]]`: As in [`TrainingFacts`].
    """
    logs = [log for log in log_history if all(name in log for name in _SIGNAL)]
    width = math.ceil(len(logs) / _MAX_POINTS) or 1
    parts = [logs[start : start + width] for start in range(0, len(logs), width)]
    if not parts:
        return {}
    signal = {"step": [part[-1]["step"] for part in parts]}
    for name in _SIGNAL:
        signal[name.rpartition("_")[2]] = [round(sum(log[name] for log in part) / len(part), 4) for part in parts]
    return signal


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
        settings["adapter"] = PeftType(peft_config.peft_type).value
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


def make_adapter_card(
    facts: TrainingFacts, name: str, *, hub_id: str | None = None, tags: Sequence[str] = ()
) -> ModelCard:
    """
    Writes the card of an adapter.

    Args:
        facts ([`TrainingFacts`]):
            What it says.
        name (`str`):
            Name of the adapter.
        hub_id (`str`, *optional*):
            Its id on the Hub.
        tags (`Sequence[str]`, *optional*):
            Tags.

    Returns:
        [`~huggingface_hub.ModelCard`]: The card.
    """
    is_adapter = facts.peft_type is not None
    base = facts.base_model.name if facts.base_model.on_hub else None
    datasets = [dataset.name for dataset in facts.datasets]
    data = ModelCardData(
        model_name=name,
        base_model=base,
        base_model_relation="adapter" if base is not None and is_adapter else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        datasets=datasets or None,
        tags=sorted({*tags, *(["lora"] if facts.peft_type == "LORA" else [])}),
    )
    kind = "An adapter" if is_adapter else "A model"
    instruct = "the instruct model" if facts.instruct_model is None else facts.instruct_model.link()
    data_text = f" on {', '.join(dataset.link('datasets/') for dataset in facts.datasets)}" if datasets else ""
    sections = [
        f"# {name}",
        f"{kind} trained{data_text} on the base model {facts.base_model.link()} with GIFT ([Guided Fine-Tuning and "
        f"Transfer]({PAPER})): the cross-entropy of every token is weighted by the probability that {instruct} gives to it."
        + (f" It is to be merged into {instruct}, and is of little use on the base model." if is_adapter else ""),
    ]
    if is_adapter and facts.instruct_model is not None:
        sections.append(
            "## Use\n\nMerge it with gift_trl, then load the merged model as "
            "any other:\n\n```python\nfrom gift_trl import merge_adapter\nfrom transformers import pipeline\n\n"
            f'merge_adapter("{hub_id or name}", "{facts.instruct_model.name}", "merged")\n'
            'generator = pipeline("text-generation", model="merged")\n```'
        )
    sections.append("## Training\n\n" + markdown_table(("setting", "value"), list(facts.settings.items())))
    if facts.links:
        sections.append("Run: " + ", ".join(f"[{service}]({url})" for service, url in facts.links.items()))
    return make_card(data, [*sections, list_versions(facts.versions)])
