"""`evaluation.yaml`: what the results in a folder come from, so that nothing of another configuration is mixed in."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger

from gift_trl.annotation.provenance import (
    hash_chat_template,
    hash_vocabulary,
    identify_commit,
    identify_weights,
    library_versions,
    model_name,
)
from gift_trl.checkpoints import REPORT_FILE, checkpoint_folder
from gift_trl.evaluation.config import EvaluationConfig, ModelSpec
from gift_trl.evaluation.harness import has_cache
from gift_trl.evaluation.parts import has_parts
from gift_trl.evaluation.prompts import Renderer
from gift_trl.evaluation.results import CONFIG_FILE, GENERATIONS_FILE, SUMMARY_FILE, read_config, write_config
from gift_trl.evaluation.tasks import TaskData
from gift_trl.model_pair import load_config, refuse_adapter_beside


logger = get_logger(__name__)

# Of a task or model: what the answers do not depend on, so that it may change without making them again
_FREE = ("merge", "role", "description", "metric", "answer_pattern")
# Of these, what the grades depend on
_GRADING = ("metric", "answer_pattern")
# Keyword arguments of `from_pretrained` that make other weights; the rest says where they lie or how fast they are used
_LOADING = ("dtype", "quantization_config", "subfolder", "variant")


def describe_model(
    spec: ModelSpec, renderer: Renderer, config: EvaluationConfig, server: dict[str, str] | None = None
) -> dict[str, Any]:
    """
    What the answers of a model depend on, without a path.

    Args:
        spec ([`ModelSpec`]):
            The model.
        renderer ([`Renderer`]):
            Its prompts.
        config ([`EvaluationConfig`]):
            The evaluation.
        server (`dict[str, str]`, *optional*):
            What a server says it holds.

    Returns:
        `dict[str, Any]`: Fields by name; under `merge`, what a merged model was made of.

    Raises:
        `ValueError`: If an adapter lies beside the model, which transformers would load with it.
    """
    tokenizer = renderer.tokenizer
    entry = {
        "model": model_name(spec.model),
        "commit": identify_commit(spec.model, spec.revision),
        "vocabulary": hash_vocabulary(tokenizer),
        "chat_template": hash_chat_template(tokenizer.chat_template),
        "chat_template_kwargs": spec.chat_template_kwargs,
        "stop_ids": list(renderer.stop_ids),
        "max_length": renderer.max_length,
    }
    report = checkpoint_folder(spec.model, spec.revision, weights=False) / REPORT_FILE
    if report.is_file():
        facts = json.loads(report.read_text(encoding="utf-8"))
        entry["merge"] = {
            name: facts.get(name) for name in ("instruct_model", "adapter_base_model", "adapter", "scale")
        }
    if server is not None:
        return {**entry, "served": Path(server["root"]).name}
    refuse_adapter_beside(spec.model, spec.revision)
    dtype = spec.dtype or config.dtype
    if dtype == "auto":
        dtype = str(load_config(spec.model, **spec.tokenizer_kwargs).dtype or "float32").removeprefix("torch.")
    entry |= {"weights": identify_weights(spec.model, spec.revision), "dtype": dtype}
    if loading := {name: str(spec.init_kwargs[name]) for name in _LOADING if name in spec.init_kwargs}:
        entry["init_kwargs"] = loading
    if spec.adapter is not None:
        entry["adapter"] = {
            "name": model_name(spec.adapter),
            "commit": identify_commit(spec.adapter, spec.adapter_revision),
            "weights": identify_weights(spec.adapter, spec.adapter_revision),
            "scale": float(spec.adapter_scale),
            "saved_modules": spec.saved_modules,
        }
    return entry


def describe_task(data: TaskData) -> dict[str, Any]:
    """
    A task as it was used, without a path.

    Args:
        data ([`TaskData`]):
            The task.

    Returns:
        `dict[str, Any]`: Its fields, the number of problems and a digest of them.
    """
    entry = dataclasses.asdict(data.task)
    del entry["name"]
    if os.path.exists(os.path.expanduser(data.task.dataset)):
        entry["dataset"] = Path(data.task.dataset).name
    return {**entry, "num_problems": len(data.problems), "data": data.digest}


def prepare_folder(
    folder: Path, config: EvaluationConfig, models: dict[str, dict[str, Any]], tasks: dict[str, dict[str, Any]]
) -> None:
    """
    Checks that what a folder holds belongs to the configuration, and writes `evaluation.yaml`. Figures of another metric or
    answer pattern are removed; the answers stay.

    Args:
        folder (`Path`):
            Folder of results.
        config ([`EvaluationConfig`]):
            The evaluation.
        models, tasks (`dict[str, dict[str, Any]]`):
            As from [`describe_model`] and [`describe_task`], by name.

    Raises:
        `FileExistsError`: If it holds something else, or answers of another configuration that are not to be overwritten.
    """
    general = {"engine": config.engine, "seeds": list(config.seeds)}
    known: dict[str, Any] = {"models": {}, "tasks": {}, **general}
    if (folder / CONFIG_FILE).is_file():
        known = read_config(folder)
    elif folder.exists() and (not folder.is_dir() or any(path for path in folder.iterdir() if path.name[0] != ".")):
        raise FileExistsError(
            f"'{folder}' holds something else than results of an evaluation: choose another `output_dir`."
        )
    for leftover in folder.rglob(".*.tmp"):  # of a run that was killed while it wrote
        leftover.unlink()
    for model, task in _answered(folder, known):
        pairs = [("evaluation", {name: known.get(name) for name in general}, general)]
        pairs += [(f"model `{model}`", known["models"][model], models[model])] if model in models else []
        pairs += [(f"task `{task}`", known["tasks"][task], tasks[task])] if task in tasks else []
        differences = [f"{where}: {text}" for where, old, new in pairs if (text := _differences(old, new))]
        if differences and not config.overwrite:
            raise FileExistsError(
                f"'{folder}' holds answers of `{model}` to task `{task}` under another configuration ({'; '.join(differences)}). "
                "Choose another `output_dir` or another name, or set `overwrite` to throw them away."
            )
        if differences:
            shutil.rmtree(folder / model / task)
        elif task in tasks and any(known["tasks"][task].get(name) != tasks[task].get(name) for name in _GRADING):
            (folder / model / task / SUMMARY_FILE).unlink(missing_ok=True)
    versions = library_versions()
    if changed := [name for name, version in versions.items() if known.get("versions", versions).get(name) != version]:
        logger.warning(
            f"Answers in '{folder}' were made with other versions of {', '.join(changed)}: new ones may differ by rounding. "
            "Choose another `output_dir` to have all from one."
        )
    write_config(
        folder,
        {
            "models": _joined(known["models"], models),
            "tasks": _joined(known["tasks"], tasks),
            "baseline": config.baseline or known.get("baseline") or next(iter(models)),
            **general,
            "versions": versions,
        },
    )


def _joined(known: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """In the order of the configuration if it names all there are, else what is added after what is there."""
    return {**named} if named.keys() >= known.keys() else {**known, **named}


def _answered(folder: Path, known: dict[str, Any]) -> list[tuple[str, str]]:
    """Models and tasks of which there are answers."""
    return [
        (model, task)
        for model in known["models"]
        for task in known["tasks"]
        if (folder / model / task / GENERATIONS_FILE).is_file()
        or has_parts(folder / model / task)
        or has_cache(folder / model / task)
    ]


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Fields that differ, of those that the answers depend on."""
    flat_old, flat_new = _flat(old), _flat(new)
    names = [
        name
        for name in {**flat_new, **flat_old}
        if name.split(".")[0] not in _FREE and flat_old.get(name) != flat_new.get(name)
    ]
    return "; ".join(f"`{name}` was {_short(flat_old.get(name))}, is {_short(flat_new.get(name))}" for name in names)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
