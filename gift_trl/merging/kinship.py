"""How far the instruct model went from its base model, and how the adapter's update lies to that, by kind of module."""

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from gift_trl.checkpoints import checkpoint_folder, safetensors_files
from gift_trl.merging.methods import combine, elements_of, match_names, modules_of, update_of
from gift_trl.merging.preflight import AdapterPlan
from gift_trl.merging.recipe import MergeRecipe
from gift_trl.merging.stream import CheckpointReader
from gift_trl.plots import DARK_ON_COLOR, new_figure


# The matrices of two models that have nothing in common are √2 apart, if they are of the same size; post-training moves them
# by a few hundredths. A quarter lies half way between on a logarithmic scale, so that versions of a family that were trained
# apart for long are noticed too.
_STRANGERS = 0.25
_CHUNK_ELEMENTS = 2**20


@dataclass
class ModuleKinship:
    """
    Sums over all modules of a kind, from which its numbers follow.

    Args:
        base (`float`):
            ‖θ_B‖², squared norm of the base model's weights.
        difference (`float`):
            ‖Δ_I‖² = ‖θ_I − θ_B‖².
        update (`float`):
            ‖M‖², of the modules that are targets.
        target_difference (`float`):
            ‖Δ_I‖² of the modules that are targets.
        product (`float`):
            ⟨M, Δ_I⟩.
    """

    base: float = 0.0
    difference: float = 0.0
    update: float = 0.0
    target_difference: float = 0.0
    product: float = 0.0

    @property
    def relative_change(self) -> float | None:
        """‖θ_I − θ_B‖ / ‖θ_B‖."""
        return math.sqrt(self.difference / self.base) if self.base else None

    @property
    def update_ratio(self) -> float | None:
        """‖M‖ / ‖Δ_I‖ over the targets."""
        return math.sqrt(self.update / self.target_difference) if self.target_difference and self.update else None

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between M and Δ_I."""
        norm = math.sqrt(self.update * self.target_difference)
        return self.product / norm if norm else None

    def add(self, other: "ModuleKinship") -> None:
        """Adds the sums of another."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Kinship:
    """
    The kinship of an instruct model with a base model.

    Args:
        kinds (`dict[str, ModuleKinship]`):
            By kind of module, such as `q_proj`; biases are a kind of their own, such as `q_proj.bias`.
        matrices (`set[str]`):
            The kinds of which the tensors have two dimensions or more.
    """

    kinds: dict[str, ModuleKinship] = field(default_factory=dict)
    matrices: set[str] = field(default_factory=set)

    @property
    def overall(self) -> ModuleKinship:
        """Of all modules together."""
        total = ModuleKinship()
        for kind in self.kinds.values():
            total.add(kind)
        return total

    @property
    def distance(self) -> float | None:
        """Median of the relative change over the kinds of matrices: a few tensors of large norm do not hide the others."""
        changes = [self.kinds[kind].relative_change for kind in self.matrices]
        known = [change for change in changes if change is not None]
        return statistics.median(known) if known else None

    def numbers(self) -> dict[str, dict[str, float | None]]:
        """
        The three numbers of every kind, and of all together.

        Returns:
            `dict[str, dict[str, float | None]]`: `relative_change`, `update_ratio` and `cosine` by kind.
        """
        rows = {**self.kinds, "all": self.overall}
        names = ("relative_change", "update_ratio", "cosine")
        return {kind: {name: getattr(sums, name) for name in names} for kind, sums in rows.items()}

    def warnings(self) -> list[str]:
        """
        What the numbers say against the merge.

        Returns:
            `list[str]`: One sentence per reason.
        """
        if self.overall.relative_change == 0:
            return [
                "The instruct model has the very weights of the base model: this is a plain fine-tuning of the base model."
            ]
        distance = self.distance
        if distance is not None and distance > _STRANGERS:
            return [
                f"The matrices of the instruct model are {distance:.2f} times the norm of the base model's away from them "
                "(median over the kinds of modules; unrelated models: about 1.4): it does not descend from this base model, "
                "or from another version of it, and an update learned there means little here. Name the base model of the "
                "same family and version."
            ]
        return []

    def table(self) -> str:
        """
        The numbers as a table for the terminal.

        Returns:
            `str`: Text of one line per kind.
        """
        lines = [f"{'':24}  |ΔI|/|B|   |M|/|ΔI|   cos(M, ΔI)"]
        for kind, row in self.numbers().items():
            cells = (f"{value:10.4f}" if value is not None else f"{'–':>10}" for value in row.values())
            lines.append(f"{kind[:24]:24} {' '.join(cells)}")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike) -> None:
        """
        Draws the numbers.

        Args:
            path (`str` or `os.PathLike`):
                PNG file to write.
        """
        numbers = self.numbers()
        titles = {
            "relative_change": "‖θ_I − θ_B‖ / ‖θ_B‖",
            "update_ratio": "‖M‖ / ‖θ_I − θ_B‖",
            "cosine": "cosine of M and θ_I − θ_B",
        }
        with new_figure(path, (11, 1.2 + 0.3 * len(numbers))) as figure:
            panels = figure.subplots(1, 3, sharey=True)
            kinds = list(reversed(numbers))
            for axes, (name, title) in zip(panels, titles.items(), strict=True):
                axes.barh(kinds, [numbers[kind][name] or 0.0 for kind in kinds])
                axes.set_title(title, fontsize=10)
                axes.axvline(0, color=DARK_ON_COLOR, linewidth=0.8)


