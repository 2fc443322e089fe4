"""Work of the main process, for which the others wait however long it takes."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list


T = TypeVar("T")

# Seconds between two signs of life: at first, and the longest. Well below every timeout of a collective operation.
_FIRST_WAIT, _LONGEST_WAIT = 0.05, 5.0


def run_on_main_process(work: Callable[[], T]) -> T:
    """
    Does something on the main process while the others wait, to be called by all of them.

    A collective operation that lasts as long as an upload would run into its timeout (`ddp_timeout`, of NCCL and gloo
    alike). Here, a thread of the main process takes part in one short operation after the other, so that no single one
    lasts. The work itself stays in the main thread, where it can be interrupted; it must not talk to other processes.

    Args:
        work (`Callable`):
            What is done; its result has to be picklable.

    Returns:
        The result, on every process.

    Raises:
        `SystemExit`: With status 1 on the other processes, if the work fails. The main process raises what it raised.
    """
    state = PartialState()
    if state.num_processes == 1:
        return work()
    if not state.is_main_process:
        return _wait()
    life = _SignsOfLife(state.device)
    life.start()
    try:
        result = work()
    except BaseException:
        life.end((False, None), time_limit=_LONGEST_WAIT)
        raise
    life.end((True, result))
    return result


def _wait() -> Any:
    outcome = None
    while outcome is None:
        (outcome,) = broadcast_object_list([None])
    succeeded, result = outcome
    if not succeeded:
        raise SystemExit(1)  # the main process says why
    return result


class _SignsOfLife(threading.Thread):
    """Tells the other processes that the work goes on, and at last how it ended."""

    def __init__(self, device: torch.device):
        super().__init__(name="gift_trl-signs-of-life", daemon=True)
        self._device = device
        self._ended = threading.Event()
        self._outcome: tuple[bool, Any] | None = None
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            if self._device.type != "cpu":  # each thread has a current device of its own
                torch.get_device_module(self._device).set_device(self._device)
            wait = _FIRST_WAIT
            while not self._ended.wait(wait):
                broadcast_object_list([None])
                wait = min(2 * wait, _LONGEST_WAIT)
            broadcast_object_list([self._outcome])
        except Exception as error:
            self._error = error

    def end(self, outcome: tuple[bool, Any], time_limit: float | None = None) -> None:
        self._outcome = outcome
        self._ended.set()
        self.join(time_limit)
        if self._error is not None and outcome[0]:
            raise RuntimeError("Another process has ended while the main one was at work.") from self._error
