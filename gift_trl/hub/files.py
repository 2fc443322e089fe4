"""The files of a model: which of a folder's are pushed, and whether the Hub holds the same."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from gift_trl.checkpoints import ADAPTER_FILE, safetensors_files


ADAPTER_CONFIG_FILE, CONFIG_FILE = "adapter_config.json", "config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
# What loading reads beside the weights, and what tells about the model. `**/` is any folder.
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
_DOCUMENTS = (
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
_TEMPLATES = "additional_chat_templates/*.jinja"
# What a trainer writes about its run, and to resume it
_TRAINING = ("trainer_state.json", "*_results.json", "zero_to_fp32.py", "optimizer*", "scheduler*", "rng_state*")
_TRAINING += ("checkpoint-*/*", "runs/*", "global_step*/*")
# Weights in whatever format: of another model, when the folder does not hold them
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.ot")


class LocalFile:
    """
    A file to push.

    Args:
        name (`str`):
            Path in the repository.
        content (`Path` or `bytes`):
            The file, or what stands in it.
    """

    def __init__(self, name: str, content: Path | bytes):
        self.name, self.content = name, content
        self._found = self._state()
        self.size = len(content) if isinstance(content, bytes) else self._found[0]

    def _state(self) -> tuple[int, int] | None:
        if isinstance(self.content, bytes):
            return None
        status = os.stat(self.content)
        return status.st_size, status.st_mtime_ns

    @cached_property
    def sha256(self) -> str:
        """Hash by which the Hub knows a large file. Reads the file."""
        if isinstance(self.content, bytes):
            return hashlib.sha256(self.content).hexdigest()
        with open(self.content, "rb") as file:
            return sha_fileobj(file).hex()

    def equals(self, remote: RepoFile | None) -> bool:
        """Whether the Hub holds this content."""
        if remote is None or remote.size != self.size:
            return False
        if remote.lfs is not None:
            return remote.lfs.sha256 == self.sha256
        content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return remote.blob_id == git_hash(content)

    def check_unchanged(self) -> None:
        """Raises an error if the file was written to since it was listed."""
        if self._state() != self._found:
            raise OSError(f"'{self.content}' was written to during the push")


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
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    pushed = [name for name in names if name in weights or _is_pushed(name)]
    return [LocalFile(name, folder / name) for name in pushed], [name for name in names if name not in pushed]


def replaced_names(names: Iterable[str]) -> list[str]:
    """
    Which files of a repository belong to the model in it.

    Args:
        names (`Iterable[str]`):
            Paths in the repository.

    Returns:
        `list[str]`: Weights, and what loading reads. Documents, pictures and `.gitattributes` are not among them.
    """
    return [
        name
        for name in names
        if (_matches(name, (*_WEIGHTS, *_DESCRIPTIONS)) and "/" not in name) or fnmatch(name, _TEMPLATES)
    ]


def differing_names(files: Iterable[LocalFile], remote: Mapping[str, RepoFile]) -> list[str]:
    """
    Which files the Hub does not hold as they are here.

    Args:
        files (`Iterable[LocalFile]`):
            The files.
        remote (`Mapping[str, RepoFile]`):
            What the Hub lists, by path.

    Returns:
        `list[str]`: Paths.
    """
    return [file.name for file in files if not file.equals(remote.get(file.name))]


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
