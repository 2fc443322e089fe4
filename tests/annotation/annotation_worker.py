"""
Annotates in a process of its own, to be launched several times at once or killed: `python annotation_worker.py SETTINGS.json`.

Settings: `model`, `data` (JSON lines), `output`, `log` (one line per scored row), `cache_dir` (a `{rank}`
in it gives every process a disk of its own), `tokens_per_batch`, `seconds_per_part`, `seconds_per_row`, `fail_rank`,
`file_bytes` (largest file that can be written), `zero3`.
"""

import json
import resource
import sys
import time
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers.integrations import HfDeepSpeedConfig
from trl import SFTConfig

from gift_trl.annotation import annotate_dataset, engine, save_annotated_dataset, scoring


def main(settings_file: str) -> None:
    with open(settings_file, encoding="utf-8") as file:
        settings = json.load(file)
    state = PartialState(cpu=True)
    engine._SECONDS_PER_PART = settings.get("seconds_per_part", engine._SECONDS_PER_PART)
    if "file_bytes" in settings:
        resource.setrlimit(resource.RLIMIT_FSIZE, (settings["file_bytes"],) * 2)
    score_batch = scoring.ModelScorer._score_batch

    def logged(self, batch):
        if settings.get("fail_rank") == state.process_index:
            raise MemoryError("no memory left")
        if settings.get("zero3"):
            partitioned = [name for name, parameter in self.model.named_parameters() if parameter.numel() == 0]
            Path(settings_file).with_name("partitioned").write_text("\n".join(partitioned))
        time.sleep(settings.get("seconds_per_row", 0) * len(batch))
        result = score_batch(self, batch)
        with open(settings["log"], "a", encoding="utf-8") as log:
            log.write("".join(f"{state.process_index} {row.index}\n" for row in batch))
        return result

    scoring.ModelScorer._score_batch = logged
    # Kept alive: transformers holds only a weak reference to it
    zero3 = settings.get("zero3") and HfDeepSpeedConfig(
        {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    )
    with open(settings["data"], encoding="utf-8") as file:
        dataset = Dataset.from_list([json.loads(line) for line in file])
    try:
        annotated = annotate_dataset(
            dataset,
            settings["model"],
            args=SFTConfig(bf16=False, use_cpu=True),
            tokens_per_batch=settings["tokens_per_batch"],
            cache_dir=settings["cache_dir"].format(rank=state.process_index),
        )
    except OSError as error:
        Path(settings_file).with_suffix(".error").write_text(str(error))
        raise
    del zero3
    # Every process must hold the same rows; all but the first write to a folder of their own
    rank = state.process_index
    save_annotated_dataset(annotated, settings["output"] + (f"-{rank}" if rank else ""))
    if state.is_main_process:
        facts = {"num_processes": state.num_processes, "distributed_type": str(state.distributed_type.value)}
        Path(settings_file).with_name("facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1])
