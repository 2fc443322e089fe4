"""
Annotation against the released algorithm and against a lower bound: time, memory and exactness, in one interleaved run.

    python benchmarks/annotation.py --preset cpu --vocab 151936 --dtype float32 bfloat16

How to read the results: benchmarks/README.md.
"""

import argparse
import copy
import functools
import json
import math
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import Results, add_model_options, add_options, interleave, machine, peak_of, seconds_of
from torch.nn import LinearCrossEntropyOptions
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config
from trl.trainer.utils import compute_flops_per_token, get_peak_flops

from gift_trl.annotation.engine import token_budget_batches
from gift_trl.annotation.head import target_log_probs
from gift_trl.annotation.rows import Row
from gift_trl.annotation.scoring import default_tokens_per_batch, scorer_of


# Shapes of the model, of which two are Qwen2.5's, and the number of rows scored in a round; `tiny` is for the tests
_SHAPE = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
PRESETS = {
    "tiny": (dict(zip(_SHAPE, (32, 1, 64, 2, 1), strict=True)), 4),
    "cpu": (dict(zip(_SHAPE, (448, 4, 2432, 7, 1), strict=True)), 24),
    "gpu-0.5b": (dict(zip(_SHAPE, (896, 24, 4864, 14, 2), strict=True)), 2000),
    "gpu-7b": (dict(zip(_SHAPE, (3584, 28, 18944, 28, 4), strict=True)), 2000),
}
# Characters at these percentiles of the NuminaMath-CoT rows the paper trains on, and the correlation of the two
# lengths' normal scores (`--measure-lengths FILE` prints them)
PERCENTILES = (0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 100)
PROMPT_CHARACTERS = (21, 39, 66, 87, 122, 151, 181, 214, 247, 291, 342, 432, 542, 858, 1748)
COMPLETION_CHARACTERS = (62, 183, 327, 425, 571, 700, 820, 971, 1136, 1333, 1636, 2139, 2508, 3205, 5590)
CORRELATION = 0.41
CHARACTERS_PER_TOKEN = 3.0
# Tokens of the chat format and the paper's instruction around a prompt, and of the end of a turn
PROMPT_TOKENS, END_TOKENS = 40, 2
DATASET_ROWS, MAX_LENGTH = 2000, 2048
# Spread of the logits, as in a trained model: those of random weights are almost equal
LOGIT_DEVIATION = 4.0
# Tokens × vocabulary rows of the bound's matrix products; the fastest is taken
BOUND_TILES = ((512, 1024), (512, 2048), (1024, 2048), (2048, 4096), (256, 16384))
# Tokens of a row that are compared with the exact result, and targets of `--head-only`
EXACT_TOKENS = 512
METHODS = ("plain", "gift_trl", "bound")


def draw_rows(vocabulary: int, count: int, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """
    Draws rows of random tokens whose lengths are distributed as those of NuminaMath-CoT.

    Args:
        vocabulary (`int`):
            Number of token ids.
        count (`int`):
            Rows to return, evenly spaced among all when these are sorted by length.
        seed (`int`, *optional*, defaults to `0`):
            Seed.

    Returns:
        `tuple[list[Row], list[Row]]`: The rows, and the four longest of all.
    """
    rng = np.random.default_rng(seed)
    normal = rng.multivariate_normal((0, 0), ((1, CORRELATION), (CORRELATION, 1)), size=DATASET_ROWS)
    percent = 100 * np.vectorize(statistics.NormalDist().cdf)(normal)
    prompts = np.interp(percent[:, 0], PERCENTILES, PROMPT_CHARACTERS) / CHARACTERS_PER_TOKEN + PROMPT_TOKENS
    completions = np.interp(percent[:, 1], PERCENTILES, COMPLETION_CHARACTERS) / CHARACTERS_PER_TOKEN + END_TOKENS
    lengths = np.minimum(prompts.astype(int) + completions.astype(int), MAX_LENGTH)
    rows = []
    for i, row in enumerate(np.argsort(lengths, kind="stable")):
        ids = rng.integers(0, vocabulary, lengths[row])
        targets = np.arange(int(prompts[row]), lengths[row])
        rows.append(Row(i, i, ids, targets, ids[targets]))
    spaced = ((np.arange(count) + 0.5) * DATASET_ROWS / count).astype(int)
    return [rows[i] for i in spaced], rows[-4:]


def make_model(preset: str, vocabulary: int, dtype: str, device: str) -> PreTrainedModel:
    """A Qwen2 model with random weights whose logits spread as those of a trained one."""
    torch.manual_seed(0)
    shape, _ = PRESETS[preset]
    config = Qwen2Config(vocab_size=vocabulary, max_position_embeddings=MAX_LENGTH, tie_word_embeddings=False, **shape)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=LOGIT_DEVIATION / math.sqrt(config.hidden_size))
    return model


