"""
Trains in the processes of a launcher, one run after another: `accelerate launch ... training_worker.py SETTINGS.json`.

Settings: `base`, `untrained`, `instruct`, `data` (JSON lines), `annotated` (folder), `output`, `device`, `fsdp_on_cpu`, `runs`. Each run has a `name`
and may have `args` (of `GIFTConfig`), `annotated` (train on that folder), `untrained` (train that model), `dropout` (of the adapter) and `sleep_at` (the
number of optimizer steps after which it waits to be killed). It leaves in `output/name`: the adapter as it is saved,
`initial.safetensors` and `final.safetensors` with the trained parameters, and `facts.json`.
"""

import contextlib
import gc
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from gift_trl import GIFTConfig, GIFTSFTTrainer
from gift_trl.annotation import load_annotated_dataset


# Nothing may hide an error of scale: SGD, no clipping, float32, constant rate. At a rate of 0.05, four steps make 6e-8
# after the first into up to 3e-6: also between two ways to accumulate in one process
EXACT = {
    "optim": "sgd",
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "bf16": False,
    "activation_checkpointing": False,
    "num_train_epochs": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


@contextlib.contextmanager
def whole(parameters: list[torch.nn.Parameter], modifier_rank: int | None = None) -> Iterator[None]:
    """Gathers what ZeRO-3 has partitioned."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modifier_rank):
        yield


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the trained parameters under the names that the saved adapter has."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with whole(list(parameters.values())):
        values = {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu().clone()
            for name, p in parameters.items()
        }
    return {name.replace(".default.", "."): value for name, value in values.items()}


def set_adapter(model: torch.nn.Module) -> None:
    """Sets every trained parameter to values that depend on its name alone, and zero nowhere as LoRA's B would be."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with whole(list(parameters.values()), modifier_rank=0), torch.no_grad():
        for name, parameter in parameters.items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2 / math.sqrt(parameter.shape[-1]))


def shard_on_cpu() -> None:
    """
    Lets FSDP2 shard in CPU processes.

    PyTorch can; accelerate asks for GPUs, and would make DDP of it without a word. It is told that these are.
    """
    initialize = AcceleratorState.__init__

    def initialize_as_gpus(self, *args, **kwargs):
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        initialize(self, *args, **kwargs)

    AcceleratorState.__init__ = initialize_as_gpus


class Count(TrainerCallback):
    """Counts the optimizer steps of this process, which those before a checkpoint are not."""

    steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


class Sleep(TrainerCallback):
    """Waits, once it is inside an epoch, for the signal that kills."""

    def __init__(self, step: int, note: Path):
        self.step, self.note = step, note

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            (self.note.parent / f"{self.note.name}-{args.process_index}").write_text(str(os.getpid()))
            time.sleep(300)
            raise TimeoutError("nobody has killed this process")


def chat_rows(model: torch.nn.Module) -> list[list[float]]:
    """Rows of `<|start|>` and `<|end|>` in the embedding and in the head."""
    weights = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    with whole(weights):
        return [row for w in weights for row in (w.full_tensor() if isinstance(w, DTensor) else w)[[1, 2]].tolist()]


