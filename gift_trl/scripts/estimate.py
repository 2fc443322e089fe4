"""`gift-trl estimate`: what a recipe needs on given hardware, before the hardware is there."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    from gift_trl.planning.hardware import Hardware
    from gift_trl.planning.memory import TrainingSetup
    from gift_trl.planning.plan import Scoring
    from gift_trl.planning.timing import Workload
    from gift_trl.scripts.arguments import GIFTScriptArguments
    from gift_trl.training import GIFTConfig


# The simplest first
_CONFIGS = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2", "zero3_offload")
# Without a measurement: FLOP/s in float32 of a server's CPU, and bytes in a second that it adds
_CPU_FLOPS, _CPU_MEMORY = 500e9, 10e9
# Share of the tokens of a row that are targets, if only the rows' length is known
_TARGET_SHARE = 0.75


@dataclass
class EstimateArguments:
    """
    Arguments of `gift-trl estimate` that a recipe does not hold.

    Args:
        gpu (`str`, *optional*, defaults to `"h100"`):
            Name of the GPU, see [`~gift_trl.planning.hardware.GPUS`].
        num_gpus (`int`, *optional*, defaults to `8`):
            Number of GPUs, of all machines together.
        num_machines (`int`, *optional*, defaults to `1`):
            Number of machines.
        efficiency (`float`, *optional*, defaults to `0.5`):
            Share of the data sheet's FLOP/s that matrix products reach.
        calibrate (`bool`, *optional*, defaults to `False`):
            Whether to measure this machine in place of a data sheet.
        num_rows (`int`, *optional*):
            Rows of the training data, if it is not here.
        mean_length (`int`, *optional*):
            Their mean length in tokens. Defaults to `max_length`, an upper bound.
        network_gb_per_second (`float`, *optional*, defaults to `50.0`):
            GB/s of each GPU between machines.
        disk_gb_per_second (`float`, *optional*, defaults to `1.0`):
            GB/s of the disk that the merge reads and writes.
        output (`str`, *optional*):
            JSON file to write the estimates to.
    """

    gpu: str = field(default="h100", metadata={"help": "Name of the GPU, such as h100, a100-80gb, l4, rtx-4090."})
    num_gpus: int = field(default=8, metadata={"help": "Number of GPUs, of all machines together."})
    num_machines: int = field(default=1, metadata={"help": "Number of machines."})
    efficiency: float = field(
        default=0.5, metadata={"help": "Share of the data sheet's FLOP/s that matrix products reach."}
    )
    calibrate: bool = field(
        default=False, metadata={"help": "Measure this machine, GPU or CPU, in place of a data sheet."}
    )
    num_rows: int | None = field(
        default=None, metadata={"help": "Rows of the training data, if it is not here or too large to be read."}
    )
    mean_length: int | None = field(
        default=None,
        metadata={"help": "Mean length of these rows in tokens; max_length, an upper bound, without it."},
    )
    network_gb_per_second: float = field(default=50.0, metadata={"help": "GB/s of each GPU between machines."})
    disk_gb_per_second: float = field(default=1.0, metadata={"help": "GB/s of the disk, for the merge."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write the estimates to."})

    def __post_init__(self):
        for name in ("num_gpus", "num_machines", "num_rows", "mean_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`--{name}` is {value}; it must be at least 1.")
        for name in ("network_gb_per_second", "disk_gb_per_second"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`--{name}` is {getattr(self, name)}; it must be above 0.")
        if self.num_gpus % self.num_machines:
            raise ValueError(f"{self.num_gpus} GPUs cannot be spread evenly over {self.num_machines} machines.")
        if self.mean_length is not None and self.num_rows is None:
            raise ValueError("`--mean_length` describes rows that are not read: give their number, `--num_rows`, too.")


def make_parser(prog: str | None = None) -> "TrlParser":
    """Parser of the command."""
    from gift_trl.scripts.arguments import make_recipe_parser

    return make_recipe_parser(
        prog=prog or "gift-trl estimate",
        description="Estimates memory on each GPU and time of the recipe's stages, under every accelerate configuration, "
        "from the shapes of the model alone: its configuration is read, no weights. Nothing of it has been compared with a "
        "GPU; on a CPU, benchmarks/estimate.py compares it with measurements.",
        epilog="example: gift-trl estimate --config recipe.yaml --gpu h100 --num_gpus 8, or on the machine itself "
        "gift-trl estimate --config recipe.yaml --calibrate",
        extra=(
            EstimateArguments,
            {
                "hardware": "gpu num_gpus num_machines efficiency calibrate network_gb_per_second disk_gb_per_second",
                "rows": "num_rows mean_length",
                "result": "output",
            },
        ),
        without=("annotation", "GIFT", "merge"),
    )


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    import sys

    import torch

    argv = list(sys.argv[1:] if argv is None else argv)
    if not torch.cuda.is_available():
        argv += ["--use_cpu", "true"]  # or bf16 would be refused here, where nothing is trained
    script_args, training_args, model_args, dataset_args, merge_args, options = make_parser().parse_args_and_config(
        argv
    )
    result = estimate(script_args, training_args, model_args, dataset_args, options)
    if merge_args.merge_output_dir is None:
        result["merge"] = None
    if options.output is not None:
        path = Path(options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.tmp")
        beside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        beside.replace(path)
    _show(result)


def estimate(
    script_args: "GIFTScriptArguments",
    training_args: "GIFTConfig",
    model_args: "ModelConfig",
    dataset_args: "DatasetMixtureConfig",
    options: EstimateArguments,
) -> dict[str, Any]:
    """
    Estimates a parsed recipe.

    Args:
        script_args ([`GIFTScriptArguments`]):
            The data.
        training_args ([`GIFTConfig`]):
            The training.
        model_args ([`~trl.ModelConfig`]):
            The base model and its adapter.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            The `datasets:` section.
        options ([`EstimateArguments`]):
            The hardware.

    Returns:
        `dict[str, Any]`: The estimates, for JSON.

    Raises:
        `ValueError`: If the GPU is not known, or the recipe does not say enough.
        `FileNotFoundError`: If a model, recipe or local file is not found.
    """
    import torch

    from gift_trl.planning.hardware import Calibration, hardware_of
    from gift_trl.planning.placement import Placement
    from gift_trl.planning.plan import Schedule, make_plan, recommend
    from gift_trl.planning.timing import merge_products, merge_time
    from gift_trl.scripts.launch import accelerate_config_file

    on_gpu = not options.calibrate or torch.cuda.is_available()
    hardware = None if options.calibrate else hardware_of(options.gpu, options.efficiency)
    setup = _training_setup(training_args, model_args, on_gpu)
    workload, annotated = _workload(script_args, training_args, dataset_args, options)
    scoring = None if annotated else _scoring(training_args, model_args)
    longest = int(workload.lengths.max())
    if training_args.packing:
        longest = training_args.max_length or longest
    schedule = Schedule(
        rows=training_args.per_device_train_batch_size,
        longest=max(2, longest),
        global_batch_size=script_args.global_batch_size,
        accumulation=training_args.gradient_accumulation_steps,
        epochs=training_args.num_train_epochs,
        max_steps=training_args.max_steps,
        packed=training_args.packing,
    )
    cpu_flops, cpu_memory = _CPU_FLOPS, _CPU_MEMORY
    if hardware is None:
        hardware = _calibrate(Calibration(torch.device("cuda" if on_gpu else "cpu")), setup, workload, schedule)
        if not on_gpu:
            cpu_flops = hardware.flops[torch.float32]
    names = [name for name in _CONFIGS if options.num_gpus > 1 or name in ("single", "zero3_offload")]
    names += ["two_nodes"] if options.num_machines == 2 else []
    if not on_gpu:
        names = ["single"]
    placements = [Placement.from_file(accelerate_config_file(name), options.num_gpus) for name in names]
    network = options.network_gb_per_second * 1e9 if options.num_machines > 1 else None
    candidates = make_plan(setup, scoring, workload, schedule, placements, hardware, network=network)
    chosen = recommend(candidates)
    merge = merge_time(
        setup.sizes.weight_bytes(torch.bfloat16),
        merge_products(setup),
        disk=options.disk_gb_per_second * 1e9,
        cpu_flops=cpu_flops,
        memory_rate=cpu_memory,
    )
    return {
        "model": model_args.model_name_or_path,
        "hardware": {"name": hardware.name, "memory_gib": hardware.memory, "num_gpus": options.num_gpus},
        "assumptions": _assumptions(options, workload, training_args, annotated),
        "checkpointing": setup.checkpointing,
        "rows_per_gpu": schedule.rows,
        "configurations": [candidate.to_dict() for candidate in candidates],
        "recommended": None if chosen is None else chosen.placement.name,
        "merge": {
            "seconds": merge.seconds,
            "limit": merge.limit,
            "host_memory": "less than four of its largest tensors",
        },
    }


def _training_setup(training_args: "GIFTConfig", model_args: "ModelConfig", on_gpu: bool) -> "TrainingSetup":
    import torch
    from trl import get_peft_config

    from gift_trl.model_pair import load_config
    from gift_trl.planning.memory import TrainingSetup

    if model_args.model_name_or_path is None:
        raise ValueError("Nothing says which model to train: set `model_name_or_path` to the base model.")
    if training_args.confidence_source == "online":
        raise ValueError(
            "With `confidence_source: online` the instruct model scores beside the training, which is not estimated. "
            "Estimate with `--confidence_source offline`, and add the instruct model's weights to the memory."
        )
    config = load_config(model_args.model_name_or_path, revision=model_args.model_revision)
    optimizer = str(getattr(training_args.optim, "value", training_args.optim))
    mixed = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None
    return TrainingSetup(
        config,
        get_peft_config(model_args),
        dtype=_dtype(model_args.dtype, config),
        mixed_precision=mixed,
        checkpointing=bool(training_args.gradient_checkpointing),
        load_in_4bit=model_args.load_in_4bit,
        optimizer_states=0 if optimizer.startswith("sgd") else 2,
        on_gpu=on_gpu,
    )


def _dtype(name: Any, config: Any) -> Any:
    import torch

    if name in (None, "auto"):
        name = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, name) if isinstance(name, str) else name


def _scoring(training_args: "GIFTConfig", model_args: "ModelConfig") -> "Scoring":
    from gift_trl.model_pair import load_config
    from gift_trl.planning.plan import Scoring

    base = training_args.annotator == "base" or training_args.instruct_model_name_or_path is None
    settings = training_args.instruct_model_init_kwargs or {}
    if base:
        config = load_config(model_args.model_name_or_path, revision=model_args.model_revision)
    else:
        config = load_config(training_args.instruct_model_name_or_path, revision=training_args.instruct_model_revision)
    quantisation = settings.get("quantization_config") or {}
    quantised = isinstance(quantisation, dict) and bool(quantisation.get("load_in_4bit"))
    return Scoring(
        config, _dtype(settings.get("dtype"), config), quantised, training_args.annotation_tokens_per_batch
    )  # fmt: skip


def _workload(
    script_args: "GIFTScriptArguments",
    training_args: "GIFTConfig",
    dataset_args: "DatasetMixtureConfig",
    options: EstimateArguments,
) -> tuple["Workload", bool]:
    """The rows, and whether they are annotated."""
    import numpy as np

    from gift_trl.planning.timing import Workload

    name, limit = script_args.dataset_name, training_args.max_length
    number = options.num_rows
    if number is None and name is not None and os.path.exists(os.path.expanduser(name)):
        return _read_rows(script_args, training_args, dataset_args)
    if number is None:
        number = script_args.max_samples
    if number is None:
        raise ValueError(
            f"The data{f' `{name}`' if name else ''} is not a local file or folder, so its rows cannot be counted: give "
            "`--num_rows` and, if you know it, `--mean_length`."
        )
    length = options.mean_length or limit
    if length is None:
        raise ValueError(
            "The recipe has no `max_length`, so nothing says how long the rows are: give `--mean_length`."
        )
    length = min(length, limit or length)
    said = "" if options.mean_length else ", max_length, an upper bound"
    source = f"{number:,} rows of {length:,} tokens each{said}, of which {_TARGET_SHARE:.0%} are targets (assumed)"
    lengths = np.full(number, length)
    if options.mean_length and limit and not training_args.packing:
        source += f"; one row of {limit:,} for the memory"
        lengths[0] = limit
    return Workload(lengths, np.maximum(1, (lengths * _TARGET_SHARE).astype(int)), source), False


def _read_rows(
    script_args: "GIFTScriptArguments", training_args: "GIFTConfig", dataset_args: "DatasetMixtureConfig"
) -> tuple["Workload", bool]:
    from gift_trl.annotation.rows import measure_rows
    from gift_trl.annotation.tokenization import prepare_processing_class, sort_out_rows, tokenize_dataset
    from gift_trl.model_pair import load_tokenizer
    from gift_trl.planning.timing import Workload
    from gift_trl.scripts.data import load_recipe_datasets

    dataset, _ = load_recipe_datasets(script_args, dataset_args, evaluate=False, seed=training_args.seed)
    model = training_args.instruct_model_name_or_path
    if model is None:
        raise ValueError("Nothing says whose tokenizer to count the rows with: set `instruct_model_name_or_path`.")
    tokenizer = load_tokenizer(model, revision=training_args.instruct_model_revision)
    annotated = "confidences" in dataset.column_names
    tokens = tokenize_dataset(dataset, prepare_processing_class(tokenizer, training_args), training_args)
    kept = sort_out_rows(tokens, measure_rows(tokens), training_args, truncate=not training_args.packing)
    statistics = kept.statistics
    source = f"{len(statistics.lengths):,} rows of {statistics.lengths.mean():,.0f} tokens on average, counted"
    return Workload(statistics.lengths, statistics.targets, source), annotated


def _calibrate(calibration: Any, setup: "TrainingSetup", workload: "Workload", schedule: Any) -> "Hardware":
    from gift_trl.planning.placement import Placement

    batch, _ = workload.micro_batches(schedule.rows, schedule.longest if schedule.packed else None)
    calibration.measure(setup.trace(batch, Placement("single", 1)).operations)
    return calibration.hardware()


def _assumptions(
    options: EstimateArguments, workload: "Workload", training_args: "GIFTConfig", annotated: bool
) -> list[str]:
    notes = [f"Data: {workload.source}."]
    if options.calibrate:
        notes += ["Speed: measured on this machine."]
    else:
        notes += [
            f"Speed: {options.efficiency:.0%} of the data sheet's FLOP/s in matrix products and 80% of its bandwidth in "
            "other kernels. Assumptions: neither time nor memory has been compared with a GPU."
        ]
    notes += ["Without loading models, saving, evaluating and waiting for the Hub."]
    if annotated:
        notes += ["The data is annotated: no token is left to score."]
    elif training_args.annotation_engine != "transformers":
        notes += [
            "The data is scored by a server, whose GPU is not estimated: the first stage is as if by this program."
        ]
    if options.num_machines > 1:
        notes += [
            f"Between machines: {options.network_gb_per_second:g} GB/s for each GPU (`--network_gb_per_second`)."
        ]
    notes += [f"Merge: on the CPU of one machine, from and to a disk of {options.disk_gb_per_second:g} GB/s."]
    return notes


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    hardware = result["hardware"]
    table = Table(
        title=f"{result['model']} on {hardware['name']} ({hardware['memory_gib']:.0f} GB each), estimated",
        title_justify="left",
    )
    for title in ("config", "GPUs × rows × steps", "annotate", "train", "time", "works", "limit"):
        table.add_column(title, no_wrap=title not in ("limit", "annotate", "train"))
    for entry in result["configurations"]:
        batch = f"{entry['processes']} × {result['rows_per_gpu']} × {entry['gradient_accumulation_steps'] or '–'}"
        if entry["problem"]:
            table.add_row(entry["accelerate_config"], batch, "–", "–", "–", "no", entry["problem"])
            continue
        stages = entry["stages"]
        cells = [
            f"{stages[name]['memory_bytes']['total'] / 2**30:.1f} GiB, {_duration(stages[name]['seconds'])}"
            if name in stages
            else "–"
            for name in ("annotation", "training")
        ]
        seconds = sum(stage["seconds"] for stage in stages.values())
        style = "bold" if entry["accelerate_config"] == result["recommended"] else None
        table.add_row(
            entry["accelerate_config"], batch, *cells, _duration(seconds), "yes" if entry["works"] else "no",
            _limit(entry, stages), style=style,
        )  # fmt: skip
    console = Console(width=max(120, Console().width))
    console.print(table)
    if result["merge"] is not None:
        print(f"merge: {_duration(result['merge']['seconds'])}, most of it {result['merge']['limit']}")
    for note in result["assumptions"]:
        print(note)
    if result["recommended"] is None:
        print(
            "No configuration works: fewer rows (`per_device_train_batch_size`), a smaller `max_length`, QLoRA "
            "(`load_in_4bit`), more GPUs or larger ones."
        )
    else:
        print(f"Recommended: --accelerate_config {result['recommended']}")


def _limit(entry: dict[str, Any], stages: dict[str, Any]) -> str:
    for name, stage in stages.items():
        if not stage["fits"]:
            memory = {key: size for key, size in stage["memory_bytes"].items() if key not in ("total", "host")}
            return f"{name}: {max(memory, key=lambda key: memory[key])}"
    return stages["training"]["limit"]


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    from gift_trl.scripts.cli import run

    run(main)