def score_plain(model: PreTrainedModel, rows: list[Row]) -> list[np.ndarray]:
    """The released algorithm: a row at a time, a soft-max over every position and the whole vocabulary."""
    result = []
    for row in rows:
        probabilities = (
            model(input_ids=torch.as_tensor(row.input_ids, device=model.device)[None]).logits.float().softmax(-1)
        )
        targets = torch.as_tensor(row.targets, device=model.device)
        target_ids = torch.as_tensor(row.target_ids, device=model.device)
        result.append(probabilities[0, targets - 1].gather(1, target_ids[:, None])[:, 0].cpu().numpy())
    return result


def score_gift_trl(model: PreTrainedModel, rows: list[Row], tokens_per_batch: int) -> list[np.ndarray]:
    """What `annotate_dataset` runs between the tokens and the cache."""
    batches = token_budget_batches([len(row.input_ids) for row in rows], tokens_per_batch)
    with scorer_of(model) as scorer:
        scored = {row.index: q for row, q in scorer.score([rows[i] for i in batch] for batch in batches)}
    return [scored[row.index] for row in rows]


def run_bound(model: PreTrainedModel, rows: list[Row], tokens_per_batch: int, tile: tuple[int, int]) -> None:
    """The backbone on the same batches, and the raw product of its targets with the head."""
    buffer = torch.empty(tile[0] * tile[1], dtype=model.dtype, device=model.device)
    for batch in token_budget_batches([len(row.input_ids) for row in rows], tokens_per_batch):
        ids = torch.zeros((len(batch), len(rows[batch[0]].input_ids)), dtype=torch.long)
        predicts = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(batch):
            ids[i, : len(rows[row].input_ids)] = torch.as_tensor(rows[row].input_ids)
            predicts[i, rows[row].targets - 1] = True
        # Padding is on the right, where causal attention does not look: no mask is cheapest
        hidden = model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
        multiply(hidden[predicts.to(model.device)], model.lm_head.weight, tile, buffer)


def multiply(hidden: torch.Tensor, weight: torch.Tensor, tile: tuple[int, int], buffer: torch.Tensor) -> None:
    """`hidden @ weight.T` in pieces that overwrite each other, so that no memory is paged in for the result."""
    for i in range(0, len(hidden), tile[0]):
        rows = hidden[i : i + tile[0]]
        for j in range(0, len(weight), tile[1]):
            part = weight[j : j + tile[1]]
            torch.mm(rows, part.T, out=buffer[: len(rows) * len(part)].view(len(rows), len(part)))


def fastest_tile(weight: torch.Tensor, tokens: int) -> tuple[int, int]:
    """The bound's fastest tile for batches of so many target tokens."""
    hidden = torch.randn(tokens, weight.shape[1], device=weight.device).to(weight.dtype)
    speeds = {}
    for tile in BOUND_TILES:
        buffer = torch.empty(tile[0] * tile[1], dtype=weight.dtype, device=weight.device)
        multiply(hidden, weight, tile, buffer)
        passes, seconds = 0, 0.0
        while seconds < 0.2:
            seconds += seconds_of(functools.partial(multiply, hidden, weight, tile, buffer), weight.device)
            passes += 1
        speeds[tile] = passes / seconds
    return max(speeds, key=speeds.get)


