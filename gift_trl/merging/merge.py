"""θ'_I = θ_I + λ·M(φ): the merge of an adapter into an instruct checkpoint, tensor by tensor."""

import dataclasses
import errno
import gc
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE
from tqdm.auto import tqdm
from transformers.utils import CHAT_TEMPLATE_DIR
from transformers.utils.hub import extract_commit_hash
from yaml import YAMLError

from gift_trl import __version__
from gift_trl.cards import public_name
from gift_trl.checkpoints import (
    ADAPTER_FILE,
    CARD_FILE,
    EVALUATION_FILE,
    KINSHIP_PLOT_FILE,
    REPORT_FILE,
    SIGNAL_PLOT_FILE,
    TRAINING_FILE,
    VERIFICATION_FILE,
    weights_fingerprint,
    write_folder,
)
from gift_trl.leftovers import whole_file
from gift_trl.merging.kinship import measure_kinship
from gift_trl.merging.methods import merge_by_method
from gift_trl.merging.preflight import AdapterPlan, MergePlan, preflight
from gift_trl.merging.recipe import MERGEKIT_FILE, RECIPE_FILE, MergeRecipe
from gift_trl.merging.report import REPLACED_MARKS, MergeReport
from gift_trl.merging.stream import CheckpointReader, MergedWriter, merge_targets
from gift_trl.merging.targets import Target


# Weights in other formats and the description of the instruct model would belie the merged one.
_LEFT_BEHIND_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}
_LEFT_BEHIND_SUFFIXES |= {".tmp", ".lock", ".incomplete", ".distcp", ".pkl", ".npz"}
_LEFT_BEHIND_NAMES = {CARD_FILE, TRAINING_FILE, REPORT_FILE, RECIPE_FILE, MERGEKIT_FILE, KINSHIP_PLOT_FILE}
_LEFT_BEHIND_NAMES |= {VERIFICATION_FILE, SIGNAL_PLOT_FILE, EVALUATION_FILE}
# What a trainer keeps to resume, and writes about its run
_LEFT_BEHIND_NAMES |= {"trainer_state.json", "latest", "zero_to_fp32.py"}
_LEFT_BEHIND_NAMES |= {f"{split}_results.json" for split in ("train", "eval", "test", "predict", "all")}
_LEFT_BEHIND_PREFIXES = ("optimizer", "scheduler", "rng_state", "random_states", "events.out.tfevents")
_REPORTED_SETTINGS = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
)
_REPORTED_LIBRARIES = ("peft", "safetensors", "torch", "transformers")


