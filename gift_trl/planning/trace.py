"""What operations cost: live bytes, floating-point operations and bytes moved, followed on tensors without content."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


aten = torch.ops.aten
# Made of nothing, or without a kernel
_FREE = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten._unsafe_view, aten.lift_fresh}


class Operation(NamedTuple):
    """
    An operation of a trace.

    Args:
        name (`str`):
            Name of the kernel.
        dtype ([`torch.dtype`]):
            Its dtype.
        shape (`tuple[int, ...]`):
            Batch, rows, inner and columns of a matrix product; shape of what is made otherwise.
        flops (`int`):
            Floating-point operations of matrix products and attention; 0 otherwise.
        moved (`int`):
            Bytes read and written.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    flops: int
    moved: int


class CostTrace(TorchDispatchMode):
    """
    Follows what is allocated, freed and computed while it is active.

    It counts storages, so a view costs nothing, and a tensor that autograd keeps counts until it is let go. What a kernel
    allocates for itself is not seen.

    Args:
        targets (`int`):
            Number of true entries of any mask that selects tokens: tensors without content do not say.
    """

    def __init__(self, targets: int = 0):
        super().__init__()
        self.operations: Counter[Operation] = Counter()
        self.peaks: dict[str, int] = {}
        self.live = 0
        self._targets, self.phase = targets, "start"
        self._storages: dict[int, tuple[weakref.ref, int]] = {}

    def enter(self, phase: str) -> None:
        """Begins, or goes on with, a phase, whose peak of live bytes is kept by itself."""
        self.phase = phase
        self.peaks[phase] = max(self.live, self.peaks.get(phase, 0))

    def count(self, operation: Operation) -> None:
        """Adds an operation that is not seen because something else stands in for it."""
        self.operations[operation] += 1

    def ignore(self, tensor: torch.Tensor) -> None:
        """Leaves a tensor out, such as a parameter."""
        storage = tensor.untyped_storage()
        if (entry := self._storages.pop(storage._cdata, None)) is not None:
            self.live -= entry[1]
        self._storages[storage._cdata] = (weakref.ref(storage, self._forget(storage._cdata)), 0)

    def _forget(self, key: int) -> Callable[[weakref.ref], None]:
        def forget(reference: weakref.ref) -> None:
            entry = self._storages.get(key)
            if entry is not None and entry[0] is reference:
                self.live -= entry[1]
                del self._storages[key]

        return forget

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = (weakref.ref(storage, self._forget(key)), storage.nbytes())
            self.live += storage.nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = self._select(func, args) if func in (aten.index.Tensor, aten.index_put_.default) else None
        if made is None:
            made = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        for tensor in outputs:
            self._hold(tensor)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.live)
        self._count(func, args, kwargs, made, outputs)
        return made

    def _select(self, func: Any, args: Any) -> torch.Tensor | None:
        """The rows that a mask selects, whose number the mask would say if it had content."""
        source, indices = args[0], args[1]
        mask = indices[0]
        if mask is None or mask.dtype != torch.bool:
            return None
        if func is aten.index_put_.default:
            return source
        return source.new_empty((self._targets, *source.shape[mask.dim() :]))

    def _count(self, func: Any, args: Any, kwargs: Any, made: Any, outputs: list[torch.Tensor]) -> None:
        packet = func._overloadpacket
        returns = func._schema.returns
        is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not outputs or is_view or packet in _FREE:
            return
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        distinct = {id(tensor): tensor for tensor in (*inputs, *outputs)}
        moved = sum(min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in distinct.values())
        flops, shape = 0, tuple(outputs[0].shape)
        if packet is aten._scaled_dot_product_flash_attention_for_cpu:
            # PyTorch's counter does not know the kernels of a CPU. What a causal mask hides is left out by all of them
            flops = sdpa_flop_count(*(tensor.shape for tensor in args[:3])) // (2 if args[4:] and args[4] else 1)
        elif packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
            flops = sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])) // (2 if args[7] else 1)
        elif packet is aten._grouped_mm:  # each token meets the weights of its own expert alone
            flops = 2 * args[0].shape[-2] * args[0].shape[-1] * args[1].shape[-1]
        elif packet is aten.addmm_:
            flops = 2 * args[1].numel() * args[2].shape[1]
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=made)
        if packet in (aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm):
            first, second = args[-2:] if packet in (aten.mm, aten.bmm) else args[1:3]
            batch = first.shape[0] if first.dim() == 3 else 1
            shape = (batch, first.shape[-2], first.shape[-1], second.shape[-1])
        self.operations[Operation(packet.__name__, outputs[0].dtype, shape, int(flops), int(moved))] += 1
