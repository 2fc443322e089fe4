"""What the cards of an adapter and of a merged model share: facts that may be published, and how a card is written."""

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from gift_trl.checkpoints import TRAINING_FILE
from gift_trl.leftovers import whole_file


logger = logging.getLogger(__name__)

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
_CACHED_REPOSITORY = re.compile(r"models--([^/\\]+?)(?:--([^/\\]+))?")


@dataclass(frozen=True)
class Source:
    """
    A model or dataset that something was made of, by a name that may be published.

    Args:
        name (`str`):
            Hub id, or the last part of a local folder's path.
        commit (`str`, *optional*):
            Commit on the Hub.
        on_hub (`bool`, *optional*, defaults to `False`):
            Whether the name is an id on the Hub.
    """

    name: str
    commit: str | None = None
    on_hub: bool = False

    @classmethod
    def of_model(cls, name: str, revision: str | None = None, *, was_loaded: bool = True) -> "Source":
        """
        The source of a model.

        Args:
            name (`str`):
                Hub id or folder; empty for a model that was built in memory.
            revision (`str`, *optional*):
                Revision on the Hub.
            was_loaded (`bool`, *optional*, defaults to `True`):
                Whether that revision has been loaded here, so that the Hub's cache knows its commit.

        Returns:
            [`Source`]: The source.
        """
        if not is_hub_id(name):
            return cls(public_name(name) or "(in memory)")
        file = try_to_load_from_cache(name, "config.json", revision=revision) if was_loaded else None
        return cls(name, Path(file).parent.name if isinstance(file, str) else None, on_hub=True)

    def link(self, kind: str = "") -> str:
        """
        The name in Markdown.

        Args:
            kind (`str`, *optional*):
                `"datasets/"` for a dataset.

        Returns:
            `str`: A link to the Hub, or the name as code.
        """
        return f"[{self.name}](https://huggingface.co/{kind}{self.name})" if self.on_hub else f"`{self.name}`"

    def commit_link(self, kind: str = "") -> str:
        """
        The commit in Markdown.

        Args:
            kind (`str`, *optional*):
                `"datasets/"` for a dataset.

        Returns:
            `str`: A link to the files of that commit; empty if it is not known.
        """
        if self.commit is None:
            return ""
        return f"[`{self.commit[:12]}`](https://huggingface.co/{kind}{self.name}/tree/{self.commit})"


