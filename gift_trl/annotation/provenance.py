"""Where the confidences of a dataset come from, carried with the dataset and checked before it is trained on."""

import hashlib
import importlib.metadata
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import get_config_model_id

from gift_trl.checkpoints import weights_fingerprint
from gift_trl.model_pair import load_config


# One line of `Dataset.info.description`, which datasets keeps through map, filter, shuffle, select and save_to_disk
_PREFIX = "gift_trl provenance: "


@dataclass
class Provenance:
    """
    What produced the `confidences` column of a dataset.

    Args:
        model (`str`):
            Model that scored the tokens: its Hub id, or the name of its folder.
        weights (`str` or `None`):
            Commit hash on the Hub, or a fingerprint of a local checkpoint's safetensors files. `None` for a model that
            only existed in memory.
        dtype (`str`):
            Data type of the scoring model.
        vocabulary (`str`):
            Hash of the tokenizer's token → id table.
        chat_template (`str`):
            Hash of the chat template the rows were rendered with.
        max_length (`int` or `None`):
            Length in tokens the rows were truncated to; `None` if they were not.
        end_of_turn_token_ids (`list[int]`):
            Token ids that end a turn.
        rows (`int`):
            Number of annotated rows.
        truncated (`int`):
            Number of rows that were truncated.
        dropped (`dict[str, int]`):
            Number of rows left out, by reason.
        versions (`dict[str, str]`):
            Versions of the libraries.
    """

    model: str
    weights: str | None
    dtype: str
    vocabulary: str
    chat_template: str
    max_length: int | None
    end_of_turn_token_ids: list[int]
    rows: int
    truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose arithmetic the confidences depend on."""
    names = ("datasets", "gift_trl", "tokenizers", "torch", "transformers", "trl")
    return {name: importlib.metadata.version(name) for name in names}


def hash_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """
    Hash of the token → id table.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.

    Returns:
        `str`: First 16 hexadecimal digits of the SHA-256.
    """
    table = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(table.encode()).hexdigest()[:16]


def hash_chat_template(chat_template: str | dict[str, str] | None) -> str:
    """
    Hash of a chat template.

    Args:
        chat_template (`str` or `dict[str, str]` or `None`):
            Jinja source, named sources, or nothing.

    Returns:
        `str`: First 16 hexadecimal digits of the SHA-256.
    """
    return hashlib.sha256(json.dumps(chat_template, sort_keys=True).encode()).hexdigest()[:16]


def identify_weights(model: str | PreTrainedModel, revision: str | None = None) -> tuple[str, str | None]:
    """
    Name and identity of a model's weights.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Model id, checkpoint folder or loaded model. A loaded model is identified by the checkpoint it came from.
        revision (`str`, *optional*):
            Revision on the Hub.

    Returns:
        `tuple[str, str | None]`: Hub id or folder name, and commit hash or fingerprint. The identity of a model that
        names no checkpoint is `None`.
    """
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    if os.path.isdir(name):
        return Path(name).resolve().name, weights_fingerprint(Path(name))
    # The configuration carries the commit, so that comparing an annotation with a run downloads no weights
    config = load_config(model, revision=revision) if isinstance(model, str) else model.config
    return name or "(in memory)", getattr(config, "_commit_hash", None)


def add_provenance(dataset: Dataset, provenance: Provenance) -> Dataset:
    """
    Attaches a provenance to a dataset, in place of any it had.

    Args:
        dataset ([`~datasets.Dataset`]):
            Annotated dataset.
        provenance ([`Provenance`]):
            Its provenance.

    Returns:
        [`~datasets.Dataset`]: The same dataset.
    """
    kept = [line for line in (dataset.info.description or "").splitlines() if not line.startswith(_PREFIX)]
    dataset.info.description = "\n".join([*kept, _PREFIX + provenance.to_json()])
    return dataset


def read_provenance(dataset: Dataset | IterableDataset) -> list[Provenance]:
    """
    Provenances a dataset carries: none, one, or several after a concatenation.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset.

    Returns:
        `list[Provenance]`: The provenances.
    """
    description = (dataset.info.description if dataset.info is not None else None) or ""
    lines = [line for line in description.splitlines() if line.startswith(_PREFIX)]
    return [Provenance(**json.loads(line.removeprefix(_PREFIX))) for line in lines]


def check_provenance(
    provenances: list[Provenance],
    *,
    vocabulary: str | None = None,
    chat_template: str | None = None,
    weights: str | None = None,
    dataset_name: str = "train",
) -> None:
    """
    Checks that annotated data belongs to the run that is about to train on it.

    Args:
        provenances (`list[Provenance]`):
            Provenances of the dataset.
        vocabulary (`str`, *optional*):
            Hash of the run's token → id table. Not compared when `None`, like the following ones.
        chat_template (`str`, *optional*):
            Hash of the run's chat template.
        weights (`str`, *optional*):
            Identity of the weights of the run's annotator.
        dataset_name (`str`, *optional*, defaults to `"train"`):
            Name of the dataset in the message.

    Raises:
        `ValueError`: If a known field differs; the message names every one that does.
    """
    run = {"vocabulary": vocabulary, "chat_template": chat_template, "weights": weights}
    for provenance in provenances:
        differing = [
            f"{key} (annotated with {getattr(provenance, key)}, this run has {value})"
            for key, value in run.items()
            if value is not None and getattr(provenance, key) not in (None, value)
        ]
        if differing:
            raise ValueError(
                f"The `confidences` of the {dataset_name} dataset were made by `{provenance.model}` for another run: "
                f"{'; '.join(differing)}. Annotate the original dataset again with this run's instruct model and "
                "tokenizer, or set the run's `instruct_model_name_or_path` to the model that annotated it."
            )
