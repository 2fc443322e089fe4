"""
Annotates in a process of its own, to be launched several times at once or killed: `python annotation_worker.py SETTINGS.json`.

Settings: `model`, `data` (JSON lines), `output`, `log` (one line per scored row), `cache_dir` (a `{rank}`
in it gives every process a disk of its own), `tokens_per_batch`, `seconds_per_part`, `seconds_per_row`, `fail_rank`,
`file_bytes` (largest file that can be written), `kill_at`.
"""

import itertools
import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import SFTConfig

from gift_trl.annotation import annotate_dataset, cache, engine, save_annotated_dataset, scoring


def main(settings_file: str) -> None:
    with open(settings_file, encoding="utf-8") as file:
        settings = json.load(file)
    args = SFTConfig(bf16=False, use_cpu=True)
    args.device  # noqa: B018  # sets the processes up
    state = PartialState()
    engine._SECONDS_PER_PART = settings.get("seconds_per_part", engine._SECONDS_PER_PART)
    if "file_bytes" in settings:
        resource.setrlimit(resource.RLIMIT_FSIZE, (settings["file_bytes"],) * 2)
    if "kill_at" in settings:
        _kill_at(*settings["kill_at"])
    score_batch = scoring.ModelScorer._score_batch

    def logged(self, batch):
        if settings.get("fail_rank") == state.process_index:
            raise MemoryError("no memory left")
        partitioned = [name for name, parameter in self.model.named_parameters() if parameter.numel() == 0]
        Path(settings_file).with_name("partitioned").write_text("\n".join(partitioned))
        time.sleep(settings.get("seconds_per_row", 0) * len(batch))
        result = score_batch(self, batch)
        with open(settings["log"], "a", encoding="utf-8") as log:
            log.write("".join(f"{state.process_index} {row.index}\n" for row in batch))
        return result

    scoring.ModelScorer._score_batch = logged
    with open(settings["data"], encoding="utf-8") as file:
        dataset = Dataset.from_list([json.loads(line) for line in file])
    try:
        annotated = annotate_dataset(
            dataset,
            settings["model"],
            args=args,
            tokens_per_batch=settings["tokens_per_batch"],
            cache_dir=settings["cache_dir"].format(rank=state.process_index),
        )
    except Exception as error:
        Path(settings_file).with_suffix(".error").write_text(f"{error}\n{traceback.format_exc()}")
        raise
    # Every process must hold the same rows; all but the first write to a folder of their own
    rank = state.process_index
    save_annotated_dataset(annotated, settings["output"] + (f"-{rank}" if rank else ""))
    if state.is_main_process:
        facts = {"num_processes": state.num_processes, "distributed_type": str(state.distributed_type.value)}
        facts["zero3"] = is_deepspeed_zero3_enabled()
        Path(settings_file).with_name("facts.json").write_text(json.dumps(facts))


def _kill_at(moment: str, number: int) -> None:
    """Kills this process before or after a write into the cache, the first of which is number 1."""
    write, count = cache.AnnotationCache._write, itertools.count(1)

    def write_or_die(self, *args):
        dies = next(count) == number
        if dies and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, *args)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)

    cache.AnnotationCache._write = write_or_die


if __name__ == "__main__":
    main(sys.argv[1])
