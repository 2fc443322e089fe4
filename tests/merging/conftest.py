from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)


_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_CONFIGS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
    "qwen3_moe": Qwen3MoeConfig,
    "mixtral": MixtralConfig,
}


def tiny_config(architecture: str, **changes) -> PreTrainedConfig:
    if architecture == "gpt2":
        sizes = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
        return GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 1, **changes})
    experts = {"qwen3_moe": _EXPERTS, "mixtral": {"num_local_experts": 4}}.get(architecture, {})
    sizes = {key: value for key, value in _SIZES.items() if key != "head_dim" or architecture != "qwen2"}
    return _CONFIGS[architecture](**{**sizes, **experts, **changes})


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

    def make(
        model: Path,
        name="adapter",
        dtype=torch.float32,
        seed=2,
        spread=0.3,
        saving=None,
        config: PeftConfig | None = None,
        **settings,
    ) -> Path:
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
        peft_model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(model), config or LoraConfig(task_type="CAUSAL_LM", **settings)
        )
        folder = tmp_path / name
        peft_model.save_pretrained(folder, **(saving or {}))
        torch.manual_seed(seed)
        file = folder / "adapter_model.safetensors"
        # On top of the initial values where there are any: some types cannot do with just any numbers
        start = 0.0 if config is None else 1.0
        factors = {
            key: (start * factor + torch.randn(factor.shape) * spread).to(dtype)
            if factor.is_floating_point()
            else factor
            for key, factor in load_file(file).items()
        }
        save_file(factors, file, metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture
def adapter_and_instruct(make_checkpoint, make_adapter) -> tuple[Path, Path]:
    """An adapter and the instruct model it fits."""
    instruct = make_checkpoint()
    return make_adapter(instruct), instruct
