from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config


_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def tiny_config(architecture: str, **changes) -> PreTrainedConfig:
    if architecture == "gpt2":
        sizes = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
        return GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 1, **changes})
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[architecture](**{**_SIZES, **changes})


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Saves a tiny model with random weights and the files that a published checkpoint has beside them."""

    def make(
        name="instruct", architecture="llama", dtype=torch.float32, seed=1, max_shard_size="1GB", **changes
    ) -> Path:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), dtype=dtype)
        for parameter in model.parameters():  # biases and norms start as zeros and ones, too regular to tell errors
            parameter.data = torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1)
        folder = tmp_path / name
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "tokenizer_config.json").write_text("{}")
        (folder / "LICENSE").write_text("the licence")
        return folder

    return make


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Saves an adapter with random factors for the model in a folder."""

    def make(model: Path, name="adapter", dtype=torch.float32, seed=2, spread=0.3, saving=None, **settings) -> Path:
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
        peft_model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(model), LoraConfig(task_type="CAUSAL_LM", **settings)
        )
        folder = tmp_path / name
        peft_model.save_pretrained(folder, **(saving or {}))
        torch.manual_seed(seed)
        file = folder / "adapter_model.safetensors"
        factors = {key: (torch.randn_like(factor) * spread).to(dtype) for key, factor in load_file(file).items()}
        save_file(factors, file, metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture
def adapter_and_instruct(make_checkpoint, make_adapter) -> tuple[Path, Path]:
    """An adapter and the instruct model it fits."""
    instruct = make_checkpoint()
    return make_adapter(instruct), instruct
