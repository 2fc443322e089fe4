"""The instruct checkpoint on its way to the merged one: untouched bytes are copied, targeted tensors updated in between."""

import contextlib
import errno
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub.utils import TensorInfo
from tqdm import tqdm

from gift_trl.checkpoints import read_header
from gift_trl.merging.conversion import DTYPES, StoredParameter
from gift_trl.merging.products import Buffer
from gift_trl.merging.targets import Target


_CHUNK_BYTES = 4 * 2**20
# How a kernel or a file system says that it cannot copy between files by itself.
_NO_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY}


@dataclass(frozen=True)
class StoredTensor:
    """
    Where a tensor lies.

    Args:
        name (`str`):
            Its name.
        shard (`Path`):
            The file.
        start (`int`):
            Its first byte in the file.
        info (`TensorInfo`):
            Dtype and shape.
    """

    name: str
    shard: Path
    start: int
    info: TensorInfo

    @property
    def num_bytes(self) -> int:
        return self.info.data_offsets[1] - self.info.data_offsets[0]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.info.dtype]


class CheckpointReader:
    """
    Tensors of a checkpoint by name, whole or in part.

    Args:
        shards (`Iterable[Path]`):
            Its safetensors files.
    """

    def __init__(self, shards: Iterable[Path]):
        self.tensors: dict[str, StoredTensor] = {}
        self.data_starts: dict[Path, int] = {}
        for shard in shards:
            header, data_start = read_header(shard)
            self.data_starts[shard] = data_start
            for name, info in sorted(header.tensors.items(), key=lambda item: item[1].data_offsets):
                self.tensors[name] = StoredTensor(name, shard, data_start + info.data_offsets[0], info)
        self._files: dict[Path, BinaryIO] = {}

    def __enter__(self) -> "CheckpointReader":
        for shard in self.data_starts:
            # Unbuffered: what is read goes straight to the tensor
            self._files[shard] = open(shard, "rb", buffering=0)
        return self

    def __exit__(self, *exception) -> None:
        for file in self._files.values():
            file.close()

    def read(self, name: str) -> torch.Tensor:
        """
        Reads a tensor.

        Args:
            name (`str`):
                Its name.

        Returns:
            `torch.Tensor`: The tensor.

        Raises:
            `OSError`: If the file ends before its header says so.
        """
        tensor = self.tensors[name]
        return self.read_bytes(tensor, 0, tensor.num_bytes).view(tensor.dtype).view(tensor.info.shape)

    def read_rows(self, name: str, start: int, end: int, buffer: Buffer | None = None) -> torch.Tensor:
        """
        Reads some rows of a tensor of two dimensions.

        Args:
            name (`str`):
                Its name.
            start (`int`):
                First row.
            end (`int`):
                Row after the last.
            buffer ([`~gift_trl.merging.products.Buffer`], *optional*):
                Memory of bytes to read into. New memory by default.

        Returns:
            `torch.Tensor` of shape `(end - start, columns)`: The rows, in the buffer if there is one.
        """
        tensor = self.tensors[name]
        row = tensor.num_bytes // tensor.info.shape[0]
        part = self.read_bytes(tensor, start * row, (end - start) * row, buffer)
        return part.view(tensor.dtype).view(end - start, tensor.info.shape[1])

    def read_bytes(
        self, tensor: StoredTensor, start: int, num_bytes: int, buffer: Buffer | None = None
    ) -> torch.Tensor:
        """
        Reads bytes of a tensor.

        Args:
            tensor (`StoredTensor`):
                The tensor.
            start (`int`):
                First byte, counted from the beginning of the tensor.
            num_bytes (`int`):
                Number of bytes.
            buffer ([`~gift_trl.merging.products.Buffer`], *optional*):
                Memory of bytes to read into. New memory by default.

        Returns:
            `torch.Tensor` of shape `(num_bytes,)`, uint8: The bytes, in the buffer if there is one.
        """
        held = (buffer or Buffer(torch.uint8)).take(num_bytes)
        _read_into(self._files[tensor.shard], tensor.start + start, memoryview(held.numpy()))
        return held


