"""The update of plain LoRA in half precision, a block of rows at a time, without a new tensor for each."""

import functools
import math
import time
from collections.abc import Callable

import torch


class Buffer:
    """
    Memory that is used again: much of the time of a fresh allocation goes into page faults.

    Args:
        dtype (`torch.dtype`):
            Dtype of its elements.
    """

    def __init__(self, dtype: torch.dtype):
        self._held = torch.empty(0, dtype=dtype)

    def take(self, count: int) -> torch.Tensor:
        """
        Some elements, with whatever values they have.

        Args:
            count (`int`):
                Number of elements.

        Returns:
            `torch.Tensor` of shape `(count,)`: The same memory as the last time, unless it was too small.
        """
        if self._held.numel() < count:
            self._held = torch.empty(count, dtype=self._held.dtype)
        return self._held[:count]


# Adds B·A to rows, of which the last argument may hold a copy in float32
Addition = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class LoraProduct:
    """
    Adds scaling·B·A to rows of a weight as PEFT's layer does: the product and the sum in float32, one rounding at the end.

    Args:
        a (`torch.Tensor` of shape `(rank, columns)`):
            The factor A.
        b (`torch.Tensor` of shape `(rows, rank)`):
            The factor B.
        scaling (`float`):
            Factor of the product.
        buffer ([`Buffer`]):
            Holds the sum, in float32.
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scaling: float, buffer: Buffer):
        self.a = a.float()
        self.b = b
        self.scaling = scaling
        self.buffer = buffer
        # A power of two shifts exponents only, before the product as well as after it
        self._scales_b = scaling >= 1 and math.frexp(scaling)[0] == 0.5

    def add_to(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """
        Adds the update to some rows.

        Args:
            rows (`torch.Tensor` of shape `(N, columns)`, bfloat16 or float16):
                Neighbouring rows of the weight. They are changed in place.
            start (`int`):
                Index of the first of them in the weight.

        Returns:
            `torch.Tensor` of shape `(N, columns)`: The rows.
        """
        b = self.b[start : start + len(rows)].float()
        wide = self.buffer.take(rows.numel()).view(rows.shape)
        if self._scales_b:
            add = quickest_addition(len(rows), *self.a.shape, torch.get_num_threads())
            return rows.copy_(add(rows, b * self.scaling, self.a, wide))
        torch.mm(b, self.a, out=wide)
        return rows.copy_(wide.mul_(self.scaling).add_(rows))


def _multiply_and_add(rows: torch.Tensor, b: torch.Tensor, a: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    return torch.mm(b, a, out=wide).add_(rows)


def _add_in_product(rows: torch.Tensor, b: torch.Tensor, a: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    # Saves a pass over memory. Where the kernel cuts a large rank into parts, it adds one after the other.
    return wide.copy_(rows).addmm_(b, a)


def _multiply_by_onednn(rows: torch.Tensor, b: torch.Tensor, a: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    # What torch.compile calls. MKL, which `torch.mm` calls, leaves half of the vector units of some processors idle.
    return torch.ops.mkldnn._linear_pointwise(b, a.t(), None, "none", [], "").add_(rows)


# The first one's bits are those of PEFT's layer
ADDITIONS: tuple[Addition, ...] = (_multiply_and_add, _add_in_product, _multiply_by_onednn)


@functools.cache
def quickest_addition(rows: int, rank: int, columns: int, num_threads: int) -> Addition:
    """
    The quickest way to add a product in float32 to rows that gives the bits of `torch.mm` and a sum.

    A kernel may sum over the rank in another order, and the last digit then differs: which do is tried once for each shape,
    on random values, and so is which takes least time.

    Args:
        rows, rank, columns (`int`):
            The product is of shapes `(rows, rank)` and `(rank, columns)`.
        num_threads (`int`):
            PyTorch's threads, by which a kernel may cut as well.

    Returns:
        `Callable`: Takes the rows, B, A, and memory for the rows in float32; returns the sum in float32.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(max(rows, rank) * max(rank, columns), generator=generator).sub_(0.5)
    before = values[: rows * columns].view(rows, columns).bfloat16()
    a, b = values[-rank * columns :].view(rank, columns), values[-rows * rank :].view(rows, rank)
    wide = torch.empty(rows, columns)
    expected = ADDITIONS[0](before, b, a, wide).clone()
    seconds: dict[Addition, float] = {}
    for add in ADDITIONS:
        try:
            if torch.equal(add(before, b, a, wide), expected):
                seconds[add] = min(seconds_of(add, before, b, a, wide) for _ in range(3))
        except (AttributeError, NotImplementedError, RuntimeError):
            continue  # this build of PyTorch has no oneDNN
    return min(seconds, key=seconds.__getitem__)


def seconds_of(add: Addition, *tensors: torch.Tensor) -> float:
    """
    Wall time of an addition.

    Args:
        add (`Callable`):
            The addition.
        tensors (`torch.Tensor`):
            What it takes.

    Returns:
        `float`: Seconds.
    """
    started = time.perf_counter()
    add(*tensors)
    return time.perf_counter() - started
