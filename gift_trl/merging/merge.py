"""θ'_I = θ_I + λ·M(φ): the merge of an adapter into an instruct checkpoint, tensor by tensor."""

import os
import shutil
import time
import warnings
from importlib.metadata import version
from pathlib import Path

from huggingface_hub.constants import SAFETENSORS_INDEX_FILE
from tqdm.auto import tqdm
from transformers.utils import CHAT_TEMPLATE_DIR
from transformers.utils.hub import extract_commit_hash

from gift_trl import __version__
from gift_trl.checkpoints import ADAPTER_FILE, weights_fingerprint, write_folder
from gift_trl.merging.preflight import MergePlan, preflight
from gift_trl.merging.report import REPORT_FILE, MergeReport
from gift_trl.merging.stream import CheckpointReader, MergedWriter, merge_targets
from gift_trl.merging.targets import Target


# Weights in other formats and the description of the instruct model would belie the merged one.
_LEFT_BEHIND_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}
_LEFT_BEHIND_NAMES = {"README.md", REPORT_FILE}
_REPORTED_SETTINGS = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules")
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
    merge, see `MERGED_TYPES` in `adapter.py`; everything else is refused by name. Plain LoRA takes a few megabytes of
    memory, other types about four times the largest module that they touch.

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
            Without a choice, such an adapter is refused.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace an `output_dir` that has something in it, once the merge has succeeded.

    Returns:
        [`MergeReport`]: What was merged; also written to `merge_report.json` in `output_dir`.

    Raises:
        `ValueError`: If the merge would fail or come out wrong, with all findings in one message and before any weight
            of the instruct model is read; or if a merged tensor is not finite.
        `OSError`: If the disk fails or fills up during the merge. Nothing is left in `output_dir`.
    """
    started = time.monotonic()
    adapter, instruct_model = os.fspath(adapter), os.fspath(instruct_model)
    plan = preflight(
        [(adapter, adapter_revision)],
        instruct_model,
        output_dir,
        instruct_model_revision=instruct_model_revision,
        scale=scale,
        overwrite=overwrite,
        saved_modules=saved_modules,
    )
    (update,) = plan.adapters
    cautions = list(plan.cautions)
    if update.is_zero:
        cautions.append("Every update of the adapter is exactly zero: nothing was learned, the merge changes nothing.")

    changed: dict[str, bool] = {}
    source = CheckpointReader(plan.shards)
    num_bytes = sum(shard.stat().st_size for shard in plan.shards)
    with (
        write_folder(output_dir, overwrite=overwrite) as folder,
        # Shown only when the merge takes longer than a moment.
        tqdm(total=num_bytes, desc="Merging", unit="B", unit_scale=True, delay=2) as bar,
        source,
        MergedWriter(source, folder, bar) as writer,
    ):
        writer.copy_rest({tensor for target in update.targets for tensor in target.tensors})
        changed.update(merge_targets(_in_file_order(update.targets, source), source, writer, scale))
        merged = _merged_tensors(update.targets, changed, source)
        num_changed = sum(changed.values())
        if not num_changed and not update.is_zero:
            cautions.append(_nothing_changed(scale, set(merged.values())))
        report = MergeReport(
            output_dir=Path(output_dir).expanduser().resolve(),
            instruct_model=_public_name(instruct_model),
            instruct_model_commit=extract_commit_hash(str(plan.instruct_dir / "config.json"), None),
            instruct_model_fingerprint=weights_fingerprint(plan.instruct_dir),
            adapter=_public_name(adapter),
            adapter_commit=extract_commit_hash(str(update.folder / ADAPTER_FILE), None),
            adapter_fingerprint=weights_fingerprint(update.folder),
            adapter_base_model=_public_name(update.settings.get("base_model_name_or_path")),
            adapter_settings={key: update.settings.get(key) for key in _REPORTED_SETTINGS},
            scale=float(scale),
            merged_tensors=merged,
            num_changed=num_changed,
            num_tensors=len(source.tensors),
            num_bytes=num_bytes,
            versions={"gift_trl": __version__, **{library: version(library) for library in _REPORTED_LIBRARIES}},
            duration_s=round(time.monotonic() - started, 3),
            warnings=tuple(cautions),
        )
        (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
        _copy_companions(plan, folder)
    for caution in cautions:
        warnings.warn(caution, UserWarning, stacklevel=2)
    return report


def _in_file_order(targets: list[Target], source: CheckpointReader) -> list[Target]:
    position = {name: index for index, name in enumerate(source.tensors)}
    return sorted(targets, key=lambda target: min(position[tensor] for tensor in target.tensors))


def _merged_tensors(targets: list[Target], changed: dict[str, bool], source: CheckpointReader) -> dict[str, str]:
    """The tensors that received an update, in the order of the checkpoint, with their dtypes."""
    # Of a module's further parameters, such as the bias that some methods scale, only those that did change.
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
    ]
    # Without config.json nothing loads, so it comes last: what a killed merge leaves behind is not taken for a model.
    for file in sorted(files, key=lambda file: file.name == "config.json"):
        copy = folder / file.relative_to(plan.instruct_dir)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def _nothing_changed(scale: float, dtypes: set[str]) -> str:
    if scale == 0:
        return "The scale is 0: the merged checkpoint is the instruct model."
    return (
        f"No tensor changed: the adapter learned nothing, or every update was lost in rounding to "
        f"{', '.join(sorted(dtypes))}. Merge with a larger scale, or into a float32 copy of the instruct checkpoint."
    )


def _public_name(name: str | None) -> str | None:
    """A Hub id as it is, of a local folder only the last part: paths of the machine are nobody's business."""
    if not name:
        return None
    path = Path(name).expanduser()
    return path.resolve().name if path.is_absolute() or path.is_dir() else name
