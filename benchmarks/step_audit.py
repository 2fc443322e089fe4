"""What a training step does that time and memory do not show: waits for the device, collectives, large tensors."""

import collections
import contextlib
import statistics
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainerCallback


# What a GPU is waited for: a value is read, or the shape of a result depends on values
_READS = ("aten::_local_scalar_dense", "aten::equal")
_SHAPES = ("aten::nonzero", "aten::masked_select")
KINDS = ("reads", "shapes", "uploads", "collectives")
_READING_METHODS = ("tolist", "numpy", "cpu")
_COLLECTIVES = ("gather", "reduce", "pad_across_processes")
# Frames of these packages only pass a call on
_PASSING = (str(Path(torch.__file__).parent), str(Path(__file__)))


class StepAudit(TorchDispatchMode):
    """
    Counts what the operations of a step would make a GPU wait for, and the tensors as large as the vocabulary. Counted
    in `counts`, in all and by the file that asks, are:

    - `"reads"`: a value is read on the host (`.item()`, `bool()`, `.tolist()`, `.numpy()`);
    - `"shapes"`: the shape of a result depends on values (`nonzero`, indexing with a boolean mask);
    - `"uploads"`: a tensor is made of Python numbers, which on a GPU is a copy that the host waits for;
    - `"collectives"`: all processes meet in [`~accelerate.Accelerator`];
    - `"vocabulary_sized"`: an operation returns a tensor with a dimension of at least `vocabulary`.

    What the collator does is left out: it works on the host, ahead of the device.

    Args:
        vocabulary (`int`):
            Size from which on a tensor is as large as the vocabulary.
    """

    def __init__(self, vocabulary: int):
        super().__init__()
        self.counts: collections.Counter[tuple[str, ...]] = collections.Counter()
        self._vocabulary = vocabulary
        self._collating = False

    def _count(self, kind: str) -> None:
        if not self._collating:
            self.counts.update([(kind,), (kind, _caller())])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        if name in _READS:
            self._count("reads")
        elif name in _SHAPES or (name in ("aten::index", "aten::index_put_") and _has_mask(args[1])):
            self._count("shapes")
        elif name == "aten::lift_fresh":
            self._count("uploads")
        result = func(*args, **(kwargs or {}))
        if any(
            isinstance(x, torch.Tensor) and max(x.shape, default=0) >= self._vocabulary for x in tree_leaves(result)
        ):
            self._count("vocabulary_sized")
        return result

    @contextlib.contextmanager
    def watch(self, trainer: Trainer) -> Iterator[None]:
        """Counts, inside, the methods of tensors and of the accelerator too, which are no operations."""
        accelerator, collate = trainer.accelerator, trainer.data_collator

        def counted(kind, original):
            def method(*args, **kwargs):
                self._count(kind)
                return original(*args, **kwargs)

            return method

        def uncounted(examples):
            self._collating = True
            try:
                return collate(examples)
            finally:
                self._collating = False

        with contextlib.ExitStack() as stack:
            for name in _READING_METHODS:
                original = getattr(torch.Tensor, name)
                setattr(torch.Tensor, name, counted("reads", original))
                stack.callback(setattr, torch.Tensor, name, original)
            for name in _COLLECTIVES:
                setattr(accelerator, name, counted("collectives", getattr(accelerator, name)))
                stack.callback(delattr, accelerator, name)
            trainer.data_collator = uncounted
            stack.callback(setattr, trainer, "data_collator", collate)
            stack.enter_context(self)
            yield


def _has_mask(indices: Any) -> bool:
    return any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in indices)


def _caller() -> str:
    """`package/…/file.py` of the innermost frame that is neither PyTorch's nor ours."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((*_PASSING, "<")):
        frame = frame.f_back
    if frame is None:
        return "?"
    parts = Path(frame.f_code.co_filename).parts
    if "site-packages" in parts:
        return "/".join(parts[parts.index("site-packages") + 1 :])
    return "/".join(parts[parts.index("gift_trl", len(parts) - 4) :] if "gift_trl" in parts[-4:] else parts[-2:])


class _Snapshots(TrainerCallback):
    """Keeps what has been counted by the end of every step."""

    def __init__(self, count):
        self._count = count
        self.counts: list[dict[tuple[str, ...], int]] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.counts.append(self._count())


def audit_steps(trainer: Trainer, vocabulary: int) -> dict[str, Any]:
    """
    Trains, and counts what each optimizer step does.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer that has not begun; all of its `max_steps` are run.
        vocabulary (`int`):
            Size from which on a tensor is as large as the vocabulary.

    Returns:
        `dict[str, Any]`: The counts of a usual step (the median) and of the dearest one after the first, which logs; on
        a GPU with `"synchronisations"`, as PyTorch's own debug mode reports them. Then the counts of a usual step by
        file: of waiting, and of the vocabulary-sized tensors.
    """
    on_gpu = trainer.args.device.type == "cuda"
    audit = StepAudit(vocabulary)
    caught: list[warnings.WarningMessage] = []

    def count() -> dict[tuple[str, ...], int]:
        waits = sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
        return {**audit.counts, **({("synchronisations",): waits} if on_gpu else {})}

    snapshots = _Snapshots(count)
    trainer.add_callback(snapshots)
    with contextlib.ExitStack() as stack:
        if on_gpu:
            caught = stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            stack.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("warn")
        stack.enter_context(audit.watch(trainer))
        trainer.train()
    pairs = list(zip(snapshots.counts[:-1], snapshots.counts[1:], strict=True))
    steps = {
        key: [after.get(key, 0) - before.get(key, 0) for before, after in pairs]
        for key in sorted(snapshots.counts[-1])
    }
    step = {key: statistics.median_low(values) for key, values in steps.items()}
    totals = (*KINDS, *(("synchronisations",) if on_gpu else ()))
    by_file = {key: n for key, n in step.items() if len(key) == 2 and n}
    return {
        "step": {kind: step.get((kind,), 0) for kind in totals},
        "logging_step": {kind: max(steps.get((kind,), [0])) for kind in totals},
        "step_by_file": {": ".join(key): n for key, n in by_file.items() if key[0] in KINDS},
        "vocabulary_sized": {file: n for (kind, file), n in by_file.items() if kind == "vocabulary_sized"},
    }