@dataclass
class TrainingFacts:
    """
    What cards say of a training.

    Args:
        base_model ([`~gift_trl.cards.Source`]):
            Model that was trained.
        instruct_model ([`~gift_trl.cards.Source`], *optional*):
            Model to merge the adapter into.
        datasets (`list[Source]`):
            Training data that came from the Hub.
        data (`str`, *optional*):
            Number of rows and digest of the training data, by which a resumed run knows its own.
        peft_type (`str`, *optional*):
            Type of the adapter; `None` if a whole model was trained.
        settings (`dict[str, Any]`):
            Settings of GIFT and of the training by name.
        links (`dict[str, str]`):
            Addresses of the logged run by name.
        signal (`dict[str, list[float]]`):
            Shares of the loss from tokens of low, middle and high confidence (`"low"`, `"mid"`, `"high"`) at some of the
            steps (`"step"`). Empty if they were not logged.
        versions (`dict[str, str]`):
            Versions of the libraries.
    """

    base_model: Source
    instruct_model: Source | None = None
    datasets: list[Source] = field(default_factory=list)
    data: str | None = None
    peft_type: str | None = "LORA"
    settings: dict[str, Any] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    signal: dict[str, list[float]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainingFacts":
        """The facts that [`write`] has written, as JSON reads them."""
        instruct = values["instruct_model"]
        return cls(
            **{
                **values,
                "base_model": Source(**values["base_model"]),
                "instruct_model": None if instruct is None else Source(**instruct),
                "datasets": [Source(**dataset) for dataset in values["datasets"]],
            }
        )

    def write(self, folder: Path) -> None:
        """
        Writes the facts beside the adapter, where the merge finds them. They are never a reason to lose a training.

        Args:
            folder (`Path`):
                Folder of the adapter.
        """
        try:
            text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
            (folder / TRAINING_FILE).write_text(text, encoding="utf-8")
        except (OSError, TypeError, ValueError) as error:
            logger.warning(f"`{TRAINING_FILE}` was not written to `{folder}`: {type(error).__name__}: {error}")


def is_hub_id(name: str) -> bool:
    """
    Whether a name can be that of a repository on the Hub, and not that of a folder here.

    Args:
        name (`str`):
            Hub id or path.

    Returns:
        `bool`: Whether it can be a Hub id.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name)


def public_name(name: str | None) -> str | None:
    """
    The name of a model without the paths of this machine, which are nobody's business.

    Args:
        name (`str` or `None`):
            Folder or Hub id.

    Returns:
        `str` or `None`: A Hub id as it is, the id of the repository for a folder of the Hub cache, of any other folder the
        last part; `None` if there is no name.
    """
    if not name:
        return None
    parts = [part for part in re.split(r"[/\\]", name) if part]
    for part in parts:
        if cached := _CACHED_REPOSITORY.fullmatch(part):
            return "/".join(filter(None, cached.groups()))
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve().name
    try:
        validate_repo_id(name)
    except HFValidationError:
        return parts[-1] if parts else None
    return name


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """
    A table in Markdown.

    Args:
        head (`Sequence[str]`):
            Titles of the columns.
        rows (`Sequence[Sequence[Any]]`):
            Cells.

    Returns:
        `str`: The table.
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def list_versions(versions: Mapping[str, str]) -> str:
    """
    The section of a card that names the libraries.

    Args:
        versions (`Mapping[str, str]`):
            Versions by library.

    Returns:
        `str`: Markdown.
    """
    return "### Framework versions\n\n" + "\n".join(f"- {name} {version}" for name, version in versions.items())


def make_card(data: ModelCardData, sections: Sequence[str]) -> ModelCard:
    """
    Puts a card together, with the citations, and a mark by which [`may_be_replaced`] knows it.

    Args:
        data ([`~huggingface_hub.ModelCardData`]):
            Its metadata.
        sections (`Sequence[str]`):
            Its sections in Markdown.

    Returns:
        [`~huggingface_hub.ModelCard`]: The card.
    """
    citations = f"## Citation\n\n```bibtex\n{GIFT_CITATION}\n```\n\n```bibtex\n{_TRL_CITATION}\n```"
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join([*sections, citations])
    return ModelCard(f"{text}\n\n{_MARK.format(_digest(text))}\n")


def write_card(path: Path, make: Callable[[], ModelCard], *, replace: bool | None = None) -> bool:
    """
    Writes a card, unless there is one that a person has written. A card is never a reason to lose what it describes.

    Args:
        path (`Path`):
            File.
        make (`Callable`):
            Makes the card.
        replace (`bool`, *optional*):
            Whether to write it in any case. Defaults to what [`may_be_replaced`] says.

    Returns:
        `bool`: Whether it was written.
    """
    if not (may_be_replaced(path) if replace is None else replace):
        logger.warning(f"`{path.name}` in `{path.parent}` was written or changed by a person, and is left as it is.")
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Half a card would have no mark, and stay as if a person had written it
        with whole_file(path) as temporary:
            make().save(temporary)
    except Exception as error:
        logger.warning(f"The model card was not written to `{path}`: {type(error).__name__}: {error}")
        return False
    return True


def may_be_replaced(path: str | os.PathLike[str]) -> bool:
    """
    Whether a card says nothing that a person wrote.

    Args:
        path (`str` or `os.PathLike`):
            File.

    Returns:
        `bool`: Whether there is none, or one that [`make_card`] has made and nobody has changed.
    """
    if not os.path.exists(path):
        return True
    with open(path, encoding="utf-8", errors="replace") as file:
        text, _, mark = file.read().rstrip().rpartition("\n\n")
    return mark == _MARK.format(_digest(text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