class MergedWriter:
    """
    Writes the files of the merged checkpoint: those of the instruct checkpoint, with the bytes of some tensors replaced.

    Dtypes and shapes stay, so the headers do too: order, offsets and metadata with them.

    Args:
        source (`CheckpointReader`):
            The instruct checkpoint, open.
        folder (`Path`):
            Folder to write to.
        progress (`tqdm`):
            Progress bar that counts bytes.
    """

    def __init__(self, source: CheckpointReader, folder: Path, progress: tqdm):
        self.source = source
        self.folder = folder
        self.progress = progress
        self._files: dict[Path, BinaryIO] = {}

    def __enter__(self) -> "MergedWriter":
        for shard in self.source.data_starts:
            file = self._files[shard] = open(self.folder / shard.name, "xb", buffering=0)
            _reserve(file, shard.stat().st_size)
        return self

    def __exit__(self, *exception) -> None:
        for file in self._files.values():
            file.close()

    def copy_rest(self, touched: set[str]) -> None:
        """
        Copies everything but some tensors.

        Args:
            touched (`set[str]`):
                Names of the tensors that will be written.
        """
        for shard, file in self._files.items():
            position, size = 0, shard.stat().st_size
            tensors = (self.source.tensors[name] for name in touched)
            for tensor in sorted((t for t in tensors if t.shard == shard), key=lambda t: t.start):
                self._copy(shard, file, position, tensor.start)
                position = tensor.start + tensor.num_bytes
            self._copy(shard, file, position, size)

    def write(self, name: str, values: torch.Tensor, start: int = 0) -> None:
        """
        Writes a tensor or a part of it.

        Args:
            name (`str`):
                Its name.
            values (`torch.Tensor`):
                The values, in its dtype.
            start (`int`, *optional*, defaults to `0`):
                Where they begin in it, in elements.
        """
        tensor = self.source.tensors[name]
        data = memoryview(values.contiguous().view(-1).view(torch.uint8).numpy())
        file, position = self._files[tensor.shard], tensor.start + start * values.element_size()
        file.seek(position)
        while data:
            written = file.write(data)
            data = data[written:]
        self.progress.update(values.nbytes)

    def _copy(self, shard: Path, target: BinaryIO, position: int, end: int) -> None:
        source = self.source._files[shard]
        while position < end:
            count = min(end - position, 16 * _CHUNK_BYTES)
            copied = _copy_range(source, target, position, count)
            self.progress.update(copied)
            position += copied


def merge_targets(
    targets: Iterable[Target], source: CheckpointReader, writer: MergedWriter, scale: float
) -> Iterator[tuple[str, bool]]:
    """
    Writes the merged values of every target, as the iterator is consumed.

    In memory is a block of rows where the adapter is merged by rows, else one module and PEFT's intermediate results for it.

    Args:
        targets (`Iterable[Target]`):
            The targets.
        source (`CheckpointReader`):
            The instruct checkpoint, open.
        writer (`MergedWriter`):
            Where to write.
        scale (`float`):
            Factor of the updates.

    Yields:
        `tuple[str, bool]`: Name of each tensor, and whether it differs from the instruct model's.

    Raises:
        `ValueError`: If a tensor is not finite, before or after the merge.
        `OSError`: If a file ends before its header says so, or the disk fails.
    """
    stored_rows, wide_rows = Buffer(torch.uint8), Buffer(torch.float32)
    for target in targets:
        if target.merges_by_rows:
            for name, stored in target.parameters.items():
                (tensor,) = stored.tensors
                if name == "weight":
                    yield tensor, _merge_by_rows(target, tensor, source, writer, scale, stored_rows, wide_rows)
                else:
                    bias = target.layer.merge_bias(source.read(tensor), scale)
                    yield from write_module({name: stored}, {name: bias}, source, writer)
            continue
        weights = {
            name: stored.assemble({tensor: source.read(tensor) for tensor in stored.tensors})
            for name, stored in target.parameters.items()
        }
        merged = target.merge(weights, scale)
        del weights
        yield from write_module(target.parameters, merged, source, writer)


