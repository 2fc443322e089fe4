"""Merges beyond one adapter: several updates, the difference of the models scaled or truncated, a fully tuned base."""

import math
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from peft.utils import merge_utils

from gift_trl.merging.adapter import MERGED_TYPES
from gift_trl.merging.checks import counterparts
from gift_trl.merging.conversion import StoredParameter
from gift_trl.merging.preflight import AdapterPlan
from gift_trl.merging.recipe import COMBINATIONS, MergeRecipe
from gift_trl.merging.stream import CheckpointReader, MergedWriter, is_finite, not_finite, write_module
from gift_trl.merging.targets import Target


_CHUNK_ELEMENTS = 2**20


def update_of(
    target: Target, settings: Mapping[str, object], weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """
    The update that an adapter makes to a module.

    Args:
        target ([`Target`]):
            The module.
        settings (`Mapping[str, Any]`):
            Contents of the adapter's `adapter_config.json`.
        weights (`Mapping[str, torch.Tensor]`):
            The module's parameters, on which the update of some types depends.

    Returns:
        `dict[str, torch.Tensor]`: What is added to each parameter, in float32 or better.
    """
    wide = {name: weight.to(torch.promote_types(weight.dtype, torch.float32)) for name, weight in weights.items()}
    if target.layer is not None and MERGED_TYPES[settings["peft_type"]] and not settings.get("use_dora"):
        # Added to nothing, the update is what it is before any rounding
        return target.merge({name: torch.zeros_like(weight) for name, weight in wide.items()})
    merged = target.merge({name: weight.clone() for name, weight in wide.items()})
    return {name: merged[name] - weight for name, weight in wide.items()}


def combine(updates: Sequence[torch.Tensor], weights: Sequence[float], recipe: MergeRecipe, name: str) -> torch.Tensor:
    """
    Makes one update of several, by PEFT's utilities.

    Args:
        updates (`Sequence[torch.Tensor]`):
            The updates of one parameter.
        weights (`Sequence[float]`):
            Their weights.
        recipe ([`MergeRecipe`]):
            Names the method and its settings.
        name (`str`):
            Name of the parameter, which makes its random numbers its own.

    Returns:
        `torch.Tensor`: The combined update.
    """
    factors = torch.tensor(list(weights), dtype=updates[0].dtype)
    method = recipe.method if recipe.method in COMBINATIONS else "linear"
    if method == "linear":
        return merge_utils.task_arithmetic(list(updates), factors)
    options = {"density": recipe.density}
    if method in ("ties", "dare_ties"):
        options["majority_sign_method"] = recipe.majority_sign
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density")  # 1 is a choice like others
        torch.manual_seed(zlib.crc32(f"{recipe.seed} {name}".encode()))
        return getattr(merge_utils, method)(list(updates), factors, **options)


def truncate(matrix: torch.Tensor, rank: int | None, explained_variance: float | None) -> torch.Tensor:
    """
    The truncated singular value decomposition of a matrix.

    Args:
        matrix (`torch.Tensor` of shape `(..., rows, columns)`):
            One matrix, or several that are truncated one by one.
        rank (`int`, *optional*):
            Number of singular values to keep.
        explained_variance (`float`, *optional*):
            Share of the sum of their squares to keep at least, in place of `rank`.

    Returns:
        `torch.Tensor` of the same shape and dtype: The closest matrix of that rank.
    """
    if matrix.dim() > 2:
        return torch.stack([truncate(part, rank, explained_variance) for part in matrix])
    if matrix.shape[0] < matrix.shape[1]:
        return truncate(matrix.T, rank, explained_variance).T
    rows = _block_rows(matrix.shape[1])
    directions = _leading_directions(matrix.split(rows), rank, explained_variance)
    truncated = torch.empty_like(matrix)
    for part, target in zip(matrix.split(rows), truncated.split(rows), strict=True):
        target.copy_(_project(part, directions))
    return truncated


def _leading_directions(
    blocks: Iterable[torch.Tensor], rank: int | None, explained_variance: float | None
) -> torch.Tensor:
    """The right singular vectors that a truncation keeps, of a matrix of which only some rows at a time are in memory."""
    # They are the eigenvectors of the smaller Gram matrix: many times quicker, and in float64 exact far below the digits
    # of the weights.
    gram: torch.Tensor | None = None
    for block in blocks:
        wide = block.double()
        gram = wide.T @ wide if gram is None else gram.addmm_(wide.T, wide)
    values, vectors = torch.linalg.eigh(gram)
    if rank is None:
        share = values.flip(0).clamp(min=0).cumsum(0)
        rank = int((share < explained_variance * share[-1]).sum()) + 1 if share[-1] > 0 else 1
    return vectors[:, max(0, len(values) - rank) :]


def _project(rows: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    return ((rows.double() @ directions) @ directions.T).to(rows.dtype)


def _block_rows(columns: int) -> int:
    # Products of very few rows are slow
    return max(256, _CHUNK_ELEMENTS // max(1, columns))


def merge_by_method(
    recipe: MergeRecipe,
    adapters: Sequence[AdapterPlan],
    source: CheckpointReader,
    writer: MergedWriter,
    base: CheckpointReader | None = None,
    tuned: CheckpointReader | None = None,
) -> Iterator[tuple[str, bool]]:
    """
    Writes every tensor that the recipe changes, as the iterator is consumed, and copies the others.

    In memory are one module and its updates.

    Args:
        recipe ([`MergeRecipe`]):
            What to do.
        adapters (`Sequence[AdapterPlan]`):
            The adapters, checked.
        source (`CheckpointReader`):
            The instruct checkpoint, open.
        writer (`MergedWriter`):
            Where to write.
        base (`CheckpointReader`, *optional*):
            The base checkpoint, open.
        tuned (`CheckpointReader`, *optional*):
            The fully fine-tuned base checkpoint, open.

    Yields:
        `tuple[str, bool]`: Name of each tensor that the recipe changes, and whether it differs from the instruct model's.

    Raises:
        `ValueError`: If a value is not finite.
    """
    modules = modules_of(adapters, source)
    adapted = {tensor for _, stored in modules.values() for part in stored.values() for tensor in part.tensors}
    # Without a base model, or with all of Δ_I, only what the adapters target changes
    every = recipe.method in ("lore_adapt", "full_delta") or recipe.instruct_weight != 1.0
    weights_of_all = match_names(source, base) if every else []
    if tuned is not None:
        match_names(source, tuned)
    writer.copy_rest({*weights_of_all, *adapted})
    for module, (entries, parameters) in modules.items():
        weights = {name: stored.assemble(_read(stored, source)) for name, stored in parameters.items()}
        updates: dict[str, list[tuple[torch.Tensor, float]]] = {name: [] for name in parameters}
        for number, target in entries:
            own = {name: weights[name] for name in target.parameters}
            for name, update in update_of(target, adapters[number].settings, own).items():
                updates[name].append((update, recipe.adapter_weight[number]))
        merged = {}
        for name, parts in updates.items():
            update = combine(*zip(*parts, strict=True), recipe, f"{module}.{name}")
            before = weights.pop(name)
            dtype = before.dtype
            if every:
                del before  # for the moment in which the largest intermediate results are made
                before = parameters[name].assemble(
                    {
                        tensor: _whole(_rescaled(tensor, recipe, source, base), source, tensor)
                        for tensor in parameters[name].tensors
                    }
                )
            merged[name] = (before.to(update.dtype) + recipe.scale * update).to(dtype)
        yield from write_module(parameters, merged, source, writer)
    for name in weights_of_all:
        if name not in adapted:
            yield name, _merge_rest(name, recipe, source, writer, base, tuned)


def modules_of(
    adapters: Sequence[AdapterPlan], source: CheckpointReader
) -> dict[str, tuple[list[tuple[int, Target]], dict[str, StoredParameter]]]:
    """
    The modules that any of several adapters updates.

    Args:
        adapters (`Sequence[AdapterPlan]`):
            The adapters.
        source (`CheckpointReader`):
            The instruct checkpoint.

    Returns:
        `dict[str, tuple[list[tuple[int, Target]], dict[str, StoredParameter]]]`: For each module, in the order of the file,
        the number of each adapter with its target, and the parameters of all targets.
    """
    found: dict[str, tuple[list[tuple[int, Target]], dict[str, StoredParameter]]] = {}
    for number, adapter in enumerate(adapters):
        for target in adapter.targets:
            # Each adapted parameter of a module of experts is a target of its own
            key = (
                f"{target.module}.{'+'.join(target.parameters)}"
                if target.module.endswith("experts")
                else target.module
            )
            entries, parameters = found.setdefault(key, ([], {}))
            entries.append((number, target))
            parameters.update(target.parameters)
    position = {name: index for index, name in enumerate(source.tensors)}

    def first(item: tuple) -> int:
        return min(position[tensor] for stored in item[1][1].values() for tensor in stored.tensors)

    return dict(sorted(found.items(), key=first))


def _whole(blocks: Iterable[tuple[int, torch.Tensor]], source: CheckpointReader, name: str) -> torch.Tensor:
    tensor = source.tensors[name]
    whole = torch.empty(tensor.info.shape, dtype=torch.promote_types(tensor.dtype, torch.float32))
    for start, values in blocks:
        whole.view(-1)[start : start + values.numel()] = values
    return whole


def _read(stored: StoredParameter, reader: CheckpointReader) -> dict[str, torch.Tensor]:
    return {tensor: reader.read(tensor) for tensor in stored.tensors}


def _rescaled(
    name: str, recipe: MergeRecipe, source: CheckpointReader, base: CheckpointReader
) -> Iterator[tuple[int, torch.Tensor]]:
    """θ_B + β·Δ_I of a tensor, Δ_I truncated if the recipe says so: the first element of each block and its values, flat."""

    def difference(start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        values = _wide(source, name, start, count)
        before = _wide(base, name, start, count).to(values.dtype)
        return before, values - before

    shape, beta = source.tensors[name].info.shape, recipe.instruct_weight
    # Of stored tensors, one by one: how transformers joins them in memory does not change what is truncated
    if recipe.method != "lore_adapt" or len(shape) < 2:
        for start, count in _chunks(math.prod(shape)):
            values = _wide(source, name, start, count)
            # Written so that a weight of 1 leaves the instruct model as it is
            yield start, values + (beta - 1.0) * (values - _wide(base, name, start, count))
        return
    rows, columns = shape[-2:]
    for first in range(0, math.prod(shape), max(1, rows * columns)):
        if rows < columns:
            # Blocks of columns lie scattered in the file; the matrix is no larger than what eigh needs for its rows
            before, change = difference(first, rows * columns)
            _check_finite(change, name)
            kept = truncate(change.view(rows, columns), recipe.rank, recipe.explained_variance)
            yield first, before.add_(kept.reshape(-1), alpha=beta)
            continue
        spans = [(first + start, count) for start, count in _chunks(rows * columns, _block_rows(columns) * columns)]

        def blocks(spans: list[tuple[int, int]] = spans, columns: int = columns) -> Iterator[torch.Tensor]:
            for start, count in spans:
                change = difference(start, count)[1]
                _check_finite(change, name)
                yield change.view(-1, columns)

        directions = _leading_directions(blocks(), recipe.rank, recipe.explained_variance)
        for start, count in spans:
            before, change = difference(start, count)
            kept = _project(change.view(-1, columns), directions)
            yield start, before.add_(kept.view(-1), alpha=beta)


def _check_finite(difference: torch.Tensor, name: str) -> None:
    if not is_finite(difference):
        raise ValueError(
            f"'{name}' of the instruct or the base checkpoint holds NaN or infinite values: copy or download it again."
        )


def _chunks(elements: int, step: int = _CHUNK_ELEMENTS) -> Iterator[tuple[int, int]]:
    for start in range(0, elements, step):
        yield start, min(step, elements - start)


def _wide(reader: CheckpointReader, name: str, start: int, count: int) -> torch.Tensor:
    values = elements_of(reader, name, start, count)
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _merge_rest(
    name: str,
    recipe: MergeRecipe,
    source: CheckpointReader,
    writer: MergedWriter,
    base: CheckpointReader,
    tuned: CheckpointReader | None,
) -> bool:
    changed = False
    blocks = _rescaled(name, recipe, source, base) if tuned is None else _shifted(name, recipe, source, base, tuned)
    for start, values in blocks:
        stored = elements_of(source, name, start, values.numel())
        merged = values.to(stored.dtype)
        if not is_finite(merged):
            raise not_finite(name, source, merged.dtype)
        writer.write(name, merged, start)
        changed = changed or not torch.equal(merged, stored)
    return changed


def _shifted(
    name: str, recipe: MergeRecipe, source: CheckpointReader, base: CheckpointReader, tuned: CheckpointReader
) -> Iterator[tuple[int, torch.Tensor]]:
    """θ_I + λ·(θ_B' − θ_B) of a tensor, by blocks."""
    for start, count in _chunks(math.prod(source.tensors[name].info.shape)):
        update = _wide(tuned, name, start, count) - _wide(base, name, start, count)
        yield start, _wide(source, name, start, count) + recipe.scale * update


def match_names(source: CheckpointReader, other: CheckpointReader) -> list[str]:
    """
    Makes another checkpoint readable under the names of the instruct checkpoint: a tied output layer that it does not store
    is its input embedding.

    Args:
        source (`CheckpointReader`):
            The instruct checkpoint.
        other (`CheckpointReader`):
            The other checkpoint, which has passed its checks. It is changed.

    Returns:
        `list[str]`: Names of the weights of the instruct checkpoint, without masks and other values that are computed.
    """
    infos = [{name: tensor.info for name, tensor in reader.tensors.items()} for reader in (other, source)]
    pairs = counterparts(*infos)
    for name, held in pairs.items():
        other.tensors.setdefault(name, other.tensors[held])
    return list(pairs)


def elements_of(reader: CheckpointReader, name: str, start: int, count: int) -> torch.Tensor:
    """
    Reads some elements of a tensor.

    Args:
        reader (`CheckpointReader`):
            The checkpoint, open.
        name (`str`):
            Name of the tensor.
        start (`int`):
            First element.
        count (`int`):
            Number of elements.

    Returns:
        `torch.Tensor` of shape `(count,)`: The elements.
    """
    tensor = reader.tensors[name]
    size = tensor.dtype.itemsize
    return reader.read_bytes(tensor, start * size, count * size).view(tensor.dtype)
