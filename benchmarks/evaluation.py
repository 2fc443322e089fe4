"""
Answers by the evaluation's transformers engine against what is usually written: generated tokens for each CPU second.

    python benchmarks/evaluation.py --preset cpu --vocab 32000 151936

How to read the results: benchmarks/README.md.
"""

import argparse
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from annotation import CHARACTERS_PER_TOKEN, LOGIT_DEVIATION, PERCENTILES, PROMPT_CHARACTERS, PROMPT_TOKENS
from measuring import Results, add_model_options, add_options, machine
from measuring import interleave as seconds_in_turns
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from gift_trl.evaluation.config import EvaluationConfig
from gift_trl.evaluation.generation import Request, TransformersEngine, plan_batches
from gift_trl.evaluation.tasks import Sampling


# Shapes of the model, of which one is Qwen2.5's; problems, and the mean and the largest number of tokens of an answer
_SHAPE = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
PRESETS = {
    "tiny": (dict(zip(_SHAPE, (32, 1, 64, 2, 1), strict=True)), 3, 4, 12),
    "cpu": (dict(zip(_SHAPE, (448, 4, 2432, 7, 1), strict=True)), 8, 32, 128),
    "gpu-0.5b": (dict(zip(_SHAPE, (896, 24, 4864, 14, 2), strict=True)), 128, 512, 2048),
}
MAX_LENGTH = 4096
METHODS = ("one by one", "file order", "gift_trl")
# Of `--growth`: rows of a batch, tokens of every prompt and answer
GROWTH_ROWS, GROWTH_PROMPT, GROWTH_ANSWER = (1, 4, 16, 64), 8, 12
Generated = list[int]  # number of tokens of every answer


def make_model(preset: str, vocabulary: int, dtype: str, device: str) -> PreTrainedModel:
    """
    A Qwen2 model with random weights whose logits spread as those of a trained one. A token in so many ends an answer, so
    that the lengths of the answers differ as those of a trained model do.
    """
    torch.manual_seed(0)
    shape, _, mean, _ = PRESETS[preset]
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    config = Qwen2Config(
        vocab_size=vocabulary, max_position_embeddings=MAX_LENGTH, tie_word_embeddings=False, **tokens, **shape
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=LOGIT_DEVIATION / math.sqrt(config.hidden_size))
    model.generation_config = GenerationConfig(eos_token_id=list(range(mean - 1, vocabulary, mean)), pad_token_id=0)
    return model


def draw_requests(preset: str, vocabulary: int, samples: int, seed: int = 0) -> list[Request]:
    """Prompts of random tokens, whose lengths are distributed as those of NuminaMath-CoT, in no order; several samples of each."""
    rng = np.random.default_rng(seed)
    _, problems, _, longest = PRESETS[preset]
    lengths = np.interp(rng.uniform(0, 100, problems), PERCENTILES, PROMPT_CHARACTERS) / CHARACTERS_PER_TOKEN
    prompts = [rng.integers(1, vocabulary, int(length) + PROMPT_TOKENS).tolist() for length in lengths]
    return [
        Request("benchmark", problem, sample, 0, prompt, longest)
        for problem, prompt in enumerate(prompts)
        for sample in range(samples)
    ]


def generate(model: PreTrainedModel, prompts: Sequence[list[int]], longest: int) -> Generated:
    """Answers to padded prompts, as anyone writes it."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = (torch.arange(width) >= torch.tensor([[width - len(prompt)] for prompt in prompts])).to(model.device)
    output = model.generate(
        ids, attention_mask=mask.long(), do_sample=True, temperature=1.0, top_k=0, max_new_tokens=longest
    )
    stops = set(model.generation_config.eos_token_id)
    return [
        next((place for place, token in enumerate(row, start=1) if token in stops), len(row))
        for row in output[:, width:].tolist()
    ]


def make_methods(
    model: PreTrainedModel, requests: Sequence[Request], args: argparse.Namespace
) -> dict[str, Callable[[], Generated]]:
    """The methods, each of which answers every request."""
    longest = requests[0].max_new_tokens

    def in_batches(rows: int) -> Generated:
        prompts = [request.prompt_ids for request in requests]
        batches = (prompts[first : first + rows] for first in range(0, len(prompts), rows))
        return [length for batch in batches for length in generate(model, batch, longest)]

    def ours() -> Generated:
        engine = TransformersEngine(model, model.generation_config.eos_token_id)
        batches = plan_batches(requests, args.tokens_per_batch)
        answered = engine.generate(batches, Sampling(longest))
        return [len(completion.ids) for answers in answered for _, completion in answers]

    methods = {
        "one by one": lambda: in_batches(1),
        "file order": lambda: in_batches(args.batch_size),
        "gift_trl": ours,
    }
    if args.peer == "lm-eval":
        methods["lm-eval"] = lm_eval_method(model, requests, args.batch_size)
    return methods


def lm_eval_method(model: PreTrainedModel, requests: Sequence[Request], rows: int) -> Callable[[], Generated]:
    """lm-eval's own class for transformers, on the same prompts as text."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    last = model.config.vocab_size - 1
    words = {"<pad>": 0, **{f"w{token}": token for token in range(1, last)}, "<eos>": last}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", padding_side="left")
    # Its stop string is the text of this token, which no answer holds
    tokenizer.eos_token = "<eos>"
    model.resize_token_embeddings(model.config.vocab_size)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=rows, max_length=MAX_LENGTH)
    settings = {"until": [], "do_sample": True, "temperature": 1.0, "top_k": 0}
    settings["max_gen_toks"] = requests[0].max_new_tokens
    instances = [
        Instance("generate_until", {}, (tokenizer.decode(request.prompt_ids), settings), index)
        for index, request in enumerate(requests)
    ]
    return lambda: [len(text.split()) for text in harness.generate_until(instances, disable_tqdm=True)]


