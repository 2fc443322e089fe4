"""Merges beyond one adapter: several updates, the difference of the models scaled or truncated, a fully tuned base."""

import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from peft.utils import merge_utils

from gift_trl.merging.adapter import MERGED_TYPES
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
    # The right singular vectors are the eigenvectors of the smaller Gram matrix: many times quicker, and in float64 exact
    # far below the digits of the weights.
    values, vectors = torch.linalg.eigh(matrix.T.double() @ matrix.double())
    if rank is None:
        share = values.flip(0).clamp(min=0).cumsum(0)
        rank = int((share < explained_variance * share[-1]).sum()) + 1 if share[-1] > 0 else 1
    kept = vectors[:, max(0, len(values) - rank) :]
    return ((matrix.double() @ kept) @ kept.T).to(matrix.dtype)


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
    writer.copy_rest(set(source.tensors) if every else adapted)
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
            wide = weights[name].to(update.dtype)
            if every:
                wide = _rescaled(wide, parameters[name].assemble(_read(parameters[name], base)), recipe)
            merged[name] = (wide + recipe.scale * update).to(weights.pop(name).dtype)
        yield from write_module(parameters, merged, source, writer)
    for name in source.tensors if every else ():
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


def _read(stored: StoredParameter, reader: CheckpointReader) -> dict[str, torch.Tensor]:
    return {tensor: reader.read(tensor) for tensor in stored.tensors}


def _rescaled(instruct: torch.Tensor, base: torch.Tensor, recipe: MergeRecipe) -> torch.Tensor:
    difference = instruct - base.to(instruct.dtype)
    if recipe.method == "lore_adapt" and instruct.dim() > 1:
        kept = truncate(difference, recipe.rank, recipe.explained_variance)
        return instruct - difference + recipe.instruct_weight * kept
    # Written so that a weight of 1 leaves the instruct model as it is
    return instruct + (recipe.instruct_weight - 1.0) * difference


def _merge_rest(
    name: str,
    recipe: MergeRecipe,
    source: CheckpointReader,
    writer: MergedWriter,
    base: CheckpointReader,
    tuned: CheckpointReader | None,
) -> bool:
    tensor = source.tensors[name]
    shape = tensor.info.shape
    whole = recipe.method == "lore_adapt" and len(shape) > 1
    elements = tensor.num_bytes // tensor.dtype.itemsize
    step = elements if whole else _CHUNK_ELEMENTS
    changed = False
    for start in range(0, elements, max(1, step)):
        count = min(step, elements - start)
        stored = elements_of(source, name, start, count)
        wide = stored.to(torch.promote_types(stored.dtype, torch.float32))
        subtracted = elements_of(base, name, start, count)
        if tuned is not None:
            update = elements_of(tuned, name, start, count).to(wide.dtype) - subtracted.to(wide.dtype)
            wide = wide + recipe.scale * update
        else:
            view = shape if whole else (count,)
            wide = _rescaled(wide.view(view), subtracted.view(view), recipe).reshape(-1)
        merged = wide.to(stored.dtype)
        if not is_finite(merged):
            raise not_finite(name, source, merged.dtype)
        writer.write(name, merged, start)
        changed = changed or not torch.equal(merged, stored)
    return changed


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
