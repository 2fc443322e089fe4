"""
Runs `gift-trl train` in the processes of a launcher: `accelerate launch ... command_worker.py NOTES CONFIG ARGUMENTS`.

Each process leaves in the folder NOTES how it was distributed, with which status it ended, and how many wrapped models there
were each time that the process group was destroyed. CONFIG is the name of the shipped configuration that the launcher was
given.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch.nn.parallel import DistributedDataParallel
from training_worker import shard_on_cpu

from gift_trl.scripts import train
from gift_trl.scripts.cli import run


def main(notes: str, config: str, *arguments: str) -> None:
    if config == "fsdp2":
        shard_on_cpu()
    status, kept, destroy = 0, [], torch.distributed.destroy_process_group

    def destroy_and_count(*args):
        # What keeps the group, and with it threads that may abort the interpreter at its end
        kept.append(sum(type(entry) is DistributedDataParallel for entry in gc.get_objects()))
        destroy(*args)

    torch.distributed.destroy_process_group = destroy_and_count
    try:
        run(train.main, list(arguments))
    except SystemExit as end:
        status = end.code
    state = AcceleratorState()
    facts = {
        "status": status,
        "distributed_type": state.distributed_type.value,
        "num_processes": state.num_processes,
        "wrapped_models": kept,
    }
    Path(notes, f"process{state.process_index}.json").write_text(json.dumps(facts))
    raise SystemExit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
