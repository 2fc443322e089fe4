import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig
from trl.trainer.utils import add_fused_lm_head

from gift_trl.training.memory import adapter_size, estimate_memory


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(width: int, inner: int, heads: int, key_heads: int, layers: int = 2, vocabulary: int = 8) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=64,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
    )


def estimate(*shape: int, **settings):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(*shape))
    return estimate_memory(model, TARGETS, **{"rank": 64, "rows": 1, "length": 512, **settings})


def test_what_is_counted():
    shape = (512, 1024, 8, 2, 3, 1000)
    linear = 3 * (512 * 512 * 2 + 512 * 128 * 2 + 512 * 1024 * 3)
    weights = linear + 2 * 1000 * 512 + 7 * 512  # embedding, head, norms
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(*shape))
    adapter = sum(p.numel() for p in get_peft_model(model, LoraConfig(r=64, target_modules=TARGETS)).parameters())
    adapter -= weights
    with torch.device("meta"):
        assert adapter_size(AutoModelForCausalLM.from_config(config(*shape)), TARGETS, 64) == adapter
    whole = estimate(*shape)
    assert (whole.weights, whole.adapter) == (2 * weights, 16 * adapter)
    assert whole.total == whole.weights + whole.adapter + whole.activations
    for stage, share in ((1, 8 + 8 / 4), (2, 4 + 12 / 4), (3, 16 / 4)):
        sharded = estimate(*shape, processes=4, zero_stage=stage)
        assert sharded.adapter == share * adapter
        layer = 512 * 512 * 2 + 512 * 128 * 2 + 512 * 1024 * 3 + 2 * 512
        assert sharded.weights == (2 * weights / 4 + 2 * 2 * layer if stage == 3 else 2 * weights)
        assert sharded.activations == whole.activations
    quantised = estimate(*shape, load_in_4bit=True)
    assert quantised.adapter == 8 * adapter
    assert quantised.weights == pytest.approx(2 * (weights - linear) + linear * (0.5 + 1 / 64 + 1 / 4096), abs=1)


def measure(shape: tuple[int, ...], tokens: int) -> int:
    """Peak of what a forward and a backward pass allocate, the adapter's gradients left out."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(*shape), dtype=torch.bfloat16)
    add_fused_lm_head(model)
    model = get_peft_model(model, LoraConfig(r=64, lora_alpha=128, lora_dropout=0.05, target_modules=TARGETS))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    ids = torch.randint(0, 8, (1, tokens))
    gc.collect()  # what an earlier model leaves would be freed meanwhile
    gc.disable()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, fused_lm_head=True).loss
        loss.backward()
    gc.enable()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("shape", [(512, 1024, 8, 2), (768, 3072, 12, 4), (512, 1792, 16, 2), (256, 4096, 4, 4)])
def test_activations_are_those_that_the_profiler_sees(shape, monkeypatch):
    # The tile of the head is as wide for a vocabulary of 8 as for any other
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 8)
    monkeypatch.setattr("gift_trl.training.memory._TILE", (4096, 8))
    measured = measure(shape, 768) - measure(shape, 256)  # without what does not grow with the rows
    assert estimate(*shape).activations == pytest.approx(measured, rel=0.01)
