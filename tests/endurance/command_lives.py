"""Lives of `gift-trl` commands: started as forks or as usual, watched, killed, and looked after when they have ended."""

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import command_forks
import psutil


# What is left of a command when it has ended has this long to end too: less than a training takes
ORPHAN_SECONDS = 2.0
PACKAGE = Path(__file__).parents[2]
# Processes without threads can be forked, and processes that share two cores are no faster for theirs
ENVIRONMENT = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "MPLBACKEND": "agg",
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",  # PEFT writes the names of the target modules in the order of a set
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


class Broken(Exception):
    """What must not happen: a wrong byte, a process that stays, a command that hangs or does not recover."""


class Life:
    """
    A command that runs.

    Args:
        process (`psutil.Process`):
            Its first process: the launcher, where there is one.
        poll (`Callable`):
            Waits for at most the given seconds; returns the exit status, or `None` while the command runs.
    """

    def __init__(self, process: psutil.Process, poll: Callable[[float], int | None]):
        self.process, self._poll = process, poll
        self.started = time.monotonic()
        self.status: int | None = None
        self.others: set[psutil.Process] = set()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def is_running(self, wait: float = 0.0) -> bool:
        """Whether the command still runs after some seconds."""
        if self.status is None:
            self.status = self._poll(wait)
        return self.status is None

    def ranks(self) -> list[psutil.Process]:
        """The processes of the launch that run now."""
        with contextlib.suppress(psutil.Error):
            found = self.process.children(recursive=True)
            self.others.update(found)
            return self.process.children()
        return []

    def kill(self, target: str, rank: int) -> bool:
        """Kills the launcher, one of its ranks, or all; returns whether there was something to kill."""
        ranks = self.ranks()
        if target == "rank":
            killed = ranks[rank % len(ranks) :][:1] if ranks else [self.process]
        else:
            killed = [self.process, *self.others] if target == "all" else [self.process]
        if not self.is_running():
            return False
        for process in killed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM if target == "terminate" else signal.SIGKILL)
        return True

    def limit_files(self, size: int) -> None:
        """From now on no file of the command may be larger, which is what a full disk is to one who may mount none."""
        self.ranks()
        for process in (self.process, *self.others):
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))

    def wait(self, seconds: float) -> int:
        """Waits for the end of the command and of all its processes; returns the exit status."""
        end = time.monotonic() + seconds
        while self.is_running(0.05):
            self.ranks()
            if time.monotonic() > end:
                self.kill("all", 0)
                self.is_running(10.0)
                raise Broken(f"the command hangs: it has not ended in {self.seconds:.0f} s")
        end = time.monotonic() + ORPHAN_SECONDS
        while orphans := [process for process in self.others if is_alive(process)]:
            if time.monotonic() > end:
                for process in orphans:
                    process.kill()
                raise Broken(
                    f"{len(orphans)} processes work on, {ORPHAN_SECONDS:.0f} s after their launcher has ended with status "
                    f"{self.status}"
                )
            time.sleep(0.05)
        return self.status


def is_alive(process: psutil.Process) -> bool:
    """Whether a process, and no later one with its number, has not ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Forks:
    """
    Commands as forks of a process that has imported all, see `command_forks.py`.

    Args:
        kind (`str`):
            `"stack"` or `"push"`.
        environment (`dict[str, str]`):
            Environment of the commands.
        log (`Path`):
            What the process itself says.
    """

    def __init__(self, kind: str, environment: dict[str, str], log: Path):
        self.log = log
        with open(log, "w") as output:
            self._process = subprocess.Popen(
                [sys.executable, command_forks.__file__, kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=environment,
            )
        self._buffer = b""

    def start(self, arguments: list[str], folder: Path, log: Path, *, online: bool = False) -> Life:
        """Starts a command in a folder, which becomes the home of its caches too; if it is to, with the Hub at hand."""
        request = {"arguments": arguments, "folder": str(folder), "home": str(folder / "home"), "log": str(log)}
        request["online"] = online
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return Life(psutil.Process(self._read(None)["pid"]), self._status)

    def wait_until_ready(self) -> None:
        self._read(None)

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:  # it waits for a command that hangs
            self._process.kill()
            self._process.wait()

    def _status(self, wait: float) -> int | None:
        answer = self._read(wait)
        return None if answer is None else answer["status"]

    def _read(self, wait: float | None) -> dict | None:
        while b"\n" not in self._buffer:
            if not select.select([self._process.stdout], [], [], wait)[0]:
                return None
            received = os.read(self._process.stdout.fileno(), 4096)
            if not received:
                raise Broken(f"the process that forks the commands has ended: {self.log.read_text()[-2000:]}")
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)


class Interpreters:
    """Commands as a user starts them; with the environment of each in `environment`."""

    def __init__(self, environment: dict[str, str]):
        self.environment = environment

    def start(self, arguments: list[str], folder: Path, log: Path, *, online: bool = False) -> Life:
        """As [`Forks.start`]."""
        environment = self.environment | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": str(int(not online))}
        with open(log, "a") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "gift_trl.scripts.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )

        def poll(wait: float) -> int | None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(wait)
            return None

        return Life(psutil.Process(process.pid), poll)


def environment(**changes: str) -> dict[str, str]:
    """Environment of commands that ask no Hub and find this package."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
    }
    path = os.pathsep.join([str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | ENVIRONMENT | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"} | changes
