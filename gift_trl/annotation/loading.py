"""The model that scores: checked before its weights are read, and loaded so that every process holds what it needs."""

import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import patch_environment
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from trl.trainer.utils import create_model_from_path

from gift_trl.annotation.scoring import unwrap_model
from gift_trl.model_pair import load_config


def check_scoring_model(instruct_model: str | PreTrainedModel, **kwargs: Any) -> PreTrainedConfig:
    """
    Checks, before weights are read, that a model can score tokens in this process.

    Args:
        instruct_model (`str` or [`~transformers.PreTrainedModel`]):
            Model id, checkpoint folder or loaded model.
        kwargs (`dict[str, Any]`):
            Keyword arguments of [`~transformers.AutoConfig.from_pretrained`], such as `revision`.

    Returns:
        [`~transformers.PreTrainedConfig`]: Its text configuration.

    Raises:
        `ValueError`: If it is no causal language model, or a loaded one whose weights are sharded over the processes.
        `FileNotFoundError`: If it is not found.
    """
    config = load_config(instruct_model, **kwargs)
    if isinstance(instruct_model, str):
        architectures: list[Any] = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)]
        architecture = architectures[0]
    else:
        architecture = type(unwrap_model(instruct_model)).__name__
    # Models that read images generate text too, and remote code has names of its own
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    if architecture not in known and "auto_map" not in config.to_dict():
        raise ValueError(
            f"The model `{instruct_model if isinstance(instruct_model, str) else config.name_or_path}` is a "
            f"`{architecture}`, which is no causal language model. Name the instruct model to be merged into."
        )
    if not isinstance(instruct_model, str) and _is_sharded(instruct_model):
        raise ValueError(
            f"The loaded `{architecture}` holds only a part of its weights in this process (DeepSpeed ZeRO-3, or FSDP's "
            "RAM-efficient loading), and the probabilities of a part are wrong. Name the instruct model instead of "
            "loading it, or annotate first with `gift-trl annotate` and train with `--dataset DIR`."
        )
    return config.get_text_config()


def _is_sharded(model: PreTrainedModel) -> bool:
    return (
        any(hasattr(parameter, "ds_id") or parameter.is_meta for parameter in model.parameters())
        # Every process but the first is given empty tensors, which look like any others
        or (_uses_fsdp() and PartialState().num_processes > 1)
    )


def load_scoring_model(
    name: str, load_kwargs: dict[str, Any], *, shard: bool = False
) -> tuple[PreTrainedModel, torch.nn.Module | None]:
    """
    Loads a model for scoring.

    A single process with GPUs spreads the model over them (`device_map="auto"`). Several processes load it whole, each
    on its own GPU, under DDP and FSDP; under DeepSpeed ZeRO-3 each holds a part.

    Args:
        name (`str`):
            Model id or checkpoint folder.
        load_kwargs (`dict[str, Any]`):
            Keyword arguments of [`~transformers.AutoModelForCausalLM.from_pretrained`]. Without a `dtype`, that of the
            checkpoint is used.
        shard (`bool`, *optional*, defaults to `False`):
            Whether each process is to hold a part under FSDP too, for a model that stays beside the one that is trained.
            Then all of them must make their forward passes together, as under DeepSpeed ZeRO-3.

    Returns:
        `tuple[PreTrainedModel, torch.nn.Module | None]`: The model, and the DeepSpeed engine that runs it or `None`.

    Raises:
        `ValueError`: If the model does not fit on the GPUs of a single process.
    """
    state = PartialState()
    load_kwargs = {"dtype": "auto", **load_kwargs}
    if state.num_processes > 1:
        load_kwargs["device_map"] = None
    # FSDP would read the weights in the first process only, and leave the others' empty
    with patch_environment(fsdp_cpu_ram_efficient_loading="false"):
        model = create_model_from_path(name, **load_kwargs)
    model = model.requires_grad_(False).eval()
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"`{name}` does not fit on the GPUs, and a part of it would be read from elsewhere for every batch. Use more "
            "GPUs, launch several processes with a DeepSpeed ZeRO-3 configuration, quantise the model "
            "(`instruct_model_init_kwargs`), or score with a vLLM server (`--engine vllm`)."
        )
    if is_deepspeed_zero3_enabled():
        return model, _sharded_engine(model)
    if state.num_processes > 1 and not getattr(model, "is_quantized", False):
        if shard and _uses_fsdp():
            _shard(model, state.device)
        else:
            model = model.to(state.device)
    return model, None


def _uses_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


def _shard(model: PreTrainedModel, device: torch.device) -> None:
    # torch's own FSDP2, whichever version the trained model uses, and without a mixed precision policy: the confidences
    # are those of the checkpoint's dtype
    mesh = init_device_mesh(device.type, (PartialState().num_processes,))
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def _sharded_engine(model: PreTrainedModel) -> torch.nn.Module:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": model.dtype == torch.bfloat16},
        "fp16": {"enabled": model.dtype == torch.float16},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine
