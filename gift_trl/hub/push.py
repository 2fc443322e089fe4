"""A model or adapter folder, pushed to the Hub in one commit that is checked afterwards."""

import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import RepoFile

from gift_trl.checkpoints import CARD_FILE
from gift_trl.hub.files import (
    LocalFile,
    hash_files,
    list_model_files,
    named_base,
    read_card,
    replaced_names,
    warn_of_local_base,
)
from gift_trl.hub.target import check_replaced, find_target, list_files, tag_exists
from gift_trl.repositories import HUB_ERRORS, UnconfirmedError, call_hub, describe, explain


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
            Files that the branch held already.
        deleted (`list[str]`):
            Files of an earlier model that the commit removed.
        left_out (`list[str]`):
            Files of the folder that are not pushed.
        num_bytes (`int`):
            Size of the uploaded files. What the Hub stored before, such as in a push that failed, was not sent again.
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

    def summary(self) -> str:
        """
        The push in a few lines for the terminal.

        Returns:
            `str`: Text of a few lines.
        """
        where = f"{self.repo_id}, branch {self.revision}" + (f", tag {self.tag}" if self.tag else "")
        if self.uploaded or self.deleted:
            lines = [f"Pushed to {where}"]
            parts = [f"{len(self.uploaded)} files ({_size(self.num_bytes)})", f"{len(self.unchanged)} unchanged"]
            parts += [f"{len(self.deleted)} of an earlier model deleted"] if self.deleted else []
        else:
            lines = [f"Nothing to push: the files are there already ({where})"]
            parts = [f"{len(self.unchanged)} files"]
        lines.append(f"  {', '.join(parts)}; names, sizes and hashes checked; {self.duration_s:.1f} s")
        if self.left_out:
            shown = ", ".join(self.left_out[:5]) + (f" and {len(self.left_out) - 5} more" if self.left_out[5:] else "")
            lines.append(f"  left out, as no part of a model: {shown}")
        return "\n".join([*lines, f"  {self.url}"])


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    commit_message: str | None = None,
    overwrite: bool = False,
    max_size_gb: float | None = None,
) -> PushReport:
    """
    Pushes a model or an adapter to a model repository on the Hub, in one commit, and checks what is there afterwards.

    The token is that of `hf auth login` or `HF_TOKEN`. The folder is not changed. A push that failed is finished by
    the same call: what the Hub has is not sent again, and a commit whose answer was lost is found.

    Without `overwrite`, a push only adds files to a branch. With it, files of the same name are replaced, and weights
    and descriptions of an earlier model that the folder does not have are deleted in the same commit; other files, such
    as pictures and documents, stay.

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
            Whether files on the branch may be replaced.
        max_size_gb (`float`, *optional*):
            Largest size of the upload in GB (10⁹ bytes), such as what the storage has left.

    Returns:
        [`PushReport`]: What was done.

    Raises:
        `FileNotFoundError`, `ValueError`: If the folder holds no complete model or adapter, its card is not valid, it is too
            large, or the target is not legal.
        `FileExistsError`: If files on the branch would be replaced, or the tag belongs to another commit.
        `PermissionError`, `ConnectionError`, `OSError`: If the push fails; with the command that finishes it.
    """
    start = time.monotonic()
    folder = Path(folder).expanduser()
    files, left_out = list_model_files(folder)
    warn_of_local_base(named_base(folder))
    push = _Push(
        folder, files, repo_id, private, revision, tag, commit_message, overwrite=overwrite, max_size_gb=max_size_gb
    )
    try:
        push.plan()
    except (ConnectionError, PermissionError) as error:
        raise type(error)(f"{error} Then push with `{push.command()}`.") from error
    try:
        commit = push.run()
    # The client, its HTTP library and its transfer library have no error in common
    except Exception as error:
        raise push.failure(error) from error
    return PushReport(
        repo_id=push.repo_id,
        revision=push.target.branch,
        commit=commit,
        url=f"{push.api.endpoint}/{push.repo_id}/commit/{commit}",
        uploaded=[file.name for file in push.changed],
        unchanged=[file.name for file in files if file not in push.changed],
        deleted=push.stale,
        left_out=left_out,
        num_bytes=push.num_bytes,
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
    commit_message: str | None = None,
    overwrite: bool = False,
) -> str:
    """
    The command that pushes a folder.

    Args:
        folder, repo_id, private, revision, tag, commit_message, overwrite:
            As in [`push_folder`].

    Returns:
        `str`: Command line.
    """
    command = ["gift-trl", "push", os.fspath(folder), "--repo_id", repo_id]
    command += ["--private"] if private else []
    for name, value in {"revision": revision, "tag": tag, "commit_message": commit_message}.items():
        command += [f"--{name}", value] if value is not None else []
    command += ["--overwrite"] if overwrite else []
    return shlex.join(command)