def make_methods(model: PreTrainedModel, tokens_per_batch: int, tile: tuple[int, int]) -> dict[str, Callable]:
    """The three methods as functions of the rows."""
    return {
        "plain": functools.partial(score_plain, model),
        "gift_trl": functools.partial(score_gift_trl, model, tokens_per_batch=tokens_per_batch),
        "bound": functools.partial(run_bound, model, tokens_per_batch=tokens_per_batch, tile=tile),
    }


@torch.no_grad()
def memory_of(method: str, args: argparse.Namespace, vocabulary: int, dtype: str) -> float:
    """Peak memory in MB above the weights of a method on the four longest rows, to be run in a fresh process."""
    torch.set_num_threads(args.threads)
    # What the libraries allocate once belongs to no method
    make_methods(make_model("tiny", 64, dtype, args.device), 64, BOUND_TILES[0])[method](draw_rows(64, 2)[0])
    model = make_model(args.preset, vocabulary, dtype, args.device)
    run = make_methods(model, args.tokens_per_batch or default_tokens_per_batch(model), BOUND_TILES[0])[method]
    _, longest = draw_rows(vocabulary, 1)
    return peak_of(functools.partial(run, longest), model.device)


def relative_errors(model: PreTrainedModel, rows: list[Row], methods: dict[str, Callable]) -> dict[str, dict]:
    """
    Relative errors of q on the first tokens of some rows, as maximum and root mean square.

    The reference is a float64 soft-max over the logits of the same weights in float64, or in float32 where the model is
    in half precision. (Norms and rotary angles are float32 in transformers, whatever the dtype.)
    """
    exact = copy.deepcopy(model).to(torch.float64 if model.dtype == torch.float32 else torch.float32)
    cut, expected = [], []
    for row in rows:
        targets = row.targets[row.targets < EXACT_TOKENS]
        cut.append(Row(row.index, row.name, row.input_ids[:EXACT_TOKENS], targets, row.target_ids[: len(targets)]))
        logits = exact(input_ids=torch.as_tensor(cut[-1].input_ids, device=model.device)[None]).logits[0]
        q = logits[torch.as_tensor(targets - 1, device=model.device)].double().softmax(-1).cpu().numpy()
        expected.append(q[np.arange(len(targets)), cut[-1].target_ids])
    errors = {}
    for name in ("plain", "gift_trl"):
        error = np.concatenate(methods[name](cut)) / np.concatenate(expected) - 1
        errors[name] = {"error_max": float(np.abs(error).max()), "error_rms": float(np.sqrt((error**2).mean()))}
    return errors


def useful_flops(model: PreTrainedModel, rows: list[Row]) -> float:
    """Forward FLOPs by TRL's formula, with the head at the target positions only."""
    head = 2 * model.config.vocab_size * model.config.hidden_size
    lengths = [len(row.input_ids) for row in rows]
    backbone = sum(n * (compute_flops_per_token(model.config, n) / 3 - head) for n in lengths)
    return backbone + head * sum(len(row.targets) for row in rows)


