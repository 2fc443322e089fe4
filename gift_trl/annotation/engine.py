"""Scores the rows of a dataset over the processes of a launch, in parts that survive a kill."""

import contextlib
import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from datasets.utils import tqdm

from gift_trl.annotation.cache import AnnotationCache
from gift_trl.annotation.rows import Row, RowStatistics, read_rows


# A kill costs a process at most what it has scored since its last part
_SECONDS_PER_PART = 30.0


def token_budget_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """
    Groups rows of similar length so that no batch exceeds a number of tokens once padded.

    Args:
        lengths (`Sequence[int]`):
            Number of tokens of every row.
        tokens_per_batch (`int`):
            Upper bound of rows × longest row of a batch. A longer row is a batch of its own.

    Returns:
        `list[list[int]]`: Row indices of every batch, longest rows first, so that a memory error comes at the start.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # Sorted by length: the first row of a batch is its longest
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens_per_batch:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def balance(costs: Sequence[int], processes: int) -> list[list[int]]:
    """
    Shares out work so that the processes end together: the largest piece first, to whoever has least.

    Args:
        costs (`Sequence[int]`):
            Cost of every piece.
        processes (`int`):
            Number of processes.

    Returns:
        `list[list[int]]`: Indices of the pieces of every process.
    """
    shares: list[list[int]] = [[] for _ in range(processes)]
    heap = [(0, process) for process in range(processes)]
    for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, process = heapq.heappop(heap)
        shares[process].append(piece)
        heapq.heappush(heap, (load + costs[piece], process))
    return shares


def find_scored_rows(cache: AnnotationCache, statistics: RowStatistics) -> np.ndarray:
    """
    Rows that some process has scored already.

    Args:
        cache ([`AnnotationCache`]):
            Folder of this process; every process may see a disk of its own.
        statistics ([`RowStatistics`]):
            The rows.

    Returns:
        `np.ndarray` of shape `(rows,)`, bool: The same in every process.
    """
    scored = cache.scored_rows(statistics)
    return np.logical_or.reduce(gather_object([scored])) if PartialState().num_processes > 1 else scored


def score_rows(
    dataset: Dataset,
    names: np.ndarray,
    statistics: RowStatistics,
    cache: AnnotationCache,
    scorer: Any,
    *,
    tokens_per_batch: int,
    scored: np.ndarray,
    sharded: bool = False,
    description: str = "Scoring",
) -> None:
    """
    Scores the rows that are not scored yet and writes them as parts.

    The batches depend on the lengths of the rows and on `tokens_per_batch` only, not on the number of processes nor on
    what is done already, and a batch is always scored whole: so every number comes out the same to the last bit.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with the columns `input_ids` and `labels`, in Arrow format.
        names (`np.ndarray` of shape `(rows,)`, int64):
            Index of every row in the dataset the user gave.
        statistics ([`RowStatistics`]):
            Lengths and target counts of the rows.
        cache ([`AnnotationCache`]):
            Where the parts go.
        scorer (`Any`):
            Object with a method `score`, as that of [`ModelScorer`].
        tokens_per_batch (`int`):
            Upper bound of the padded number of tokens in one forward pass.
        scored (`np.ndarray` of shape `(rows,)`, bool):
            Rows that are done, the same in every process.
        sharded (`bool`, *optional*, defaults to `False`):
            Whether each process holds a part of the weights, so that all must make the same number of passes.
        description (`str`, *optional*, defaults to `"Scoring"`):
            Label of the progress bar.

    Raises:
        `ValueError`: If a probability is NaN or infinite, or a process fails; the message names the rows. What is
            scored until then is kept.
    """
    state = PartialState()
    lengths = statistics.lengths
    batches = [b for b in token_budget_batches(lengths.tolist(), tokens_per_batch) if not scored[b].all()]
    shares = balance([len(batch) * int(lengths[batch[0]]) for batch in batches], state.num_processes)
    mine = [batches[i] for i in shares[state.process_index]]
    passes = max(len(share) for share in shares) if sharded else 0

    progress = tqdm(
        total=int(sum(lengths[batch].sum() for batch in mine)),
        desc=description,
        unit="tok",
        unit_scale=True,
        disable=not state.is_main_process,
        leave=False,
    )
    rows = (read_rows(dataset, batch, names) for batch in mine)
    row_names = [int(names[row]) for batch in mine for row in batch]
    error, broken = None, []
    try:
        with progress:
            broken = _write_parts(scorer.score(rows, passes), cache, progress.update)
    except Exception as caught:
        if state.num_processes == 1:
            raise _with_remedy(caught, tokens_per_batch) from caught.__cause__
        error = _describe_failure(caught, row_names, tokens_per_batch)
        if sharded:  # the others are waiting for this process's part of the weights, and cannot be told
            raise ValueError(error) from caught
    # Told to the other processes first: one that raised alone would leave them waiting for it
    failures = [(error, broken)]
    if state.num_processes > 1:
        failures = gather_object(failures)
    for error, _ in failures:
        if error is not None:
            raise ValueError(error)
    broken = sorted(row for _, rows in failures for row in rows)
    if broken:
        raise ValueError(
            f"The model gave NaN or infinite probabilities for {len(broken)} rows, the first being row {broken[0]}. "
            "Score with another dtype (`instruct_model_init_kwargs: {dtype: float32}`), or check the checkpoint."
        )


def _write_parts(
    results: Iterator[tuple[Row, np.ndarray]], cache: AnnotationCache, advance: Callable[[int], Any]
) -> list[int]:
    rows: list[int] = []
    confidences: list[np.ndarray] = []
    broken: list[int] = []
    written = time.monotonic()

    def write() -> None:
        if rows:
            cache.write_part(rows, confidences)
            rows.clear()
            confidences.clear()

    try:
        for row, q in results:
            advance(len(row.input_ids))
            if not np.isfinite(q).all():
                broken.append(row.name)
                continue
            rows.append(row.index)
            confidences.append(np.asarray(q, dtype=np.float32))
            if time.monotonic() - written >= _SECONDS_PER_PART:
                write()
                written = time.monotonic()
    finally:
        write()
    return broken


def _describe_failure(error: Exception, row_names: list[int], tokens_per_batch: int) -> str:
    state = PartialState()
    shown = ", ".join(map(str, row_names[:20])) + (", …" if len(row_names) > 20 else "")
    return (
        f"Process {state.process_index} of {state.num_processes} failed while it scored its {len(row_names)} rows "
        f"({shown}). What was scored until then is kept; run again to go on. {type(error).__name__}: "
        f"{_with_remedy(error, tokens_per_batch)}"
    )


def _with_remedy(error: Exception, tokens_per_batch: int) -> Exception:
    if not isinstance(error, torch.OutOfMemoryError):
        return error
    return ValueError(
        f"A forward pass of {tokens_per_batch} tokens did not fit beside the instruct model. Set "
        f"`annotation_tokens_per_batch` to {max(1, tokens_per_batch // 2)} or less. ({str(error).splitlines()[0]})"
    )


def together(action: Callable[[], Any]) -> Any:
    """
    Does something in every process, and fails in all of them if it fails in one.

    Args:
        action (`Callable`):
            What to do. It must not wait for the other processes.

    Returns:
        `Any`: What it returns in this process.

    Raises:
        `ValueError`: If it failed in another process; in this one, the error itself is raised.
    """
    state = PartialState()
    if state.num_processes == 1:
        return action()
    result, error = None, None
    try:
        result = action()
    except Exception as caught:
        error = caught
    errors = gather_object([None if error is None else f"{type(error).__name__}: {error}"])
    if error is not None:
        raise error
    for process, message in enumerate(errors):
        if message is not None:
            raise ValueError(f"Process {process} of {state.num_processes} failed: {message}")
    return result


def share_files(cache: AnnotationCache, *, with_main_only: bool = False) -> None:
    """
    Gives the processes each other's finished files, where they do not write to the same disk.

    Args:
        cache ([`AnnotationCache`]):
            Folder of this process.
        with_main_only (`bool`, *optional*, defaults to `False`):
            Whether only the main process needs them.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    seen = gather_object([cache.file_names()])
    for name in sorted(set().union(*seen)):
        lacking = [process for process, names in enumerate(seen) if name not in names]
        if with_main_only:
            lacking = lacking[:1] if lacking[:1] == [0] else []
        if not lacking:
            continue
        owner = next(process for process, names in enumerate(seen) if name in names)
        content = [cache.read_file(name) if state.process_index == owner else None]
        broadcast_object_list(content, from_process=owner)
        if state.process_index in lacking and content[0] is not None:
            cache.copy_file(name, content[0])


@contextlib.contextmanager
def keep_random_state() -> Iterator[None]:
    """Leaves PyTorch's random numbers as they were: annotating must not change a training that follows."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
