from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from gift_trl.checkpoints import safetensors_files


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in safetensors_files(folder) for name, tensor in load_file(file).items()}


def merged_by_peft(instruct: Path, adapter: Path, scale: float = 1.0) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(instruct, dtype="auto")
    # A checkpoint may mix dtypes; transformers loads it in one.
    stored = tensors_of(instruct)
    for name, parameter in model.named_parameters():
        if name in stored:
            parameter.data = stored[name]
    peft_model = PeftModel.from_pretrained(model, adapter)
    for module in peft_model.modules():
        if scale != 1.0 and "lora_A" in dict(module.named_children()):
            module.scale_layer(scale)
    merged = peft_model.merge_and_unload()
    # Under the names of the checkpoint, where each expert has its own
    return revert_weight_conversion(merged, merged.state_dict())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a.view(torch.uint8) == b.view(torch.uint8)).all())
