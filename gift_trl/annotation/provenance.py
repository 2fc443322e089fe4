"""Where the confidences of a dataset come from, carried with the dataset and checked before it is trained on."""

import hashlib
import importlib.metadata
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file, extract_commit_hash
from trl.trainer.utils import get_config_model_id

from gift_trl.checkpoints import checkpoint_folder, weights_fingerprint
from gift_trl.model_pair import refuse_adapter_beside


# One line of `Dataset.info.description`, which datasets keeps through map, filter, shuffle, select and save_to_disk
_PREFIX = "gift_trl provenance: "


@dataclass
class Provenance:
    """
    What produced the `confidences` column of a dataset.

    Args:
        model (`str`):
            Model that scored the tokens: its Hub id, or the name of its folder.
        commit (`str` or `None`):
            Its commit on the Hub.
        weights (`str` or `None`):
            Fingerprint of its safetensors files. `None` for a model that was passed as an object.
        dtype (`str`):
            Data type of the scoring model.
        vocabulary (`str`):
            Hash of the tokenizer's token → id table.
        chat_template (`str`):
            Hash of the chat template the rows were rendered with.
        assistant_only_loss (`bool`):
            Whether only assistant turns are targets.
        completion_only_loss (`bool` or `None`):
            Whether only completions are targets; `None` if the data marks no completions.
        max_length (`int` or `None`):
            Length in tokens the rows were truncated to; `None` if they were not.
        end_of_turn_token_ids (`list[int]`):
            Token ids that end a turn.
        rows (`int`):
            Number of annotated rows.
        truncated (`int`):
            Number of rows that were truncated.
        dropped (`dict[str, list[int]]`):
            Rows left out, by reason, as indices into the dataset that was annotated.
        engine (`str`):
            What scored the tokens: `"transformers"`, `"vllm"`, or `"imported"` for scores made elsewhere.
        quantization (`str` or `None`):
            Quantisation method of the scoring model, `None` if it is not quantised.
        tokens_per_batch (`int` or `None`):
            Upper bound of the padded tokens in one forward pass; it moves the confidences by rounding only.
        truncation_mode (`str` or `None`):
            Which end of a row truncation keeps, `"keep_start"` or `"keep_end"`. `None` in older annotations.
        eos_token (`str` or `None`):
            End-of-sequence token, `None` if nothing wrote it into the rows.
        versions (`dict[str, str]`):
            Versions of the libraries.
    """

    model: str
    commit: str | None
    weights: str | None
    dtype: str
    vocabulary: str
    chat_template: str
    assistant_only_loss: bool
    completion_only_loss: bool | None
    max_length: int | None
    end_of_turn_token_ids: list[int]
    rows: int
    truncated: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    engine: str = "transformers"
    quantization: str | None = None
    tokens_per_batch: int | None = None
    truncation_mode: str | None = None
    eos_token: str | None = None
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


def model_name(model: str | PreTrainedModel) -> str:
    """
    Name of a model that may be published: its Hub id, or the last part of its folder.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Model id, checkpoint folder or loaded model.

    Returns:
        `str`: The name.
    """
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    return Path(name).resolve().name if os.path.isdir(name) else name or "(in memory)"


def identify_commit(model: str | PreTrainedModel, revision: str | None = None) -> str | None:
    """
    Commit of a model on the Hub; reads its configuration only.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Model id, checkpoint folder or loaded model.
        revision (`str`, *optional*):
            Revision on the Hub.

    Returns:
        `str` or `None`: Commit hash, `None` for a local folder or a loaded model.
    """
    if not isinstance(model, str) or os.path.isdir(model):
        return None
    # A file in the Hub's cache lies in a folder named after its commit
    return extract_commit_hash(cached_file(model, "config.json", revision=revision), None)


def identify_weights(model: str | PreTrainedModel, revision: str | None = None) -> str | None:
    """
    Fingerprint of a model's weights, the same for a Hub id and for a local copy.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Model id, checkpoint folder or loaded model.
        revision (`str`, *optional*):
            Revision on the Hub.

    Returns:
        `str` or `None`: Fingerprint, see [`~gift_trl.checkpoints.weights_fingerprint`]; `None` for a loaded model, whose
        weights may no longer be those of the checkpoint it came from.
    """
    return weights_fingerprint(checkpoint_folder(model, revision)) if isinstance(model, str) else None


def identify_code(folder: str) -> str:
    """
    Hash of what a local checkpoint folder says besides its weights: the configuration, and the code it may bring.

    Args:
        folder (`str`):
            Checkpoint folder.

    Returns:
        `str`: SHA-256 as 64 hexadecimal digits.

    Raises:
        `ValueError`: If an adapter lies in the folder, which transformers would load with the model.
    """
    path = Path(folder).expanduser()
    refuse_adapter_beside(str(path))
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    # Changed by saving the model again, and by nothing else
    config = {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in sorted(path.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def add_provenance(dataset: Dataset, *provenances: Provenance) -> Dataset:
    """
    Attaches provenances to a dataset, in place of any it had.

    Args:
        dataset ([`~datasets.Dataset`]):
            Annotated dataset.
        provenances ([`Provenance`]):
            Its provenance, or several of a concatenation.

    Returns:
        [`~datasets.Dataset`]: The same dataset.
    """
    kept = [line for line in (dataset.info.description or "").splitlines() if not line.startswith(_PREFIX)]
    dataset.info.description = "\n".join([*kept, *(_PREFIX + provenance.to_json() for provenance in provenances)])
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
