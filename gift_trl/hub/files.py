"""The files of a model: which of a folder's are pushed, and whether the Hub holds the same."""

import json
import os
import warnings
from collections.abc import Iterable
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, ModelCard
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from tqdm.auto import tqdm

from gift_trl.cards import is_hub_id
from gift_trl.checkpoints import ADAPTER_FILE, CARD_FILE, KINSHIP_PLOT_FILE, SIGNAL_PLOT_FILE, safetensors_files
from gift_trl.repositories import describe


ADAPTER_CONFIG_FILE, CONFIG_FILE = "adapter_config.json", "config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
# What loading reads beside the weights, and what tells about the model
_DESCRIPTIONS = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.model.v*",
    "*.tiktoken",
    "*.bpe",
    "*.txt",
    "*.py",
    "*.yaml",
    "*.yml",
)
_DOCUMENTS: tuple[str, ...] = (
    "*.md",
    "*.png",
    "*.svg",
    "*.jpg",
    "*.jpeg",
    "*.gif",
    "*.webp",
    "*.pdf",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
)
_DOCUMENTS += ("*POLICY*", "COPYING*")
_PLOTS = (KINSHIP_PLOT_FILE, SIGNAL_PLOT_FILE)
_TEMPLATES = "additional_chat_templates/*.jinja"
# Of the pushes of a run; `Trainer.push_to_hub` leaves out what begins like this
LEDGER_FILE = "_gift_trl_pushes.json"
# What a trainer writes about its run, and to resume it
_TRAINING: tuple[str, ...] = (
    "trainer_state.json",
    "*_results.json",
    "zero_to_fp32.py",
    "optimizer*",
    "scheduler*",
    "rng_state*",
)
_TRAINING += ("checkpoint-*/*", "runs/*", "global_step*/*", f"{LEDGER_FILE}*")
# Weights in whatever format: of another model, when the folder does not hold them
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.ot")


class LocalFile:
    """
    A file to push.

    Args:
        folder (`Path`):
            Folder that is pushed.
        name (`str`):
            Path in the folder, and in the repository.

    Attributes:
        size (`int`): Size in bytes.
    """

    def __init__(self, folder: Path, name: str):
        self.path, self.name = folder / name, name
        self._found = self._state()
        self.size = self._found[0]

    def _state(self) -> tuple[int, int]:
        status = os.stat(self.path)
        return status.st_size, status.st_mtime_ns

    @cached_property
    def sha256(self) -> str:
        """Hash by which the Hub knows a large file."""
        with open(self.path, "rb") as file:
            return sha_fileobj(file).hex()

    @cached_property
    def git_sha1(self) -> str:
        """Hash by which the Hub knows a small file."""
        return git_hash(self.path.read_bytes())

    def equals(self, remote: RepoFile | None) -> bool:
        """Whether the Hub holds this content."""
        if remote is None or remote.size != self.size:
            return False
        return remote.blob_id == self.git_sha1 if remote.lfs is None else remote.lfs.sha256 == self.sha256

    def addition(self) -> CommitOperationAdd:
        """The operation that uploads the file, with the hash that is already known."""
        operation = CommitOperationAdd(self.name, self.path)
        operation.upload_info.sha256 = bytes.fromhex(self.sha256)
        return operation

    def check_unchanged(self) -> None:
        """Raises an `OSError` if the file was written to since it was listed."""
        if self._state() != self._found:
            raise OSError(f"'{self.name}' was written to meanwhile")


def hash_files(files: list[LocalFile]) -> None:
    """Reads every file once, with a progress bar if that takes longer than a moment."""
    size = sum(file.size for file in files)
    with tqdm(total=size, desc="Hash", unit="B", unit_scale=True, leave=False, delay=2) as bar:
        for file in files:
            _ = file.sha256
            bar.update(file.size)


