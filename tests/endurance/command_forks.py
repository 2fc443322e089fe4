"""
Runs `gift-trl` commands in forks of one process that has imported everything, one command at a time.

A command imports for ten seconds and works for two. Here the work alone is left: `python command_forks.py stack` reads requests
as lines of JSON, `{"arguments", "folder", "home", "log", "online"}`, and answers each with a line when the command has started,
`{"pid"}`, and another when it has ended, `{"status"}`. Everything else is the command's own: the launcher is accelerate's with torch's
elastic agent, and only the interpreters of its workers are forks too. `push` in place of `stack` imports what a push needs.
"""

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any


# Not the numbers of the processes of one command, but the processes that outlive its launcher, come to this process
PR_SET_CHILD_SUBREAPER = 36
IMPORTED = {
    "push": ["gift_trl.hub.push", "gift_trl.hub.card", "gift_trl.scripts.push"],
    "stack": [
        "accelerate.commands.launch",
        "gift_trl.annotation.annotator",
        "gift_trl.annotation.hub",
        "gift_trl.annotation.summary",
        "gift_trl.hub.card",
        "gift_trl.merging.merge",
        "gift_trl.scripts.annotate",
        "gift_trl.scripts.arguments",
        "gift_trl.scripts.data",
        "gift_trl.scripts.merge",
        "gift_trl.scripts.train",
        "gift_trl.training",
        "gift_trl.training.trainer",
        "matplotlib.pyplot",
        "peft",
        "torch.distributed.run",
        "transformers.models.llama.modeling_llama",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "trl",
    ],
}
# A run on tiny models waits for nothing that a run on large ones would wait minutes for
PART_SECONDS = 0.01
RETRY_WAITS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
READ_SECONDS = 1.5


class ForkedPopen(subprocess.Popen):
    """`Popen` of `python -m module arguments` that forks this interpreter, in place of starting one."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.closerange(3, 1024)  # as of any process that was started, the launcher's sockets among them
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(env)
            set_offline()
            module, *arguments = args[args.index("-m") + 1 :]
            run_and_exit(lambda: run_module(module, list(map(str, arguments))))
        self._child_created = True


def run_module(module: str, arguments: list[str]) -> None:
    """Runs a module as `python -m` does, and notes how many processes it found itself to be among."""
    sys.argv = [module, *arguments]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it was imported before
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    from accelerate.state import AcceleratorState, PartialState

    # Only an accelerator knows of DeepSpeed; the annotation may have none
    state = AcceleratorState() if AcceleratorState._shared_state else PartialState()
    facts = {"num_processes": state.num_processes, "distributed_type": state.distributed_type.value}
    Path(f"{module.rsplit('.')[-1]}-rank{state.process_index}.json").write_text(json.dumps(facts))


def run_command(arguments: list[str], home: str) -> None:
    """Runs a command of `gift-trl` with a Hugging Face home of its own."""
    from gift_trl.scripts import cli

    if "datasets" in sys.modules:
        cache = importlib.import_module("gift_trl.annotation.cache")
        cache.HF_HOME = home
        sys.modules["datasets"].config.HF_DATASETS_CACHE = Path(home) / "datasets"
    sys.argv = ["gift-trl", *arguments]
    cli.main()


def set_offline() -> None:
    """Whether this process may ask the Hub, which is otherwise a matter of the environment at the time of the import."""
    constants = importlib.import_module("huggingface_hub.constants")
    constants.HF_HUB_OFFLINE = os.environ["HF_HUB_OFFLINE"] == "1"


def run_and_exit(action: Any) -> None:
    """Runs something, and ends this process as an interpreter does."""
    status = 1
    try:
        action()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                status = status or 1
        os._exit(status)


def shorten_waits() -> None:
    """Waits of a run on tiny models."""
    if "gift_trl.annotation.engine" in sys.modules:
        sys.modules["gift_trl.annotation.engine"]._SECONDS_PER_PART = PART_SECONDS
    repositories = importlib.import_module("gift_trl.repositories")
    repositories.RETRY_WAITS = RETRY_WAITS
    repositories.TIME_LIMITS = dict.fromkeys(repositories.TIME_LIMITS, READ_SECONDS)


def serve(kind: str) -> None:
    """Forks a command for each request until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for module in IMPORTED[kind]:
        importlib.import_module(module)
    shorten_waits()
    if kind == "stack":
        import torch
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        torch.set_num_threads(1)  # a fork has none of its parent's threads
        subprocess_handler.Popen = ForkedPopen
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: a fork may wait for ever for a lock of another"
    gc.freeze()

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    answer(ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setsid()
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(log, stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.closerange(3, 1024)
            os.chdir(request["folder"])
            os.environ["HF_HUB_OFFLINE"] = str(int(not request["online"]))
            set_offline()
            run_and_exit(lambda request=request: run_command(request["arguments"], request["home"]))
        answer(pid=child)
        _, status = os.waitpid(child, 0)
        answer(status=os.waitstatus_to_exitcode(status))
        reap()


def reap() -> None:
    """Takes leave of processes that have outlived their parent and ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    serve(sys.argv[1])