def write_module(
    parameters: Mapping[str, StoredParameter],
    merged: dict[str, torch.Tensor],
    source: CheckpointReader,
    writer: MergedWriter,
) -> Iterator[tuple[str, bool]]:
    """
    Writes the parameters of a module.

    Args:
        parameters (`Mapping[str, StoredParameter]`):
            The parameters by their name in the module.
        merged (`dict[str, torch.Tensor]`):
            Their values. It is emptied on the way.
        source (`CheckpointReader`):
            The instruct checkpoint, open.
        writer (`MergedWriter`):
            Where to write.

    Yields:
        `tuple[str, bool]`: Name of each tensor, and whether it differs from the instruct model's.

    Raises:
        `ValueError`: If a value is not finite.
    """
    for name, stored in parameters.items():
        parts = stored.take_apart(merged.pop(name))
        while parts:
            tensor, values = parts.popitem()
            values = values.contiguous()
            if not is_finite(values):
                raise not_finite(tensor, source, values.dtype)
            writer.write(tensor, values)
            yield tensor, _differs(values, source, tensor)


def _merge_by_rows(
    target: Target,
    name: str,
    source: CheckpointReader,
    writer: MergedWriter,
    scale: float,
    stored_rows: Buffer,
    wide_rows: Buffer,
) -> bool:
    changed, tensor = False, source.tensors[name]
    columns = tensor.info.shape[1]
    merge = target.layer.block_merger(tensor.dtype, scale, wide_rows)
    for start, end in target.layer.row_blocks(*tensor.info.shape):
        rows = source.read_rows(name, start, end, stored_rows)
        before = None if changed else rows.clone()
        rows = merge(rows, start)
        if not is_finite(rows):
            raise not_finite(name, source, rows.dtype)
        writer.write(name, rows, start * columns)
        changed = changed or not torch.equal(rows, before)
    return changed


def not_finite(name: str, source: CheckpointReader, dtype: torch.dtype) -> ValueError:
    """
    The error about a merged tensor with values that are not finite, which says whether they came from the checkpoint.

    Args:
        name (`str`):
            Name of the tensor.
        source (`CheckpointReader`):
            The instruct checkpoint, open.
        dtype (`torch.dtype`):
            Dtype of the tensor.

    Returns:
        `ValueError`: The error.
    """
    if not is_finite(source.read(name)):
        return ValueError(
            f"'{name}' of the instruct checkpoint holds NaN or infinite values: copy or download the checkpoint again."
        )
    return ValueError(
        f"'{name}' holds NaN or infinite values after the merge: the update is too large for {dtype}. Merge with a smaller "
        "scale, or train the adapter with a lower learning rate."
    )


def _differs(values: torch.Tensor, source: CheckpointReader, name: str) -> bool:
    # The original comes from the file once more, piece by piece: PEFT merges in place, and a copy would cost memory.
    tensor, start = source.tensors[name], 0
    for piece in values.view(-1).split(_CHUNK_BYTES // values.element_size()):
        if not torch.equal(piece, source.read_bytes(tensor, start, piece.nbytes).view(piece.dtype)):
            return True
        start += piece.nbytes
    return False


def is_finite(values: torch.Tensor) -> bool:
    """
    Whether all values are finite, without a copy of them.

    Args:
        values (`torch.Tensor`):
            The values.

    Returns:
        `bool`: Whether they are.
    """
    # A finite sum has finite terms, and is the quickest to have; one that is not may only be large.
    return math.isfinite(values.sum().item()) or bool(torch.stack(values.aminmax()).isfinite().all())


def _reserve(file: BinaryIO, size: int) -> None:
    # So that a full disk shows at once; where that cannot be, it shows when it is full.
    with contextlib.suppress(AttributeError):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno not in _NO_COPY:
                raise
    file.truncate(size)


def _copy_range(source: BinaryIO, target: BinaryIO, position: int, count: int) -> int:
    with contextlib.suppress(AttributeError):
        try:
            copied = os.copy_file_range(source.fileno(), target.fileno(), count, position, position)
            if copied:
                return copied
        except OSError as error:
            if error.errno not in _NO_COPY:
                raise
    buffer = memoryview(bytearray(min(count, _CHUNK_BYTES)))
    _read_into(source, position, buffer)
    target.seek(position)
    return target.write(buffer)


def _read_into(source: BinaryIO, position: int, buffer: memoryview) -> None:
    source.seek(position)
    while buffer:
        count = source.readinto(buffer)
        if not count:
            raise OSError(
                f"'{source.name}' ended early: it was changed during the merge. Merge again when it is complete."
            )
        buffer = buffer[count:]
