"""What hardware does in a second: from data sheets, or measured here."""

import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from gift_trl.planning.trace import Operation


# Share of the data sheet's bandwidth that kernels reach which do little else than read and write: an assumption
_BANDWIDTH_SHARE = 0.8
# Seconds in which Python starts a kernel of a GPU: an assumption
_LAUNCH_SECONDS = 8e-6
_RANDOM = {"bernoulli_", "native_dropout", "uniform_"}
_EXPONENTIAL = {"exp", "silu", "silu_backward", "gelu", "gelu_backward", "tanh", "sigmoid", "_softmax", "_log_softmax"}
# Bytes that the calibration's kernels read and write
_SIZES = (2**16, 2**19, 2**22, 2**25, 2**27)
# How such kernels are measured, and how often each reads or writes an element
_KERNELS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
    "plain": (lambda x: x * 2.5, 2),
    "exponential": (torch.exp, 2),
    "random": (lambda x: torch.empty_like(x).bernoulli_(0.95), 1),
}
_SECONDS_EACH = 0.03


@dataclass(frozen=True)
class DataSheet:
    """
    A GPU as its vendor describes it.

    Args:
        memory (`float`):
            GB of memory.
        bf16 (`float`):
            TFLOP/s of dense bfloat16 products with float32 accumulation.
        float32 (`float`):
            TFLOP/s in float32, outside of tensor cores.
        bandwidth (`float`):
            GB/s of its memory.
        link (`float`):
            GB/s to other GPUs, both directions together: NVLink or Infinity Fabric, else PCIe.
    """

    memory: float
    bf16: float
    float32: float
    bandwidth: float
    link: float


# From the vendors' data sheets (NVIDIA H100, H200, HGX B200, A100, A10, L4, L40S, RTX A6000, RTX PRO 6000, the GeForce
# architecture white papers; AMD Instinct MI300X), without sparsity
GPUS = {
    "b200": DataSheet(180, 2250, 75, 7700, 1800),
    "h200": DataSheet(141, 989, 67, 4800, 900),
    "h100": DataSheet(80, 989, 67, 3350, 900),
    "h100-pcie": DataSheet(80, 756, 51, 2000, 128),
    "a100-80gb": DataSheet(80, 312, 19.5, 2039, 600),
    "a100-40gb": DataSheet(40, 312, 19.5, 1555, 600),
    "mi300x": DataSheet(192, 1307, 163, 5300, 896),
    "rtx-pro-6000": DataSheet(96, 504, 126, 1792, 128),
    "l40s": DataSheet(48, 362, 91.6, 864, 64),
    "rtx-a6000": DataSheet(48, 155, 38.7, 768, 64),
    "rtx-5090": DataSheet(32, 209, 105, 1792, 128),
    "rtx-4090": DataSheet(24, 165, 82.6, 1008, 64),
    "rtx-3090": DataSheet(24, 71, 35.6, 936, 64),
    "a10": DataSheet(24, 125, 31.2, 600, 64),
    "l4": DataSheet(24, 121, 30.3, 300, 64),
}


@dataclass(frozen=True)
class Hardware:
    """
    What a device does in a second.

    Args:
        name (`str`):
            Its name.
        memory (`float`):
            GiB of memory.
        flops (`Mapping[torch.dtype, float]`):
            Floating-point operations of matrix products in a second, by dtype.
        bandwidth (`Callable[[Operation], float]`):
            Bytes that an operation reads and writes in a second.
        link (`float`):
            Bytes that it sends to other devices in a second.
        host_link (`float`):
            Bytes from the memory of the host in a second.
        launch (`float`, *optional*, defaults to `0.0`):
            Seconds to start a kernel, while others run.
        products (`Mapping[tuple, float]`, *optional*):
            Seconds of matrix products that were measured, by dtype and shape.
    """

    name: str
    memory: float
    flops: Mapping[torch.dtype, float]
    bandwidth: Callable[[Operation], float] = field(repr=False)
    link: float
    host_link: float
    launch: float = 0.0
    products: Mapping[tuple, float] = field(default_factory=dict, repr=False)

    def seconds(self, operations: Mapping[Operation, int]) -> float:
        """
        Estimates the time of operations.

        A kernel takes as long as its arithmetic or its memory traffic, whichever is longer.

        Args:
            operations (`Mapping[Operation, int]`):
                How often every operation is done.

        Returns:
            `float`: Seconds.
        """
        total = sum(count * self._seconds(operation) for operation, count in operations.items())
        return max(total, self.launch * sum(operations.values()))

    def _seconds(self, operation: Operation) -> float:
        measured = self.products.get((operation.dtype, operation.shape)) if operation.flops else None
        if measured is not None:
            return measured
        rate = self.flops.get(operation.dtype, self.flops[torch.float32])
        return max(operation.flops / rate, operation.moved / self.bandwidth(operation))