def compare(args: argparse.Namespace, vocabulary: int, dtype: str) -> dict[str, Any]:
    """Measures the three methods on one shape."""
    rows, longest = draw_rows(vocabulary, args.rows or PRESETS[args.preset][1])
    model = make_model(args.preset, vocabulary, dtype, args.device)
    device, on_gpu = model.device, model.device.type == "cuda"
    tokens_per_batch = args.tokens_per_batch or default_tokens_per_batch(model)
    lengths, targets = [len(row.input_ids) for row in rows], sum(len(row.targets) for row in rows)
    tile = fastest_tile(model.lm_head.weight, targets // len(token_budget_batches(lengths, tokens_per_batch)))
    methods = make_methods(model, tokens_per_batch, tile)
    for run in methods.values():  # kernels are compiled for the shapes they meet
        run(rows if on_gpu else rows[:1])
    rounds = interleave({name: functools.partial(run, rows) for name, run in methods.items()}, args.rounds, device)
    results: dict[str, dict[str, Any]] = {}
    peak_flops = get_peak_flops(torch.cuda.get_device_name(device), dtype) if on_gpu else None
    for name, run in methods.items():
        seconds = statistics.median(rounds[name])
        results[name] = {"rounds": rounds[name], "seconds": seconds, "tokens_per_second": sum(lengths) / seconds}
        if peak_flops is not None:
            results[name]["mfu"] = useful_flops(model, rows) / seconds / peak_flops
        if on_gpu and not args.skip_memory:
            results[name]["peak_mb"] = peak_of(functools.partial(run, longest + rows), device)
    if args.exact_rows:
        spaced = [rows[int(i)] for i in np.linspace(0, len(rows) - 1, args.exact_rows)]
        for name, errors in relative_errors(model, spaced, methods).items():
            results[name].update(errors)
    for name in () if on_gpu or args.skip_memory else ("plain", "gift_trl"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh_process:
            results[name]["peak_mb"] = fresh_process.submit(memory_of, name, args, vocabulary, dtype).result()
    shape = {"preset": args.preset, "vocabulary": vocabulary, "dtype": dtype, "tokens_per_batch": tokens_per_batch}
    data = {"rows": len(rows), "tokens": sum(lengths), "targets": targets, "bound_tile": tile}
    return {**shape, **data, "machine": machine(args), "methods": results}


def compare_heads(args: argparse.Namespace, vocabulary: int, dtype: str) -> dict[str, Any]:
    """Measures the tiles of `gift_trl` against PyTorch's own chunked head, and both against float64."""
    hidden_size = PRESETS[args.preset][0]["hidden_size"]
    torch.manual_seed(0)
    hidden = torch.randn(EXACT_TOKENS, hidden_size, device=args.device).to(getattr(torch, dtype))
    weight = torch.randn(vocabulary, hidden_size, device=args.device) * LOGIT_DEVIATION / math.sqrt(hidden_size)
    weight = weight.to(hidden.dtype)
    targets = torch.randint(vocabulary, (EXACT_TOKENS,), device=args.device)
    exact = (hidden.double() @ weight.double().T).log_softmax(1).gather(1, targets[:, None])[:, 0]
    buffers: dict[str, Any] = {}
    heads = {"gift_trl": lambda: target_log_probs(hidden, targets, weight, buffers=buffers)}
    for options in ({}, {"batch_chunk_size": 256}, {"batch_chunk_size": 256, "acc_policy": "accurate"}):
        name = ", ".join(["linear_cross_entropy", *(f"{key}={value}" for key, value in options.items())])
        chunks = LinearCrossEntropyOptions(**options)
        loss = functools.partial(F.linear_cross_entropy, hidden, weight, targets, reduction="none", options=chunks)
        heads[name] = lambda loss=loss: -loss()
    rounds = interleave(heads, args.rounds, hidden.device)
    results = {}
    for name, head in heads.items():
        error = head().double() - exact
        errors = {"error_max": error.abs().max().item(), "error_rms": error.square().mean().sqrt().item()}
        results[name] = {"rounds": rounds[name], "seconds": statistics.median(rounds[name]), **errors}
    shape = {"hidden_size": hidden_size, "vocabulary": vocabulary, "dtype": dtype, "targets": EXACT_TOKENS}
    return {**shape, "machine": machine(args), "methods": results}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown tables of all results of a file."""
    columns = ("preset", "vocabulary", "dtype", "tokens per batch", "plain s", "gift_trl s", "bound s")
    columns += ("plain / gift_trl", "share of the bound", "tokens/s", "peak MB (plain / gift_trl)")
    columns += ("error of q (plain / gift_trl)", "MFU (plain / gift_trl)")
    lines = [columns, ("---",) * len(columns)]

    def fields(methods: tuple[dict[str, Any], ...], field: str, form: str) -> str:
        return " / ".join(f"{method[field]:{form}}" if field in method else "–" for method in methods)

    for run in results["runs"].values():
        plain, ours, bound = (run["methods"][name] for name in METHODS)
        shape = (run["preset"], f"{run['vocabulary']:,}", run["dtype"], f"{run['tokens_per_batch']:,}")
        seconds = [f"{method['seconds']:.2f}" for method in (plain, ours, bound)]
        ratios = (f"{plain['seconds'] / ours['seconds']:.2f}×", f"{bound['seconds'] / ours['seconds']:.2f}")
        errors = fields((plain, ours), "error_max" if run["dtype"] == "float32" else "error_rms", ".1e")
        rest = (f"{ours['tokens_per_second']:,.0f}", fields((plain, ours), "peak_mb", ",.0f"), errors)
        lines.append((*shape, *seconds, *ratios, *rest, fields((plain, ours), "mfu", ".2f")))
    if results["heads"]:
        columns = ("vocabulary", "dtype", "head", "s", "error of log q, max", "rms")
        lines += [(), columns, ("---",) * len(columns)]
    for run in results["heads"].values():
        for name, head in run["methods"].items():
            numbers = (f"{head['seconds']:.2f}", f"{head['error_max']:.1e}", f"{head['error_rms']:.1e}")
            lines.append((f"{run['vocabulary']:,}", run["dtype"], name, *numbers))
    return "\n".join(f"| {' | '.join(cells)} |" if cells else "" for cells in lines)


def measure_lengths(path: str) -> str:
    """Percentiles of the characters of prompts and completions, and the correlation of their normal scores."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    lengths = [np.array([len(row[key]) for row in rows]) for key in ("instruction", "response")]
    percentiles = [tuple(np.percentile(part, PERCENTILES).round().astype(int).tolist()) for part in lengths]
    ranks = [(part.argsort(kind="stable").argsort() + 0.5) / len(rows) for part in lengths]
    scores = [np.vectorize(statistics.NormalDist().inv_cdf)(part) for part in ranks]
    return f"{percentiles[0]}\n{percentiles[1]}\n{np.corrcoef(scores)[0, 1]:.2f}"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, PRESETS)
    add_options(parser, rounds=3)
    parser.add_argument("--rows", type=int, help=f"Rows of a round, of {DATASET_ROWS}; default: the preset's.")
    parser.add_argument("--tokens-per-batch", type=int, help="Default: the library's own.")
    parser.add_argument("--exact-rows", type=int, default=3, help="Rows compared with the exact result; 0: none.")
    parser.add_argument("--skip-memory", action="store_true", help="Do not measure memory.")
    parser.add_argument("--head-only", action="store_true", help="Compare heads instead of models.")
    parser.add_argument("--measure-lengths", metavar="FILE", help="Print the lengths in a JSON-lines file and stop.")
    return parser.parse_args(arguments)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    if args.measure_lengths:
        print(measure_lengths(args.measure_lengths))
        return
    results = Results(args, "annotation", "runs", "heads")
    for vocabulary in args.vocab:
        for dtype in args.dtype:
            if args.head_only:
                results["heads"][f"{args.preset} {vocabulary} {dtype}"] = compare_heads(args, vocabulary, dtype)
            else:
                run = compare(args, vocabulary, dtype)
                results["runs"][f"{args.preset} {vocabulary} {dtype} {run['tokens_per_batch']}"] = run
            results.save()
    print(table(results))


if __name__ == "__main__":
    main()
