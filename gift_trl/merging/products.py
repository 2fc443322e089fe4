"""The update of plain LoRA in half precision, a block of rows at a time, without a new tensor for each."""

import functools
import math

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
            b = b * self.scaling
            if adds_whole_products(len(rows), *self.a.shape, torch.get_num_threads()):
                return rows.copy_(wide.copy_(rows).addmm_(b, self.a))
        torch.mm(b, self.a, out=wide)
        if not self._scales_b:
            wide.mul_(self.scaling)
        return rows.copy_(wide.add_(rows))


@functools.cache
def adds_whole_products(rows: int, rank: int, columns: int, num_threads: int) -> bool:
    """
    Whether `addmm_` in float32 gives the bits of a product that is added afterwards, which it saves a pass over memory.

    That is so where the kernel finishes a product before it adds it. Where it cuts a large rank into parts, it adds one
    after the other, and the last digit differs. It is tried once for each shape.

    Args:
        rows, rank, columns (`int`):
            The product is of shapes `(rows, rank)` and `(rank, columns)`.
        num_threads (`int`):
            PyTorch's threads, by which a kernel may cut as well.

    Returns:
        `bool`: Whether the bits are the same.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(max(rows, rank) * max(rank, columns), generator=generator).sub_(0.5)
    before = values[: rows * columns].view(rows, columns)
    a = values[-rank * columns :].view(rank, columns)
    b = values[-rows * rank :].view(rows, rank)
    return torch.equal(torch.addmm(before, b, a), torch.mm(b, a).add_(before))
