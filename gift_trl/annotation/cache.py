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
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from accelerate.logging import get_logger
from datasets import Dataset, Features, List, Value, is_caching_enabled
from datasets.arrow_writer import ArrowWriter
from huggingface_hub.constants import HF_HOME

from gift_trl.annotation.rows import CHUNK_ROWS, RowStatistics, read_rows


logger = get_logger(__name__)

CONFIDENCES = Features({"confidences": List(Value("float32"))})
_TABLE, _RECORD, _PLAN = "confidences.arrow", "annotation.json", "plan.json"
_PART, _TEMPORARY = "part-{}.npz", ".tmp-{}"
_ABANDONED_SECONDS = 3600
_BLOCK_BYTES = 2**20


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
    all rows are there, one Arrow file takes their place. A call that is killed loses at most the part it was at. Several
    runs may work on the same annotation: they write the same numbers, and whoever is first completes it.

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

    def check_space(self, statistics: RowStatistics, scored: np.ndarray) -> None:
        """
        Checks that the confidences will find room.

        Args:
            statistics ([`RowStatistics`]):
                All rows.
            scored (`np.ndarray` of shape `(rows,)`, bool):
                Rows whose parts are there already.

        Raises:
            `OSError`: If the disk has less room than they need.
        """
        # The parts, the working file and the result exist side by side for a moment
        targets, rows = int(statistics.targets.sum()), len(statistics.lengths)
        needed = 4 * (targets + int(statistics.targets[~scored].sum()) + int(statistics.lengths.sum())) + 24 * rows
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"The confidences need {needed / 1e6:,.3g} MB, and {free / 1e6:,.3g} MB are free. Free some space, or set "
                "`annotation_cache_dir` to a folder on a larger disk",
                str(self.folder),
            )

    def read_plan(self) -> dict[str, Any] | None:
        """How the rows that are scored were, `None` if nothing is known."""
        try:
            return json.loads((self.folder / _PLAN).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def write_plan(self, plan: dict[str, Any]) -> None:
        """
        Says how the rows are scored, so that a call that goes on does it alike.

        Args:
            plan (`dict[str, Any]`):
                What JSON can hold.
        """
        if plan != self.read_plan():
            self._write(_PLAN, lambda file: file.write(json.dumps(plan, sort_keys=True).encode()))

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
        positions, q = np.array(rows, dtype=np.int64), np.concatenate(confidences)
        name = _PART.format(secrets.token_hex(8))
        self._write(name, lambda file: np.savez(file, rows=positions, lengths=lengths, q=q))

    def file_names(self) -> set[str]:
        """Names of the finished files in this folder: the parts, or what has taken their place."""
        if self.is_complete:
            return {_TABLE, _RECORD}
        return {path.name for path in self.folder.glob(_PART.format("*"))}

    def read_file(self, name: str) -> bytes | None:
        """Content of a file, to be sent to a process that does not see this folder; `None` if it has gone."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / name).read_bytes()
        return None

    def copy_file(self, name: str, content: bytes) -> None:
        """Writes a file that another process has sent."""
        self._write(name, lambda file: file.write(content))

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
        for rows, _, _ in self._parts():
            scored[rows] = True
        return scored

    def _parts(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for path in sorted(self.folder.glob(_PART.format("*"))):
            try:
                with np.load(path) as part:
                    yield part["rows"], part["lengths"], part["q"]
            except FileNotFoundError:  # another run has completed the annotation
                continue
            except (EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
                logger.warning(f"'{path}' is damaged ({error}), and its rows are scored again.")
                path.unlink(missing_ok=True)

    def assemble(self, dataset: Dataset, statistics: RowStatistics, record: dict[str, Any]) -> None:
        """
        Writes the confidences of all rows as one Arrow file, after which the parts are not needed any more.

        Args:
            dataset ([`~datasets.Dataset`]):
                The rows, in Arrow format.
            statistics ([`RowStatistics`]):
                Their lengths and target counts.
            record (`dict[str, Any]`):
                What produced them.

        Raises:
            `ValueError`: If rows are in no part.
        """
        offsets = np.concatenate([[0], np.cumsum(statistics.targets)])
        found = np.zeros(len(statistics.targets), dtype=bool)
        # Temporary files are not memory, since the confidences of a large dataset need not fit there
        with _explained(self.folder), tempfile.TemporaryFile(dir=self.folder) as scratch:
            _reserve(scratch, 4 * int(offsets[-1]))
            flat = np.memmap(scratch, dtype=np.float32, mode="r+", shape=(offsets[-1],))
            for rows, lengths, q in self._parts():
                starts = np.concatenate([[0], np.cumsum(lengths)])
                for i, row in enumerate(rows):
                    flat[offsets[row] : offsets[row + 1]] = q[starts[i] : starts[i + 1]]
                found[rows] = True
            if not found.all():
                if self.is_complete:  # another run of the same annotation was first
                    return
                raise ValueError(
                    f"The confidences of {(~found).sum()} rows have gone from '{self.folder}' since they were scored. Run "
                    "again, and leave the folder alone meanwhile."
                )
            self._write(_TABLE, functools.partial(_write_table, dataset=dataset, flat=flat, offsets=offsets))
        self._write(_RECORD, lambda file: file.write(json.dumps(record, indent=2, sort_keys=True).encode()))

    def load(self) -> tuple[Dataset, dict[str, Any]]:
        """
        Opens the confidences of a complete annotation, and removes what is left of its making.

        Returns:
            `tuple[Dataset, dict[str, Any]]`: A dataset with the column `confidences`, and what produced it.

        Raises:
            `ValueError`: If the files are damaged.
        """
        try:
            dataset = Dataset.from_file(str(self.folder / _TABLE))
            record = json.loads((self.folder / _RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:  # those of Arrow are one or the other
            raise ValueError(
                f"The annotation in '{self.folder}' is damaged ({error}). Delete the folder and run again."
            ) from error
        for path in (*self.folder.glob(_PART.format("*")), self.folder / _PLAN):
            path.unlink(missing_ok=True)
        for path in self.folder.glob(_TEMPORARY.format("*")):
            with contextlib.suppress(FileNotFoundError):
                # Of a call that was killed, unless another run is writing it now
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()
        return dataset, record

    def _write(self, name: str, write: Callable[[BinaryIO], Any]) -> None:
        temporary = self.folder / _TEMPORARY.format(secrets.token_hex(8))
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


def _reserve(file: BinaryIO, size: int) -> None:
    # With real zeros: a page of a sparse file that finds no room on the disk kills the process without a message
    block = bytes(_BLOCK_BYTES)
    for start in range(0, size, _BLOCK_BYTES):
        file.write(block[: min(_BLOCK_BYTES, size - start)])
    file.flush()


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
