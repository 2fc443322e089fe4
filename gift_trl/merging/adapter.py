"""What an adapter's settings say, and which of them a merge would get wrong."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
from huggingface_hub import ModelCard
from packaging.version import InvalidVersion, Version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from yaml import YAMLError

from gift_trl.cards import public_name


ADAPTER_CONFIG_FILE = "adapter_config.json"

# What to do with tensors that an adapter holds whole, rather than an update of them.
SAVED_MODULES = ("replace", "ignore")

# Types whose layers merge to the same bits without the rest of the model, as the tests show one by one. The value says
# whether the update is added to the weight, whatever the weight is: only then is the merge θ_I + M(φ).
MERGED_TYPES = {
    "LORA": True,
    "LOHA": True,
    "LOKR": True,
    "FOURIERFT": True,
    "WAVEFT": True,
    "C3A": True,
    "GRALORA": True,
    "PEANUT": True,
    "DELORA": False,
    "HIRA": False,
    "IA3": False,
    "OFT": False,
    "BOFT": False,
    "HRA": False,
    "MISS": False,
}
# Types whose layers can scale their update.
_SCALED_TYPES = ("LORA", "LOHA", "LOKR")

# Initialisations after which the model that was trained is no longer the base model, but base minus an initial update.
_MUTATING_INITS = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
}

# Settings that change what is merged; each is given its name and what to do instead.
_UNSUPPORTED_SETTINGS = {
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
# Settings by which an adapter comes to hold trained tensors of the base model whole.
_WHOLE_SETTINGS = {
    "modules_to_save": "fully trained modules",
    "trainable_token_indices": "trained token embeddings",
}
# What quantised copies of a model add to its name.
_QUANTISED = re.compile(
    r"([-_.](unsloth|bnb|nf4|gptq|awq|gguf|mlx|exl2|fp8|fp4|[48]-?bits?|int[48]|w[48]a(8|16)|dynamic))+$"
)


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


def unsupported_settings(
    settings: Mapping[str, Any], saved_modules: str | None = None, scale: float = 1.0
) -> list[str]:
    """
    Names what in an adapter's settings cannot be merged here, or would come out wrong.

    Args:
        settings (`Mapping[str, Any]`):
            Contents of `adapter_config.json`.
        saved_modules (`str`, *optional*):
            What is to be done with tensors that the adapter holds whole.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor of the update.

    Returns:
        `list[str]`: One sentence per reason, with its remedy; empty if it can be merged.
    """
    peft_type = settings.get("peft_type")
    if peft_type not in MERGED_TYPES:
        return [
            f"The adapter is of type {peft_type}, which is not merged; these are: {', '.join(MERGED_TYPES)}. Train with "
            "`LoraConfig`."
        ]
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        return [f"The installed PEFT does not know adapters of type {peft_type}: upgrade PEFT."]
    problems = [
        f"The adapter uses {name} (`{key}`), which is not merged: {remedy}."
        for key, (name, remedy) in _UNSUPPORTED_SETTINGS.items()
        if settings.get(key)
    ]
    if peft_type not in _SCALED_TYPES and scale != 1.0:
        problems.append(
            f"The scale is {scale:g}, and PEFT's {peft_type} layers have none: merge with scale 1.0, or in a recipe, where "
            "the difference that they make is scaled."
        )
    if saved_modules is None:
        whole = [f"{name} (`{key}`)" for key, name in _WHOLE_SETTINGS.items() if settings.get(key)]
        if settings.get("bias", "none") != "none":
            whole.append(f"the model's biases (`bias={settings['bias']!r}`)")
        if whole:
            problems.append(
                f"The adapter holds {', '.join(whole)} whole, as the base model became, not as an update. Choose: "
                "`saved_modules='ignore'` (`--saved_modules ignore`; in the recipe of a training `merge_saved_modules: "
                "ignore`) keeps the instruct model's, `'replace'` takes the adapter's in their place, as PEFT does. Or "
                "train without."
            )
    if settings.get("trainable_token_indices") and saved_modules == "ignore":
        problems.append(
            "The adapter's trained token embeddings (`trainable_token_indices`) cannot be left out: merge with "
            "`saved_modules='replace'`, or train without."
        )
    if settings.get("task_type") not in (None, "CAUSAL_LM"):
        problems.append(
            f"The adapter is for the task {settings['task_type']}, not for a causal language model: train with "
            "`task_type='CAUSAL_LM'`."
        )
    problems += _unsupported_initialisation(settings)
    unknown, saved_by = _unknown_settings(settings), _peft_version(settings)
    if unknown and saved_by is not None and saved_by > Version(peft.__version__):
        problems.append(
            f"The adapter has settings that the installed PEFT {peft.__version__} does not know ({', '.join(unknown)}) and "
            f"would ignore: upgrade PEFT to {saved_by}, which saved the adapter."
        )
    return problems


def unusual_settings(settings: Mapping[str, Any]) -> list[str]:
    """
    Names what in an adapter's settings makes the merge another one than θ_I + M(φ), or may.

    Args:
        settings (`Mapping[str, Any]`):
            Contents of `adapter_config.json`.

    Returns:
        `list[str]`: One sentence per reason.
    """
    kind = "DoRA" if settings.get("use_dora") else settings.get("peft_type")
    cautions = []
    if settings.get("use_dora") or not MERGED_TYPES.get(kind or "", True):
        cautions.append(
            f"A {kind} adapter does not add an update but depends on the weights it is put on: what it does to the "
            "instruct model is not what it learned on the base model. LoRA and rsLoRA are what GIFT is made for."
        )
    if unknown := _unknown_settings(settings):
        cautions.append(
            f"The adapter has settings that PEFT does not know ({', '.join(unknown)}), another tool's perhaps: they are "
            "ignored. If one of them changes what the adapter does, convert it with the tool that saved it."
        )
    return cautions


def foreign_base(settings: dict[str, Any], instruct_model: str, instruct_dir: Path) -> list[str]:
    """
    Compares the adapter's base model with the one that the instruct model's card names.

    Args:
        settings (`dict[str, Any]`):
            Contents of `adapter_config.json`.
        instruct_model (`str`):
            The instruct model, as it was given.
        instruct_dir (`Path`):
            Its folder.

    Returns:
        `list[str]`: A sentence if they differ.
    """
    base, card = settings.get("base_model_name_or_path"), instruct_dir / "README.md"
    if not base or not card.is_file():
        return []
    try:
        known = ModelCard(card.read_text(encoding="utf-8")).data.get("base_model")
    except (ValueError, YAMLError):
        return []  # a card that cannot be read says nothing
    known = [known] if isinstance(known, str) else list(known or [])
    known = [name for name in map(public_name, known) if name]
    # Trained on the instruct model itself, it is the plain fine-tuning that GIFT is compared with.
    if not known or _model_part(base) in map(_model_part, [*known, instruct_model]):
        return []
    return [
        f"The adapter was trained on '{public_name(base)}', while the instruct model's card says that it was made from "
        f"{', '.join(known)}: an update of another model may do harm. `--base_model` reports how far the two are related."
    ]


def _model_part(name: str) -> str:
    # The last part only, of the unquantised model: mirrors and local copies keep it. ModelScope writes dots as `___`.
    last = (public_name(name) or "").rpartition("/")[2]
    return _QUANTISED.sub("", last.lower().replace("___", "."))


def _unknown_settings(settings: Mapping[str, Any]) -> list[str]:
    kind: Any = settings.get("peft_type")
    config = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if config is None:
        return []
    known = {*config.__dataclass_fields__, "runtime_config"}
    return sorted(key for key, value in settings.items() if key not in known and value)


def _peft_version(settings: Mapping[str, Any]) -> Version | None:
    try:
        # Behind an `@`, PEFT names the commit of a version that was not released.
        return Version(str(settings.get("peft_version")).partition("@")[0])
    except InvalidVersion:
        return None


def _unsupported_initialisation(settings: Mapping[str, Any]) -> list[str]:
    if settings.get("peft_type") != "LORA":
        return []
    init = str(settings.get("init_lora_weights")).lower()
    problems = []
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
    return problems
