"""
Kills, damages and starves the merge, and looks at what is left.

    python tests/merging/merge_fuzz.py --kills 200 --corruptions 50

Every attempt runs in a forked process. After each: the inputs have every byte they had; what stands under the output's
name, if anything, is the whole and right result; nothing else is left that loads as a model. An attempt that ends by
itself ends with one error, and leaves nothing behind.
"""

import argparse
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# pyarrow's other allocator has a thread, and the lock that it may hold when the process forks is never released in a child
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

from gift_trl import checkpoints
from gift_trl.merging import merge, merge_adapter, stream


SUCCESS, REFUSED = 0, 3


def make_inputs(folder: Path) -> None:
    """Saves a tiny sharded instruct checkpoint, an adapter, and an outdated output."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "instruct", max_shard_size="500KB")
    (folder / "instruct" / "chat_template.jinja").write_text("{{ messages }}")
    adapter = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, adapter).save_pretrained(folder / "adapter")


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, but for the report, which has the time in it."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "merge_report.json"
    }


def run_merge(folder: Path, **options) -> None:
    merge_adapter(folder / "adapter", folder / "instruct", folder / "out" / "merged", **options)


def fork(action: Callable[[], None], messages: Path) -> int:
    """Runs an action in a child, which ends with `SUCCESS`, or with `REFUSED` after one error that the user can mend."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        warnings.simplefilter("ignore")
        action()
        status = SUCCESS
    except (OSError, ValueError) as error:
        messages.write_text(str(error))
        status = REFUSED
    except BaseException as error:
        messages.write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """Waits for a child; returns its exit status, negative for a signal."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    raise TimeoutError("an attempt hangs")


class Trial:
    """
    A folder with inputs and the right result.

    Args:
        folder (`Path`):
            An empty folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.messages = folder / "messages"
        self.messages.touch()
        self.messages.chmod(0o666)
        make_inputs(folder)
        for file in folder.rglob("*"):
            file.chmod(0o777 if file.is_dir() else 0o666)
        self.inputs = {name: contents(folder / name) for name in ("instruct", "adapter")}
        run_merge(folder)
        self.result = contents(folder / "out" / "merged")
        (folder / "old").mkdir()
        (folder / "old" / "config.json").write_text("old")
        self.clear()

    def clear(self) -> None:
        if (self.folder / "out").is_dir():
            (self.folder / "out").chmod(0o755)
        shutil.rmtree(self.folder / "out", ignore_errors=True)

    def check(self, overwrite: bool = False) -> str:
        """Looks at what an attempt left; returns `"whole"`, `"old"` or `"none"`."""
        for name, before in self.inputs.items():
            assert contents(self.folder / name) == before, f"{name} was changed"
        states = {}
        for path in (self.folder / "out").glob("*") if (self.folder / "out").is_dir() else ():
            if (path / "config.json").is_file():
                found = contents(path)
                assert found in (self.result, contents(self.folder / "old")), f"{path} is loadable and wrong"
                states[path.name] = "whole" if found == self.result else "old"
            assert path.name == "merged" or path.name.startswith(".merged."), path
        assert not overwrite or states, "neither the old nor the new output is left"
        return states.get("merged", "none")


def kill_at_random(trial: Trial, count: int, seed: int) -> Counter:
    """Kills merges at moments drawn from their whole duration; every third overwrites an output."""
    rng, states = random.Random(seed), Counter()
    durations = []
    for _ in range(5):
        started = time.monotonic()
        assert wait(fork(lambda: run_merge(trial.folder), trial.messages)) == SUCCESS, trial.messages.read_text()
        durations.append(time.monotonic() - started)
        trial.clear()
    for attempt in range(count):
        overwrite = attempt % 3 == 2
        if overwrite:
            shutil.copytree(trial.folder / "old", trial.folder / "out" / "merged")
        child = fork(lambda overwrite=overwrite: run_merge(trial.folder, overwrite=overwrite), trial.messages)
        time.sleep(rng.uniform(0, 1.05 * max(durations)))
        os.kill(child, signal.SIGKILL)
        killed = wait(child) == -signal.SIGKILL
        state = trial.check(overwrite)
        assert killed or state == "whole"
        states[f"{'killed' if killed else 'ended'}, {state}"] += 1
        trial.clear()
    return states


def corrupt(folder: Path, rng: random.Random) -> str:
    """Damages one file of a copy of the inputs, in a way that can be noticed; returns how."""
    shards = sorted((folder / "instruct").glob("*.safetensors"))
    index, adapter = folder / "instruct" / "model.safetensors.index.json", folder / "adapter"
    shard = rng.choice([*shards, adapter / "adapter_model.safetensors"])
    data = bytearray(shard.read_bytes())
    header_size = int.from_bytes(data[:8], "little")
    kind = rng.choice(
        [
            "header",
            "header",
            "length",
            "truncated",
            "longer",
            "empty",
            "index",
            "shard lost",
            "nan",
            "config",
            "settings",
        ]
    )
    if kind == "header":
        for _ in range(rng.randint(1, 4)):
            data[8 + rng.randrange(header_size)] = rng.randrange(256)
    elif kind == "length":
        data[:8] = rng.randrange(2 * header_size if rng.random() < 0.5 else 2**63).to_bytes(8, "little")
    elif kind == "truncated":
        del data[rng.randrange(len(data)) :]
    elif kind == "longer":
        data += bytes(rng.randrange(1, 100))
    elif kind == "empty":
        data.clear()
    elif kind == "nan":
        name = adapter / "adapter_model.safetensors"
        tensors = load_file(name)
        rng.choice(list(tensors.values())).view(-1)[0] = rng.choice([float("nan"), float("inf")])
        save_file(tensors, name, {"format": "pt"})
        return kind
    elif kind == "index":
        weight_map = json.loads(index.read_text())
        names = list(weight_map["weight_map"])
        change = rng.choice(["swap", "unknown shard", "unknown tensor", "garbage"])
        if change == "swap":
            weight_map["weight_map"][names[0]] = weight_map["weight_map"][names[-1]]
        elif change == "unknown shard":
            weight_map["weight_map"][rng.choice(names)] = "model-00099-of-00099.safetensors"
        elif change == "unknown tensor":
            weight_map["weight_map"]["model.layers.99.mlp.up_proj.weight"] = shards[0].name
        index.write_text("{" if change == "garbage" else json.dumps(weight_map))
        return f"{kind}: {change}"
    elif kind == "shard lost":
        rng.choice(shards).unlink()
        return kind
    elif kind in ("config", "settings"):
        file = folder / "instruct" / "config.json" if kind == "config" else adapter / "adapter_config.json"
        text = file.read_text()
        file.write_text(text[: rng.randrange(len(text))])
        return kind
    shard.write_bytes(data)
    return kind


