"""
Runs `gift-trl train` in the processes of a launcher: `accelerate launch ... command_worker.py NOTES CONFIG ARGUMENTS`.

Each process leaves in the folder NOTES how it was distributed and with which status it ended. CONFIG is the name of the
shipped configuration that the launcher was given.
"""

import json
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from training_worker import shard_on_cpu

from gift_trl.scripts import train
from gift_trl.scripts.cli import run


def main(notes: str, config: str, *arguments: str) -> None:
    if config == "fsdp2":
        shard_on_cpu()
    status = 0
    try:
        run(train.main, list(arguments))
    except SystemExit as end:
        status = end.code
    state = AcceleratorState()
    facts = {
        "status": status,
        "distributed_type": state.distributed_type.value,
        "num_processes": state.num_processes,
    }
    Path(notes, f"process{state.process_index}.json").write_text(json.dumps(facts))
    raise SystemExit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
