"""Work of the main process that lasts longer than any collective operation may."""

import os
import time
from datetime import timedelta

import pytest
import torch.multiprocessing
from accelerate import PartialState

from gift_trl.hub import main_process


TIMEOUT = 8.0


def process(rank: int, folder: str) -> None:
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})  # asked for, and not used
    state = PartialState(
        cpu=True, init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT)
    )
    assert (state.num_processes, state.process_index, state.backend) == (2, rank, "gloo")
    main_process._LONGEST_WAIT = TIMEOUT / 4

    def work() -> int:
        time.sleep(1.5 * TIMEOUT)
        assert rank == 0
        return 42

    assert main_process.run_on_main_process(work) == 42
    assert main_process.run_on_main_process(lambda: rank) == 0

    def fail() -> None:
        raise OSError("the disk is full")

    try:
        main_process.run_on_main_process(fail)
    except OSError:
        assert rank == 0
    except SystemExit as end:
        assert rank == 1 and end.code == 1
    else:
        raise AssertionError("the failure was lost")
    state.destroy_process_group()


@pytest.mark.slow
def test_the_others_wait_longer_than_their_timeout(tmp_path):
    torch.multiprocessing.spawn(process, [str(tmp_path)], nprocs=2)
