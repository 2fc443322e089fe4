"""How long the stages of a run take on given hardware."""

import math
from dataclasses import dataclass

import numpy as np

from gift_trl.planning.hardware import Hardware
from gift_trl.planning.memory import TrainingSetup
from gift_trl.planning.placement import Placement
from gift_trl.planning.stages import Batch


@dataclass(frozen=True, eq=False)
class Workload:
    """
    The rows of a dataset.

    Args:
        lengths (`np.ndarray` of shape `(rows,)`):
            Tokens of every row.
        targets (`np.ndarray` of shape `(rows,)`):
            Target tokens of every row.
        source (`str`):
            Where the numbers are from, in words.
    """

    lengths: np.ndarray
    targets: np.ndarray
    source: str

    @property
    def target_share(self) -> float:
        """Share of the tokens that are targets."""
        return float(self.targets.sum() / self.lengths.sum())

    def micro_batches(self, rows: int, packed_length: int | None = None) -> tuple[Batch, float]:
        """
        Batches of a data loader that draws rows at random and pads them to the longest.

        Args:
            rows (`int`):
                Rows of a batch.
            packed_length (`int`, *optional*):
                Tokens of a row into which several are packed.

        Returns:
            `tuple[Batch, float]`: A batch of the mean cost, and the number of batches.
        """
        if packed_length is not None:
            count = max(1, math.ceil(self.lengths.sum() / packed_length))
            targets = round(rows * packed_length * self.target_share)
            return Batch(rows, packed_length, targets, masked=True), count / rows
        order = np.random.default_rng(0).permutation(len(self.lengths))
        full = order[: len(order) // rows * rows].reshape(-1, rows) if len(order) >= rows else order[None]
        length = max(2, round(float(self.lengths[full].max(1).mean())))
        masked = full.shape[1] > 1 and bool((self.lengths[full].min(1) < self.lengths[full].max(1)).any())
        targets = round(float(self.targets.mean()) * full.shape[1])
        return Batch(full.shape[1], length, min(targets, full.shape[1] * (length - 1)), masked), len(order) / rows

    def scoring_batch(self, tokens_per_batch: int) -> tuple[Batch, float]:
        """
        Batches of rows that are sorted by length.

        Args:
            tokens_per_batch (`int`):
                Tokens of a batch.

        Returns:
            `tuple[Batch, float]`: A batch, and the number of such batches. Its rows are so long that the attention of
            all rows together costs what it does: Σ n² / Σ n.
        """
        length = max(2, round(float((self.lengths**2.0).sum() / self.lengths.sum())))
        rows = max(1, tokens_per_batch // length)
        targets = min(rows * (length - 1), round(rows * length * self.target_share))
        return Batch(rows, length, targets), float(self.lengths.sum() / (rows * length))


@dataclass(frozen=True)
class TimeEstimate:
    """
    Time of a stage.

    Args:
        seconds (`float`):
            All of it.
        limit (`str`):
            What most of it goes into.
        detail (`dict[str, float]`):
            Parts, by name.
    """

    seconds: float
    limit: str
    detail: dict[str, float]


def training_time(
    setup: TrainingSetup,
    workload: Workload,
    placement: Placement,
    hardware: Hardware,
    *,
    rows: int,
    accumulation: int,
    steps: int,
    packed_length: int | None = None,
    network: float | None = None,
) -> TimeEstimate:
    """
    Estimates the time of training.

    Args:
        setup ([`TrainingSetup`]):
            What is trained.
        workload ([`Workload`]):
            The data.
        placement ([`Placement`]):
            How it is spread over GPUs.
        hardware ([`Hardware`]):
            Each of them.
        rows (`int`):
            Rows of a micro-batch.
        accumulation (`int`):
            Micro-batches of an optimizer step on each GPU.
        steps (`int`):
            Optimizer steps.
        packed_length (`int`, *optional*):
            Tokens of a row into which several are packed.
        network (`float`, *optional*):
            Bytes in a second between machines, if there are several.

    Returns:
        [`TimeEstimate`]: The time, without loading the model.
    """
    batch, _ = workload.micro_batches(rows, packed_length)
    computing = hardware.seconds(setup.trace(batch, placement).operations)
    moving = _exchange_seconds(setup, placement, hardware, network)
    # Weights are gathered while others are at work
    micro = max(computing, moving)
    own = setup.adapter_dtype(placement).itemsize
    reducing = 2 * setup.sizes.trained * own / (network or hardware.link) if placement.processes > 1 else 0.0
    total = steps * (accumulation * micro + reducing)
    limit = "computing" if computing >= moving else "moving weights"
    detail = {"micro_batch": micro, "computing": computing, "moving_weights": moving, "optimizer_steps": steps}
    return TimeEstimate(total, limit, detail)


def _exchange_seconds(setup: TrainingSetup, placement: Placement, hardware: Hardware, network: float | None) -> float:
    """Seconds in which a micro-batch gathers the weights: for the forward pass, and for the backward pass again."""
    if not placement.shards_parameters:
        return 0.0
    size = 2 * setup.sizes.weight_bytes(setup.dtype)
    others = (placement.processes - 1) / placement.processes
    seconds = size * others / (network or hardware.link)
    if placement.offload_parameters:
        seconds += size / placement.processes / hardware.host_link
    return seconds


def merge_time(
    checkpoint_bytes: int, adapter_products: int, *, disk: float, cpu_flops: float, memory_rate: float
) -> TimeEstimate:
    """
    Estimates the time of a merge, which one process makes on the CPU.

    Args:
        checkpoint_bytes (`int`):
            Bytes of the instruct model's checkpoint, which is read once and written once.
        adapter_products (`int`):
            FLOPs of the adapter's factors, in float32.
        disk (`float`):
            Bytes in a second, read or written.
        cpu_flops (`float`):
            FLOP/s of the CPU in float32.
        memory_rate (`float`):
            Bytes in a second that are added in memory.

    Returns:
        [`TimeEstimate`]: The time.
    """
    parts = {
        "disk": 2 * checkpoint_bytes / disk,
        "products": adapter_products / cpu_flops,
        # A bfloat16 weight becomes float32, is added to, and becomes bfloat16 again
        "adding": 3 * (2 * checkpoint_bytes) / memory_rate,
    }
    return TimeEstimate(sum(parts.values()), max(parts, key=lambda name: parts[name]), parts)


def merge_products(setup: TrainingSetup) -> int:
    """
    FLOPs of multiplying the factors of a LoRA.

    Args:
        setup ([`TrainingSetup`]):
            What was trained.

    Returns:
        `int`: 2 · rank · inputs · outputs of all modules that are adapted; 0 without an adapter of that kind.
    """
    rank = getattr(setup.peft_config, "r", 0) or 0
    return 2 * rank * setup.sizes.adapted