def hardware_of(gpu: str, efficiency: float) -> Hardware:
    """
    A GPU of the table.

    Args:
        gpu (`str`):
            Its name.
        efficiency (`float`):
            Share of the data sheet's FLOP/s that large matrix products reach.

    Returns:
        [`Hardware`]: What it does in a second.

    Raises:
        `ValueError`: If it is not in the table, or the share is not between 0 and 1.
    """
    sheet = GPUS.get(gpu.lower())
    if sheet is None:
        raise ValueError(
            f"The GPU `{gpu}` is not in the table: {', '.join(GPUS)}. Take the one that is nearest, or measure yours with "
            "`--calibrate` on it."
        )
    if not 0 < efficiency <= 1:
        raise ValueError(
            f"`--efficiency` is {efficiency}; it is the share of the data sheet's FLOP/s, between 0 and 1."
        )
    flops = {torch.float32: sheet.float32 * 1e12 * efficiency}
    flops |= dict.fromkeys((torch.bfloat16, torch.float16), sheet.bf16 * 1e12 * efficiency)
    bandwidth = sheet.bandwidth * 1e9 * _BANDWIDTH_SHARE
    # One direction of PCIe 4 or 5
    host_link = (64e9 if sheet.link in (128, 900, 1800) else 32e9) * _BANDWIDTH_SHARE
    return Hardware(
        gpu.lower(), sheet.memory, flops, lambda _: bandwidth, sheet.link / 2 * 1e9 * _BANDWIDTH_SHARE, host_link,
        _LAUNCH_SECONDS,
    )  # fmt: skip


class Calibration:
    """
    Measures this machine: its matrix products, in the shapes of a run, and its memory.

    Args:
        device ([`torch.device`]):
            The GPU, or the CPU with as many threads as PyTorch has been given.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._products: dict[tuple, list[float]] = {}
        self._rates: dict[str, list[list[float]]] = {name: [] for name in _KERNELS}

    def measure(self, operations: Iterable[Operation]) -> None:
        """
        Measures once; the median of several calls is what counts.

        Args:
            operations (`Iterable[Operation]`):
                Operations of a run.
        """
        flops: dict[tuple, int] = {}
        for operation in operations:
            if operation.flops and len(operation.shape) == 4 and "mm" in operation.name:
                key = (operation.dtype, operation.shape)
                flops[key] = max(flops.get(key, 0), operation.flops)
        for dtype, shape in flops:
            self._products.setdefault((dtype, shape), []).append(self._product(dtype, *shape))
        for name, (kernel, accesses) in _KERNELS.items():
            self._rates[name].append([self._rate(kernel, accesses, size) for size in _SIZES])

    def hardware(self) -> Hardware:
        """
        What was measured.

        Returns:
            [`Hardware`]: The machine.
        """
        products = {key: float(np.median(seconds)) for key, seconds in self._products.items()}
        flops = {}
        for dtype in {dtype for dtype, _ in products} | {torch.float32}:
            rates = [2 * math.prod(shape) / t for (d, shape), t in products.items() if d == dtype]
            flops[dtype] = float(np.median(rates)) if rates else 2 * 512**3 / self._product(dtype, 1, 512, 512, 512)
        curves = {name: np.median(found, axis=0) for name, found in self._rates.items()}

        def bandwidth(operation: Operation) -> float:
            kind = "random" if operation.name in _RANDOM else "plain"
            kind = "exponential" if operation.name in _EXPONENTIAL else kind
            return float(np.interp(math.log(max(1, operation.moved)), np.log(_SIZES), curves[kind]))

        if self.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.device).total_memory
            name, launch = torch.cuda.get_device_name(self.device), _LAUNCH_SECONDS
        else:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            name, launch = "this CPU", 0.0
        return Hardware(name, memory / 2**30, flops, bandwidth, 10e9, 10e9, launch, products)

    def _product(self, dtype: torch.dtype, batch: int, rows: int, inner: int, columns: int) -> float:
        a = torch.randn(batch, rows, inner, device=self.device).to(dtype)
        b = torch.randn(batch, columns, inner, device=self.device).to(dtype).transpose(1, 2)
        return self._time(
            functools.partial(torch.mm, a[0], b[0]) if batch == 1 else functools.partial(torch.bmm, a, b)
        )

    def _rate(self, kernel: Callable[[torch.Tensor], torch.Tensor], accesses: int, size: int) -> float:
        x = torch.rand(size // (4 * accesses), device=self.device)
        return size / self._time(functools.partial(kernel, x))

    def _time(self, run: Callable[[], torch.Tensor]) -> float:
        def clock() -> float:
            if self.device.type != "cuda":
                # Other programs do not count, but with several threads the seconds of all of them would
                return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
            torch.cuda.synchronize(self.device)
            return time.perf_counter()

        run()
        start, repeats = clock(), 0
        while (elapsed := clock() - start) < _SECONDS_EACH or not repeats:
            run()
            repeats += 1
        return elapsed / repeats if repeats else elapsed
