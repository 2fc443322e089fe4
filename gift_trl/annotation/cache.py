"""The confidences of a dataset on disk: parts as they finish, then one file that every later call opens."""

import atexit
import contextlib
import errno
import functools
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value, is_caching_enabled
from datasets.arrow_writer import ArrowWriter
from huggingface_hub.constants import HF_HOME

from gift_trl.annotation.rows import CHUNK_ROWS, RowStatistics, read_rows


CONFIDENCES = Features({"confidences": List(Value("float32"))})
_TABLE, _RECORD, _PLAN = "confidences.arrow", "annotation.json", "plan.json"
_PART = "part-{}.npz"
_ABANDONED_SECONDS = 3600


def fingerprint(fields: dict[str, Any]) -> str:
    """
    Hash of everything that changes the confidences.

    Args:
        fields (`dict[str, Any]`):
            What JSON can hold.

    Returns:
        `str`: First 32 hexadecimal digits of the SHA-256.
    """
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:32]


class AnnotationCache:
    """
    Folder of one annotation.

    While it is made, every process writes what it has scored as parts, each of which appears whole or not at all; when
    all rows are there, one Arrow file takes their place. A call that is killed loses at most the part it was at.

    Args:
        name (`str` or `None`):
            Fingerprint of the annotation. `None`, or caching turned off with [`~datasets.disable_caching`], gives a
            temporary folder that goes with the process.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Folder of all annotations. Defaults to `gift_trl/annotations` in the Hugging Face home (`HF_HOME`).
    """

    def __init__(self, name: str | None, cache_dir: str | os.PathLike[str] | None = None):
        if name is None or not is_caching_enabled():
            self.folder = Path(tempfile.mkdtemp(prefix="gift_trl_annotation_"))
            atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
            return
        root = Path(HF_HOME) / "gift_trl" / "annotations" if cache_dir is None else Path(cache_dir).expanduser()
        self.folder = root / name
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def is_complete(self) -> bool:
        """Whether every row is scored."""
        return (self.folder / _TABLE).is_file() and (self.folder / _RECORD).is_file()

    def check_space(self, statistics: RowStatistics) -> None:
        """
        Checks that the confidences will find room.

        Args:
            statistics ([`RowStatistics`]):
                Rows to be scored.

        Raises:
            `OSError`: If the disk has less room than they need.
        """
        # The parts, the working file and the result exist side by side for a moment
        needed = 4 * (2 * int(statistics.targets.sum()) + int(statistics.lengths.sum())) + 24 * len(statistics.lengths)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"The confidences need {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free. Free some space, or set "
                "`annotation_cache_dir` to a folder on a larger disk",
                str(self.folder),
            )

    def plan(self, default: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """
        How the rows are cut into batches; decided by the first call, so that one that goes on cuts them alike.

        Args:
            default (`Callable`):
                Decides it.

        Returns:
            `dict[str, Any]`: The plan.
        """
        path = self.folder / _PLAN
        if not path.is_file():
            plan = default()
            self._write(_PLAN, lambda file: file.write(json.dumps(plan).encode()))
            return plan
        return json.loads(path.read_text())

    def write_part(self, rows: list[int], confidences: list[np.ndarray]) -> None:
        """
        Writes the confidences of some rows.

        Args:
            rows (`list[int]`):
                Positions of the rows.
            confidences (`list[np.ndarray]`):
                Probabilities of the target tokens of each.
        """
        lengths = np.array([len(q) for q in confidences], dtype=np.int64)
        arrays = {"rows": np.array(rows, dtype=np.int64), "lengths": lengths, "q": np.concatenate(confidences)}
        self._write(_PART.format(secrets.token_hex(8)), lambda file: np.savez(file, **arrays))

    def file_names(self) -> set[str]:
        """Names of the finished files in this folder: the parts, or what has taken their place."""
        if self.is_complete:
            return {_TABLE, _RECORD}
        return self._part_names()

    def read_file(self, name: str) -> bytes:
        """Content of a file, to be sent to a process that does not see this folder."""
        return (self.folder / name).read_bytes()

    def copy_file(self, name: str, content: bytes) -> None:
        """Writes a file that another process has sent."""
        self._write(name, lambda file: file.write(content))

    def _part_names(self) -> set[str]:
        return {path.name for path in self.folder.glob(_PART.format("*"))}

    def scored_rows(self, statistics: RowStatistics) -> np.ndarray:
        """
        Rows that are in a part.

        Args:
            statistics ([`RowStatistics`]):
                Rows to be scored.

        Returns:
            `np.ndarray` of shape `(rows,)`, bool: Whether a row is there.
        """
        scored = np.zeros(len(statistics.lengths), dtype=bool)
        for name in self._part_names():
            with np.load(self.folder / name) as part:
                scored[part["rows"]] = True
        return scored

    def assemble(self, dataset: Dataset, statistics: RowStatistics, record: dict[str, Any]) -> None:
        """
        Writes the confidences of all rows as one Arrow file and removes the parts.

        Args:
            dataset ([`~datasets.Dataset`]):
                The rows, in Arrow format.
            statistics ([`RowStatistics`]):
                Their lengths and target counts.
            record (`dict[str, Any]`):
                What produced them.
        """
        offsets = np.concatenate([[0], np.cumsum(statistics.targets)])
        parts = self._part_names()
        with _explained(self.folder), tempfile.NamedTemporaryFile(dir=self.folder, prefix=".tmp-") as scratch:
            # On disk, since the confidences of a large dataset need not fit in memory
            flat = np.memmap(scratch, dtype=np.float32, mode="w+", shape=(offsets[-1],))
            for name in parts:
                try:
                    with np.load(self.folder / name) as part:
                        rows, q, starts = part["rows"], part["q"], np.concatenate([[0], np.cumsum(part["lengths"])])
                except FileNotFoundError:
                    if self.is_complete:  # another run of the same annotation was first
                        return
                    raise
                for i, row in enumerate(rows):
                    flat[offsets[row] : offsets[row + 1]] = q[starts[i] : starts[i + 1]]
            self._write(_TABLE, functools.partial(_write_table, dataset=dataset, flat=flat, offsets=offsets))
        self._write(_RECORD, lambda file: file.write(json.dumps(record, indent=2, sort_keys=True).encode()))
        for name in (*parts, _PLAN):
            (self.folder / name).unlink(missing_ok=True)
        for left in self.folder.glob(".tmp-*"):
            with contextlib.suppress(FileNotFoundError):
                # Of a call that was killed, unless another run is writing it now
                if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                    left.unlink()

    def load(self) -> tuple[Dataset, dict[str, Any]]:
        """
        Opens the confidences of a complete annotation.

        Returns:
            `tuple[Dataset, dict[str, Any]]`: A dataset with the column `confidences`, and what produced it.
        """
        return Dataset.from_file(str(self.folder / _TABLE)), json.loads((self.folder / _RECORD).read_text())

    def _write(self, name: str, write: Callable[[BinaryIO], Any]) -> None:
        temporary = self.folder / f".tmp-{secrets.token_hex(8)}"
        try:
            with _explained(self.folder), open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        os.replace(temporary, self.folder / name)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Says what to do when the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno)}; the confidences scored until now are kept. Free some space and run again, or "
            "set `annotation_cache_dir` to a folder on a larger disk",
            str(folder),
        ) from error


def _write_table(file: BinaryIO, dataset: Dataset, flat: np.ndarray, offsets: np.ndarray) -> None:
    with ArrowWriter(features=CONFIDENCES, stream=file) as writer:
        for table in _confidence_tables(dataset, flat, offsets):
            writer.write_table(table)
        writer.finalize(close_stream=False)


def _confidence_tables(dataset: Dataset, flat: np.ndarray, offsets: np.ndarray) -> Iterator[pa.Table]:
    names = np.arange(len(dataset))
    for start in range(0, len(dataset), CHUNK_ROWS):
        rows = read_rows(dataset, range(start, min(start + CHUNK_ROWS, len(dataset))), names)
        ends = np.cumsum([len(row.input_ids) for row in rows])
        values = np.zeros(ends[-1], dtype=np.float32)
        targets = np.concatenate([row.targets + end - len(row.input_ids) for row, end in zip(rows, ends, strict=True)])
        values[targets] = flat[offsets[start] : offsets[start + len(rows)]]
        lists = pa.ListArray.from_arrays(np.concatenate([[0], ends]).astype(np.int32), values)
        yield pa.table({"confidences": lists}, schema=CONFIDENCES.arrow_schema)