def compare(args: argparse.Namespace, vocabulary: int, dtype: str) -> dict[str, Any]:
    """Measures the methods on one shape."""
    model = make_model(args.preset, vocabulary, dtype, args.device)
    requests = draw_requests(args.preset, vocabulary, args.samples)
    lengths: dict[str, list[Generated]] = {}

    def keep(name: str, method: Callable[[], Generated]) -> Callable[[], None]:
        return lambda: lengths.setdefault(name, []).append(method())

    methods = make_methods(model, requests, args)
    torch.manual_seed(0)
    seconds = seconds_in_turns(
        {name: keep(name, method) for name, method in methods.items()}, args.rounds, model.device
    )
    results = {}
    for name, rounds in seconds.items():
        speeds = [sum(tokens) / took for tokens, took in zip(lengths[name], rounds, strict=True)]
        results[name] = {
            "rounds": speeds,
            "tokens_per_second": statistics.median(speeds),
            "mean_tokens": statistics.mean(length for tokens in lengths[name] for length in tokens),
        }
    shape = {"preset": args.preset, "vocabulary": vocabulary, "dtype": dtype, "answers": len(requests)}
    sizes = {"samples": args.samples, "batch_size": args.batch_size, "tokens_per_batch": args.tokens_per_batch}
    return {**shape, **sizes, "machine": machine(args), "methods": results}


def measure_growth(args: argparse.Namespace, vocabulary: int, dtype: str) -> dict[str, Any]:
    """Milliseconds of a token in batches of more and more rows of which none ends, greedy and drawn."""
    model = make_model(args.preset, vocabulary, dtype, args.device)
    engine = TransformersEngine(model, [])
    rng = np.random.default_rng(0)
    costs: dict[str, dict[str, float]] = {"greedy": {}, "drawn": {}}
    for rows in GROWTH_ROWS:
        prompts = rng.integers(1, vocabulary, (rows, GROWTH_PROMPT)).tolist()
        batch = [Request("growth", row, 0, 0, prompt, GROWTH_ANSWER) for row, prompt in enumerate(prompts)]
        runs = {
            name: functools.partial(list, engine.generate([batch], Sampling(GROWTH_ANSWER, temperature=temperature)))
            for name, temperature in (("greedy", 0), ("drawn", 1.0))
        }
        for name, (seconds,) in seconds_in_turns(runs, 1, model.device).items():
            costs[name][str(rows)] = 1000 * seconds / (rows * GROWTH_ANSWER)
    shape = {"preset": args.preset, "vocabulary": vocabulary, "dtype": dtype}
    return {**shape, "machine": machine(args), "milliseconds": costs}


def table(results: dict[str, Any]) -> str:
    """Markdown table of all results of a file."""
    lines: list[Sequence[str]] = [
        ("preset", "vocabulary", "dtype", "method", "tokens/s", "against one by one", "mean tokens of an answer"),
        ("---",) * 7,
    ]
    for run in results["runs"].values():
        slowest = run["methods"]["one by one"]["tokens_per_second"]
        for name, method in run["methods"].items():
            speed = method["tokens_per_second"]
            cells = [run["preset"], f"{run['vocabulary']:,}", run["dtype"], name, f"{speed:,.0f}"]
            lines.append((*cells, f"{speed / slowest:.2f}×", f"{method['mean_tokens']:.0f}"))
    if results["growth"]:
        lines += [(), ("preset", "vocabulary", "dtype", "ms a token", *(f"{rows} rows" for rows in GROWTH_ROWS))]
        lines.append(("---",) * (4 + len(GROWTH_ROWS)))
    for run in results["growth"].values():
        for name, costs in run["milliseconds"].items():
            cells = [run["preset"], f"{run['vocabulary']:,}", run["dtype"], name]
            lines.append((*cells, *(f"{cost:.1f}" for cost in costs.values())))
    return "\n".join(f"| {' | '.join(cells)} |" if cells else "" for cells in lines)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, PRESETS)
    add_options(parser, rounds=3)
    parser.add_argument("--samples", type=int, default=4, help="Answers to each problem.")
    parser.add_argument("--batch-size", type=int, default=16, help="Rows of a batch in file order, and of lm-eval's.")
    parser.add_argument(
        "--tokens-per-batch",
        type=int,
        default=EvaluationConfig.tokens_per_batch,
        help="As of gift-trl evaluate (default: its own).",
    )
    parser.add_argument("--peer", choices=["lm-eval"], help="A further peer, which has to be installed.")
    parser.add_argument("--growth", action="store_true", help="Measure how the cost of a token grows instead.")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    results = Results(args, "evaluation", "runs", "growth")
    for vocabulary in args.vocab:
        for dtype in args.dtype:
            title = f"{args.preset} {vocabulary} {dtype}"
            if args.growth:
                results["growth"][title] = measure_growth(args, vocabulary, dtype)
            else:
                results["runs"][title] = compare(args, vocabulary, dtype)
            results.save()
    print(table(results))


if __name__ == "__main__":
    main()
