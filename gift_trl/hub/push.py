"""A model or adapter folder, pushed to the Hub in one commit that is checked afterwards."""

import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError
from huggingface_hub.hf_api import RepoFile

from gift_trl.checkpoints import CARD_FILE
from gift_trl.hub.files import LocalFile, differing_names, list_model_files, replaced_names
from gift_trl.repositories import LongWaitError, call_hub, check_repository, describe, explain


DEFAULT_BRANCH = "main"


@dataclass(frozen=True)
class PushReport:
    """
    What a push did.

    Args:
        repo_id (`str`):
            Id of the repository, with its namespace.
        revision (`str`):
            Branch that was pushed to.
        commit (`str`):
            Hash of the commit that holds the files.
        url (`str`):
            Address of that commit.
        uploaded (`list[str]`):
            Files that the commit added or changed; empty if the Hub held them all.
        unchanged (`list[str]`):
            Files that the Hub held already.
        deleted (`list[str]`):
            Files of an earlier model that the commit removed.
        left_out (`list[str]`):
            Files of the folder that are not pushed.
        num_bytes (`int`):
            Size of the uploaded files.
        duration_s (`float`):
            Seconds from the call to the last check.
        tag (`str`, *optional*):
            Tag of the commit.
    """

    repo_id: str
    revision: str
    commit: str
    url: str
    uploaded: list[str]
    unchanged: list[str]
    deleted: list[str]
    left_out: list[str]
    num_bytes: int
    duration_s: float
    tag: str | None = None


@dataclass(frozen=True)
class _Target:
    """A branch of a repository: the commit it points to, and the files of that."""

    repo_id: str
    exists: bool
    branch_exists: bool
    head: str | None
    files: dict[str, RepoFile]
    # Nothing on the branch would be lost with it
    is_new: bool
    tags: dict[str, str]


def check_push_target(
    repo_id: str, *, private: bool | None = None, revision: str | None = None, overwrite: bool = False
) -> str:
    """
    Checks that a model repository can be pushed to, before the work whose result goes there. Nothing is created.

    Args:
        repo_id (`str`):
            Id of the repository. Without a namespace, it is the user's.
        private (`bool`, *optional*):
            Whether the repository has to be private.
        revision (`str`, *optional*):
            Branch to be pushed to. Defaults to the main branch.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether a model that is there may be replaced.

    Returns:
        `str`: The id with its namespace.

    Raises:
        `ValueError`: If it is no legal id, or the repository is public and `private` is set.
        `FileExistsError`: If the branch holds a model or a card and `overwrite` is not set.
        `PermissionError`: If there is no login, or it may not write there.
        `ConnectionError`: If the Hub cannot be asked.
    """
    target = _find_target(HfApi(token=True), repo_id, private, revision)
    if not overwrite and not target.is_new:
        _refuse_to_replace(target, revision, sorted([*replaced_names(target.files), *_card_of(target)]))
    return target.repo_id


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    commit_message: str | None = None,
    overwrite: bool = False,
) -> PushReport:
    """
    Pushes a model or an adapter to a model repository on the Hub, in one commit, and checks what is there afterwards.

    The token is that of `hf auth login` or `HF_TOKEN`. The folder is not changed. A push that failed is finished by
    the same call: what the Hub has is not sent again, and a commit whose answer was lost is found.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of a model with its tokenizer, or of an adapter, in safetensors. See [`list_model_files`] for what of it
            is pushed.
        repo_id (`str`):
            Id of the repository, which is created if it does not exist.
        private (`bool`, *optional*):
            Whether the repository is private. By default, a new one is as its owner's settings say.
        revision (`str`, *optional*):
            Branch to push to, created from the main one if it does not exist. Defaults to the main branch.
        tag (`str`, *optional*):
            Tag for the commit.
        commit_message (`str`, *optional*):
            First line of the commit's message.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether files on the branch may be replaced. The commit then also deletes weights and descriptions of an earlier
            model that the folder does not have; other files, such as pictures, stay.

    Returns:
        [`PushReport`]: What was done.

    Raises:
        `FileNotFoundError`, `ValueError`: If the folder holds no complete model or adapter, or the target is not legal.
        `FileExistsError`: If files on the branch would be replaced, or the tag belongs to another commit.
        `PermissionError`, `ConnectionError`, `OSError`: If the push fails; with the command that finishes it.
    """
    start = time.monotonic()
    folder = Path(folder).expanduser()
    files, left_out = list_model_files(folder)
    api = HfApi(token=True)
    target = _find_target(api, repo_id, private, revision)
    changed = differing_names(files, target.files)
    stale = [name for name in replaced_names(target.files) if name not in {file.name for file in files}]
    if not overwrite and not target.is_new:
        _refuse_to_replace(target, revision, sorted([*stale, *(name for name in changed if name in target.files)]))
    try:
        target = _create(api, target, private, revision)
        commit = target.head
        if changed or stale:
            message = commit_message or f"Upload {folder.resolve().name} with gift_trl"
            commit = _commit(api, target, files, changed, stale, revision, message)
        _verify(api, target.repo_id, commit, files, stale)
        if tag is not None:
            call_hub(api.create_tag, target.repo_id, tag=tag, revision=commit, exist_ok=True)
    # The client, its HTTP library and its transfer library have no error in common
    except Exception as error:
        command = push_command(
            folder, target.repo_id, private=private, revision=revision, tag=tag, overwrite=overwrite
        )
        reason = explain(error, target.repo_id) if isinstance(error, (HTTPError, LongWaitError)) else describe(error)
        raise OSError(
            f"The push to '{target.repo_id}' failed: {str(reason).rstrip('.')}. Everything is still in '{folder}', finish "
            f"with `{command}`."
        ) from error
    return PushReport(
        repo_id=target.repo_id,
        revision=revision or DEFAULT_BRANCH,
        commit=commit,
        url=f"{api.endpoint}/{target.repo_id}/commit/{commit}",
        uploaded=changed,
        unchanged=[file.name for file in files if file.name not in changed],
        deleted=stale,
        left_out=left_out,
        num_bytes=sum(file.size for file in files if file.name in changed),
        duration_s=time.monotonic() - start,
        tag=tag,
    )


