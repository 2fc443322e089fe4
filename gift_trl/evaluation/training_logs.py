"""Where the loss of a training came from, as the log says that the trainer keeps beside its checkpoints."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gift_trl.checkpoints import TRAINING_FILE


_STATE_FILE = "trainer_state.json"
_SIGNAL_KEYS = ("gift/signal_low", "gift/signal_mid", "gift/signal_high")


@dataclass(frozen=True)
class TrainingSignal:
    """
    Where the loss of a training came from.

    Args:
        name (`str`):
            Name of the run: the last parts of its folder's path that tell it from others.
        shares (`tuple[float, float, float]`):
            Shares, in percent, of the loss Σ w·ℓ that came from tokens with q < 0.2, 0.2 ≤ q ≤ 0.8 and q > 0.8: mean over
            the steps.
        steps (`int`):
            Number of steps that the log covers.
    """

    name: str
    shares: tuple[float, float, float]
    steps: int


def read_training_signals(folders: Sequence[str | os.PathLike]) -> list[TrainingSignal]:
    """
    Reads the learning signal of trainings.

    Args:
        folders (`Sequence[str | os.PathLike]`):
            For each training its output folder, one of its checkpoints, or the file itself: a `trainer_state.json`, or the
            `gift_training.json` beside an adapter.

    Returns:
        `list[TrainingSignal]`: One for each.

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If it cannot be read, or holds no learning signal.
    """
    paths = list(dict.fromkeys(Path(folder).expanduser().resolve() for folder in folders))
    signals = []
    for path, name in zip(paths, _short_names(paths), strict=True):
        file = _find_log(path)
        try:
            found = mean_shares(_read_log(file))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"'{file}' is not the log of a training ({error!r}): name another folder.") from error
        if found is None:
            raise ValueError(
                f"'{file}' holds no learning signal (`{_SIGNAL_KEYS[0]}` and so on): `GIFTSFTTrainer` has not logged any."
            )
        signals.append(TrainingSignal(name, *found))
    return signals


def _read_log(file: Path) -> list[dict[str, Any]]:
    """The entries of a log; those of `gift_training.json` are columns."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if "log_history" in content:
        return content["log_history"]
    signal = content["signal"]
    columns = [signal.get(name, []) for name in ("step", "low", "mid", "high")]
    return [dict(zip(("step", *_SIGNAL_KEYS), row, strict=True)) for row in zip(*columns, strict=True)]


def mean_shares(log: Sequence[dict[str, Any]]) -> tuple[tuple[float, float, float], int] | None:
    """
    Mean over the steps of the shares of the loss by confidence.

    Args:
        log (`Sequence[dict[str, Any]]`):
            `log_history` of a trainer's state. Each entry speaks of the steps since the one before.

    Returns:
        `tuple[tuple[float, float, float], int]` or `None`: Shares in percent from low to high confidence, and the number of
        steps; `None` if the log says nothing of them.
    """
    sums, before = [0.0, 0.0, 0.0], 0
    for entry in log:
        if all(key in entry for key in _SIGNAL_KEYS):
            for band, key in enumerate(_SIGNAL_KEYS):
                sums[band] += 100 * entry[key] * (entry["step"] - before)
            before = entry["step"]
    return ((sums[0] / before, sums[1] / before, sums[2] / before), before) if before else None


def _find_log(path: Path) -> Path:
    """The file of a training that tells most: the state at its end, the facts beside its adapter, its last checkpoint."""
    if path.is_file():
        return path
    checkpoints = sorted(path.glob(f"checkpoint-*/{_STATE_FILE}"), key=lambda file: _step(file.parent), reverse=True)
    for file in (path / _STATE_FILE, path / TRAINING_FILE, *checkpoints):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"'{path}' holds no {_STATE_FILE} and no {TRAINING_FILE}, nor does a checkpoint in it: name the `output_dir` of a "
        "training."
    )


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as it takes to tell the paths apart."""
    paths = [path.parent if path.is_file() else path for path in paths]
    for depth in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return [path.name for path in paths]
