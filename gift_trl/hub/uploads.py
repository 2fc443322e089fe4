"""Pushes in the background of a training: in order, one at a time, with an outcome for each."""

import glob
import json
import logging
import os
import queue
import re
import shutil
import threading
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from gift_trl.checkpoints import CARD_FILE
from gift_trl.hub.files import LEDGER_FILE, list_model_files
from gift_trl.hub.push import PushReport, push_command, push_folder
from gift_trl.hub.target import DEFAULT_BRANCH
from gift_trl.repositories import describe


logger = logging.getLogger(__name__)

# Pushes that may wait behind the one that runs; who asks for more waits too
_MAX_PENDING = 2
_SNAPSHOT_SUFFIX = ".push"


class PushLedger:
    """
    The branches that the run in a folder pushes to, so that it may replace there what it has pushed itself, also after it
    was killed and resumed.

    Args:
        output_dir (`str` or `os.PathLike`):
            Folder of the run.
    """

    def __init__(self, output_dir: str | os.PathLike):
        self._file = Path(output_dir) / LEDGER_FILE

    def __contains__(self, target: tuple[str, str | None]) -> bool:
        return _branch_name(*target) in self._read()

    def clear(self) -> None:
        """Forgets the branches of an earlier run."""
        self._file.unlink(missing_ok=True)

    def add(self, repo_id: str, revision: str | None) -> bool:
        """Notes a branch; returns whether that found room."""
        return self._write([*self._read(), _branch_name(repo_id, revision)])

    def remove(self, repo_id: str, revision: str | None) -> None:
        """Forgets a branch, to which nothing was pushed after all."""
        self._write([name for name in self._read() if name != _branch_name(repo_id, revision)])

    def _read(self) -> list[str]:
        try:
            return json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []

    def _write(self, names: list[str]) -> bool:
        temporary = self._file.with_name(f"{LEDGER_FILE}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(names), encoding="utf-8")
            os.replace(temporary, self._file)
        except OSError as error:  # no reason to stop a training
            temporary.unlink(missing_ok=True)
            logger.warning(f"`{self._file}` was not written: {error}")
            return False
        return True


@dataclass
class Upload:
    """
    A push, and how it ended.

    Args:
        folder (`Path`):
            Folder to push.
        repo_id (`str`):
            Id of the repository, with its namespace.
        options (`dict[str, Any]`):
            Further arguments of [`push_folder`].
        is_snapshot (`bool`):
            Whether the folder was made for this push alone, and is deleted afterwards.
        report ([`PushReport`], *optional*):
            What was done, once the files are there.
        problem (`str`, *optional*):
            Why they are not, and what to do about it.
    """

    folder: Path
    repo_id: str
    options: dict[str, Any] = field(default_factory=dict)
    is_snapshot: bool = False
    report: PushReport | None = None
    problem: str | None = None

    @property
    def target(self) -> tuple[str, str | None]:
        """Repository and branch."""
        return self.repo_id, self.options.get("revision")

    def command(self) -> str:
        """The command that makes this push."""
        return push_command(self.folder, self.repo_id, **self.options)


class UploadQueue:
    """
    Pushes of a run.

    Args:
        ledger ([`PushLedger`]):
            The branches of the run.
    """

    def __init__(self, ledger: PushLedger):
        self._ledger = ledger
        self._uploads: list[Upload] = []
        self._failed: set[Path] = set()
        # Branches of which it is known that what they hold is this run's
        self._owned: set[tuple[str, str | None]] = set()
        self._queue: queue.Queue[Upload] = queue.Queue(_MAX_PENDING)
        # Branches of which nothing could be noted, and so nothing was pushed
        self._unnoted: set[tuple[str, str | None]] = set()
        self._thread: threading.Thread | None = None
        self._shows_bars = not are_progress_bars_disabled()

    def add(self, upload: Upload) -> None:
        """Adds a push; waits if there are too many before it."""
        if self._thread is None:
            # A daemon: a training that fails or is interrupted ends at once, and what is missing is pushed later
            self._thread = threading.Thread(target=self._run, name="gift_trl-uploads", daemon=True)
            self._thread.start()
        if self._shows_bars:
            disable_progress_bars()  # they would be drawn across the one of the training
        is_first = all(earlier.target != upload.target for earlier in self._uploads)
        if is_first or upload.target in self._unnoted:
            self._unnoted.discard(upload.target)
            if upload.target in self._ledger:
                self._owned.add(upload.target)
            # Long before it is done: the commit may be made and the process killed before its answer comes
            elif not self._ledger.add(*upload.target):
                self._unnoted.add(upload.target)
                upload.problem = (
                    f"Nothing was pushed to '{upload.repo_id}': a note of it found no room in the run's folder, without which "
                    f"the run could not go on after a kill. Make room, and run `{upload.command()}`."
                )
                logger.warning(upload.problem)
        self._uploads.append(upload)
        if upload.problem is not None:
            if upload.is_snapshot:
                shutil.rmtree(upload.folder, ignore_errors=True)
            return
        self._queue.put(upload)

    def is_pending(self, target: tuple[str, str | None]) -> bool:
        """Whether a push to a branch waits or runs."""
        return any(upload.target == target and _is_pending(upload) for upload in self._uploads)

    def holds(self, folder: Path) -> bool:
        """Whether a folder is needed: its push waits, runs or has failed."""
        return folder in self._failed or any(
            upload.folder == folder and upload.report is None for upload in self._uploads
        )

    def pending(self) -> list[Upload]:
        """Pushes that wait or run."""
        return [upload for upload in self._uploads if _is_pending(upload)]

    def wait(self) -> list[Upload]:
        """
        Waits until every push has ended.

        Returns:
            `list[Upload]`: The last one to each branch: what came before it was replaced, or would have been. They are
            not returned again.
        """
        if self._shows_bars:
            enable_progress_bars()
        self._queue.join()
        last = {upload.target: upload for upload in self._uploads}
        self._failed |= {upload.folder for upload in self._uploads if upload.problem is not None}
        self._uploads = []
        return list(last.values())

    def _run(self) -> None:
        while True:
            upload = self._queue.get()
            try:
                self._push(upload)
            finally:
                if upload.is_snapshot:
                    shutil.rmtree(upload.folder, ignore_errors=True)
                self._queue.task_done()

    def _push(self, upload: Upload) -> None:
        owned = upload.target in self._owned
        if owned:
            upload.options["overwrite"] = True
        try:
            upload.report = push_folder(upload.folder, upload.repo_id, **upload.options)
        except Exception as error:  # whatever it is, the training goes on
            problem = describe(error)
            if isinstance(error, FileExistsError) and not owned:
                self._ledger.remove(*upload.target)
            else:
                self._owned.add(upload.target)  # even so the commit may be there
            if "gift-trl push" not in problem:
                problem = f"The push to '{upload.repo_id}' failed: {problem}. To finish, run `{upload.command()}`."
            upload.problem = problem
            if upload.is_snapshot:
                problem = f"A push to '{upload.repo_id}' failed, the next one will try again: {describe(error)}"
            logger.warning(problem)
        else:
            self._owned.add(upload.target)


def take_snapshot(checkpoint: Path, output_dir: str | os.PathLike) -> Path:
    """
    Keeps the files of a checkpoint that are pushed, however soon it is deleted.

    Args:
        checkpoint (`Path`):
            Folder of the checkpoint, whose files are not written to in place.
        output_dir (`str` or `os.PathLike`):
            Folder of the run, whose card is taken if the checkpoint has none.

    Returns:
        `Path`: Folder beside `output_dir`, of hard links where the disk has them.

    Raises:
        `FileNotFoundError`, `ValueError`: If the checkpoint is not complete.
    """
    output_dir = Path(output_dir).resolve()
    sources = {file.name: file.path for file in list_model_files(checkpoint)[0]}
    if (output_dir / CARD_FILE).is_file():
        sources.setdefault(CARD_FILE, output_dir / CARD_FILE)
    snapshot = output_dir.parent / f".{output_dir.name}.{uuid.uuid4().hex[:12]}{_SNAPSHOT_SUFFIX}"
    try:
        for name, source in sources.items():
            target = snapshot / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                # Not of the card, which is written anew later
                (shutil.copyfile if source.parent == output_dir else os.link)(source, target)
            except OSError:
                shutil.copyfile(source, target)
    except BaseException:
        shutil.rmtree(snapshot, ignore_errors=True)
        raise
    return snapshot


def remove_snapshots(output_dir: str | os.PathLike) -> None:
    """Removes what a run that was killed has left of [`take_snapshot`]."""
    output_dir = Path(output_dir).resolve()
    for path in output_dir.parent.glob(f".{glob.escape(output_dir.name)}.*{_SNAPSHOT_SUFFIX}"):
        # Not those of a run in a folder whose name begins alike
        if re.fullmatch(rf"\.{re.escape(output_dir.name)}\.[0-9a-f]{{12}}{re.escape(_SNAPSHOT_SUFFIX)}", path.name):
            shutil.rmtree(path, ignore_errors=True)


def _is_pending(upload: Upload) -> bool:
    return upload.report is None and upload.problem is None


def _branch_name(repo_id: str, revision: str | None) -> str:
    return f"{repo_id}@{revision or DEFAULT_BRANCH}"