def facts(trainer: GIFTSFTTrainer) -> dict[str, Any]:
    """How the trainer was distributed in fact, seen from this process."""
    accelerator, model = trainer.accelerator, trainer.model
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.reshard()  # an evaluation leaves what it has used last gathered
    found = {
        "distributed_type": accelerator.distributed_type.value,
        "num_processes": accelerator.num_processes,
        "local_processes": int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        "mixed_precision": trainer.args.mixed_precision,
        "ddp": isinstance(trainer.model_wrapped, DistributedDataParallel),
        "zero3": is_deepspeed_zero3_enabled(),
        "parameters": sum(1 for _ in model.parameters()),
        "dtensors": sum(isinstance(p, DTensor) for p in model.parameters()),
        "units": [type(unit).__name__ for unit in units],
        "trained": sum(p.numel() for p in trained_parameters(model).values()),
        "chat_rows": chat_rows(model),
        "log": trainer.state.log_history,
    }
    if trainer.args.confidence_source == "online":
        scorer = trainer._confidence_source._online._scorer
        found["scoring_parameters"] = sum(1 for _ in scorer.model.parameters())
        found["scoring_parameters_sharded"] = sum(
            isinstance(p, DTensor) or (hasattr(p, "ds_id") and p.ds_tensor.numel() < p.ds_numel)
            for p in scorer.model.parameters()
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine = trainer.model_wrapped
        optimizer = engine.optimizer
        sharded = [p for p in model.parameters() if hasattr(p, "ds_id") and p.ds_tensor.numel() < p.ds_numel]
        found |= {
            "stage": engine.zero_optimization_stage(),
            "accumulation_steps": engine.gradient_accumulation_steps(),
            "clipping": engine.gradient_clipping(),
            "sharded": len(sharded),
            "released": sum(p.numel() == 0 for p in sharded),  # not gathered at this moment
            "offload": [engine.zero_offload_optimizer().device, engine.zero_offload_param().device],
            "optimizer": type(optimizer.optimizer).__name__,
            "partitions_gradients": bool(getattr(optimizer, "partition_gradients", False)),
        }
        groups = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_partitioned_groups_flat
        found["optimized_here"] = sum(group.numel() for group in groups)
    return found


def train(settings: dict[str, Any], run: dict[str, Any]) -> None:
    folder = Path(settings["output"]) / run["name"]
    folder.mkdir(parents=True, exist_ok=True)
    args = GIFTConfig(
        output_dir=str(folder),
        instruct_model_name_or_path=settings["instruct"],
        annotation_cache_dir=str(folder / "cache"),  # its own, so that the processes of this launch annotate
        use_cpu=settings.get("device", "cpu") == "cpu",
        **{**EXACT, **run.get("args", {})},
    )
    if args.deepspeed_plugin is not None:
        config = args.deepspeed_plugin.deepspeed_config
        # DeepSpeed leaves parameters of less than 100,000 elements whole, and the tiny model has no others
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        if args.optim == "sgd":  # with offload, DeepSpeed's Adam would take its place
            config["zero_force_ds_cpu_optimizer"] = False
    if run.get("annotated"):
        dataset = load_annotated_dataset(settings["annotated"])["train"]
    else:
        with open(settings["data"], encoding="utf-8") as file:
            dataset = Dataset.from_list([json.loads(line) for line in file])
    set_seed(args.seed)
    trainer = GIFTSFTTrainer(
        model=settings["untrained" if run.get("untrained") else "base"],
        args=args,
        train_dataset=dataset,
        # Two processes repeat a row of the last batch
        eval_dataset=dataset.select(range(len(dataset) - 1)) if args.eval_strategy != "no" else None,
        peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=run.get("dropout", 0.0), target_modules="all-linear"),
    )
    set_adapter(trainer.model)
    initial = trained_parameters(trainer.model)
    count = Count()
    trainer.add_callback(count)
    if "sleep_at" in run:
        trainer.add_callback(Sleep(run["sleep_at"], folder / "pid"))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    found, final = facts(trainer) | {"steps": count.steps}, trained_parameters(trainer.model)
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        save_file(initial, folder / "initial.safetensors")
        save_file(final, folder / "final.safetensors")
        (folder / "facts.json").write_text(json.dumps(found, indent=2))
    trainer.accelerator.wait_for_everyone()


def main(settings_file: str) -> None:
    with open(settings_file, encoding="utf-8") as file:
        settings = json.load(file)
    if settings.get("fsdp_on_cpu"):
        shard_on_cpu()
    for run in settings["runs"]:
        start = time.monotonic()
        train(settings, run)
        gc.collect()
        print(f"{run['name']}: {time.monotonic() - start:.1f} s", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