def list_model_files(folder: Path) -> tuple[list[LocalFile], list[str]]:
    """
    Lists what is pushed of a folder, after checking that it is a complete model or adapter.

    Pushed are the safetensors files, what `from_pretrained` reads beside them, documents, licences and pictures. Hidden
    files, weights in other formats, pickles, and what a trainer writes about its run and to resume it are not.

    Args:
        folder (`Path`):
            Folder of a model with its tokenizer, or of an adapter.

    Returns:
        `tuple[list[LocalFile], list[str]]`: The files, and the names of those that are left out.

    Raises:
        `FileNotFoundError`, `ValueError`: If it is no complete model or adapter.
    """
    _check_complete(folder)
    weights = {path.name for path in safetensors_files(folder)}
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()
    )
    pushed = [name for name in names if name in weights or _is_pushed(name)]
    if broken := [name for name in pushed if not (folder / name).exists()]:
        raise FileNotFoundError(
            f"'{folder / broken[0]}' is a link that leads nowhere: copy or download the file again, or remove the link."
        )
    return [LocalFile(folder, name) for name in pushed], [name for name in names if name not in pushed]


def replaced_names(names: Iterable[str]) -> list[str]:
    """
    Which files of a repository belong to the model in it.

    Args:
        names (`Iterable[str]`):
            Paths in the repository.

    Returns:
        `list[str]`: Weights in any format, what loading reads, and the reports of a merge. Other pictures, documents and
        `.gitattributes` are not among them.
    """
    return [
        name
        for name in names
        if (_matches(name, (*_WEIGHTS, *_DESCRIPTIONS)) and "/" not in name) or fnmatch(name, _TEMPLATES)
    ]


def read_card(folder: Path) -> ModelCard | None:
    """
    Reads the card of a folder. A model without a licence on its card is warned of.

    Args:
        folder (`Path`):
            Folder of a model or an adapter.

    Returns:
        [`~huggingface_hub.ModelCard`] or `None`: The card; `None` if there is none.

    Raises:
        `ValueError`: If its metadata cannot be read.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        warnings.warn(
            f"'{folder}' has no card: nobody will know what the model is. Write a {CARD_FILE}.", stacklevel=4
        )
        return None
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(
            f"The metadata of '{path}' cannot be read ({describe(error)}): mend what stands between its lines `---`."
        ) from error
    if (folder / CONFIG_FILE).is_file() and not card.data.get("license"):
        warnings.warn(
            f"The card of '{folder}' names no licence (`license:`): nobody will know what the model may be used for. Take that "
            "of the instruct model.",
            stacklevel=4,
        )
    return card


def warn_of_local_base(base: str | None) -> None:
    """
    Warns, once, of the base model's name in an adapter that is pushed, if that is a folder.

    Args:
        base (`str`, *optional*):
            Name of the base model, as PEFT writes it into `adapter_config.json`.
    """
    if base and not is_hub_id(base):
        warnings.warn(
            f"The adapter names its base model by a folder, '{base}', which everybody can read who reads its repository, and "
            f"nobody can load: train from the model's id on the Hub, or write that into `{ADAPTER_CONFIG_FILE}` before a push.",
            stacklevel=1,  # in one place, so that it is said once
        )


def named_base(folder: Path) -> str | None:
    """Name of the base model that an adapter is of; `None` for other models."""
    path = folder / ADAPTER_CONFIG_FILE
    return json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path") if path.is_file() else None


def _check_complete(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder '{folder}': check the path.")
    is_adapter, is_model = (folder / ADAPTER_FILE).is_file(), (folder / CONFIG_FILE).is_file()
    if is_adapter and is_model:
        raise ValueError(
            f"'{folder}' holds an adapter ({ADAPTER_FILE}) and a model ({CONFIG_FILE}): push them from a folder each, to a "
            "repository each."
        )
    safetensors_files(folder)
    config = folder / (ADAPTER_CONFIG_FILE if is_adapter else CONFIG_FILE)
    if not config.is_file():
        raise FileNotFoundError(
            f"'{folder}' lacks {config.name}, without which nothing loads: write or copy it again."
        )
    try:
        described = json.loads(config.read_text(encoding="utf-8"))
        named = described["peft_type"] if is_adapter else described["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{config}' is no readable configuration: write or copy it again.") from error
    if not isinstance(named, str):
        raise ValueError(f"'{config}' is no readable configuration: write or copy it again.")
    if not is_adapter and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"'{folder}' holds a model without its tokenizer: save it there too (`tokenizer.save_pretrained`)."
        )


def _is_pushed(name: str) -> bool:
    if any(part.startswith(".") for part in name.split("/")) or _matches(name, _TRAINING):
        return False
    if "/" in name:
        return fnmatch(name, _TEMPLATES) or _matches(name.rsplit("/")[-1], _DOCUMENTS)
    return _matches(name, (*_DESCRIPTIONS, *_DOCUMENTS))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
