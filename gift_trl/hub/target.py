"""Where a model is pushed to: what a branch of a repository holds, and whether that may be replaced."""

import re
from dataclasses import dataclass, field

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from gift_trl.checkpoints import CARD_FILE
from gift_trl.hub.files import replaced_names
from gift_trl.repositories import HUB_ERRORS, call_hub, check_repository, explain


DEFAULT_BRANCH = "main"
_NOT_BRANCHES = re.compile(r"refs/.*|[0-9a-f]{40}")


@dataclass(frozen=True)
class Target:
    """
    A branch of a model repository.

    Args:
        repo_id (`str`):
            Id of the repository, with its namespace.
        branch (`str`):
            Name of the branch.
        exists (`bool`):
            Whether the repository exists.
        branch_exists (`bool`):
            Whether the branch does.
        head (`str` or `None`):
            Commit that the branch points to, or will when it is created.
        files (`dict[str, RepoFile]`):
            Files of that commit, by path.
        is_copy (`bool`):
            Whether the branch is or will be a copy of the main one, so that nothing is lost with what it holds.
        tags (`dict[str, str]`):
            Commits by tag.
    """

    repo_id: str
    branch: str
    exists: bool = False
    branch_exists: bool = False
    head: str | None = None
    files: dict[str, RepoFile] = field(default_factory=dict)
    is_copy: bool = False
    tags: dict[str, str] = field(default_factory=dict)


def check_push_target(
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    overwrite: bool = False,
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
        tag (`str`, *optional*):
            Tag for the commit to be.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether a model that is there may be replaced.

    Returns:
        `str`: The id with its namespace.

    Raises:
        `ValueError`: If the id or the branch is not legal, or the repository is public and `private` is set.
        `FileExistsError`: If the branch holds a model or a card and `overwrite` is not set, or the tag exists.
        `PermissionError`: If there is no login, or it may not write there.
        `ConnectionError`: If the Hub cannot be asked.
    """
    target = find_target(HfApi(token=True), repo_id, private, revision)
    if not overwrite:
        check_replaced(target, sorted({*replaced_names(target.files), CARD_FILE} & target.files.keys()))
    if tag in target.tags:
        raise FileExistsError(tag_exists(target, tag))
    return target.repo_id


def find_target(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> Target:
    """
    Asks the Hub for the branch to push to.

    Args:
        api ([`~huggingface_hub.HfApi`]):
            Client.
        repo_id, private, revision:
            As in [`check_push_target`].

    Returns:
        [`Target`]: The branch.

    Raises:
        `ValueError`, `PermissionError`, `ConnectionError`: As in [`check_push_target`].
    """
    branch = DEFAULT_BRANCH if revision is None else revision
    if not branch or _NOT_BRANCHES.fullmatch(branch):
        raise ValueError(f"'{branch}' is no name of a branch: a push ends in a commit of its own, on a branch.")
    repo_id, remote = check_repository(repo_id, private=private)
    if remote is None:
        return Target(repo_id, branch, files={}, tags={})
    try:
        refs = call_hub(api.list_repo_refs, repo_id)
        branches = {ref.name: ref.target_commit for ref in refs.branches}
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        head = branches.get(branch, remote.sha)
        files = call_hub(list_files, api, repo_id, head)
    except HUB_ERRORS as error:
        raise explain(error, repo_id) from error
    if branch in tags and branch not in branches:
        raise ValueError(f"'{branch}' is a tag of '{repo_id}', to which nothing can be pushed: name a branch.")
    # Such a branch was created for a push that failed before its commit
    is_copy = branch != DEFAULT_BRANCH and head == remote.sha
    return Target(repo_id, branch, True, branch in branches, head, files, is_copy, tags)


def list_files(api: HfApi, repo_id: str, commit: str) -> dict[str, RepoFile]:
    """Files of a commit by path, with sizes and hashes."""
    entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def check_replaced(target: Target, names: list[str]) -> None:
    """
    Refuses to replace files.

    Args:
        target ([`Target`]):
            The branch.
        names (`list[str]`):
            Files that would be changed or deleted on it.

    Raises:
        `FileExistsError`: If there are any, and the branch is no copy of the main one.
    """
    if names and not target.is_copy:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise FileExistsError(
            f"'{target.repo_id}' has files on the branch '{target.branch}' that would be replaced or deleted ({shown}): push "
            "to another repository or branch (`revision`), or replace them (`overwrite=True`, `--overwrite`)."
        )


def tag_exists(target: Target, tag: str) -> str:
    """What to say of a tag that stands at another commit."""
    return (
        f"The tag '{tag}' of '{target.repo_id}' exists, at the commit {target.tags[tag]}: choose another one, or delete it "
        "on the Hub first."
    )
