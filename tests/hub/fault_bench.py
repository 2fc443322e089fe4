"""Pushes of a small model with faults on the way, each checked for what must hold whatever happens."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hub_server import HubServer, client_process


TOKEN = "hf_canaryThatMustBeReadNowhere"
REPOSITORY, BRANCH = "user/model", "step-000100"
# Seconds after which a request that does not move is given up: where one is to stall, and elsewhere
STALLED_AFTER, TIME_LIMIT = 0.25, 30.0
# Seconds that a push may wait at a time
LONGEST_WAIT = 600


@dataclass
class Case:
    """
    A fault of a push.

    Args:
        request (`str`):
            Where it happens.
        fault (`str`):
            What happens.
        times (`str`):
            How often.
        arm (`Callable`):
            Prepares the server, given it and the file with the process id of the push.
        reason (`str`, *optional*):
            What the message must say if the push ends with one.
        waits (`float`, *optional*, defaults to `0.0`):
            Seconds that the server asks to wait for.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether another model is on the branch, and is replaced.
        killed (`bool`, *optional*, defaults to `False`):
            Whether the push may end without a message.
    """

    request: str
    fault: str
    times: str
    arm: Callable[[HubServer, Path], Any]
    reason: str = ""
    waits: float = 0.0
    overwrite: bool = False
    killed: bool = False

    def __str__(self) -> str:
        return f"{self.request}: {self.fault}, {self.times}" + (", replacing" if self.overwrite else "")


@dataclass
class Outcome:
    """What became of a case: the output of the push, the message it ended with, and what is wrong with all that."""

    case: Case
    status: int | None
    message: str = ""
    waits: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The outcome in a few words."""
        if self.problems:
            return f"**wrong**: {'; '.join(self.problems)}"
        if self.status == 0:
            return "completes by itself"
        return "killed; the command again completes" if self.case.killed else "message; its command completes"


def run_push(arguments: list[str], log: Path, pid_file: Path, time_limit: float) -> dict[str, Any]:
    """Runs `gift-trl push` in a fork of this process: imports cost more than the push."""
    from tqdm import tqdm

    from gift_trl import repositories
    from gift_trl.hub import card, push  # noqa: F401
    from gift_trl.scripts.cli import run
    from gift_trl.scripts.push import main

    pid = os.fork()
    if pid == 0:
        status, waits, sleep = 1, [], time.sleep
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            tqdm.set_lock(
                threading.RLock()
            )  # its own is shared by all forks, and never released by one that is killed
            time.sleep = lambda seconds: (waits.append(seconds), sleep(min(seconds, 0.001)))
            repositories.RETRY_WAITS = (1, 2)
            repositories.TIME_LIMITS = dict.fromkeys(repositories.TIME_LIMITS, time_limit)
            pid_file.write_text(str(os.getpid()))
            try:
                run(main, arguments)
                status = 0
            except SystemExit as end:
                status = end.code
            pid_file.with_suffix(".waits").write_text(json.dumps(waits))
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    pid_file.unlink(missing_ok=True)
    waits = pid_file.with_suffix(".waits")
    found = json.loads(waits.read_text()) if waits.is_file() else []
    waits.unlink(missing_ok=True)
    return {"status": status, "output": log.read_text(), "waits": found}


