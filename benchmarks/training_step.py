"""
A training step of GIFTSFTTrainer against SFTTrainer and the released code's loss: time, memory, waiting.

    python benchmarks/training_step.py --preset cpu --vocab 151936 32000

How to read the results: benchmarks/README.md.
"""

import argparse
import copy
import ctypes
import gc
import math
import multiprocessing
import random
import statistics
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from annotation import LOGIT_DEVIATION
from datasets import Dataset
from measuring import Results, add_model_options, add_options, machine, peak_of, seconds_of
from peft import LoraConfig
from step_audit import audit_steps
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2Config,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from gift_trl import GIFTConfig, GIFTSFTTrainer


# Shapes of the model, of which three are Qwen2.5's, then rows of a batch and tokens of a row; `tiny` is for the tests
_SHAPE = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
PRESETS = {
    "tiny": (dict(zip(_SHAPE, (32, 2, 64, 2, 1), strict=True)), 2, 24),
    "cpu": (dict(zip(_SHAPE, (256, 4, 1376, 4, 1), strict=True)), 2, 256),
    "gpu-0.5b": (dict(zip(_SHAPE, (896, 24, 4864, 14, 2), strict=True)), 4, 2048),
    "gpu-1.5b": (dict(zip(_SHAPE, (1536, 28, 8960, 12, 2), strict=True)), 4, 2048),
    "gpu-7b": (dict(zip(_SHAPE, (3584, 28, 18944, 28, 4), strict=True)), 2, 2048),
}
# Share of a row that is its prompt
PROMPT_SHARE = 0.25
# LoRA of the paper, and of the tiny preset
LORA_RANK, TINY_RANK = 64, 4
WARMUP_STEPS, MEMORY_STEPS, AUDIT_STEPS, AUDIT_VOCABULARY = 2, 3, 11, 1000
METHODS = ("sft", "gift", "released")
# Largest ratio to SFTTrainer's time and memory that `--check` lets pass
BOUNDS = {"cpu": 1.05, "cuda": 1.03}


class ReleasedLossTrainer(GIFTSFTTrainer):
    """The same trainer with the loss of the paper's released code: full logits, `Σ w·ℓ / Σ w` of each micro-batch."""

    def _get_num_items_in_batch(self, batch_samples, device):
        return None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, confidences = inputs.pop("labels")[:, 1:], inputs.pop("confidences")[:, 1:]
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        targets = labels != -100
        # It never annotates the token that ends a row
        confidences = confidences.masked_fill(labels == self.processing_class.eos_token_id, 1.0)
        weights = confidences.clamp(min=1e-4) * targets
        if weights.sum() <= 1e-8:
            return losses.sum() / targets.sum()
        return (weights * losses).sum() / weights.sum()


def draw_dataset(preset: str, vocabulary: int, steps: int, seed: int = 0) -> Dataset:
    """Rows of random tokens and confidences, all of one length; the last token ends the turn."""
    _, rows, length = PRESETS[preset]
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, vocabulary, (steps * rows, length))
    ids[:, -1] = 1
    prompt = np.arange(length) < PROMPT_SHARE * length
    confidences = np.where(prompt, 0.0, rng.random(ids.shape)).astype(np.float32)
    columns = {"input_ids": ids, "labels": np.where(prompt, -100, ids), "confidences": confidences}
    return Dataset.from_dict({name: values.tolist() for name, values in columns.items()})


