"""Processes that compare answers, each of which can be killed at the cost of one answer."""

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm.auto import tqdm


# A process takes half a second to start, in which another one compares about this many pairs
_PAIRS_PER_PROCESS = 100
_MOST_PROCESSES = 8

Result = tuple[bool, str | None]


def compare_pairs(
    pairs: Sequence[tuple[str, str]], time_limit: float, num_processes: int | None = None
) -> list[Result | None]:
    """
    Compares answers in processes of their own.

    They are started for each call and are gone at its end, whatever happens. They import none of the caller's modules, so
    that it may be a script without a main guard, a thread, or a process that holds a GPU. If the caller is killed, they end
    with the pair they are at.

    Args:
        pairs (`Sequence[tuple[str, str]]`):
            Reference and prediction, of a bounded length each.
        time_limit (`float`):
            Seconds of processor time for a pair. The kernel keeps to it, also where sympy is in C code.
        num_processes (`int`, *optional*):
            Number of processes. Defaults to the number of processors, at most 8, and fewer for few pairs.

    Returns:
        `list[tuple[bool, str | None] | None]`: For each pair whether the prediction is right, and how a wrong one is counted
        in a vote; `None` where the check was cut off.

    Raises:
        RuntimeError: If a process cannot start.
    """
    if num_processes is None:
        num_processes = min(os.cpu_count() or 1, _MOST_PROCESSES, len(pairs) // _PAIRS_PER_PROCESS + 1)
    results: list[Result | None] = [None] * len(pairs)
    todo = deque(range(len(pairs)))
    workers = [_Worker(time_limit) for _ in range(num_processes)]

    def compare(worker: _Worker) -> None:
        try:
            while True:
                index = todo.popleft()
                results[index] = worker.compare(*pairs[index])
                bar.update()
        except IndexError:
            pass  # nothing is left to do
        finally:
            worker.close()

    # The bar shows itself after five seconds
    with (
        ThreadPoolExecutor(num_processes) as threads,
        tqdm(total=len(pairs), desc="Comparing answers", delay=5) as bar,
    ):
        try:
            for future in [threads.submit(compare, worker) for worker in workers]:
                future.result()
        finally:
            todo.clear()
            for worker in workers:
                worker.kill()
    return results


class _Worker:
    """A process that compares, and that is replaced when it dies."""

    def __init__(self, time_limit: float):
        self.time_limit = time_limit
        self.process: subprocess.Popen | None = None

    def compare(self, reference: str, prediction: str) -> Result | None:
        """Compares one pair; `None` if the process died of it."""
        if self.process is None:
            self.process = self._start()
        try:
            print(json.dumps([reference, prediction]), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.close()
            return None
        correct, answer = json.loads(line)
        return correct, answer

    def _start(self) -> subprocess.Popen:
        """A process that is ready to compare."""
        process = subprocess.Popen(
            # Without the working directory on its path, where a file may have a library's name
            [sys.executable, "-P", "-m", "gift_trl.evaluation.metrics.math_accuracy.worker", str(self.time_limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            # An interrupt from the keyboard is for the caller, who ends the process
            start_new_session=True,
        )
        if not process.stdout.readline():
            _, errors = process.communicate()
            raise RuntimeError(f"The process that compares answers cannot start:\n{errors.strip()}")
        return process

    def kill(self) -> None:
        """Ends the process; whoever waits for it gets no answer."""
        if self.process is not None:
            self.process.kill()

    def close(self) -> None:
        """Ends the process, if there is one, and lets go of it."""
        self.kill()
        if self.process is not None:
            self.process.communicate()
            self.process = None
