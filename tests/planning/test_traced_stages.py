import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, MixtralConfig
from trl.trainer.utils import add_fused_lm_head, compute_flops_per_token

from gift_trl.planning.stages import Batch, trace_annotation, trace_training_step
from gift_trl.training.loss import weighted_loss


SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear", **settings})


def llama(layers: int = 3, **settings) -> LlamaConfig:
    return LlamaConfig(**{**SIZES, "vocab_size": 500, "num_hidden_layers": layers, **TOKENS, **settings})


def measured_peak(config: LlamaConfig, batch: Batch, dtype: torch.dtype, checkpointing: bool) -> int:
    """Peak of what a forward and a backward pass allocate, the adapter's gradients left out."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    model = get_peft_model(model, lora())
    if checkpointing:
        model.enable_input_require_grads()
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    ids = torch.randint(0, config.vocab_size, (batch.rows, batch.length))
    inputs = {"input_ids": ids, "labels": ids}
    if batch.masked:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, -1] = 0
    weights = torch.rand(batch.rows, batch.length - 1)
    gc.collect()  # what an earlier model leaves would be freed meanwhile
    gc.disable()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            outputs = model.train()(**inputs, fused_lm_head=True, use_cache=False)
        weighted_loss(outputs.log_probs, outputs.label_mask, weights)[0].backward()
    gc.enable()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("dtype, vocabulary, masked", [(torch.float32, 500, True), (torch.bfloat16, 4000, False)])
def test_peak_is_what_the_profiler_sees(dtype, vocabulary, masked, checkpointing, monkeypatch):
    # TRL's tile is as wide for a small vocabulary as for a large one, and would be all there is to see
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", vocabulary // 4)
    config, batch = llama(vocab_size=vocabulary), Batch(2, 200, 398, masked)
    traced = trace_training_step(
        config,
        lora(),
        batch,
        dtype=dtype,
        autocast_dtype=None if dtype == torch.float32 else dtype,
        checkpointing=checkpointing,
        on_gpu=False,
    )
    assert traced.peak == pytest.approx(measured_peak(config, batch, dtype, checkpointing), rel=0.01)


@pytest.mark.parametrize(
    "config",
    [
        llama(5),
        Gemma3TextConfig(
            **{**SIZES, **TOKENS, "vocab_size": 500, "num_hidden_layers": 8, "head_dim": 16, "sliding_window": 32},
            layer_types=["sliding_attention", "full_attention"] * 4,
        ),
        GPT2Config(n_embd=64, n_layer=5, n_head=4, vocab_size=500, bos_token_id=1, eos_token_id=2),
    ],
    ids=lambda config: config.model_type,
)
def test_few_layers_tell_what_all_cost(config):
    batch = Batch(2, 96, 150)
    settings = lora(fan_in_fan_out=config.model_type == "gpt2")
    checkpointing = config.model_type != "gpt2"
    few, whole = (
        trace_training_step(config, settings, batch, checkpointing=checkpointing, whole=whole)
        for whole in (False, True)
    )
    assert (few.peak, few.operations) == (whole.peak, whole.operations)
    few, whole = (trace_annotation(config, batch, whole=whole) for whole in (False, True))
    assert (few.peak, few.flops) == (whole.peak, whole.flops)


def test_flops_of_a_forward_pass_are_those_of_the_formula():
    config, batch = llama(5), Batch(3, 128, 300)
    head = 2 * config.vocab_size * config.hidden_size
    tokens = batch.rows * batch.length
    backbone = tokens * (compute_flops_per_token(config, batch.length) / 3 - head)
    hidden_by_mask = tokens * 2 * config.num_hidden_layers * config.hidden_size * batch.length
    # The head is for the targets alone
    assert trace_annotation(config, batch).flops == backbone - hidden_by_mask + head * batch.targets


def test_a_token_costs_its_own_experts_alone():
    flops = [
        trace_annotation(
            MixtralConfig(
                **SIZES,
                **TOKENS,
                vocab_size=500,
                num_hidden_layers=2,
                num_local_experts=8,
                num_experts_per_tok=experts,
            ),
            Batch(1, 32, 31),
        ).flops
        for experts in (1, 2)
    ]
    assert flops[1] - flops[0] == 2 * 32 * (3 * 2 * SIZES["hidden_size"] * SIZES["intermediate_size"])


def test_a_gpu_scores_targets_alone_and_keeps_smaller_masks():
    config, many, few = llama(vocab_size=40_000), Batch(2, 128, 254), Batch(2, 128, 100)
    on_gpu = [trace_training_step(config, lora(), batch) for batch in (many, few)]
    head = 3 * 2 * config.vocab_size * config.hidden_size  # forward, again, and for the gradient
    assert on_gpu[0].flops - on_gpu[1].flops == 154 * head
    on_cpu = trace_training_step(config, lora(), many, on_gpu=False)
    assert on_cpu.flops == on_gpu[0].flops and on_cpu.peak > 3 * on_gpu[0].peak
    masks = [trace_training_step(llama(), lora(lora_dropout=p), many, checkpointing=False).peak for p in (0.05, 0.0)]
    assert masks[0] > masks[1]


def test_frozen_weights_have_no_gradients_and_checkpoints_cost_a_forward_pass():
    config, batch = llama(), Batch(2, 128, 254)
    forward = trace_annotation(config, batch).flops
    kept, again = (trace_training_step(config, lora(r=1), batch, checkpointing=c).flops for c in (False, True))
    whole = trace_training_step(config, None, batch, checkpointing=False, adapter_dtype=torch.bfloat16).flops
    assert kept < 2.5 * forward < whole  # of two products in the backward pass one is spared
    assert again - kept == pytest.approx(forward, rel=0.2)


def test_quantised_weights_are_unpacked_for_their_turn():
    plain, quantised = (
        trace_training_step(llama(), lora(), Batch(1, 16, 15), adapter_dtype=torch.bfloat16, quantised=quantised)
        for quantised in (False, True)
    )
    assert quantised.flops == plain.flops
    assert sum(o.moved * n for o, n in quantised.operations.items()) > sum(
        o.moved * n for o, n in plain.operations.items()
    )
