"""The head in tiles against the full logits in float64, and the check that finds an architecture it does not know."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PhiConfig,
    Qwen3Config,
)

from gift_trl.annotation import annotate_dataset, head, read_provenance
from gift_trl.annotation.head import target_log_probs
from gift_trl.annotation.scoring import scorer_of


SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}


@pytest.fixture(params=[(512, 2048), (3, 7)], ids=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(head, "_TILE_TOKENS", request.param[0])
    monkeypatch.setattr(head, "_TILE_VOCABULARY", request.param[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 5.0), (3.0, 30.0)])
def test_log_probs_in_tiles(tiles, dtype, with_bias, scale, softcap):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 16, generator=generator).to(dtype)
    weight = torch.randn(100, 16, generator=generator).to(dtype)
    bias = torch.randn(100, generator=generator).to(dtype) if with_bias else None
    targets = torch.randint(0, 100, (20,), generator=generator)
    found = target_log_probs(hidden, targets, weight, bias, scale=scale, softcap=softcap)
    # The product is in the model's dtype, as the model's own; all that follows is exact
    logits = (hidden @ weight.T if bias is None else (hidden @ weight.T).add(bias)).double() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2e-6 if dtype == torch.float32 else 2e-2, atol=2e-6)


def test_extreme_logits_do_not_overflow():
    hidden = torch.tensor([[100.0], [-100.0]])
    weight = torch.linspace(-50, 50, 5000)[:, None]
    found = target_log_probs(hidden, torch.tensor([4999, 4999]), weight)
    expected = (hidden.double() @ weight.double().T).log_softmax(-1)[:, 4999]
    # The logits themselves are 5,000, of which float32 knows the fourth digit after the point
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("lowest", [-50.0, -1000.0, float("-inf")])
def test_unlikely_and_masked_tokens_do_not_blur_the_others(tiles, lowest):
    # A whole tile of the vocabulary, and the first token of the others, are as good as impossible
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 8, generator=generator), torch.randn(5000, 8, generator=generator)
    bias = torch.zeros(5000)
    bias[::2048] = bias[2048:4096] = bias[::7] = lowest
    targets = torch.tensor([1, 2, 3, 4, 5, 4097, 4098, 4099, 4100])
    found = target_log_probs(hidden, targets, weight, bias)
    expected = (hidden.double() @ weight.double().T + bias.double()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        LlamaConfig(**SIZES, tie_word_embeddings=True),
        Qwen3Config(**SIZES, head_dim=8),
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0),
        CohereConfig(**SIZES, logit_scale=0.3),
        GraniteConfig(**SIZES, logits_scaling=4.0),
        PhiConfig(**SIZES),  # has a bias in its head
        MixtralConfig(**SIZES, num_local_experts=4),
        GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    ],
    ids=lambda config: f"{config.model_type}{'-tied' if config.tie_word_embeddings else ''}",
)
def test_confidences_of_every_architecture(config, tokenizer, tmp_path):
    torch.manual_seed(0)
    # The kernel for the experts of a mixture knows no float64
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that the probabilities are not all alike
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            model.get_output_embeddings().bias.normal_()
    generator = np.random.default_rng(0)
    rows = [generator.integers(3, 300, size=n).tolist() for n in (7, 90, 23, 64, 2, 23)]
    labels = [[-100] * (len(row) // 3) + row[len(row) // 3 :] for row in rows]
    dataset = Dataset.from_dict({"input_ids": rows, "labels": labels})
    annotated = annotate_dataset(dataset, model, tokenizer, tokens_per_batch=200, cache_dir=tmp_path)
    model = model.double().eval()
    for row in annotated:
        ids = torch.tensor(row["input_ids"])
        with torch.no_grad():
            log_probs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        expected = torch.zeros(len(ids), dtype=torch.float64)
        expected[1:] = log_probs[:-1].gather(1, ids[1:, None])[:, 0].exp()
        expected[torch.tensor(row["labels"]) == -100] = 0
        expected[0] = 0
        np.testing.assert_allclose(row["confidences"], expected.numpy(), rtol=1e-5)


class SteeredLlama(LlamaForCausalLM):
    """Does something to its logits that its configuration does not say."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 1.5
        return outputs


def test_an_unknown_head_is_refused():
    torch.manual_seed(0)
    model = SteeredLlama(LlamaConfig(**SIZES))
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    ids = np.arange(3, 20)
    with scorer_of(model) as scorer, pytest.raises(ValueError, match=r"`SteeredLlama` changes its logits in a way"):
        scorer.check(ids)
    assert "forward" not in model.__dict__


def test_a_quantised_model_scores_and_says_so(make_model, tokenizer, conversations, tmp_path):
    folder = str(make_model(tmp_path / "model", hidden_size=64, intermediate_size=128))
    options = {"cache_dir": tmp_path / "cache"}
    plain = annotate_dataset(conversations, folder, tokenizer, **options)
    quantised = annotate_dataset(
        conversations,
        folder,
        tokenizer,
        model_init_kwargs={"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")},
        **options,
    )
    assert read_provenance(plain)[0].quantization is None
    assert read_provenance(quantised)[0].quantization == "bitsandbytes"
    difference = np.concatenate(quantised["confidences"][:]) - np.concatenate(plain["confidences"][:])
    assert 0 < np.abs(difference).max() < 0.1
