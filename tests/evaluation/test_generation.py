"""Answers: drawn from the model's distribution, and the same whatever they are batched with."""

import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GenerationConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    Qwen2Config,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gift_trl.evaluation.generation import (
    Request,
    TransformersEngine,
    keeps_keys_and_values_alone,
    make_sampler,
    plan_batches,
)
from gift_trl.evaluation.tasks import Sampling


VOCABULARY, STOP = 60, 2
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "llama": LlamaConfig(**COMMON),
    "qwen2": Qwen2Config(**COMMON),
    "gemma": GemmaConfig(**COMMON, head_dim=8),
    "gemma2": Gemma2Config(**COMMON, head_dim=8, sliding_window=16),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
}


def make_engine(name: str = "llama", dtype: torch.dtype = torch.float32) -> TransformersEngine:
    """A model whose next tokens are neither certain nor all alike."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    for parameter in model.parameters():
        parameter.data.mul_(1.0 if parameter.dim() < 2 else 3.0)
    return TransformersEngine(model.to(dtype), [STOP])


def make_requests(samples: int = 3, longest: int = 24) -> list[Request]:
    rng = random.Random(0)
    prompts = [[rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(1, 30))] for _ in range(8)]
    return [Request("t", p, s, 0, ids, longest) for p, ids in enumerate(prompts) for s in range(samples)]


def answer(engine: TransformersEngine, batches: list[list[Request]], **sampling) -> dict:
    answers = engine.generate(batches, Sampling(**{"max_new_tokens": 24, **sampling}))
    return {request.key: completion for batch in answers for request, completion in batch}


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.8, "top_k": 40, "top_p": 0.95}])
def test_batches_do_not_change_answers(name, sampling):
    engine, requests = make_engine(name), make_requests()
    alone = answer(engine, [[request] for request in requests], **sampling)
    reasons = {completion.finish_reason for completion in alone.values()}
    assert reasons == {"stop", "length"} or sampling["temperature"] == 0
    for seed, size in enumerate((3, 24)):
        shuffled = random.Random(seed).sample(requests, len(requests))
        batches = [shuffled[first : first + size] for first in range(0, len(shuffled), size)]
        assert answer(engine, batches, **sampling) == alone
    # Nor does it matter what else is asked
    assert answer(engine, [requests[5:11]], **sampling) == {r.key: alone[r.key] for r in requests[5:11]}


def test_answers_that_have_ended_are_generated_no_further():
    engine, requests = make_engine(), make_requests(longest=90)
    alone, sizes = answer(engine, [[request] for request in requests]), []
    engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    assert answer(engine, [requests]) == alone
    assert sizes[0] == 24 and sizes == sorted(sizes, reverse=True) and len(sizes) == 90
    going = [sum(len(completion.ids) > step for completion in alone.values()) for step in range(90)]
    assert going[-1] < 12  # so there was something to leave out
    assert all(size < 2 * max(count, 1) or size == 24 for size, count in zip(sizes, going, strict=True))


def test_rows_are_left_out_only_where_a_model_keeps_keys_and_values_alone():
    for name in CONFIGS:
        assert keeps_keys_and_values_alone(make_engine(name).model)
    layers = {"layer_types": ["conv", "full_attention"]}
    hybrid = AutoModelForCausalLM.from_config(Lfm2Config(**COMMON, **layers))
    assert not keeps_keys_and_values_alone(hybrid)
    engine, requests, sizes = TransformersEngine(hybrid, [STOP]), make_requests(1), []
    hybrid.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    assert len(answer(engine, [requests])) == 8 and set(sizes) == {8}


def test_samples_differ_and_seeds_too():
    engine, requests = make_engine(), make_requests()
    first = answer(engine, [requests])
    assert len({tuple(completion.ids) for completion in first.values()}) == len(requests)
    reseeded = [Request(r.task, r.problem, r.sample, 1, r.prompt_ids, r.max_new_tokens) for r in requests]
    assert all(first[key] != completion for key, completion in answer(engine, [reseeded]).items())
    state = torch.get_rng_state()
    answer(engine, [requests])
    assert torch.equal(torch.get_rng_state(), state)


def test_greedy_answers_are_those_of_generate():
    engine, requests = make_engine(), make_requests(1)
    found = answer(engine, [requests], temperature=0)
    for request in requests:
        ids = torch.tensor([request.prompt_ids])
        expected = engine.model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=STOP)[0, ids.shape[1] :]
        assert found[request.key].ids == expected.tolist()
        assert found[request.key].finish_reason == ("stop" if expected[-1] == STOP else "length")


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 2, "top_k": 9, "top_p": 0.8}]
)
def test_tokens_are_drawn_from_the_warped_distribution(sampling):
    draws, logits = 20_000, 2 * torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(max_new_tokens=1, **sampling)
    requests = [Request("t", 0, sample, 0, [3], 1) for sample in range(draws)]
    sampler = make_sampler(requests, sampling, [STOP], torch.device("cpu"))
    tokens = sampler(torch.full((draws, 1), 3), logits.repeat(draws, 1)).argmax(-1)
    expected = TemperatureLogitsWarper(float(sampling.temperature))(None, logits)
    expected = TopKLogitsWarper(sampling.top_k or 30)(None, expected)
    expected = TopPLogitsWarper(float(sampling.top_p))(None, expected)[0].softmax(-1)
    counts = torch.bincount(tokens, minlength=30)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi_squared = ((counts - draws * expected)[possible].square() / (draws * expected[possible])).sum()
    # Mean and variance of the statistic are k and 2k
    freedom = int(possible.sum()) - 1
    assert chi_squared < freedom + 5 * (2 * freedom) ** 0.5


def test_a_row_draws_the_same_tokens_after_others_have_ended():
    """Noise is drawn for rows that go on only, and each has its own."""
    requests = [Request("t", 0, sample, 0, [3], 4) for sample in range(2)]
    sampling = Sampling(max_new_tokens=4)
    both = make_sampler(requests, sampling, [STOP], torch.device("cpu"))
    alone = make_sampler(requests[1:], sampling, [STOP], torch.device("cpu"))
    for last in ([3, 3], [STOP, 5], [STOP, 7]):
        together = both(torch.tensor([[token] for token in last]), torch.zeros(2, 9))
        assert torch.equal(together[1:], alone(torch.tensor([[last[1]]]), torch.zeros(1, 9)))


def test_nothing_of_the_checkpoints_generation_configuration_is_applied():
    engine, requests = make_engine(), make_requests()
    expected = answer(engine, [requests])
    changed = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=1, repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=20, max_length=7,
        num_beams=2, suppress_tokens=[5, 6, 7], eos_token_id=9, bad_words_ids=[[8]],
    )  # fmt: skip
    engine.model.generation_config = changed
    assert answer(engine, [requests]) == expected
    assert engine.model.generation_config is changed


def test_batches_grow_alike_and_depend_on_the_requests_alone():
    requests = make_requests(2)
    requests = [
        Request(r.task, r.problem, r.sample, 0, r.prompt_ids, 30 - len(r.prompt_ids)) for r in requests[:8]
    ] + requests[8:]
    batches = plan_batches(requests, 100)
    assert sorted(r.key for batch in batches for r in batch) == [r.key for r in requests]
    for batch in batches:
        assert len({request.max_new_tokens for request in batch}) == 1
        assert len(batch) == 1 or len(batch) * max(len(r.prompt_ids) + r.max_new_tokens for r in batch) <= 100
    assert [len(batch) for batch in plan_batches(requests, 1)] == [1] * len(requests)


def test_a_batch_without_memory_is_halved(monkeypatch):
    engine, requests = make_engine(), make_requests()
    expected, run, sizes = answer(engine, [requests]), engine._run, []

    def limited(batch, sampling):
        sizes.append(len(batch))
        if len(batch) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return run(batch, sampling)

    monkeypatch.setattr(engine, "_run", limited)
    limit = 6
    with pytest.warns(UserWarning, match="A batch of 24 answers did not fit into memory and is halved"):
        assert answer(engine, [requests]) == expected
    assert sizes == [24, 12, 6, 6, 12, 6, 6]
    limit = 0
    with pytest.raises(ValueError, match="no memory for an answer of 24 tokens"), pytest.warns(UserWarning):
        answer(engine, [requests])


def test_nan_logits_are_refused():
    engine = make_engine()
    engine.model.lm_head.weight.data[5, 0] = float("nan")
    for temperature in (0, 1):
        with pytest.raises(ValueError, match="The model gave NaN logits"):
            answer(engine, [make_requests(1)], temperature=temperature)