def make_model(preset: str, vocabulary: int, dtype: str, device: str, seed: int = 0) -> PreTrainedModel:
    """A Qwen2 model with random weights, whose logits spread as those of a trained one."""
    torch.manual_seed(seed)
    shape, _, length = PRESETS[preset]
    tokens = {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = Qwen2Config(max_position_embeddings=length, tie_word_embeddings=False, **tokens, **shape)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    torch.nn.init.normal_(model.lm_head.weight, std=LOGIT_DEVIATION / math.sqrt(config.hidden_size))
    return model


def make_trainer(
    name: str,
    model: PreTrainedModel,
    args: argparse.Namespace,
    preset: str,
    steps: int,
    output_dir: str,
    **options: Any,
) -> SFTTrainer:
    """A trainer on its own adapter and, since only adapters are trained, the same weights and batches as the others."""
    method = name.removesuffix("-again")
    dataset = draw_dataset(preset, model.config.vocab_size, steps)
    _, rows, length = PRESETS[preset]
    settings = {
        "output_dir": output_dir,
        "max_steps": steps,
        "max_length": length,
        "per_device_train_batch_size": rows,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": model.dtype == torch.bfloat16,
        "use_cpu": model.device.type == "cpu",
        **options,
    }
    rank = TINY_RANK if preset == "tiny" else LORA_RANK
    keywords: dict[str, Any] = {
        "processing_class": PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")),
            pad_token="<pad>",
            eos_token="<eos>",
            chat_template="{% for message in messages %}{{ message['content'] + '<eos>' }}{% endfor %}",
        ),
        "peft_config": LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules="all-linear"),
    }
    if method == "online":
        keywords["instruct_model"] = make_model(
            preset, model.config.vocab_size, str(model.dtype).removeprefix("torch."), str(model.device), seed=1
        )
        settings["confidence_source"] = "online"
    if method in ("sft", "online"):
        dataset = dataset.remove_columns("confidences")
    # Frozen weights are shared, modules are not
    own = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    cls = {"sft": SFTTrainer, "released": ReleasedLossTrainer}.get(method, GIFTSFTTrainer)
    config = (SFTConfig if method == "sft" else GIFTConfig)(**settings)
    torch.manual_seed(0)
    trainer = cls(model=own, args=config, train_dataset=dataset, **keywords)
    trainer.remove_callback(PrinterCallback)
    return trainer


class Stepper(TrainerCallback):
    """
    `trainer.train()`, one optimizer step a call: from the end of a step to the end of the next, so that collating and
    logging belong to it. It waits in a thread of its own while other trainers have their turn.
    """

    def __init__(self, trainer: SFTTrainer, threads: int):
        self.trainer = trainer
        self._threads = threads
        self._turn, self._end = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        trainer.add_callback(self)
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def _train(self) -> None:
        torch.set_num_threads(self._threads)  # OpenMP counts for each thread anew
        self._turn.acquire()
        try:
            self.trainer.train()
        except BaseException as error:
            self._error = error
        finally:
            self._end.release()

    def on_step_end(self, args, state, control, **kwargs):
        self._end.release()
        self._turn.acquire()

    def __call__(self) -> None:
        self._turn.release()
        self._end.acquire()
        if self._error is not None:
            raise self._error


def measure_steps(args: argparse.Namespace, model: PreTrainedModel, names: list[str]) -> dict[str, dict[str, Any]]:
    """Seconds of a step of every method in every round, in an order drawn anew, and on a GPU the peak memory."""
    device, order = model.device, random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        # After the last round, a call more lets `train()` end
        steps = WARMUP_STEPS + args.rounds + 1
        steppers = {
            name: Stepper(make_trainer(name, model, args, args.preset, steps, folder), args.threads) for name in names
        }
        for _ in range(WARMUP_STEPS):
            for stepper in steppers.values():
                stepper()
        for _ in range(args.rounds):
            for name in order.sample(names, len(names)):
                seconds[name].append(seconds_of(steppers[name], device))
        for name, stepper in steppers.items():
            results[name] = {"rounds": seconds[name], "seconds": statistics.median(seconds[name])}
            if device.type == "cuda" and not args.skip_memory:
                results[name]["peak_mb"] = peak_of(stepper, device)
            else:
                stepper()
            stepper()
            results[name]["first_loss"] = stepper.trainer.state.log_history[0]["loss"]
    return results


def memory_of(name: str, args: argparse.Namespace, vocabulary: int, dtype: str, **options: Any) -> float:
    """Peak memory in MB of the first steps above the weights, to be run in a fresh process."""
    torch.set_num_threads(args.threads)
    # glibc would learn to keep large blocks for later, differently in every run: give back all from 64 kB (M_MMAP_THRESHOLD)
    ctypes.CDLL(None).mallopt(-3, 2**16)
    with tempfile.TemporaryDirectory() as folder:
        # What the libraries allocate once belongs to no method
        small = make_model("tiny", AUDIT_VOCABULARY, dtype, args.device)
        make_trainer(name, small, args, "tiny", MEMORY_STEPS, folder, **options).train()
        model = make_model(args.preset, vocabulary, dtype, args.device)
        trainer = make_trainer(name, model, args, args.preset, MEMORY_STEPS, folder, **options)
        gc.collect()
        return peak_of(trainer.train, model.device)


