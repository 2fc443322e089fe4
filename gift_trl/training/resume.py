"""The checkpoint that a killed run goes on from."""

import json
import os
import zipfile
from pathlib import Path

from accelerate.logging import get_logger
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = get_logger(__name__)


def last_complete_checkpoint(output_dir: str | os.PathLike[str], num_processes: int = 1) -> str:
    """
    Finds the last checkpoint that was written to its end.

    The trainer writes a checkpoint file by file, so that a run killed meanwhile leaves a part of one, which transformers
    would take for the last. `trainer_state.json` is written last by the main process, and the state of the random numbers
    last by the others.

    Args:
        output_dir (`str` or `os.PathLike`):
            Output folder of the interrupted run.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of processes. A checkpoint of another number is taken if there is none of this one.

    Returns:
        `str`: Folder of the checkpoint.

    Raises:
        `ValueError`: If there is none that the run can go on from.
    """
    folders = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step(path) is not None]
    folders.sort(key=_step, reverse=True)
    if not folders:
        raise ValueError(
            f"`resume_from_checkpoint` is set, but `{output_dir}` holds no checkpoint. Unset it, or set `output_dir` to the "
            "folder of the interrupted run."
        )
    written = [path for path in folders if _has_state(path)]
    for expected in (num_processes, None):
        for path in written:
            states = list(path.glob("rng_state*.pth"))
            if states and all(map(zipfile.is_zipfile, states)) and expected in (None, len(states)):
                if path != folders[0]:
                    logger.warning(
                        f"`{folders[0].name}` is not complete: the run was killed while it was written. Going on from "
                        f"`{path.name}`."
                    )
                return str(path)
    raise ValueError(
        f"None of the {len(folders)} checkpoints in `{output_dir}` can be gone on from: they were not written to their end, or "
        "without the state of the optimizer (`save_only_model`). Start again with another `output_dir`."
    )


def _step(path: Path) -> int | None:
    step = path.name.rpartition("-")[2]
    return int(step) if step.isdigit() and path.is_dir() else None


def _has_state(path: Path) -> bool:
    try:
        json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
