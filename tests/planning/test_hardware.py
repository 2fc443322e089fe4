import numpy as np
import pytest
import torch
from trl.trainer.utils import get_peak_flops

from gift_trl.planning.hardware import GPUS, Calibration, hardware_of
from gift_trl.planning.timing import Workload, merge_time
from gift_trl.planning.trace import Operation


def product(rows: int, inner: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Operation:
    moved = 2 * (rows * inner + inner * columns + rows * columns)
    return Operation("mm", dtype, (1, rows, inner, columns), 2 * rows * inner * columns, moved)


@pytest.mark.parametrize(
    "name", [name for name in GPUS if get_peak_flops(f"NVIDIA {name.replace('-', ' ')}", "bfloat16")]
)
def test_figures_are_those_that_trl_knows(name):
    assert GPUS[name].bf16 == pytest.approx(
        get_peak_flops(f"NVIDIA {name.replace('-', ' ')}", "bfloat16") / 1e12, rel=0.01
    )


def test_a_kernel_takes_its_arithmetic_or_its_traffic():
    gpu = hardware_of("h100", efficiency=0.5)
    large, thin = product(8192, 8192, 8192), product(8192, 1, 8192)
    assert gpu.seconds({large: 10}) == pytest.approx(10 * large.flops / (989e12 / 2))
    assert gpu.seconds({thin: 100}) == pytest.approx(100 * thin.moved / (3350e9 * 0.8))
    # Python starts kernels one after the other
    assert gpu.seconds({product(8, 8, 8): 1000}) == pytest.approx(1000 * 8e-6)


def test_calibration_measures_the_products_of_a_run():
    calibration = Calibration(torch.device("cpu"))
    operation = product(64, 96, 128, torch.float32)
    calibration.measure([operation])
    machine = calibration.hardware()
    seconds = machine.seconds({operation: 7})
    assert seconds == 7 * machine.products[torch.float32, (1, 64, 96, 128)] > 0
    other = Operation("mul", torch.float32, (1000,), 0, 8000)
    assert 0 < machine.seconds({other: 1}) < 0.1


def test_batches_of_rows():
    lengths = np.array([10, 30, 10, 30, 20, 20])
    workload = Workload(lengths, lengths // 2, "")
    assert workload.target_share == 0.5
    one, count = workload.micro_batches(1)
    assert (one.rows, one.length, one.targets, one.masked, count) == (1, 20, 10, False, 6)
    two, count = workload.micro_batches(2)
    # Padded to the longer one
    assert two.rows == 2 and 20 < two.length <= 30 and two.masked and count == 3
    packed, count = workload.micro_batches(2, packed_length=60)
    assert (packed.rows, packed.length, packed.targets, packed.masked, count) == (2, 60, 60, True, 1)
    scored, count = workload.scoring_batch(100)
    assert scored.length == round((lengths**2).sum() / lengths.sum()) and scored.rows == 100 // scored.length
    assert count * scored.rows * scored.length == lengths.sum()


def test_a_merge_reads_multiplies_adds_and_writes():
    time = merge_time(10**9, 10**11, disk=10**9, cpu_flops=10**11, memory_rate=6 * 10**9)
    assert time.detail == pytest.approx({"disk": 2.0, "products": 1.0, "adding": 1.0})
    assert (time.seconds, time.limit) == (4.0, "disk")
