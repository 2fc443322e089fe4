"""The checkpoint that a killed run goes on from."""

import errno
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints


logger = get_logger(__name__)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Bytes: of a failed write torch says nothing but that
_LITTLE_ROOM = 2**20


def last_complete_checkpoint(args: TrainingArguments) -> str:
    """
    Finds the last checkpoint that was written to its end.

    The trainer writes a checkpoint file by file, so that a run killed meanwhile leaves a part of one, which transformers
    would take for the last. `trainer_state.json` is written last by the main process, and the state of the random numbers
    last by the others.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Arguments of the trainer, whose `output_dir` holds the checkpoints.

    Returns:
        `str`: Folder of the checkpoint.

    Raises:
        `ValueError`: If there is none that the run can go on from.
    """
    found = [(_step(path), path) for path in Path(str(args.output_dir)).glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    folders = [path for step, path in sorted(found, reverse=True) if step >= 0]
    if not folders:
        raise ValueError(
            f"`resume_from_checkpoint` is set, but `{args.output_dir}` holds no checkpoint. Unset it, or set `output_dir` to "
            "the folder of the interrupted run."
        )
    for path in folders:
        if _has_state(path) and (args.save_only_model or _is_complete(path, folders, args.world_size)):
            if path != folders[0]:
                logger.warning(
                    f"`{folders[0].name}` is not complete: the run was killed while it was written. Going on from "
                    f"`{path.name}`."
                )
            if args.save_only_model:
                logger.warning(
                    f"`{path.name}` was saved without the state of the optimizer (`save_only_model`), which starts anew: "
                    "the run will differ from an uninterrupted one."
                )
            return str(path)
    raise ValueError(
        f"None of the {len(folders)} checkpoints in `{args.output_dir}` can be gone on from: they were not written to their "
        "end, or without the state of the optimizer (`save_only_model`). Start again with another `output_dir`, or set "
        "`save_only_model` as it was set then."
    )


def find_checkpoint(args: TrainingArguments, wanted: str | bool | None) -> str | None:
    """
    Finds what `resume_from_checkpoint` asks for; to be called by every process.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Arguments of the trainer.
        wanted (`str` or `bool`, *optional*):
            Folder of a checkpoint; `True` for the last one that is complete, which there has to be; `"auto"` for that if there
            is one, so that the same command starts a run and goes on with it. The command line gives booleans as text.

    Returns:
        `str` or `None`: Folder of the checkpoint, `None` to begin.

    Raises:
        `ValueError`: As [`last_complete_checkpoint`], for `True`.
    """
    text = str(wanted).lower()
    if text not in ("true", "auto"):
        return None if text in ("false", "none", "") else str(wanted)
    found: list[str | None] = [None]
    try:
        found = [Path(last_complete_checkpoint(args)).name]
    except ValueError:
        if text == "true":
            raise
        if any(Path(str(args.output_dir)).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
            logger.warning(f"No checkpoint in `{args.output_dir}` can be gone on from: starting from the beginning.")
    # Each process would decide for itself, and one that sees another disk otherwise
    if args.world_size > 1:
        broadcast_object_list(found)
    return None if found[0] is None else str(Path(str(args.output_dir)) / found[0])


def finish_rotation(args: TrainingArguments, checkpoint: str) -> None:
    """
    Deletes what a killed run was about to delete, to keep no more than `save_total_limit` checkpoints.

    By the time of its change transformers would take the rest of one for the newest, and delete others in its place; and
    after the last step no further checkpoint is written whose saving would delete the oldest one.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Arguments of the trainer.
        checkpoint (`str`):
            The checkpoint that the run goes on from.
    """
    newest, output_dir = Path(checkpoint), Path(str(args.output_dir))
    if not args.save_total_limit or newest.parent.resolve() != output_dir.resolve():
        return
    folders = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step(path) >= 0]
    if len(folders) <= args.save_total_limit:
        return
    state = json.loads((newest / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    best, names = Path(state.get("best_model_checkpoint") or "").name, _names(newest)
    for path in folders:
        if _step(path) < _step(newest) and path.name != best and not names <= _names(path):
            shutil.rmtree(path, ignore_errors=True)
    if max(map(_step, folders)) == _step(newest):
        rotate_checkpoints(str(output_dir), args.save_total_limit, str(output_dir / best) if best else None)


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """
    Says what to do when a checkpoint or an adapter finds no room.

    Args:
        folder (`Path`):
            Folder that is written to.

    Raises:
        `OSError`: In place of what the libraries raise.
    """
    try:
        yield
    except Exception as error:
        # safetensors and torch have errors of their own, with the system's words or without
        number = error.errno if isinstance(error, OSError) else None
        if number not in _NO_ROOM and not any(os.strerror(known) in str(error) for known in _NO_ROOM):
            if not isinstance(error, RuntimeError) or shutil.disk_usage(_existing(folder)).free > _LITTLE_ROOM:
                raise
        raise OSError(
            number or errno.ENOSPC,
            "The disk is full. The checkpoints before are whole: free some space, or keep fewer (`save_total_limit`), and go on "
            "with `resume_from_checkpoint: true`",
            str(folder),
        ) from error


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def clear_checkpoint(output_dir: Path, step: int) -> None:
    """
    Removes what a killed run has left of a checkpoint that is about to be written.

    Its files would make the new one look complete before it is, and older than others: transformers removes the oldest.

    Args:
        output_dir (`Path`):
            Folder of the checkpoints.
        step (`int`):
            Step of the checkpoint.
    """
    folder = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    if folder.is_dir():
        # First what makes it complete: this process may be killed too
        (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        for path in folder.iterdir():  # the folder itself may be a link to another disk
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def logged_tokens(log_history: Sequence[Mapping[str, float]]) -> int:
    """
    Number of tokens that were trained on, as of the last log before a checkpoint.

    Args:
        log_history (`Sequence[Mapping[str, float]]`):
            What the trainer has logged.

    Returns:
        `int`: The number, 0 if none was logged.
    """
    return int(next((log["num_tokens"] for log in reversed(log_history) if "num_tokens" in log), 0))


def _is_complete(path: Path, folders: list[Path], num_processes: int) -> bool:
    states = list(path.glob("rng_state*.pth"))
    if not states or not all(map(zipfile.is_zipfile, states)):
        return False
    if [state.name for state in states] == ["rng_state.pth"]:  # of a single process
        return True
    # Fewer than there are processes now: by a run of fewer, unless other checkpoints show that it had more
    others = [len(list(folder.glob("rng_state_*.pth"))) for folder in folders]
    return len(states) > 1 and (len(states) >= num_processes or len(states) == max(others))


def _step(path: Path) -> int:
    """Number of the step, -1 for what is no checkpoint."""
    step = path.name.rpartition("-")[2]
    return int(step) if step.isdigit() and path.is_dir() else -1


def _names(checkpoint: Path) -> set[str]:
    """What is in a checkpoint, without the numbers of steps and processes."""
    return {re.sub(r"\d+", "#", str(path.relative_to(checkpoint))) for path in checkpoint.rglob("*")}


def _has_state(path: Path) -> bool:
    try:
        json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
