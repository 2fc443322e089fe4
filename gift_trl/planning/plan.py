"""Every accelerate configuration with what each stage needs under it, and which one to take."""

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from gift_trl.annotation.scoring import CPU_TOKENS, tokens_that_fit
from gift_trl.planning.hardware import Hardware
from gift_trl.planning.memory import (
    MemoryEstimate,
    ModelSizes,
    TrainingSetup,
    gathered_bytes,
    measure_model,
    needed_memory,
    training_memory,
)
from gift_trl.planning.placement import Placement
from gift_trl.planning.stages import Batch, StageCosts, trace_annotation
from gift_trl.planning.timing import TimeEstimate, Workload, training_time


# A configuration is preferred to a simpler one if it saves more than this share of the time: less is within the error
_WORTH = 0.2


@dataclass(frozen=True, eq=False)
class Scoring:
    """
    How the data is annotated.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the instruct model.
        dtype ([`torch.dtype`]):
            Its dtype.
        load_in_4bit (`bool`):
            Whether it is quantised.
        tokens_per_batch (`int`, *optional*):
            Tokens of a forward pass, if the recipe says.
    """

    config: PreTrainedConfig
    dtype: torch.dtype
    load_in_4bit: bool = False
    tokens_per_batch: int | None = None

    @functools.cached_property
    def sizes(self) -> ModelSizes:
        """Numbers of parameters."""
        return measure_model(self.config)

    @functools.lru_cache(maxsize=64)  # noqa: B019  # it lives as long as its estimates are made
    def trace(self, batch: Batch, on_gpu: bool) -> StageCosts:
        """
        Costs of a forward pass.

        Args:
            batch ([`Batch`]):
                The rows.
            on_gpu (`bool`):
                Whether the kernels are those of a GPU.

        Returns:
            [`StageCosts`]: The costs.
        """
        return trace_annotation(self.config, batch, dtype=self.dtype, quantised=self.load_in_4bit, on_gpu=on_gpu)


@dataclass(frozen=True)
class Schedule:
    """
    The batches of the training.

    Args:
        rows (`int`):
            Rows of a micro-batch.
        longest (`int`):
            Tokens of the longest row.
        global_batch_size (`int`, *optional*):
            Rows of an optimizer step over all GPUs.
        accumulation (`int`, *optional*, defaults to `1`):
            Accumulation steps without it.
        epochs (`float`, *optional*, defaults to `1.0`):
            Passes over the data.
        max_steps (`int`, *optional*, defaults to `-1`):
            Optimizer steps in place of epochs.
        packed (`bool`, *optional*, defaults to `False`):
            Whether rows are packed to `longest`.
    """

    rows: int
    longest: int
    global_batch_size: int | None = None
    accumulation: int = 1
    epochs: float = 1.0
    max_steps: int = -1
    packed: bool = False


@dataclass(frozen=True)
class StageEstimate:
    """
    A stage under a configuration.

    Args:
        memory ([`MemoryEstimate`]):
            Bytes on each GPU.
        time ([`TimeEstimate`]):
            Time.
        fits (`bool`):
            Whether the memory of the GPU is enough, with room for what CUDA and the allocator keep.
    """

    memory: MemoryEstimate
    time: TimeEstimate
    fits: bool