def merge_adapter(
    adapter: str | os.PathLike,
    instruct_model: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    instruct_model_revision: str | None = None,
    adapter_revision: str | None = None,
    scale: float = 1.0,
    saved_modules: str | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """
    Adds a LoRA adapter that was trained on the base model to the instruct model: θ'_I = θ_I + λ·M(φ).

    The instruct checkpoint is streamed. Each safetensors file keeps its name, its header and every tensor that the
    adapter does not target, byte for byte; a targeted tensor is updated by PEFT's own layer, in the dtype of the
    checkpoint, so that the result is the one of `merge_and_unload()`. Configuration, tokenizer and chat template come
    from the instruct model. The output folder appears when it is complete, or not at all.

    Merged are LoRA (rsLoRA, DoRA, rank and alpha patterns, embeddings, experts) and further types of PEFT whose layers
    merge, see `MERGED_TYPES` in `adapter.py`; everything else is refused by name. LoRA, DoRA, LoHa, LoKr, IA3, HiRA
    and MiSS are merged by blocks of rows; for other types, one module and PEFT's intermediate results for it are in memory.

    Args:
        adapter (`str` or `os.PathLike`):
            Folder or Hub id of the PEFT adapter.
        instruct_model (`str` or `os.PathLike`):
            Folder or Hub id of the instruct checkpoint, in safetensors.
        output_dir (`str` or `os.PathLike`):
            Folder to write the merged checkpoint to, outside the two others.
        instruct_model_revision (`str`, *optional*):
            Branch, tag or commit of the instruct model on the Hub.
        adapter_revision (`str`, *optional*):
            Branch, tag or commit of the adapter on the Hub.
        scale (`float`, *optional*, defaults to `1.0`):
            λ, the factor of the update. 1.0 adds it as it was trained.
        saved_modules (`str`, *optional*):
            What to do with tensors of the base model that the adapter holds whole (`modules_to_save`, trained biases and
            token embeddings): `"replace"` puts them in the place of the instruct model's, `"ignore"` leaves them out.
            Without a choice, such an adapter is refused. A replacement is no update: `scale` leaves it as it is, with a
            warning if it is not 1. Only a [`MergeRecipe`] of several adapters, or of another method than `"linear"`,
            takes its difference from the instruct model's tensor for an update and scales that.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace an `output_dir` that has something in it, once the merge has succeeded.

    Returns:
        [`MergeReport`]: What was merged; also written to `merge_report.json` in `output_dir`.

    Raises:
        `ValueError`: If the merge would fail or come out wrong, with all findings in one message and before any weight
            of the instruct model is read; or if a merged tensor is not finite.
        `OSError`: If the disk fails or fills up during the merge. Nothing is left in `output_dir`.
    """
    recipe = MergeRecipe(
        instruct_model=os.fspath(instruct_model),
        adapter=[os.fspath(adapter)],
        adapter_revision=[adapter_revision],
        scale=scale,
        instruct_model_revision=instruct_model_revision,
        saved_modules=saved_modules,
    )
    return merge_recipe(recipe, output_dir, overwrite=overwrite)


def merge_recipe(recipe: MergeRecipe, output_dir: str | os.PathLike, *, overwrite: bool = False) -> MergeReport:
    """
    Merges what a recipe says; [`merge_adapter`] is the recipe of one adapter.

    Args:
        recipe ([`MergeRecipe`]):
            The recipe.
        output_dir (`str` or `os.PathLike`):
            Folder to write the merged checkpoint to, outside all others. The recipe is written into it too, with the
            commits of what came from the Hub and the fingerprints of all weights, and mergekit's configuration of the same
            merge where there is one.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace an `output_dir` that has something in it, once the merge has succeeded.

    Returns:
        [`MergeReport`]: What was merged.

    Raises:
        `ValueError`, `OSError`: As [`merge_adapter`]; also if the recipe has the fingerprints of other weights.
    """
    with _old_objects_spared():
        report = _merge(recipe, output_dir, overwrite)
    for caution in report.warnings:
        warnings.warn(caution, UserWarning, stacklevel=3)
    return report


@contextmanager
def _old_objects_spared() -> Iterator[None]:
    # While skeletons are built, the collector would go through every object of the libraries, again and again
    if gc.get_freeze_count():  # they are spared, or someone else says when
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _merge(recipe: MergeRecipe, output_dir: str | os.PathLike, overwrite: bool) -> MergeReport:
    started = time.monotonic()
    scale = recipe.scale * recipe.adapter_weight[0] if recipe.is_plain else recipe.scale
    companions = {"base_model": (recipe.base_model, recipe.base_model_revision)} if recipe.base_model else {}
    if recipe.tuned_model:
        companions["tuned_model"] = (recipe.tuned_model, recipe.tuned_model_revision)
    plan = preflight(
        list(zip(recipe.adapter, recipe.adapter_revision, strict=True)),
        recipe.instruct_model,
        output_dir,
        instruct_model_revision=recipe.instruct_model_revision,
        scale=scale,
        overwrite=overwrite,
        saved_modules=recipe.saved_modules,
        companions=companions,
        scaled_by_layers=recipe.is_plain,
    )
    fingerprints = _fingerprints(plan)
    recipe.check_fingerprints(fingerprints)
    cautions = list(plan.cautions)
    is_zero = bool(plan.adapters) and all(adapter.is_zero for adapter in plan.adapters)
    replaced = [t.module for adapter in plan.adapters for t in adapter.targets if t.replacement is not None]
    if recipe.is_plain and replaced and scale != 1.0:
        cautions.append(
            f"The scale {scale:g} is the update's alone: what the adapter holds whole ({len(replaced)} tensors, the first "
            f"of {replaced[0]}) takes the place of the instruct model's unscaled."
        )

    source = CheckpointReader(plan.shards)
    num_bytes = sum(shard.stat().st_size for shard in plan.shards)
    others = {role: CheckpointReader(shards) for role, (_, shards) in plan.companions.items()}
    with (
        _clear_disk_errors(output_dir),
        write_folder(output_dir, overwrite=overwrite, marks=REPLACED_MARKS) as folder,
        # Shown only when the merge takes longer than a moment.
        tqdm(total=num_bytes, desc="Merging", unit="B", unit_scale=True, delay=2) as bar,
        ExitStack() as stack,
    ):
        for reader in (source, *others.values()):
            stack.enter_context(reader)
        kinship = None
        if "base_model" in others:
            kinship = measure_kinship(recipe, plan.adapters, source, others["base_model"])
            kinship.plot(folder / KINSHIP_PLOT_FILE)
            cautions += kinship.warnings()
        writer = stack.enter_context(MergedWriter(source, folder, bar))
        if recipe.is_plain:
            targets = _in_file_order(plan.adapters[0].targets, source)
            writer.copy_rest({tensor for target in targets for tensor in target.tensors})
            changed = dict(merge_targets(targets, source, writer, scale))
        else:
            changed = dict(
                merge_by_method(
                    recipe, plan.adapters, source, writer, others.get("base_model"), others.get("tuned_model")
                )
            )
        merged = _merged_tensors(plan.adapters, changed, source)
        num_changed = sum(changed.values())
        if is_zero:
            nothing = ", the merge changes nothing" if not num_changed else ""
            cautions.append(f"Every update of the adapter is exactly zero: nothing was learned{nothing}.")
        elif not num_changed:
            cautions.append(_nothing_changed(recipe.scale, set(merged.values())))
        effective = dataclasses.replace(_effective(recipe, plan), **fingerprints)
        report = MergeReport(
            output_dir=Path(output_dir).expanduser().resolve(),
            instruct_model=effective.instruct_model,
            instruct_model_commit=_commit(plan.instruct_dir / "config.json"),
            instruct_model_fingerprint=fingerprints["instruct_model_fingerprint"],
            adapter=" + ".join(effective.adapter) or effective.tuned_model,
            scale=float(scale),
            merged_tensors=merged,
            num_changed=num_changed,
            num_tensors=len(source.tensors),
            num_bytes=num_bytes,
            recipe=effective.to_dict(),
            updates=tuple(_update_facts(plan)),
            licence=_licence(plan.instruct_dir),
            kinship=kinship.numbers() if kinship else None,
            versions={"gift_trl": __version__, **{library: version(library) for library in _REPORTED_LIBRARIES}},
            duration_s=round(time.monotonic() - started, 3),
            warnings=tuple(cautions),
            **_first_adapter(plan),
        )
        (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
        effective.write(folder)
        _copy_companions(plan, folder)
    return report


def _fingerprints(plan: MergePlan) -> dict[str, Any]:
    """Of all weights that are merged, by the fields of a recipe."""
    folders = {"instruct_model": plan.instruct_dir} | {role: folder for role, (folder, _) in plan.companions.items()}
    return {
        "adapter_fingerprint": [weights_fingerprint(adapter.folder) for adapter in plan.adapters],
        **{f"{role}_fingerprint": weights_fingerprint(folder) for role, folder in folders.items()},
    }


def _commit(file: Path) -> str | None:
    return extract_commit_hash(str(file), None)


def _effective(recipe: MergeRecipe, plan: MergePlan) -> MergeRecipe:
    """The recipe with the commits that were read, and without the paths of this machine."""
    changes = {"instruct_model": public_name(recipe.instruct_model)}
    changes["instruct_model_revision"] = _commit(plan.instruct_dir / "config.json")
    changes["adapter"] = [public_name(name) for name in recipe.adapter]
    changes["adapter_revision"] = [_commit(adapter.folder / ADAPTER_FILE) for adapter in plan.adapters]
    for role, (_, shards) in plan.companions.items():
        changes[role] = public_name(getattr(recipe, role))
        changes[f"{role}_revision"] = _commit(shards[0])
    return dataclasses.replace(recipe, **changes)


def _update_facts(plan: MergePlan) -> Iterator[dict[str, Any]]:
    for adapter in plan.adapters:
        yield {
            "name": public_name(adapter.name),
            "commit": _commit(adapter.folder / ADAPTER_FILE),
            "fingerprint": weights_fingerprint(adapter.folder),
            "base_model": public_name(adapter.settings.get("base_model_name_or_path")),
            "settings": {key: adapter.settings.get(key) for key in _REPORTED_SETTINGS},
            **_training(adapter.folder),
        }
    for role, (folder, shards) in plan.companions.items():
        facts = {"name": role, "commit": _commit(shards[0]), "fingerprint": weights_fingerprint(folder)}
        yield facts | _training(folder)


def _training(folder: Path) -> dict[str, Any]:
    """What the training of an adapter or a model says of itself, if it was one of ours."""
    try:
        return {"training": json.loads((folder / TRAINING_FILE).read_text(encoding="utf-8"))}
    except (OSError, ValueError):
        return {}


def _licence(instruct_dir: Path) -> dict[str, Any]:
    """The licence that the instruct model's card names, or else the file that holds one."""
    try:
        metadata = metadata_load(instruct_dir / CARD_FILE) or {}
    except (OSError, ValueError, YAMLError):
        metadata = {}  # there is no card, or none that can be read
    licence = {key: metadata[key] for key in ("license", "license_name", "license_link") if metadata.get(key)}
    files = sorted(file.name for file in instruct_dir.glob("LICENSE*") if file.is_file())
    if not licence and files:
        licence = {"license": "other", "license_link": files[0]}
    return licence


def _first_adapter(plan: MergePlan) -> dict[str, Any]:
    facts = next(_update_facts(plan))
    return {
        "adapter_commit": facts["commit"],
        "adapter_fingerprint": facts["fingerprint"],
        "adapter_base_model": facts.get("base_model"),
        "adapter_settings": facts.get("settings", {}),
    }


@contextmanager
def _clear_disk_errors(output_dir: str | os.PathLike) -> Iterator[None]:
    """Says what a failing disk means for the merge, in place of the system's few words."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            cause, remedy = "there is no room", "make room, or choose an output folder on another disk"
        elif error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        elif not _is_written(error.filename, Path(output_dir).expanduser().resolve()):
            raise OSError(
                error.errno,
                f"The merge cannot read '{os.fsdecode(error.filename)}' ({error}): change its permissions. Nothing was "
                f"left in '{output_dir}'.",
            ) from error
        else:
            cause, remedy = "it cannot be written to", "choose an output folder elsewhere"
        raise OSError(
            error.errno,
            f"The merged checkpoint could not be written to '{output_dir}', {cause} ({error}): {remedy}. Nothing "
            "was left there.",
        ) from error


def _is_written(file: str | bytes | None, output: Path) -> bool:
    if file is None:  # as in the errors of an open file: those that are read have passed their checks
        return True
    path = Path(os.fsdecode(file)).absolute()
    # The folder and those that hold it, and the temporary ones beside it
    return output.is_relative_to(path) or str(path).startswith(str(output.parent / f".{output.name}."))


def _in_file_order(targets: list[Target], source: CheckpointReader) -> list[Target]:
    position = {name: index for index, name in enumerate(source.tensors)}
    return sorted(targets, key=lambda target: min(position[tensor] for tensor in target.tensors))


def _merged_tensors(adapters: list[AdapterPlan], changed: dict[str, bool], source: CheckpointReader) -> dict[str, str]:
    """The tensors that received an update, in the order of the checkpoint, with their dtypes."""
    # Of a module's further parameters, such as the bias that some methods scale, only those that did change.
    targets = [target for adapter in adapters for target in adapter.targets]
    main = {tensor for target in targets for tensor in next(iter(target.parameters.values())).tensors}
    return {
        name: str(tensor.dtype).removeprefix("torch.")
        for name, tensor in source.tensors.items()
        if name in main or changed.get(name)
    }


def _copy_companions(plan: MergePlan, folder: Path) -> None:
    files = [
        file
        for file in sorted([*plan.instruct_dir.iterdir(), *plan.instruct_dir.glob(f"{CHAT_TEMPLATE_DIR}/*")])
        if file.is_file()
        and not file.name.startswith(".")
        and file.suffix not in _LEFT_BEHIND_SUFFIXES
        and not (file.name.endswith(".index.json") and file.name != SAFETENSORS_INDEX_FILE)
        and file.name not in _LEFT_BEHIND_NAMES
        and not file.name.startswith(_LEFT_BEHIND_PREFIXES)
    ]
    # Without config.json nothing loads, so it comes last, and whole: what a killed merge leaves is not taken for a model.
    for file in sorted(files, key=lambda file: file.name == "config.json"):
        copy = folder / file.relative_to(plan.instruct_dir)
        copy.parent.mkdir(exist_ok=True)
        with whole_file(copy) as temporary:
            shutil.copyfile(file, temporary)


def _nothing_changed(scale: float, dtypes: set[str]) -> str:
    if scale == 0:
        return "The scale is 0: the merged checkpoint is the instruct model."
    return (
        f"No tensor changed: the adapter learned nothing, or every update was lost in rounding to "
        f"{', '.join(sorted(dtypes))}. Merge with a larger scale, or into a float32 copy of the instruct checkpoint."
    )
