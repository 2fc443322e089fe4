"""Generations under way: each process appends to a file of its own, and nothing that is written is lost or made twice."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from gift_trl.evaluation.results import GENERATIONS_FILE, Generation, to_line, write_file


Key = tuple[int, int]
_PART = "generations.part-{:05d}.jsonl"


def read_done(folder: Path) -> set[Key]:
    """
    Finds what is generated already, and cuts off a last line that a kill left unfinished.

    Args:
        folder (`Path`):
            Folder of a model and task. No process may be writing to it.

    Returns:
        `set[tuple[int, int]]`: Problem and sample of every generation in the parts.

    Raises:
        `ValueError`: If a line cannot be read that is not the last.
    """
    done: set[Key] = set()
    for path in _parts(folder):
        whole = 0
        for key, _, end in _scan(path):
            done.add(key)
            whole = end
        if whole < path.stat().st_size:
            os.truncate(path, whole)
    return done


def has_parts(folder: Path) -> bool:
    """
    Whether a generation was begun and not finished.

    Args:
        folder (`Path`):
            Folder of a model and task.

    Returns:
        `bool`: Whether it was.
    """
    return bool(_parts(folder))


class PartWriter:
    """
    Appends generations to the part of a process; on return they are on the disk.

    Args:
        folder (`Path`):
            Folder of a model and task.
        process (`int`):
            Number of the process.
    """

    def __init__(self, folder: Path, process: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / _PART.format(process), "ab")

    def write(self, generations: Iterable[Generation]) -> None:
        """
        Appends generations.

        Args:
            generations (`Iterable[Generation]`):
                The generations.
        """
        self._file.write("".join(map(to_line, generations)).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def join_parts(folder: Path, expected: set[Key]) -> None:
    """
    Makes the file of all generations, sorted by problem and sample, and removes the parts.

    Args:
        folder (`Path`):
            Folder of a model and task.
        expected (`set[tuple[int, int]]`):
            Problem and sample of every generation there has to be.

    Raises:
        `ValueError`: If one is missing.
    """
    places: dict[Key, tuple[Path, int, int]] = {}
    for path in _parts(folder):
        for key, start, end in _scan(path):
            places.setdefault(key, (path, start, end))
    if missing := sorted(expected - places.keys()):
        raise ValueError(
            f"{len(missing)} generations are missing in '{folder}', the first of problem {missing[0][0]}. Run the evaluation "
            "again; processes on several machines need an `output_dir` on a disk that all of them see."
        )
    files = {path: open(path, "rb") for path in _parts(folder)}
    try:
        with write_file(folder / GENERATIONS_FILE, "wb") as joined:
            for key in sorted(expected):
                path, start, end = places[key]
                files[path].seek(start)
                joined.write(files[path].read(end - start))
    finally:
        for file in files.values():
            file.close()
    remove_parts(folder)


def remove_parts(folder: Path) -> None:
    """
    Removes the parts, such as those that a kill left behind after they had been joined.

    Args:
        folder (`Path`):
            Folder of a model and task.
    """
    for path in _parts(folder):
        path.unlink()


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob(_PART.replace("{:05d}", "*")))


def _scan(path: Path) -> Iterable[tuple[Key, int, int]]:
    """Problem and sample, first byte and end of every whole line."""
    start = 0
    with open(path, "rb") as lines:
        for line in lines:
            end = start + len(line)
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("the line has no end")
                values = json.loads(line)
                yield (values["problem"], values["sample"]), start, end
            except (ValueError, TypeError, KeyError) as error:
                if end == path.stat().st_size:
                    return
                raise ValueError(
                    f"'{path}' cannot be read at byte {start}, in its middle: it was damaged after it was written. Remove the "
                    "file; its generations are made anew."
                ) from error
            start = end
