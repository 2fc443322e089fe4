"""What an adapter's settings say, and which of them a merge would get wrong."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig


ADAPTER_CONFIG_FILE = "adapter_config.json"

# Initialisations after which the model that was trained is no longer the base model, but base minus an initial update.
_MUTATING_INITS = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
}

# Settings that change what is merged; each is given its name and what to do instead.
_UNSUPPORTED_SETTINGS = {
    "use_dora": ("DoRA", "train a plain LoRA (`use_dora=False`)"),
    "lora_bias": ("a bias on LoRA B", "train with `lora_bias=False`"),
    "modules_to_save": ("fully trained modules", "train without `modules_to_save`, targeting the modules by LoRA"),
    "trainable_token_indices": ("trained token embeddings", "train without `trainable_token_indices`"),
    "target_parameters": ("LoRA on bare parameters (MoE experts)", "train with `target_modules` instead"),
    "alora_invocation_tokens": (
        "activated LoRA, which is applied to some positions only and cannot be merged",
        "train without `alora_invocation_tokens`",
    ),
    "layer_replication": (
        "replicated layers, which the instruct checkpoint does not have",
        "train without `layer_replication`",
    ),
    "use_qalora": ("QA-LoRA, which belongs to a quantised model", "train with `use_qalora=False`"),
    "use_bdlora": ("block-diagonal LoRA", "train without `use_bdlora`"),
    "arrow_config": ("Arrow routing, which cannot be merged", "train without `arrow_config`"),
    "velora_config": ("VeLoRA", "train without `velora_config`"),
    "monteclora_config": ("MonteCLoRA", "train without `monteclora_config`"),
    "kasa_config": ("KaSA, which also truncates the base weights", "train without `kasa_config`"),
    "megatron_config": ("Megatron layers", "train without `megatron_config`"),
}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """
    Reads `adapter_config.json`.

    Args:
        folder (`Path`):
            Adapter folder.

    Returns:
        `dict[str, Any]`: Its contents.

    Raises:
        `FileNotFoundError`: If there is none.
        `ValueError`: If it is not a JSON object.
    """
    path = folder / ADAPTER_CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"'{folder}' holds no {ADAPTER_CONFIG_FILE}, so it is no PEFT adapter: pass the folder that "
            "`trainer.save_model()` wrote."
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is not valid JSON ({error}): save or download the adapter again.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"'{path}' holds no settings: save or download the adapter again.")
    return settings


def unsupported_settings(settings: Mapping[str, Any]) -> list[str]:
    """
    Names what in an adapter's settings cannot be merged here, or would come out wrong.

    Args:
        settings (`Mapping[str, Any]`):
            Contents of `adapter_config.json`.

    Returns:
        `list[str]`: One sentence per reason, with its remedy; empty if plain LoRA or rsLoRA.
    """
    peft_type = settings.get("peft_type")
    if peft_type != "LORA":
        return [f"The adapter is of type {peft_type}; only LoRA and rsLoRA are merged: train with `LoraConfig`."]
    problems = [
        f"The adapter uses {name} (`{key}`), which is not merged: {remedy}."
        for key, (name, remedy) in _UNSUPPORTED_SETTINGS.items()
        if settings.get(key)
    ]
    if settings.get("bias", "none") != "none":
        problems.append(
            f"The adapter trained the model's biases (`bias={settings['bias']!r}`), which is not merged: train with "
            "`bias='none'`."
        )
    if settings.get("task_type") not in (None, "CAUSAL_LM"):
        problems.append(
            f"The adapter is for the task {settings['task_type']}, not for a causal language model: train with "
            "`task_type='CAUSAL_LM'`."
        )
    init = str(settings.get("init_lora_weights")).lower()
    for prefix, name in _MUTATING_INITS.items():
        if init.startswith(prefix):
            problems.append(
                f"The adapter was initialised by {name} (`init_lora_weights={init!r}`), which subtracts an initial update "
                "from the base weights; adding it to other weights would be wrong: convert it to plain LoRA with PEFT's "
                "`save_pretrained(..., path_initial_model_for_weight_conversion=<the adapter saved before training>)`."
            )
    if init == "loftq":
        problems.append(
            "The adapter was initialised by LoftQ (`init_lora_weights='loftq'`): it compensates the quantisation error of "
            "its base model, which the instruct model does not have, and PEFT has no conversion for it: train with "
            "`init_lora_weights=True`."
        )
    if init == "mica":
        problems.append(
            "The adapter was initialised by MiCA (`init_lora_weights='mica'`), a LoRA variant that is not merged: train "
            "with `init_lora_weights=True`."
        )
    known = set(LoraConfig.__dataclass_fields__) | {"runtime_config"}
    unknown = sorted(key for key, value in settings.items() if key not in known and value)
    if unknown:
        problems.append(
            f"The adapter has settings that the installed PEFT does not know ({', '.join(unknown)}) and would ignore: "
            "upgrade PEFT to the version that saved the adapter."
        )
    return problems
