"""An annotated dataset on the Hugging Face Hub: pushed with its provenance and a card, and recognised when loaded."""

import os
import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import (
    _CACHED_NO_EXIST,
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCardData,
    HfApi,
    hf_hub_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)

from gift_trl.annotation.provenance import Provenance
from gift_trl.annotation.storage import PROVENANCE_FILE, TOKENIZER_FOLDER, read_provenance_file
from gift_trl.repositories import HUB_ERRORS, call_hub, check_repository, describe, explain


# What a push replaces as a whole: a file left from an earlier push would be loaded with the new ones
_REPLACED = ("data/*.parquet", f"{TOKENIZER_FOLDER}/*")


def check_push_target(repo_id: str, *, private: bool | None = None, revision: str | None = None) -> str:
    """
    Checks that a dataset repository can be pushed to, before the work whose result goes there.

    Nothing is created. Whether a fine-grained token may create a repository cannot be asked; all else is known
    afterwards.

    Args:
        repo_id (`str`):
            Id of the repository. Without a namespace, it is the user's.
        private (`bool`, *optional*):
            Whether the repository has to be private.
        revision (`str`, *optional*):
            Branch to be pushed to.

    Returns:
        `str`: The id with its namespace.

    Raises:
        `ValueError`: If it is no legal id, or the repository is public and `private` is set.
        `FileExistsError`: If the repository holds data that is not an annotated dataset.
        `PermissionError`: If there is no login, or it may not write there.
        `ConnectionError`: If the Hub cannot be asked.
    """
    repo_id, remote = check_repository(repo_id, repo_type="dataset", private=private)
    if remote is not None and revision is not None:
        try:
            remote = call_hub(HfApi(token=True).dataset_info, repo_id, revision=revision)
        except RevisionNotFoundError:
            pass  # a new branch begins as a copy of the main one
        except HUB_ERRORS as error:
            raise explain(error, repo_id, "dataset") from error
    if remote is not None:
        _check_content(remote)
    return repo_id


def push_annotated_dataset(
    folder: str | os.PathLike[str], repo_id: str, *, private: bool | None = None, revision: str | None = None
) -> str:
    """
    Pushes an annotated dataset with its provenance and a card to a dataset repository on the Hub, in one commit.

    Data of an earlier push is replaced. The token is that of `hf auth login` or `HF_TOKEN`. The folder is not changed;
    if it has a `README.md`, that is the card.

    Args:
        folder (`str` or `os.PathLike`):
            Folder that [`save_annotated_dataset`] wrote. Hidden files in it are left out.
        repo_id (`str`):
            Id of the repository, which is created if it does not exist.
        private (`bool`, *optional*):
            Whether the repository is private. By default, a new one is as its owner's settings say.
        revision (`str`, *optional*):
            Branch to push to, which is created if it does not exist. Defaults to the main branch.

    Returns:
        `str`: URL of the commit.

    Raises:
        `FileNotFoundError`: If the folder holds no annotated dataset.
        `ValueError`, `FileExistsError`, `PermissionError`, `ConnectionError`: As [`check_push_target`].
        `OSError`: If the push fails, or what the Hub holds afterwards differs from the folder.
    """
    folder = Path(folder).expanduser()
    if not (folder / PROVENANCE_FILE).is_file() or not any(folder.glob("data/*.parquet")):
        raise FileNotFoundError(
            f"'{folder}' holds no annotated dataset ({PROVENANCE_FILE} and data/*.parquet): pass a folder that "
            "`save_annotated_dataset` or `gift-trl annotate` wrote."
        )
    provenances = read_provenance_file(folder / PROVENANCE_FILE)
    repo_id = check_push_target(repo_id, private=private, revision=revision)
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files: dict[str, Path | bytes] = {
        name.as_posix(): path for name, path in paths.items() if not any(part.startswith(".") for part in name.parts)
    }
    card = _dataset_card(repo_id, provenances, tokenizer=(folder / TOKENIZER_FOLDER).is_dir())
    files.setdefault("README.md", card.encode())
    try:
        return call_hub(_push_once, folder, files, repo_id, private, revision).commit_url
    # The client, its HTTP library and its transfer library have no error in common
    except Exception as error:
        raise OSError(_how_to_finish(folder, repo_id, private, revision, error)) from error


def download_provenance(repo_id: str, revision: str | None = None) -> dict[str, list[Provenance]] | None:
    """
    Provenance of a dataset on the Hub, from the cache if it is there.

    Args:
        repo_id (`str`):
            Id of a dataset repository.
        revision (`str`, *optional*):
            Branch, tag or commit. Only a commit is found in the cache without asking the Hub.

    Returns:
        `dict[str, list[Provenance]]` or `None`: The provenances by split; `None` if the repository has none.

    Raises:
        `FileNotFoundError`: If it is not in the cache and the Hub cannot be asked.
        `ValueError`: If this version cannot read it.
    """
    where: Any = {"repo_id": repo_id, "filename": PROVENANCE_FILE, "repo_type": "dataset", "revision": revision}
    try:
        return read_provenance_file(hf_hub_download(**where))
    except LocalEntryNotFoundError as error:
        if try_to_load_from_cache(**where) is _CACHED_NO_EXIST:
            return None
        raise FileNotFoundError(
            f"The Hub cannot be asked for the provenance of the confidences in '{repo_id}', and its cache does not say "
            "whether there is one: load the dataset once online (with `HF_HUB_OFFLINE` unset)."
        ) from error
    except EntryNotFoundError:
        return None