def audit(name: str, args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """What a step of the tiny model waits for, and which files make tensors as large as the vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_model("tiny", AUDIT_VOCABULARY, dtype, args.device)
        return audit_steps(make_trainer(name, model, args, "tiny", AUDIT_STEPS, folder), AUDIT_VOCABULARY)


def compare(args: argparse.Namespace, vocabulary: int, dtype: str) -> dict[str, Any]:
    """Measures the methods on one shape."""
    names = [*METHODS, *(["online"] if args.online else []), *(["sft-again"] if args.control else [])]
    model = make_model(args.preset, vocabulary, dtype, args.device)
    results = measure_steps(args, model, names)
    del model
    for name in names:
        if args.device == "cpu" and not args.skip_memory:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh_process:
                results[name]["peak_mb"] = fresh_process.submit(memory_of, name, args, vocabulary, dtype).result()
        ratios = [a / b for a, b in zip(results[name]["rounds"], results["sft"]["rounds"], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        results[name]["time_ratio"], results[name]["time_ratio_quartiles"] = quartiles[1], quartiles[::2]
        if "peak_mb" in results[name]:
            results[name]["memory_ratio"] = results[name]["peak_mb"] / results["sft"]["peak_mb"]
        if not name.endswith("-again"):
            results[name]["audit"] = audit(name, args, dtype)
    _, rows, length = PRESETS[args.preset]
    shape = {"preset": args.preset, "vocabulary": vocabulary, "dtype": dtype, "rows": rows, "tokens_per_row": length}
    return {**shape, "machine": machine(args), "methods": results}


def table(results: dict[str, Any]) -> str:
    """Markdown table of all results of a file."""
    columns = ("preset", "vocabulary", "dtype", "method", "s/step", "ratio to SFTTrainer (quartiles)", "peak MB")
    columns += ("ratio", "reads / shapes / uploads / collectives a step", "vocabulary-sized tensors made by")
    lines = [columns, ("---",) * len(columns)]
    for run in results["runs"].values():
        for name, method in run["methods"].items():
            low, high = method["time_ratio_quartiles"]
            cells = [run["preset"], f"{run['vocabulary']:,}", run["dtype"], name, f"{method['seconds']:.3f}"]
            cells.append(f"{method['time_ratio']:.3f} ({low:.3f}–{high:.3f})")
            cells += (
                [f"{method['peak_mb']:,.0f}", f"{method['memory_ratio']:.3f}"] if "peak_mb" in method else ["–"] * 2
            )
            counts = method.get("audit", {"step": {}, "vocabulary_sized": {}})
            cells.append(" / ".join(str(n) for n in counts["step"].values()) or "–")
            lines.append((*cells, ", ".join(counts["vocabulary_sized"]) or "–"))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def violations(run: dict[str, Any], bound: float) -> list[str]:
    """What of `gift` costs more than SFTTrainer times the bound."""
    gift = run["methods"]["gift"]
    ratios = {name: gift[f"{name}_ratio"] for name in ("time", "memory") if f"{name}_ratio" in gift}
    return [f"{name} {ratio:.3f} > {bound}" for name, ratio in ratios.items() if ratio > bound]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, PRESETS)
    add_options(parser, 15, "Rounds, each of which runs a step of every method.")
    parser.add_argument("--online", action="store_true", help="GIFT with confidences made on the fly, too.")
    parser.add_argument("--control", action="store_true", help="A second SFTTrainer, too: its ratio is noise alone.")
    parser.add_argument("--check", action="store_true", help="Fail if GIFT costs too much more than SFTTrainer.")
    parser.add_argument("--skip-memory", action="store_true", help="Do not measure memory.")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    results, failures = Results(args, "training-step", "runs"), []
    for vocabulary in args.vocab:
        for dtype in args.dtype:
            run = compare(args, vocabulary, dtype)
            title = f"{args.preset} {vocabulary} {dtype}"
            results["runs"][title] = run
            results.save()
            failures += [f"{title}: {text}" for text in violations(run, BOUNDS[torch.device(args.device).type])]
    print(table(results))
    if args.check and failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
