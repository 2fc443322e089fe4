"""
What `gift-trl estimate` says against fresh measurements on this CPU: memory and time of training, annotation and merge.

    python benchmarks/estimate.py

How to read the results: benchmarks/README.md.
"""

import argparse
import math
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import annotation
import merge
import numpy as np
import torch
import training_step
from measuring import Results, add_options, machine, seconds_of
from peft import LoraConfig
from transformers import Qwen2Config

from gift_trl.annotation.engine import token_budget_batches
from gift_trl.merging.products import Buffer, LoraProduct
from gift_trl.planning.hardware import Calibration
from gift_trl.planning.memory import TrainingSetup, training_memory
from gift_trl.planning.placement import Placement
from gift_trl.planning.plan import Scoring
from gift_trl.planning.stages import Batch
from gift_trl.planning.timing import Workload, merge_products, merge_time


class Shape(NamedTuple):
    """A model and the rows of its batch."""

    hidden: int
    layers: int
    inner: int
    heads: int
    vocabulary: int
    rows: int
    length: int
    dtype: str = "float32"
    checkpointing: bool = True

    @property
    def sizes(self) -> dict[str, int]:
        """Keyword arguments of the configuration."""
        values = (self.hidden, self.layers, self.inner, self.heads, 1)
        return dict(zip(training_step._SHAPE, values, strict=True))

    @property
    def title(self) -> str:
        """In words."""
        kept = "" if self.checkpointing else ", no checkpoints"
        return (
            f"{self.layers} × {self.hidden}, {self.vocabulary:,}, {self.rows} × {self.length}, {self.dtype}{kept}"
        )  # fmt: skip


SHAPES = {
    "tiny": Shape(32, 2, 64, 2, 1000, 2, 24),
    "wide vocabulary": Shape(256, 4, 1376, 4, 151936, 1, 256),
    "narrow vocabulary": Shape(256, 4, 1376, 4, 32000, 2, 256),
    "without checkpoints": Shape(256, 4, 1376, 4, 32000, 2, 256, checkpointing=False),
    "deeper": Shape(320, 10, 1376, 5, 32000, 4, 128),
    "bfloat16": Shape(256, 4, 1376, 4, 32000, 2, 256, "bfloat16"),
}
SINGLE = Placement("single", 1)
LORA = LoraConfig(
    r=training_step.LORA_RANK,
    lora_alpha=2 * training_step.LORA_RANK,
    lora_dropout=0.05,
    target_modules="all-linear",
)
# The methods of training_step.py take the name of a preset
training_step.PRESETS |= {name: (shape.sizes, shape.rows, shape.length) for name, shape in SHAPES.items()}
# Rows and layers of the annotation and the merge that are measured
SCORED_ROWS, MERGED_LAYERS = 12, (4, 10)
BOUND = 0.2


def setup_of(shape: Shape) -> TrainingSetup:
    """What is trained, to be estimated."""
    config = Qwen2Config(
        vocab_size=shape.vocabulary, max_position_embeddings=shape.length, tie_word_embeddings=False, **shape.sizes
    )
    half = shape.dtype == "bfloat16"
    return TrainingSetup(
        config,
        LORA,
        dtype=getattr(torch, shape.dtype),
        mixed_precision=torch.bfloat16 if half else None,
        checkpointing=shape.checkpointing,
        on_gpu=False,
    )


def batch_of(shape: Shape) -> Batch:
    """The batches of training_step.py, whose rows are all of one length."""
    prompt = math.ceil(training_step.PROMPT_SHARE * shape.length)
    return Batch(shape.rows, shape.length, shape.rows * (shape.length - prompt))


def predicted_memory(shape: Shape) -> float:
    """MB above weights and adapter, which the measurement leaves out."""
    setup = setup_of(shape)
    estimate = training_memory(setup, batch_of(shape), SINGLE)
    return (estimate.total - estimate.weights - 4 * setup.sizes.trained) / 1e6


def measured_memory(name: str, args: argparse.Namespace) -> float:
    """Peak in MB of three steps in a fresh process."""
    shape = SHAPES[name]
    args = argparse.Namespace(**{**vars(args), "preset": name, "device": "cpu"})
    return training_step.memory_of(
        "gift", args, shape.vocabulary, shape.dtype, gradient_checkpointing=shape.checkpointing
    )