@dataclass(frozen=True)
class Candidate:
    """
    A configuration and what the stages need under it.

    Args:
        placement ([`Placement`]):
            The configuration.
        annotation ([`StageEstimate`], *optional*):
            Stage 1; `None` if no token is left to score.
        training ([`StageEstimate`], *optional*):
            Stage 2.
        accumulation (`int`, *optional*):
            Accumulation steps.
        problem (`str`, *optional*):
            Why the run does not work under it.
    """

    placement: Placement
    annotation: StageEstimate | None = None
    training: StageEstimate | None = None
    accumulation: int | None = None
    problem: str | None = None

    @property
    def works(self) -> bool:
        """Whether all stages fit."""
        stages = [stage for stage in (self.annotation, self.training) if stage is not None]
        return self.problem is None and all(stage.fits for stage in stages)

    @property
    def seconds(self) -> float:
        """Time of both stages."""
        return sum(stage.time.seconds for stage in (self.annotation, self.training) if stage is not None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        stages = {"annotation": self.annotation, "training": self.training}
        return {
            "accelerate_config": self.placement.name,
            "processes": self.placement.processes,
            "gradient_accumulation_steps": self.accumulation,
            "works": self.works,
            "problem": self.problem,
            "stages": {
                name: {
                    "memory_bytes": {**asdict(stage.memory), "total": stage.memory.total},
                    "fits": stage.fits,
                    **asdict(stage.time),
                }
                for name, stage in stages.items()
                if stage is not None
            },
        }


def make_plan(
    setup: TrainingSetup,
    scoring: Scoring | None,
    workload: Workload,
    schedule: Schedule,
    placements: Sequence[Placement],
    hardware: Hardware,
    *,
    network: float | None = None,
) -> list[Candidate]:
    """
    Estimates every configuration.

    Args:
        setup ([`TrainingSetup`]):
            What is trained.
        scoring ([`Scoring`], *optional*):
            How the data is annotated; `None` if it has been.
        workload ([`Workload`]):
            The data.
        schedule ([`Schedule`]):
            The batches.
        placements (`Sequence[Placement]`):
            The configurations.
        hardware ([`Hardware`]):
            A GPU.
        network (`float`, *optional*):
            Bytes in a second between machines, if there are several.

    Returns:
        `list[Candidate]`: One for each configuration.
    """
    candidates = []
    for placement in placements:
        candidate = Candidate(placement)
        accumulation = schedule.accumulation
        if schedule.global_batch_size is not None:
            at_once = placement.processes * schedule.rows
            accumulation = schedule.global_batch_size // at_once
            if schedule.global_batch_size % at_once:
                candidate = replace(
                    candidate,
                    problem=f"{placement.processes} GPUs × {schedule.rows} rows do not divide the global batch of "
                    f"{schedule.global_batch_size}",
                )
        if setup.load_in_4bit and placement.shards_parameters:
            candidate = replace(candidate, problem="NF4 weights are not sharded")
        if candidate.problem is None:
            candidate = replace(
                candidate,
                annotation=None
                if scoring is None
                else _annotate(scoring, workload, schedule, placement, hardware, setup.on_gpu, network),
                training=_train(setup, workload, schedule, accumulation, placement, hardware, network),
                accumulation=accumulation,
            )
        candidates.append(candidate)
    return candidates


def recommend(candidates: Sequence[Candidate]) -> Candidate | None:
    """
    The configuration to take.

    Sharding the model makes room, not speed: where each GPU can hold all of it, the simplest configuration is taken. Else
    the fastest, or a simpler one that is almost as fast; the host's memory is the last resort.

    Args:
        candidates (`Sequence[Candidate]`):
            The configurations, the simplest first.

    Returns:
        [`Candidate`] or `None`: `None` if none works.
    """
    working = [candidate for candidate in candidates if candidate.works]
    gpus = max((candidate.placement.processes for candidate in working), default=0)
    working = [candidate for candidate in working if candidate.placement.processes == gpus]
    on_gpus = [c for c in working if not c.placement.offload_parameters] or working
    whole = [c for c in on_gpus if not c.placement.shards_parameters]
    if whole:
        return whole[0]
    best = min((candidate.seconds for candidate in on_gpus), default=0.0)
    return next((candidate for candidate in on_gpus if candidate.seconds <= best * (1 + _WORTH)), None)


def _train(
    setup: TrainingSetup,
    workload: Workload,
    schedule: Schedule,
    accumulation: int,
    placement: Placement,
    hardware: Hardware,
    network: float | None,
) -> StageEstimate:
    rows, longest = schedule.rows, schedule.longest
    # The mask is counted where rows of other lengths may share the batch
    batch = Batch(rows, longest, rows * (longest - 1), masked=rows > 1 or schedule.packed)
    memory = training_memory(setup, batch, placement)
    packed = longest if schedule.packed else None
    _, batches = workload.micro_batches(rows, packed)
    steps = float(schedule.max_steps)
    if steps <= 0:
        steps = math.ceil(math.ceil(batches / placement.processes) / accumulation) * schedule.epochs
    time = training_time(
        setup,
        workload,
        placement,
        hardware,
        rows=rows,
        accumulation=accumulation,
        steps=math.ceil(steps),
        packed_length=packed,
        network=network,
    )
    return StageEstimate(memory, time, needed_memory(memory.total) <= hardware.memory)


def _annotate(
    scoring: Scoring,
    workload: Workload,
    schedule: Schedule,
    placement: Placement,
    hardware: Hardware,
    on_gpu: bool,
    network: float | None,
) -> StageEstimate:
    sizes = scoring.sizes
    weights, gathered = sizes.weight_bytes(scoring.dtype, scoring.load_in_4bit), 0
    sharded = placement.zero_stage == 3 and not scoring.load_in_4bit  # FSDP leaves the scoring model whole
    if sharded:
        weights, gathered = weights // placement.processes, gathered_bytes(sizes, scoring.dtype, placement)
    tokens = scoring.tokens_per_batch
    if tokens is None:
        free = max(0, round(hardware.memory * 2**30) - weights - gathered)
        tokens = tokens_that_fit(scoring.config, scoring.dtype, free) if on_gpu else CPU_TOKENS
    longest = min(schedule.longest, int(workload.lengths.max()))
    rows = max(1, tokens // longest)
    largest = Batch(rows, longest, rows * (longest - 1), masked=rows > 1)
    memory = MemoryEstimate(weights, 0, gathered, scoring.trace(largest, on_gpu).peak)
    batch, batches = workload.scoring_batch(tokens)
    computing = hardware.seconds(scoring.trace(batch, on_gpu).operations)
    moving = 0.0
    if sharded:
        share = (placement.processes - 1) / placement.processes
        moving = sizes.weight_bytes(scoring.dtype) * share / (network or hardware.link)
    # A last batch that is not full costs its share
    seconds = max(1.0, batches / placement.processes) * max(computing, moving)
    limit = "computing" if computing >= moving else "moving weights"
    time = TimeEstimate(seconds, limit, {"batch": computing, "moving_weights": moving, "tokens_per_batch": tokens})
    return StageEstimate(memory, time, needed_memory(memory.total) <= hardware.memory)