class _Push:
    """One push: planned from what the folder and the branch hold, then made."""

    def __init__(
        self,
        folder: Path,
        files: list[LocalFile],
        repo_id: str,
        private: bool | None,
        revision: str | None,
        tag: str | None,
        commit_message: str | None,
        *,
        overwrite: bool,
        max_size_gb: float | None,
    ):
        self.api = HfApi(token=True)
        self.folder, self.files, self.card = folder, files, read_card(folder)
        self.repo_id, self.private, self.revision, self.tag = repo_id, private, revision, tag
        self.commit_message, self.overwrite, self.max_size_gb = commit_message, overwrite, max_size_gb
        self.step = "preparing it"

    def plan(self) -> None:
        """Compares the folder with the branch; raises what speaks against the push before anything is changed."""
        self.target = find_target(self.api, self.repo_id, self.private, self.revision)
        self.repo_id = self.target.repo_id
        hash_files(self.files)
        self.changed = [file for file in self.files if not file.equals(self.target.files.get(file.name))]
        names = {file.name for file in self.files}
        self.stale = [name for name in replaced_names(self.target.files) if name not in names]
        self.num_bytes = sum(file.size for file in self.changed)
        if not self.overwrite:
            replaced = [file.name for file in self.changed if file.name in self.target.files]
            try:
                check_replaced(self.target, sorted([*replaced, *self.stale]))
            except FileExistsError as error:
                raise FileExistsError(f"{error} That would be `{self.command(overwrite=True)}`.") from error
        tagged = self.target.tags.get(self.tag)
        if tagged is not None and (self.changed or self.stale or tagged != self.target.head):
            raise FileExistsError(tag_exists(self.target, self.tag))
        if self.max_size_gb is not None and self.num_bytes > self.max_size_gb * 1e9:
            raise ValueError(
                f"The upload has {_size(self.num_bytes)}, more than the {self.max_size_gb:g} GB of `max_size_gb`: make room on "
                "the Hub, or push to the namespace of somebody who has it."
            )
        if self.card is not None:
            self._check_card()

    def run(self) -> str:
        """Makes the push; returns the commit that holds the files."""
        self._create()
        commit = self.target.head
        if self.changed or self.stale:
            commit = self._commit()
        self.step = f"checking the commit {commit}"
        held = call_hub(list_files, self.api, self.repo_id, commit)
        if wrong := self._differences(held):
            raise OSError(f"the Hub and the folder differ in {', '.join(wrong)}")
        if self.tag is not None:
            self.step = f"tagging the commit {commit}, which is complete"
            call_hub(
                self._make,
                lambda: self.api.create_tag(self.repo_id, tag=self.tag, revision=commit, exist_ok=True),
                lambda: self._is_tagged(commit),
            )
        return commit

    def command(self, **changes: bool) -> str:
        """The command that makes this push."""
        options = {name: getattr(self, name) for name in ("private", "revision", "tag", "commit_message", "overwrite")}
        return push_command(self.folder, self.repo_id, **{**options, **changes})

    def failure(self, error: Exception) -> OSError:
        """What to say of a push that failed after it was planned."""
        asked = (*HUB_ERRORS, RuntimeError, ValueError)
        found = explain(error, self.repo_id) if isinstance(error, asked) else error
        kind = type(found) if isinstance(found, (ConnectionError, PermissionError)) else OSError
        return kind(
            f"The push to '{self.repo_id}' failed while {self.step}: {describe(found)}. The files are safe in "
            f"'{self.folder}'; to finish, run `{self.command()}`."
        )

    def _check_card(self) -> None:
        try:
            call_hub(self.card.validate, repo_type="model")
        except HUB_ERRORS as error:
            raise explain(error, self.repo_id) from error
        except ValueError as error:
            raise ValueError(
                f"The Hub does not take the metadata of '{self.folder / CARD_FILE}' ({describe(error)}): mend what stands "
                "between its lines `---`."
            ) from error

    def _create(self) -> None:
        """Creates the repository and the branch if they do not exist."""
        if not self.target.exists:
            self.step = "creating the repository"
            call_hub(
                self._make,
                lambda: self.api.create_repo(self.repo_id, private=self.private),
                lambda: self.api.repo_exists(self.repo_id),
            )
            # Somebody else may have been faster
            self.plan()
        if not self.target.branch_exists:
            branch, start = self.target.branch, self.target.head
            self.step = f"creating the branch '{branch}'"
            call_hub(
                self._make,
                lambda: self.api.create_branch(self.repo_id, branch=branch, revision=start, exist_ok=True),
                lambda: branch in {ref.name for ref in self.api.list_repo_refs(self.repo_id).branches},
            )

    def _make(self, change: Callable[[], object], is_made: Callable[[], bool]) -> None:
        """Changes something on the Hub. Whatever the answer: what counts is whether the change was made, now or before."""
        try:
            change()
        except Exception:
            if not is_made():
                raise
        else:
            if not is_made():
                raise UnconfirmedError("the Hub took the change and does not show it")

    def _is_tagged(self, commit: str) -> bool:
        tags = {ref.name: ref.target_commit for ref in self.api.list_repo_refs(self.repo_id).tags}
        if tags.get(self.tag, commit) != commit:
            raise FileExistsError(tag_exists(replace(self.target, tags=tags), self.tag))
        return self.tag in tags

    def _commit(self) -> str:
        additions = [file.addition() for file in self.changed]
        self.step = "uploading the files"
        # Nothing that the repository's .gitignore says may leave a part of the model out
        call_hub(
            self.api.preupload_lfs_files,
            self.repo_id,
            additions,
            revision=self.target.branch,
            free_memory=False,
            gitignore_content="",
        )
        for file in self.changed:
            file.check_unchanged()
        self.step = "committing the files"
        return call_hub(self._commit_once, additions)

    def _commit_once(self, additions: list[CommitOperationAdd]) -> str:
        try:
            # Not `upload_folder`, which may make several commits: in between, the branch would hold half a model
            return self.api.create_commit(
                self.repo_id,
                [*(CommitOperationDelete(name) for name in self.stale), *additions],
                commit_message=self.commit_message or f"Upload {self.folder.resolve().name} with gift_trl",
                revision=self.target.branch,
                parent_commit=self.target.head,
            ).oid
        except Exception as error:
            # The commit may have been made, now or before, and its answer lost
            head = self.api.model_info(self.repo_id, revision=self.target.branch).sha
            if head == self.target.head:
                raise
            if self._differences(list_files(self.api, self.repo_id, head)):
                raise OSError(
                    f"somebody else has committed to the branch '{self.target.branch}' meanwhile ({head})"
                ) from error
            return head

    def _differences(self, held: dict[str, RepoFile]) -> list[str]:
        return [
            *(file.name for file in self.files if not file.equals(held.get(file.name))),
            *(name for name in self.stale if name in held),
        ]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