def compare_training(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Memory, and seconds of a step, with the calibration between the steps."""
    shape, cpu = SHAPES[name], torch.device("cpu")
    setup = setup_of(shape)
    operations = setup.trace(batch_of(shape), SINGLE).operations
    calibration, seconds = Calibration(cpu), []
    with tempfile.TemporaryDirectory() as folder:
        model = training_step.make_model(name, shape.vocabulary, shape.dtype, "cpu")
        options = argparse.Namespace(**{**vars(args), "preset": name})
        steps = training_step.WARMUP_STEPS + args.rounds + 1
        trainer = training_step.make_trainer(
            "gift", model, options, name, steps, folder, gradient_checkpointing=shape.checkpointing
        )
        step = training_step.Stepper(trainer, args.threads)
        for _ in range(training_step.WARMUP_STEPS):
            step()
        for _ in range(args.rounds):
            calibration.measure(operations)
            seconds.append(seconds_of(step, cpu))
        step(), step()
    result = {"shape": shape.title, "seconds": pair(calibration.hardware().seconds(operations), seconds)}
    if not args.skip_memory:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh_process:
            measured = fresh_process.submit(measured_memory, name, args).result()
        result["peak_mb"] = pair(predicted_memory(shape), [measured])
    return result


def compare_annotation(vocabulary: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of scoring rows with the lengths of NuminaMath-CoT."""
    preset, cpu = "tiny" if args.tiny else "cpu", torch.device("cpu")
    rows, _ = annotation.draw_rows(vocabulary, 2 if args.tiny else SCORED_ROWS)
    model = annotation.make_model(preset, vocabulary, "float32", "cpu")
    lengths, targets = (np.array([len(getattr(row, key)) for row in rows]) for key in ("input_ids", "targets"))
    tokens = annotation.default_tokens_per_batch(model)
    batch, batches = Workload(lengths, targets, "").scoring_batch(tokens)
    operations = Scoring(model.config, torch.float32).trace(batch, on_gpu=False).operations
    run = partial(annotation.score_gift_trl, model, rows, tokens)
    run()
    calibration, seconds = Calibration(cpu), []
    for _ in range(args.rounds):
        calibration.measure(operations)
        seconds.append(seconds_of(run, cpu))
    count = len(token_budget_batches(lengths.tolist(), tokens))
    title = f"{len(rows)} rows, {lengths.sum():,} tokens in {count} batches, {vocabulary:,}"
    return {"shape": title, "seconds": pair(batches * calibration.hardware().seconds(operations), seconds)}


def compare_merge(layers: int, args: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of a merge of some layers of Qwen2.5-1.5B."""
    preset = "tiny" if args.tiny else "1.5b"
    sizes = {**merge.PRESETS[preset], "num_hidden_layers": layers}
    lora = LoraConfig(r=args.rank, target_modules=merge.MODULES)
    setup = TrainingSetup(Qwen2Config(**sizes), lora, on_gpu=False)
    checkpoint = setup.sizes.weight_bytes(torch.bfloat16)
    seconds, rates = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        merge._run_here(args, f"merge.make_checkpoint(Path({name!r}), {preset!r}, num_hidden_layers={layers})")
        merge._run_here(args, f"merge.make_adapter(Path({name!r}), 'adapter', 'lora', r={args.rank})")
        code = merge._MERGES["gift_trl"].format(
            instruct=str(folder / "instruct"), adapter=str(folder / "adapter"), output=str(folder / "out")
        )
        for _ in range(args.rounds):
            rates.append(merge_rates(sizes, args.rank, folder))
            idle = merge.run(sys.executable, merge._IMPORTS["gift_trl"], args.threads)["cpu"]
            full = merge.run(sys.executable, f"{merge._IMPORTS['gift_trl']}\n{code}", args.threads)["cpu"]
            seconds.append(full - idle)
            shutil.rmtree(folder / "out")
    flops, memory, disk = np.median(rates, axis=0)
    estimate = merge_time(checkpoint, merge_products(setup), disk=disk, cpu_flops=flops, memory_rate=memory)
    title = f"{layers} layers of {preset}, {checkpoint / 1e9:.2f} GB, rank {args.rank}"
    return {"shape": title, "seconds": pair(estimate.seconds, seconds), "parts": estimate.detail}


def merge_rates(sizes: dict[str, Any], rank: int, folder: Path) -> tuple[float, float, float]:
    """FLOP/s of a block of the update, bytes that are added in a second, and bytes that are copied in a CPU second."""
    columns = sizes["hidden_size"]
    rows = max(16, 2**18 // columns)
    calibration, buffer = Calibration(torch.device("cpu")), Buffer(torch.float32)
    weight, wide = torch.rand(rows, columns).bfloat16(), torch.rand(rows, columns)
    product = LoraProduct(torch.rand(rank, columns), torch.rand(rows, rank), 2.0, buffer)
    # Through one buffer, as the merge does: fresh memory for every block would cost more than the work
    adding = calibration._time(lambda: weight.copy_(wide.add_(weight)))
    seconds = calibration._time(lambda: product.add_to(weight, 0)) - adding
    source, copied, size = folder / "source", folder / "copied", 2**28
    source.write_bytes(bytes(size))
    held = memoryview(bytearray(2**20))
    start = time.process_time()
    with source.open("rb", buffering=0) as read, copied.open("wb", buffering=0) as write:
        while count := read.readinto(held):
            write.write(held[:count])
    copying = time.process_time() - start
    source.unlink(), copied.unlink()
    return 2 * rows * rank * columns / seconds, 12 * rows * columns / adding, 2 * size / copying


def pair(predicted: float, measured: list[float]) -> dict[str, Any]:
    """Prediction, measurement and their ratio."""
    middle = statistics.median(measured)
    return {"predicted": predicted, "measured": middle, "ratio": predicted / middle, "rounds": measured}


def table(results: dict[str, Any]) -> str:
    """Markdown table of the results."""
    lines = ["| stage | shape | what | predicted | measured | ratio |", "| --- | --- | --- | --- | --- | --- |"]
    for stage, runs in results["stages"].items():
        for run in runs.values():
            for key, unit, form in (("peak_mb", "MB", ",.0f"), ("seconds", "CPU s", ".2f")):
                if key in run:
                    p, m, ratio = (run[key][name] for name in ("predicted", "measured", "ratio"))
                    lines.append(f"| {stage} | {run['shape']} | {unit} | {p:{form}} | {m:{form}} | {ratio:.2f} |")
    return "\n".join(lines)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=[n for n in SHAPES if n != "tiny"])
    parser.add_argument("--vocab", type=int, nargs="*", default=[151936, 32000], help="Of the annotation.")
    parser.add_argument("--layers", type=int, nargs="*", default=list(MERGED_LAYERS), help="Of the merge.")
    parser.add_argument("--rank", type=int, default=64, help="Of the adapter that is merged.")
    add_options(parser, 3, "Measurements, each after a calibration.")
    parser.add_argument("--skip-memory", action="store_true", help="Do not measure memory.")
    parser.add_argument("--tiny", action="store_true", help="Tiny models for annotation and merge, for the tests.")
    parser.add_argument("--check", action="store_true", help=f"Fail if a ratio is off by more than {BOUND:.0%}.")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    results = Results(args, "estimate", "stages")
    results["machine"] = machine(argparse.Namespace(device="cpu", threads=args.threads))
    runs = [("training", name, partial(compare_training, name, args)) for name in args.shapes]
    runs += [("annotation", str(size), partial(compare_annotation, size, args)) for size in args.vocab]
    runs += [("merge", str(layers), partial(compare_merge, layers, args)) for layers in args.layers]
    failures = []
    for stage, name, compare in runs:
        run = compare()
        results["stages"].setdefault(stage, {})[name] = run
        results.save()
        off = [key for key in ("peak_mb", "seconds") if key in run and abs(run[key]["ratio"] - 1) > BOUND]
        failures += [f"{stage} {name}: {key} {run[key]['ratio']:.2f}" for key in off]
        print(
            f"{stage} {name}: " + ", ".join(f"{k} {run[k]['ratio']:.2f}" for k in ("peak_mb", "seconds") if k in run)
        )
    print(table(results))
    if args.check and failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
