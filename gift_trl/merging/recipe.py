"""A merge written down: which update or updates, combined how, into which model."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gift_trl.checkpoints import REPORT_FILE
from gift_trl.merging.adapter import MERGED_TYPES


RECIPE_FILE = "merge_recipe.yaml"
MERGEKIT_FILE = "mergekit_config.yml"

# How the updates of several adapters become one, by PEFT's utilities
COMBINATIONS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
# Methods that also read the base model
WITH_BASE = ("task_arithmetic", "re_adapt", "lore_adapt", "full_delta")
_MODELS = ("instruct_model", "base_model", "tuned_model")
_WITH_DENSITY = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
_LISTS = ("adapter", "adapter_revision", "adapter_weight", "adapter_fingerprint")


@dataclass
class MergeRecipe:
    """
    A merge of one or more updates into an instruct model.

    With M the combined update of the adapters, Δ_I = θ_I − θ_B, λ = `scale` and β = `instruct_weight`:

    | method | merged model |
    | --- | --- |
    | `linear`, `ties`, `dare_linear`, `dare_ties`, `magnitude_prune` | θ_I + λ·M |
    | `task_arithmetic`, `re_adapt` | θ_B + β·Δ_I + λ·M |
    | `lore_adapt` | θ_B + β·(Δ_I, every matrix by its truncated SVD) + λ·M |
    | `full_delta` | θ_I + λ·(θ_B' − θ_B), with θ_B' a fully fine-tuned base model |

    Args:
        instruct_model (`str`):
            Folder or Hub id of the instruct model.
        adapter (`list[str]`, *optional*):
            Folders or Hub ids of the adapters.
        adapter_revision (`list[str]`, *optional*):
            Revision of each adapter on the Hub.
        adapter_weight (`list[float]`, *optional*):
            Weight of each adapter's update. All 1 by default.
        method (`str`, *optional*, defaults to `"linear"`):
            As in the table.
        scale (`float`, *optional*, defaults to `1.0`):
            λ.
        instruct_weight (`float`, *optional*, defaults to `1.0`):
            β.
        density (`float`, *optional*):
            Share of the values of each update that is kept, for the methods that prune.
        majority_sign (`str`, *optional*, defaults to `"total"`):
            How `ties` and `dare_ties` elect a sign: by the `"total"` of the values or their `"frequency"`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of what `dare_linear` and `dare_ties` drop; each parameter draws by the CRC-32 of `"{seed} {its name}"`.
        rank (`int`, *optional*):
            Rank to which `lore_adapt` truncates Δ_I.
        explained_variance (`float`, *optional*):
            Share of the squared norm of each matrix of Δ_I that `lore_adapt` keeps at least, in place of `rank`.
        base_model (`str`, *optional*):
            Folder or Hub id of the base model. Given, the kinship of the two models is measured, whatever the method.
        tuned_model (`str`, *optional*):
            Folder or Hub id of the fully fine-tuned base model, for `full_delta`.
        instruct_model_revision, base_model_revision, tuned_model_revision (`str`, *optional*):
            Revisions on the Hub.
        saved_modules (`str`, *optional*):
            What to do with tensors that an adapter holds whole, see [`merge_adapter`].
        adapter_fingerprint (`list[str]`, *optional*):
            Fingerprint of each adapter's weights, as a recipe that was followed records it. Others are refused.
        instruct_model_fingerprint, base_model_fingerprint, tuned_model_fingerprint (`str`, *optional*):
            Those of the models.
    """

    instruct_model: str
    adapter: list[str] = field(default_factory=list)
    adapter_revision: list[str | None] = field(default_factory=list)
    adapter_weight: list[float] = field(default_factory=list)
    method: str = "linear"
    scale: float = 1.0
    instruct_weight: float = 1.0
    density: float | None = None
    majority_sign: str = "total"
    seed: int = 0
    rank: int | None = None
    explained_variance: float | None = None
    base_model: str | None = None
    tuned_model: str | None = None
    instruct_model_revision: str | None = None
    base_model_revision: str | None = None
    tuned_model_revision: str | None = None
    saved_modules: str | None = None
    adapter_fingerprint: list[str | None] = field(default_factory=list)
    instruct_model_fingerprint: str | None = None
    base_model_fingerprint: str | None = None
    tuned_model_fingerprint: str | None = None

    def __post_init__(self) -> None:
        self._check_types()
        self.adapter_weight = list(self.adapter_weight or [1.0] * len(self.adapter))
        self.adapter_revision = list(self.adapter_revision or [None] * len(self.adapter))
        self.adapter_fingerprint = list(self.adapter_fingerprint or [None] * len(self.adapter))
        if problems := self._problems():
            raise ValueError(" ".join(problems))

    @property
    def is_plain(self) -> bool:
        """Whether this is one adapter added to the instruct model, for which PEFT's own arithmetic is exact."""
        return self.method == "linear" and len(self.adapter) == 1

    def _check_types(self) -> None:
        # A recipe in YAML may hold anything: `1e-1` is text there, and so is every number in quotes
        problems = []
        for entry in dataclasses.fields(self):
            value, kind = getattr(self, entry.name), str(entry.type)
            if value is None and entry.name in _LISTS:
                value = []
            elif entry.name in _LISTS and not isinstance(value, list | tuple):
                value = [value]
            try:
                if entry.name in _LISTS:
                    value = [_typed(item, kind) for item in value]
                else:
                    value = _typed(value, kind)
            except ValueError as error:
                problems.append(f"`{entry.name}` is {value!r}: {error}.")
            setattr(self, entry.name, value)
        if problems:
            raise ValueError(" ".join(problems))

    def _problems(self) -> list[str]:
        problems = []
        if self.method not in (*COMBINATIONS, *WITH_BASE):
            problems.append(
                f"There is no merge method '{self.method}': choose {', '.join((*COMBINATIONS, *WITH_BASE))}."
            )
        if self.method == "full_delta":
            if self.adapter or not self.tuned_model:
                problems.append("`full_delta` takes a `tuned_model` in place of adapters: set it, and no `adapter`.")
        elif not self.adapter:
            problems.append("There is nothing to merge: set `adapter`.")
        elif self.tuned_model:
            problems.append(f"`tuned_model` is read by `full_delta` only, not by `{self.method}`: unset one of them.")
        for name in ("adapter_weight", "adapter_revision", "adapter_fingerprint"):
            if len(getattr(self, name)) != len(self.adapter):
                problems.append(
                    f"There are {len(self.adapter)} adapters and {len(getattr(self, name))} values of `{name}`: give one "
                    f"each. `--adapter` on the command line replaces the adapters of a recipe file, not its `{name}`: give "
                    f"`--{name}` there too, or remove `{name}` from the file."
                )
        numbers = {"instruct_weight": self.instruct_weight}
        numbers |= {f"adapter_weight[{i}]": weight for i, weight in enumerate(self.adapter_weight)}
        problems += [
            f"`{key}` is {value}: pass a finite number." for key, value in numbers.items() if not math.isfinite(value)
        ]
        if self.method in WITH_BASE and not self.base_model:
            problems.append(f"`{self.method}` subtracts the base model: set `base_model`.")
        if self.instruct_weight != 1.0 and self.method not in ("task_arithmetic", "re_adapt", "lore_adapt"):
            problems.append(f"`instruct_weight` is not read by `{self.method}`: unset it.")
        if self.method in _WITH_DENSITY and (self.density is None or not 0 < self.density <= 1):
            problems.append(f"`{self.method}` keeps a share of each update: set `density` above 0 and up to 1.")
        if self.method not in _WITH_DENSITY and self.density is not None:
            problems.append(f"`density` is not read by `{self.method}`: unset it.")
        if self.majority_sign not in ("total", "frequency"):
            problems.append(f"`majority_sign` is '{self.majority_sign}': choose total or frequency.")
        truncations = [value for value in (self.rank, self.explained_variance) if value is not None]
        if self.method == "lore_adapt" and len(truncations) != 1:
            problems.append("`lore_adapt` truncates the difference of the models: set `rank` or `explained_variance`.")
        if self.method != "lore_adapt" and truncations:
            problems.append(f"`rank` and `explained_variance` are not read by `{self.method}`: unset them.")
        if self.rank is not None and self.rank < 1:
            problems.append(f"`rank` is {self.rank}: it must be at least 1.")
        if self.explained_variance is not None and not 0 < self.explained_variance <= 1:
            problems.append(f"`explained_variance` is {self.explained_variance}: it must be above 0 and up to 1.")
        return problems

    def to_dict(self) -> dict[str, Any]:
        """
        The recipe without what is not set.

        Returns:
            `dict[str, Any]`: Fields by name.
        """
        unused = {"majority_sign", "seed"} if self.method not in ("ties", "dare_ties", "dare_linear") else set()
        fields = {key: value for key, value in dataclasses.asdict(self).items() if key not in unused}
        return {
            key: value
            for key, value in fields.items()
            if value is not None
            and value != []
            and not (key in ("adapter_revision", "adapter_fingerprint") and not any(value))
        }

    def check_fingerprints(self, found: Mapping[str, Any]) -> None:
        """
        Refuses other weights than those of which a recipe was written.

        Args:
            found (`Mapping[str, Any]`):
                Fingerprints by the names of the fields; under `adapter_fingerprint`, a list.

        Raises:
            `ValueError`: If one differs. A folder of the same name may be another one.
        """
        adapters = zip(self.adapter, self.adapter_fingerprint, found["adapter_fingerprint"], strict=True)
        checked = [("adapter_fingerprint", *adapter) for adapter in adapters]
        for role in _MODELS:
            name = f"{role}_fingerprint"
            checked += [(name, getattr(self, role), getattr(self, name), found[name])] if name in found else []
        problems = [
            f"'{name}' holds other weights than those that the recipe was written for (`{entry}`: {wanted[:12]}, here "
            f"{there[:12]})"
            for entry, name, wanted, there in checked
            if wanted not in (None, there)
        ]
        if problems:
            raise ValueError(
                f"{'; '.join(problems)}. Give the path of the right one, or remove the fingerprint from the recipe to merge "
                "what is here."
            )

    def write(self, folder: Path) -> None:
        """
        Writes the recipe beside the weights, and mergekit's configuration of the same merge where there is one.

        Args:
            folder (`Path`):
                Folder of the merged checkpoint.
        """
        text = f"# gift-trl merge --config {RECIPE_FILE} --output_dir DIR\n"
        # What came from the Hub has a commit
        folders = ["adapter"] if any(revision is None for revision in self.adapter_revision) else []
        folders += [name for name in _MODELS if getattr(self, name) and not getattr(self, f"{name}_revision")]
        if folders:
            text += f"# Paths are not kept: fill in those of the folders of {', '.join(folders)}. Other weights are refused.\n"
        text += _yaml(self.to_dict())
        (folder / RECIPE_FILE).write_text(text, encoding="utf-8")
        report = folder / REPORT_FILE
        updates = json.loads(report.read_text(encoding="utf-8"))["updates"] if report.is_file() else []
        settings = [update["settings"] for update in updates if "settings" in update]
        if (config := self.mergekit_config(settings)) is not None:
            (folder / MERGEKIT_FILE).write_text(_yaml(config), encoding="utf-8")

    def mergekit_config(self, adapter_settings: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any] | None:
        """
        mergekit's configuration of the same merge.

        Args:
            adapter_settings (`Sequence[Mapping[str, Any]]`, *optional*):
                `peft_type` and `use_dora` of each adapter. Taken for plain LoRA if not given.

        Returns:
            `dict[str, Any]` or `None`: The configuration. `None` for `ties`, which weighs otherwise there, for methods that
            draw at random, and for those that mergekit does not have; for `saved_modules` and for adapters that do not add
            an update; and for names in which mergekit would read `+` or `@` as the start of an adapter or revision.
        """
        additive = all(MERGED_TYPES.get(s.get("peft_type", "")) and not s.get("use_dora") for s in adapter_settings)
        names = [self.instruct_model, *self.adapter, self.base_model or "", self.tuned_model or ""]
        if self.saved_modules or not additive or any(mark in name for name in names for mark in "+@"):
            return None
        # Everything is taken as a difference from the instruct model, as mergekit's base model: from that it also takes
        # configuration and tokenizer. Its key `tokenizer` would cut the embeddings to the size of the vocabulary.
        instruct = _reference(self.instruct_model, self.instruct_model_revision)
        if self.method in ("linear", "task_arithmetic", "re_adapt"):
            terms = [
                (f"{instruct}+{_reference(adapter, revision)}", self.scale * weight)
                for adapter, revision, weight in zip(
                    self.adapter, self.adapter_revision, self.adapter_weight, strict=True
                )
            ]
            if self.instruct_weight != 1.0:
                # θ_B + β·(θ_I − θ_B) = θ_I + (1 − β)·(θ_B − θ_I)
                terms.append((_reference(self.base_model, self.base_model_revision), 1.0 - self.instruct_weight))
        elif self.method == "full_delta":
            # λ·(θ_B' − θ_B) = λ·(θ_B' − θ_I) − λ·(θ_B − θ_I)
            terms = [(_reference(self.tuned_model, self.tuned_model_revision), self.scale)]
            terms.append((_reference(self.base_model, self.base_model_revision), -self.scale))
        else:
            return None
        weights: dict[str, float] = {}
        for model, weight in terms:  # of one model that is named twice, mergekit takes the last only
            weights[model] = weights.get(model, 0.0) + weight
        return {
            "merge_method": "task_arithmetic",
            "base_model": instruct,
            "models": [{"model": model, "parameters": {"weight": weight}} for model, weight in weights.items()],
            "parameters": {"normalize": False},
        }


def _reference(model: str | None, revision: str | None) -> str:
    return f"{model}@{revision}" if revision else str(model)


def _typed(value: Any, kind: str) -> Any:
    """A value of a recipe as the type of its field, which is `str`, `float` or `int`, in a list or optional."""
    if value is None and "None" in kind:
        return None
    if "str" in kind:
        if not isinstance(value, str | os.PathLike):
            raise ValueError("pass text")
        return os.fspath(value)
    wanted, expected = (float, "a number") if "float" in kind else (int, "a whole number")
    try:
        number = wanted(value) if not isinstance(value, bool | None) else None
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or (wanted is int and not isinstance(value, str) and number != value):
        raise ValueError(f"pass {expected}")
    return number


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