def kill(pid_file: Path) -> None:
    """Ends the push as a machine that loses its power does."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
        os.kill(int(pid_file.read_text()), signal.SIGKILL)


def make_model(folder: Path, seed: int, shards: int) -> Path:
    """A model as far as a push looks at it: weights in shards, configuration, tokenizer, card."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    weights = np.random.default_rng(seed).standard_normal((shards, 64, 64), dtype=np.float32)
    names = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
    for name, weight in zip(names, weights, strict=True):
        save_file({name.split(".")[0]: weight}, folder / name)
    index = {"metadata": {"total_size": weights.nbytes}, "weight_map": {name.split(".")[0]: name for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "seed": seed}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text(f"---\nlicense: apache-2.0\n---\n# Model {seed}\n")
    return folder


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file of a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


class Bench:
    """
    A Hub and a process of its client, for one case after the other.

    Args:
        root (`Path`):
            Folder for what is needed.
    """

    def __init__(self, root: Path):
        self.root = root
        self.folder, self.earlier = make_model(root / "merged", 1, 3), make_model(root / "earlier", 2, 4)
        self.model = {name: content for name, (content, _) in contents(self.folder).items()}
        self.old = {name: content for name, (content, _) in contents(self.earlier).items()}
        self.pid_file = root / "pid"

    def __enter__(self) -> "Bench":
        self.stack = contextlib.ExitStack()
        self.hub = self.stack.enter_context(HubServer(token=TOKEN))
        environment = self.hub.environment(self.root / "home")
        self.call = self.stack.enter_context(client_process(environment, self.root / "client.txt"))
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.stack.close()

    def push(self, folder: Path, *options: str, time_limit: float = TIME_LIMIT) -> dict[str, Any]:
        arguments = [str(folder), "--repo_id", REPOSITORY, *options]
        return self.call(run_push, arguments, self.root / "output.txt", self.pid_file, time_limit)

    def run(self, case: Case) -> Outcome:
        """Runs a case."""
        self._clear()
        options = ["--private", "--revision", BRANCH, "--tag", "v1"]
        if case.overwrite:
            assert self.push(self.earlier, "--revision", BRANCH, "--private")["status"] == 0
            options.append("--overwrite")
        before = contents(self.folder)
        self.hub.requests.clear()
        stop = case.arm(self.hub, self.pid_file)
        limit = STALLED_AFTER if case.fault.startswith("stalled") else TIME_LIMIT
        found = self.push(self.folder, *options, time_limit=limit)
        if stop is not None:
            stop()
        hit = not self.hub.faults or any(fault.hits for fault in self.hub.faults)
        self.hub.faults.clear()
        outcome = Outcome(case, found["status"], waits=found["waits"])
        problems = outcome.problems
        if not hit:
            problems.append("the fault never happened")
        outputs = [found["output"]]
        if found["status"] != 0:
            errors = re.findall(r"^error: (.*)$", found["output"], re.MULTILINE)
            outcome.message = self._public(errors[0]) if errors else ""
            commands = re.findall(r"`gift-trl (push [^`]*)`", outcome.message and errors[0])
            if not case.killed and (len(errors) != 1 or len(commands) != 1):
                problems.append(f"no message with a command: {found['output'][-2000:]}")
            elif not case.killed and case.reason not in errors[0]:
                problems.append(f"the message does not say '{case.reason}'")
            arguments = shlex.split(commands[0])[2:] if commands else ["--repo_id", REPOSITORY, *options]
            arguments = arguments[arguments.index("--repo_id") + 2 :]
            again = self.push(self.folder, *arguments)
            outputs.append(again["output"])
            if again["status"] != 0:
                problems.append(f"the command again fails: {again['output'][-2000:]}")
        problems += self._problems(case, outputs)
        if any(wait > LONGEST_WAIT for wait in outcome.waits):
            problems.append(f"waits for {max(outcome.waits):,.0f} s")
        if case.waits and (len(outcome.waits) == 0 or min(outcome.waits) < case.waits):
            problems.append(f"waits for {outcome.waits} s where {case.waits} are asked for")
        if contents(self.folder) != before:
            problems.append("the folder has changed")
        return outcome

    def _problems(self, case: Case, outputs: list[str]) -> Iterator[str]:
        if any(TOKEN in output for output in outputs):
            yield "the token is printed"
        if any("Traceback" in output for output in outputs):
            yield "a traceback is printed"
        repo = self.hub.repositories.get(("model", REPOSITORY))
        if repo is None:
            yield "there is no repository"
            return
        held = [{name: file.content for name, file in commit.files.items()} for commit in repo.commits]
        own = [{name: c for name, c in files.items() if name not in (".gitattributes", "notes.md")} for files in held]
        made = [files for files in own if files == self.model]
        changed = [files for previous, files in zip([{}, *own], own, strict=False) if files != previous]
        if changed.count(self.model) != 1:
            yield f"{changed.count(self.model)} commits with the content"
        if any(files not in ({}, self.old, self.model) for files in own):
            yield "a commit holds a part of the model"
        if not made or not repo.private:
            yield "the repository is not as it was asked for"
        head = repo.branches.get(BRANCH)
        if head is None or {n: f.content for n, f in head.files.items() if n in self.model} != self.model:
            yield "the branch does not hold the model"
        if (
            repo.tags.get("v1") is None
            or not self.model.items() <= {name: file.content for name, file in repo.tags["v1"].files.items()}.items()
        ):
            yield "the tag does not hold the model"

    def _clear(self) -> None:
        self.hub.repositories.clear()
        self.hub.requests.clear()
        self.hub.faults.clear()
        shutil.rmtree(self.hub.root / "blobs")
        (self.hub.root / "blobs").mkdir()

    def _public(self, message: str) -> str:
        message = message.replace(str(self.folder), "DIR").replace(self.hub.endpoint, "https://huggingface.co")
        return re.sub(r"\b[0-9a-f]{40}\b", "SHA", message)