def corrupt_at_random(trial: Trial, count: int, seed: int) -> Counter:
    """Merges damaged inputs: each is refused with nothing left, or the damage did not matter and the result is right."""
    rng, states = random.Random(seed), Counter()
    for _ in range(count):
        damaged = trial.folder / "damaged"
        for name in trial.inputs:
            shutil.copytree(trial.folder / name, damaged / name)
        kind = corrupt(damaged, rng)
        before = {name: contents(damaged / name) for name in trial.inputs}
        status = wait(fork(lambda: run_merge(damaged), trial.messages))  # noqa: B023
        assert {name: contents(damaged / name) for name in trial.inputs} == before, "an input was changed"
        left = list((damaged / "out").glob("*")) if (damaged / "out").is_dir() else []
        if status == SUCCESS:
            assert tensors_of(damaged / "out" / "merged") == tensors_of_result(trial), f"{kind}: wrong and loadable"
        else:
            assert status == REFUSED, f"{kind}: {trial.messages.read_text()}"
            assert not left, f"{kind}: left {left}"
        states[f"{kind}: {'refused' if status == REFUSED else 'harmless'}"] += 1
        shutil.rmtree(damaged)
    return states


def tensors_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a checkpoint."""
    return {
        name: hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for file in checkpoints.safetensors_files(folder)
        for name, tensor in load_file(file).items()
    }


def tensors_of_result(trial: Trial) -> dict[str, str]:
    run_merge(trial.folder)
    found = tensors_of(trial.folder / "out" / "merged")
    trial.clear()
    return found


def failing(number: int, code: int, function: Callable) -> Callable:
    """A function that fails at one of its calls, as the system would."""
    calls = iter(range(10**9))

    def call(*args, **kwargs):
        if next(calls) == number:
            raise OSError(code, os.strerror(code))
        return function(*args, **kwargs)

    return call


def starve(trial: Trial, seed: int) -> Counter:
    """Merges onto full, limited and read-only disks."""
    rng, states = random.Random(seed), Counter()
    places = [
        (stream, "_reserve"),
        (stream, "_copy_range"),
        (stream.MergedWriter, "write"),
        (merge.shutil, "copyfile"),
        (checkpoints.os, "fsync"),
        (checkpoints.os, "rename"),
    ]

    def attempt(name: str, action: Callable[[], None], text: str) -> None:
        status = wait(fork(action, trial.messages))
        assert status == REFUSED and text in trial.messages.read_text(), (name, status, trial.messages.read_text())
        assert trial.check() == "none"
        out = trial.folder / "out"
        assert not out.is_dir() or not list(out.iterdir()), f"{name} left {list(out.iterdir())}"
        states[name] += 1
        trial.clear()

    for owner, function in places:
        for code, text in ((errno.ENOSPC, "there is no room"), (errno.EROFS, "cannot be written to")):

            def patched(owner=owner, function=function, code=code) -> None:
                number = 0 if function == "rename" else rng.randrange(4)
                setattr(owner, function, failing(number, code, getattr(owner, function)))
                run_merge(trial.folder)

            attempt(f"{function}: {errno.errorcode[code]}", patched, text)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        run_merge(trial.folder)

    attempt("file size limit of the system", limited, "there is no room")

    def read_only() -> None:
        (trial.folder / "out").mkdir()
        (trial.folder / "out").chmod(0o555)
        if os.geteuid() == 0:  # to whom no folder is read-only
            os.setuid(65534)
        run_merge(trial.folder)

    attempt("read-only folder", read_only, "cannot be written to")
    return states


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--corruptions", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a child of fork has none of its parent's threads
    # tqdm's own lock is shared by all processes, and a child that is killed with it leaves it locked for ever
    tqdm.set_lock(threading.RLock())
    with tempfile.TemporaryDirectory(prefix="merge_fuzz_") as folder:
        os.chmod(folder, 0o777)
        trial = Trial(Path(folder))
        for name, states in (
            ("kills", kill_at_random(trial, args.kills, args.seed)),
            ("corrupted inputs", corrupt_at_random(trial, args.corruptions, args.seed)),
            ("full and read-only disks", starve(trial, args.seed)),
        ):
            print(f"{states.total()} {name}")
            for state, number in sorted(states.items()):
                print(f"  {number:4} {state}")


if __name__ == "__main__":
    main()