def measure_kinship(
    recipe: MergeRecipe, adapters: Sequence[AdapterPlan], source: CheckpointReader, base: CheckpointReader
) -> Kinship:
    """
    Compares the instruct checkpoint with the base checkpoint and the update, a tensor at a time.

    Args:
        recipe ([`MergeRecipe`]):
            The merge, which says how several updates become one.
        adapters (`Sequence[AdapterPlan]`):
            The adapters, checked.
        source (`CheckpointReader`):
            The instruct checkpoint, open.
        base (`CheckpointReader`):
            The base checkpoint, open; it has the same weights.

    Returns:
        [`Kinship`]: The result. In place of adapters, the update of `full_delta` is the tuned model's difference from the
        base model.
    """
    kinship = Kinship()
    names = match_names(source, base)
    modules = modules_of(adapters, source)
    adapted = {
        tensor: module for module, (_, stored) in modules.items() for p in stored.values() for tensor in p.tensors
    }
    total = sum(source.tensors[name].num_bytes for name in names)
    done: set[str] = set()
    with (
        tqdm(total=total, desc="Comparing with the base model", unit="B", unit_scale=True, delay=2) as bar,
        ExitStack() as stack,
    ):
        tuned = None
        if recipe.tuned_model:
            folder = checkpoint_folder(recipe.tuned_model, recipe.tuned_model_revision)
            tuned = stack.enter_context(CheckpointReader(safetensors_files(folder)))
            match_names(source, tuned)
        for name in names:
            tensor = source.tensors[name]
            sums = kinship.kinds.setdefault(kind_of(name), ModuleKinship())
            if len(tensor.info.shape) > 1:
                kinship.matrices.add(kind_of(name))
            if name not in adapted:
                sums.add(_compare(name, recipe.scale, source, base, tuned))
            elif adapted[name] not in done:
                done.add(adapted[name])
                for other, part in _compare_module(adapted[name], modules, recipe, adapters, source, base).items():
                    kinship.kinds.setdefault(kind_of(other), ModuleKinship()).add(part)
            bar.update(tensor.num_bytes)
    return kinship


def kind_of(name: str) -> str:
    """
    The kind of module that a tensor belongs to: the last part of its name that is no number; of a bias, with `.bias`.

    Args:
        name (`str`):
            Name of the tensor.

    Returns:
        `str`: Such as `q_proj`, `input_layernorm` or `experts.up_proj`.
    """
    if name.endswith(".bias"):
        return f"{kind_of(name.removesuffix('.bias'))}.bias"
    parts = [part for part in name.removesuffix(".weight").split(".") if not part.isdigit()]
    return ".".join(parts[-2:]) if "experts" in parts[-2:-1] else parts[-1]


def _compare(
    name: str, scale: float, source: CheckpointReader, base: CheckpointReader, tuned: CheckpointReader | None
) -> ModuleKinship:
    sums = ModuleKinship()
    tensor = source.tensors[name]
    elements = tensor.num_bytes // tensor.dtype.itemsize
    for start in range(0, elements, _CHUNK_ELEMENTS):
        count = min(_CHUNK_ELEMENTS, elements - start)
        before = elements_of(base, name, start, count).float()
        difference = elements_of(source, name, start, count).float() - before
        sums.base += _square(before)
        sums.difference += _square(difference)
        if tuned is not None:
            update = scale * (elements_of(tuned, name, start, count).float() - before)
            sums.update += _square(update)
            sums.target_difference += _square(difference)
            sums.product += _dot(update, difference)
    return sums


def _compare_module(
    module: str,
    modules: Mapping[str, Any],
    recipe: MergeRecipe,
    adapters: Sequence[AdapterPlan],
    source: CheckpointReader,
    base: CheckpointReader,
) -> dict[str, ModuleKinship]:
    entries, parameters = modules[module]
    weights = {n: stored.assemble({t: source.read(t) for t in stored.tensors}) for n, stored in parameters.items()}
    updates: dict[str, list[tuple[torch.Tensor, float]]] = {name: [] for name in parameters}
    for number, target in entries:
        own = {name: weights[name] for name in target.parameters}
        for name, update in update_of(target, adapters[number].settings, own).items():
            updates[name].append((update, recipe.adapter_weight[number]))
    found = {}
    for name, stored in parameters.items():
        matrices, factors = zip(*updates[name], strict=True)
        update = recipe.scale * combine(matrices, factors, recipe, f"{module}.{name}")
        for tensor, part in stored.take_apart(update).items():
            before = base.read(tensor).float()
            difference = source.read(tensor).float() - before
            part = part.float()
            found[tensor] = ModuleKinship(
                _square(before), _square(difference), _square(part), _square(difference), _dot(part, difference)
            )
    return found


def _square(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _dot(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left * right).sum(dtype=torch.float64))