def push_command(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    overwrite: bool = False,
) -> str:
    """
    The command that pushes a folder.

    Args:
        folder, repo_id, private, revision, tag, overwrite:
            As in [`push_folder`].

    Returns:
        `str`: Command line.
    """
    command = ["gift-trl", "push", os.fspath(folder), "--repo_id", repo_id]
    command += ["--private"] if private else []
    command += ["--revision", revision] if revision is not None else []
    command += ["--tag", tag] if tag is not None else []
    command += ["--overwrite"] if overwrite else []
    return shlex.join(command)


def _find_target(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> _Target:
    repo_id, remote = check_repository(repo_id, private=private)
    if remote is None:
        return _Target(repo_id, False, False, None, {}, True, {})
    try:
        refs = call_hub(api.list_repo_refs, repo_id)
        branches = {branch.name: branch.target_commit for branch in refs.branches}
        head = branches.get(revision or DEFAULT_BRANCH, remote.sha)
        files = _remote_files(api, repo_id, head)
    except (HTTPError, LongWaitError) as error:
        raise explain(error, repo_id) from error
    # A branch without a commit of its own loses nothing: it was created for a push that then failed
    is_new = revision not in (None, DEFAULT_BRANCH) and head == remote.sha
    branch_exists = (revision or DEFAULT_BRANCH) in branches
    return _Target(
        repo_id, True, branch_exists, head, files, is_new, {tag.name: tag.target_commit for tag in refs.tags}
    )


def _remote_files(api: HfApi, repo_id: str, revision: str) -> dict[str, RepoFile]:
    entries = call_hub(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=revision)))
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _card_of(target: _Target) -> list[str]:
    return [CARD_FILE] if CARD_FILE in target.files else []


def _refuse_to_replace(target: _Target, revision: str | None, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise FileExistsError(
            f"'{target.repo_id}' holds other files at '{revision or DEFAULT_BRANCH}' that would be replaced or deleted "
            f"({shown}): push to another repository or `--revision`, or add `--overwrite`."
        )


def _create(api: HfApi, target: _Target, private: bool | None, revision: str | None) -> _Target:
    """The target, created if it does not exist."""
    if not target.exists:
        call_hub(api.create_repo, target.repo_id, private=private, exist_ok=True)
        target = _find_target(api, target.repo_id, private, revision)
    if not target.branch_exists:
        call_hub(api.create_branch, target.repo_id, branch=revision, revision=target.head, exist_ok=True)
    return target


def _commit(
    api: HfApi,
    target: _Target,
    files: list[LocalFile],
    changed: list[str],
    stale: list[str],
    revision: str | None,
    message: str,
) -> str:
    by_name = {file.name: file for file in files}

    def attempt() -> str:
        try:
            # Not `upload_folder`, which may make several commits: in between, the repository would hold half a model
            return api.create_commit(
                target.repo_id,
                [
                    *(CommitOperationDelete(name) for name in stale),
                    *(CommitOperationAdd(name, by_name[name].content) for name in changed),
                ],
                commit_message=message,
                revision=revision,
                parent_commit=target.head,
            ).oid
        except Exception as error:
            # The commit may have been made and its answer lost
            head = api.model_info(target.repo_id, revision=revision).sha
            if head == target.head:
                raise
            remote = _remote_files(api, target.repo_id, head)
            if differing_names(files, remote) or any(name in remote for name in stale):
                raise OSError(f"somebody else has committed to '{target.repo_id}' meanwhile ({head})") from error
            return head

    return call_hub(attempt)


def _verify(api: HfApi, repo_id: str, commit: str, files: list[LocalFile], stale: list[str]) -> None:
    remote = _remote_files(api, repo_id, commit)
    wrong = [*differing_names(files, remote), *(name for name in stale if name in remote)]
    if wrong:
        raise OSError(f"after the commit {commit}, the Hub and the folder differ in {', '.join(wrong)}")
    for file in files:
        file.check_unchanged()
