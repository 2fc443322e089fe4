"""One safetensors file of the instruct checkpoint after the other, with the targeted tensors updated on the way."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub.utils import TensorInfo
from safetensors import safe_open
from tqdm import tqdm

from gift_trl.checkpoints import read_header
from gift_trl.merging.targets import Target


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_CHUNK_BYTES = 8 * 2**20


class ShardStream:
    """
    Copies safetensors files, adding the adapter's updates to the tensors that it targets.

    In memory are one targeted tensor and PEFT's intermediate results for it; all else passes through a small buffer.

    Args:
        targets (`Mapping[str, Target]`):
            The update of each targeted tensor, by its name in the checkpoint.
        adapter (`safe_open`):
            Open adapter file.
        scale (`float`):
            Factor of the updates.
        progress (`tqdm`):
            Progress bar that counts bytes.
    """

    def __init__(self, targets: Mapping[str, Target], adapter: safe_open, scale: float, progress: tqdm):
        self.targets = targets
        self.adapter = adapter
        self.scale = scale
        self.progress = progress
        # Kept from tensor to tensor: large blocks that come and go fragment the heap, which then never shrinks.
        self._chunk = torch.empty(_CHUNK_BYTES, dtype=torch.uint8)
        self._weight = torch.empty(0, dtype=torch.uint8)

    def merge_shard(self, shard: Path, output: Path) -> Iterator[tuple[str, TensorInfo, bool | None]]:
        """
        Writes the merged copy of one file, tensor by tensor as the iterator is consumed.

        Args:
            shard (`Path`):
                File of the instruct checkpoint.
            output (`Path`):
                File to write.

        Yields:
            `tuple[str, TensorInfo, bool | None]`: Name, dtype and shape of each tensor, and whether it differs from the
            instruct model's, `None` for one that is no target.

        Raises:
            `ValueError`: If a targeted tensor is not finite, before or after the merge.
            `OSError`: If the file ends before its header says so.
        """
        header, data_start = read_header(shard)
        with open(shard, "rb") as source, open(output, "wb") as target:
            # Dtypes and shapes stay, so the header does too: order, offsets and metadata with it.
            self._copy(source, target, data_start)
            for name, info in sorted(header.tensors.items(), key=lambda item: item[1].data_offsets):
                if name in self.targets:
                    changed = self._merge_tensor(name, info, source, target)
                else:
                    changed = None
                    self._copy(source, target, info.data_offsets[1] - info.data_offsets[0])
                yield name, info, changed

    def _merge_tensor(self, name: str, info: TensorInfo, source: BinaryIO, target: BinaryIO) -> bool:
        start, num_bytes = source.tell(), info.data_offsets[1] - info.data_offsets[0]
        if num_bytes > len(self._weight):
            self._weight = torch.empty(num_bytes, dtype=torch.uint8)
        stored = self._weight[:num_bytes]
        _read_into(source, stored)
        weight = stored.view(DTYPES[info.dtype]).view(info.shape)
        if not _is_finite(weight):
            raise ValueError(
                f"'{name}' of the instruct checkpoint holds NaN or infinite values: copy or download the checkpoint again."
            )
        weight = self.targets[name].merge(weight, self.adapter, self.scale)
        if not _is_finite(weight):
            raise ValueError(
                f"'{name}' holds NaN or infinite values after the merge: the update is too large for {weight.dtype}. Merge "
                "with a smaller scale, or train the adapter with a lower learning rate."
            )
        target.write(memoryview(weight.contiguous().view(-1).view(torch.uint8).numpy()))
        # The original comes from the file once more, piece by piece: PEFT merges in place, and a copy would cost memory.
        source.seek(start)
        changed = False
        for piece in weight.view(-1).split(_CHUNK_BYTES // weight.element_size()):
            original = self._chunk[: piece.nbytes]
            _read_into(source, original)
            changed = changed or not torch.equal(piece, original.view(piece.dtype))
        self.progress.update(num_bytes)
        return changed

    def _copy(self, source: BinaryIO, target: BinaryIO, num_bytes: int) -> None:
        while num_bytes:
            part = self._chunk[:num_bytes]
            _read_into(source, part)
            target.write(memoryview(part.numpy()))
            self.progress.update(len(part))
            num_bytes -= len(part)


def _read_into(source: BinaryIO, buffer: torch.Tensor) -> None:
    if source.readinto(memoryview(buffer.numpy())) != len(buffer):
        raise OSError(
            f"'{source.name}' ended early: it was changed during the merge. Merge again when it is complete."
        )


def _is_finite(weight: torch.Tensor) -> bool:
    # The extremes show a NaN or an infinity without a copy of the tensor.
    return bool(torch.stack(weight.aminmax()).isfinite().all())
