"""What the benchmarks share: their options, clocks, memory, facts about the machine, and the file of results."""

import argparse
import ctypes
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import trl


def add_options(
    parser: argparse.ArgumentParser, rounds: int, rounds_help: str = "Rounds, each of which runs every method once."
) -> None:
    """Options of every benchmark."""
    parser.add_argument("--rounds", type=int, default=rounds, help=rounds_help)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads.")
    parser.add_argument("--output-dir", default=Path(__file__).parent / "results", help="Folder of the results.")


def add_model_options(parser: argparse.ArgumentParser, presets: dict[str, Any]) -> None:
    """Options of the benchmarks of one model."""
    parser.add_argument("--preset", choices=presets, default="cpu", help="Shape of the model.")
    parser.add_argument("--vocab", type=int, nargs="+", default=[151936], help="Sizes of the vocabulary.")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


class Results(dict[str, Any]):
    """
    The results of a benchmark on a device, in a JSON file that each run adds to.

    Args:
        args (`argparse.Namespace`):
            With `output_dir` and, unless it is the CPU, `device`.
        benchmark (`str`):
            Beginning of the file's name.
        sections (`str`):
            Keys of dictionaries that it has at least.
    """

    def __init__(self, args: argparse.Namespace, benchmark: str, *sections: str):
        device = getattr(args, "device", "cpu")
        name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
        self._path = Path(args.output_dir) / f"{benchmark}-{name.lower().replace(' ', '-')}.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(self._path.read_text()) if self._path.is_file() else {}
        super().__init__({section: {} for section in sections} | known)

    def save(self) -> None:
        """Writes the file."""
        self._path.write_text(json.dumps(self, indent=2) + "\n")


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """CPU seconds of the process, or synchronised seconds on a GPU."""
    if device.type != "cuda":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def interleave(runs: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every run in every round, A B A B: a noisy neighbour then meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run, device))
    return seconds


def peak_of(run: Callable[[], Any], device: torch.device) -> float:
    """Largest memory in MB during a call above what is held before it; on a CPU by the kernel's own record."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    # What is freed but not given back would be used again unseen
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise OSError(
            f"The record of this process's peak memory cannot be reset ({error}), which takes Linux. Leave the memory out "
            "with `--skip-memory`."
        ) from error

    def kilobytes(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    before = kilobytes("VmRSS")
    run()
    return (kilobytes("VmHWM") - before) * 1024 / 1e6


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on, without names of hosts or folders."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpu = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else None
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": args.threads, "gpu": gpu, **versions}
