"""Launches `training_worker.py` with the shipped accelerate configurations."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import training_worker
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from gift_trl.annotation import annotate_dataset, save_annotated_dataset
from gift_trl.scripts.recipes import recipes_folder


CONFIGS = recipes_folder() / "accelerate_configs"
TIMEOUT = 400  # seconds; the first DeepSpeed run compiles its CPU extensions


@dataclass
class Run:
    """What a run has left in its folder."""

    folder: Path

    @property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.folder / "facts.json").read_text())

    @property
    def initial(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "initial.safetensors")

    @property
    def final(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "final.safetensors")

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "adapter_model.safetensors")


class Launcher:
    """
    Launches runs, each of which is described as in `training_worker.py`.

    Args:
        folder (`Path`):
            Folder of what is written, one subfolder for each name of a launch.
        settings (`dict[str, Any]`):
            Settings of the worker.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, settings

    def run(
        self, name: str, config: str, runs: list[dict[str, Any]], *options: str, **settings: Any
    ) -> dict[str, Run]:
        """Launches the runs, waits for them, and returns them by name."""
        with self.start(name, config, runs, *options, **settings) as process:
            self.finish(process, name)
        return self.runs(name, runs)

    def runs(self, name: str, runs: list[dict[str, Any]]) -> dict[str, Run]:
        """What the runs of a launch have left, by name."""
        return {run["name"]: Run(self.folder / name / run["name"]) for run in runs}

    @contextlib.contextmanager
    def start(
        self, name: str, config: str, runs: list[dict[str, Any]], *options: str, **settings: Any
    ) -> Iterator[subprocess.Popen]:
        """Launches the runs with a shipped configuration, in float32, and ends them in any case."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (folder / "settings.json").write_text(
            json.dumps({**self.settings, "output": str(folder), "runs": runs, **settings})
        )
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(CONFIGS / f"{config}.yaml"),
        ]
        command += ["--mixed_precision", "no", *options, training_worker.__file__, str(folder / "settings.json")]
        environment = {**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        if settings.get("device", "cpu") != "cpu":
            del environment["CUDA_VISIBLE_DEVICES"]
        with open(folder / "log", "w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()  # the launcher ends its workers
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def finish(self, process: subprocess.Popen, name: str) -> None:
        """Waits for a launch, which must succeed."""
        try:
            status = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            status = f"none after {TIMEOUT} s"
        assert status == 0, f"{name}: exit status {status}\n{self.output(name)}"

    def kill(self, process: subprocess.Popen, name: str, notes: list[Path]) -> None:
        """Kills a launcher and its workers without a warning, once every worker has noted its process id."""
        deadline = time.monotonic() + TIMEOUT
        while not all(note.is_file() and note.read_text() for note in notes):
            assert process.poll() is None and time.monotonic() < deadline, f"{name}\n{self.output(name)}"
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
        for note in notes:  # the launcher gives each worker a session of its own
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(note.read_text()), signal.SIGKILL)
        process.wait(30)

    def output(self, name: str) -> str:
        """End of what a launch has printed."""
        return (self.folder / name / "log").read_text()[-10000:]


@pytest.fixture(scope="session")
def launcher(tmp_path_factory, pair, conversations) -> Launcher:
    folder = tmp_path_factory.mktemp("distributed")
    turns = [[*row["prompt"], *row["completion"]] for row in conversations]
    # 20 conversations of one to three turns: five batches of four rows, of which two steps of accumulation leave one
    rows = [{"messages": [m for j in range(1 + i % 3) for m in turns[(i + j * 3) % 8]]} for i in range(20)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = SFTConfig(str(folder), bf16=False, use_cpu=True)
    annotated = annotate_dataset(Dataset.from_list(rows), pair[1], args=args, cache_dir=str(folder / "cache"))
    save_annotated_dataset(annotated, folder / "annotated")
    untrained = AutoModelForCausalLM.from_pretrained(pair[0])
    with torch.no_grad():
        untrained.get_input_embeddings().weight[[1, 2]] *= 1e-3
        untrained.get_output_embeddings().weight[[1, 2]] *= 1e-3
    untrained.save_pretrained(folder / "untrained")
    settings = {
        "base": pair[0],
        "untrained": str(folder / "untrained"),
        "instruct": pair[1],
        "data": str(folder / "data.jsonl"),
        "annotated": str(folder / "annotated"),
    }
    return Launcher(folder, settings)