def _check_content(remote: Any) -> None:
    names = [file.rfilename for file in remote.siblings or ()]
    replaced = [name for name in names if _is_replaced(name)]
    if replaced and PROVENANCE_FILE not in names:
        raise FileExistsError(
            f"The dataset repository '{remote.id}' holds data that is no annotated dataset ({replaced[0]}) and would be "
            "replaced: push to another one, or delete that data first."
        )


def _is_replaced(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _REPLACED)


def _push_once(
    folder: Path, files: dict[str, Path | bytes], repo_id: str, private: bool | None, revision: str | None
) -> CommitInfo:
    """Creates what is missing and commits what differs, so that it can be repeated wherever it was interrupted."""
    api = HfApi(token=True)
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, repo_type="dataset", exist_ok=True)
    remote = api.dataset_info(repo_id, revision=revision)
    stale = [file.rfilename for file in remote.siblings or () if _is_replaced(file.rfilename)]
    # Not `upload_folder`, which may make several commits: in between, data of two pushes would be mixed
    commit = api.create_commit(
        repo_id,
        [
            *(CommitOperationDelete(name) for name in stale if name not in files),
            *(CommitOperationAdd(name, content) for name, content in files.items()),
        ],
        commit_message="Upload dataset annotated with gift_trl",
        repo_type="dataset",
        revision=revision,
        parent_commit=remote.sha,
    )
    found = api.verify_repo_checksums(repo_id, repo_type="dataset", revision=commit.oid, local_dir=folder)
    differing = {mismatch["path"] for mismatch in found.mismatches} | set(found.extra_paths)
    wrong = [*sorted(differing & files.keys()), *filter(_is_replaced, found.missing_paths)]
    if wrong:
        raise OSError(f"after the commit {commit.oid}, the Hub and the folder differ in {', '.join(wrong)}")
    return commit


def _how_to_finish(folder: Path, repo_id: str, private: bool | None, revision: str | None, error: Exception) -> str:
    command = ["hf", "upload", repo_id, str(folder), "--repo-type", "dataset", "--delete", _REPLACED[0]]
    command += ["--private"] if private else []
    command += ["--revision", revision] if revision is not None else []
    return (
        f"The push to the dataset repository '{repo_id}' failed: {describe(error)}. The dataset is complete in '{folder}': "
        f"push it again with `push_annotated_dataset`, or without its card with `{shlex.join(command)}`."
    )


def _dataset_card(repo_id: str, provenances: dict[str, list[Provenance]], *, tokenizer: bool) -> str:
    provenances = dict(sorted(provenances.items(), key=lambda item: (item[0] != "train", item[0])))
    # Named one by one, so that no file beside them is ever taken for data
    data_files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in provenances]
    header = DatasetCardData(
        task_categories=["text-generation"],
        tags=["trl", "gift", "gift-confidences"],
        configs=[{"config_name": "default", "data_files": data_files}],
    )
    rows = [_card_row(split, provenance) for split, found in provenances.items() for provenance in found]
    return _CARD.format(
        header=header.to_yaml(),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        provenance_file=PROVENANCE_FILE,
        rows="\n".join(rows),
        tokenizer=_CARD_TOKENIZER if tokenizer else "",
    )


def _card_row(split: str, provenance: Provenance) -> str:
    model, commit = f"`{provenance.model}`", "none"
    if provenance.commit is not None:
        url = f"https://huggingface.co/{provenance.model}"
        model = f"[{provenance.model}]({url})"
        commit = f"[`{provenance.commit[:12]}`]({url}/tree/{provenance.commit})"
    dtype = provenance.dtype + (f", {provenance.quantization}" if provenance.quantization else "")
    length = "none" if provenance.max_length is None else f"{provenance.max_length:,}"
    dropped = "; ".join(f"{len(indices):,} ({reason})" for reason, indices in provenance.dropped.items()) or "0"
    cells = [split, model, commit, dtype, provenance.engine, length]
    cells += [f"{provenance.rows:,}", f"{provenance.truncated:,}", dropped]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


_CARD = """\
---
{header}
---

# {name}

A tokenised dataset for [GIFT](https://huggingface.co/papers/2605.01256) (Guided Fine-Tuning and Transfer): beside every
target token stands the probability that the model below gives to it, as a rule the instruction-tuned one. GIFT trains an
adapter on the base model with these confidences as weights of the loss, and merges it into the instruction-tuned model.

## Where the confidences come from

| split | model | commit | dtype | engine | max length | rows | truncated | left out |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

`{provenance_file}` says the same and more (hashes of the weights, the vocabulary and the chat template, the versions of
the libraries, which rows were left out). Training reads it, and refuses confidences that belong to another run.

## Columns

- `input_ids`: the tokens, as the instruction-tuned model's tokenizer and chat template make them.
- `labels`: the same tokens where they are trained on, −100 elsewhere.
- `confidences`: as long as `input_ids`; entry *i* is the probability of token *i* given the tokens before it. It is 0.0
  at position 0, which nothing predicts, and where the label is −100.

Other columns are those of the dataset that was annotated.{tokenizer}

## Train with it

```bash
gift-trl train --config recipe.yaml --dataset {repo_id}
```

The recipe names the base model and the instruction-tuned model; the scoring pass is not repeated. Without GIFT, it is a
dataset like any other:

```python
from datasets import load_dataset

dataset = load_dataset("{repo_id}")
```
"""
_CARD_TOKENIZER = " `tokenizer/` holds the tokenizer, with which the token ids can be read as text."
