"""What a stage needs on each GPU, from the shapes of the model alone."""

import functools
from dataclasses import dataclass

import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from gift_trl.planning.placement import Placement
from gift_trl.planning.stages import Batch, StageCosts, build_skeleton, trace_training_step


# NF4: half a byte, and a scale of one byte for each block of 64, whose own scales are shared by 256 blocks
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# DeepSpeed's defaults, in elements: its buffer for gradients on the way, what it gathers ahead, and what it keeps gathered
_REDUCE_BUCKET, _PREFETCH_BUCKET, _MAX_GATHERED = 500_000_000, 50_000_000, 1_000_000_000
# Of an estimate, for what CUDA and the allocator keep: a share and GiB
_RESERVE = (0.05, 1.0)


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Bytes that a stage needs on each GPU, beside what CUDA and the allocator keep for themselves.

    Args:
        weights (`int`):
            The model, or a GPU's share of it.
        adapter (`int`):
            The adapter, its gradients and its optimizer state.
        buffers (`int`):
            Weights that are gathered for their turn, and what the launcher allocates to exchange gradients.
        activations (`int`):
            What the longest rows leave for the backward pass, and all that is made on the way, at most.
        host (`int`, *optional*, defaults to `0`):
            What lies in the memory of the host, for each GPU; not part of the total.
    """

    weights: int
    adapter: int
    buffers: int
    activations: int
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return self.weights + self.adapter + self.buffers + self.activations


@dataclass(frozen=True)
class ModelSizes:
    """
    Numbers of parameters.

    Args:
        parameters (`int`):
            All of the model.
        quantised (`int`):
            Those that QLoRA quantises: the linear layers', but for the head.
        layer (`int`):
            The largest decoder layer.
        outside (`int`):
            Embeddings, head and what else is in no layer.
        trained (`int`):
            Those that are trained.
        adapted (`int`):
            Those of the weights that the adapter changes.
    """

    parameters: int
    quantised: int
    layer: int
    outside: int
    trained: int
    adapted: int

    def weight_bytes(self, dtype: torch.dtype, load_in_4bit: bool = False) -> int:
        """Bytes of the weights."""
        quantised = self.quantised if load_in_4bit else 0
        return round((self.parameters - quantised) * dtype.itemsize + quantised * _NF4_BYTES)


def measure_model(config: PreTrainedConfig, peft_config: PeftConfig | None = None) -> ModelSizes:
    """
    Counts the parameters of a model and its adapter.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the model.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The adapter; without one, every parameter counts as trained.

    Returns:
        [`ModelSizes`]: The numbers.
    """
    model = build_skeleton(config)
    head = model.get_output_embeddings()
    linear = {
        id(module.weight): module.weight.numel()
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
    blocks = model._no_split_modules or ()
    layers = [
        sum(p.numel() for p in module.parameters()) for module in model.modules() if type(module).__name__ in blocks
    ]
    parameters = model.num_parameters()
    trained, adapted_weights = parameters, 0
    if peft_config is not None:
        adapted = get_peft_model(model, peft_config, low_cpu_mem_usage=True)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        tuned = [module.get_base_layer() for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
        adapted_weights = sum(layer.weight.numel() for layer in tuned if isinstance(layer, (nn.Linear, Conv1D)))
    return ModelSizes(
        parameters=parameters,
        quantised=sum(linear.values()),
        layer=max(layers, default=0),
        outside=parameters - sum(layers),
        trained=trained,
        adapted=adapted_weights,
    )


@dataclass(frozen=True, eq=False)
class TrainingSetup:
    """
    What is trained, and on which batch.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the base model.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The adapter; `None` trains every parameter.
        dtype ([`torch.dtype`], *optional*, defaults to `torch.bfloat16`):
            Of the base model.
        mixed_precision ([`torch.dtype`], *optional*, defaults to `torch.bfloat16`):
            Of the computation (`bf16`); `None` computes in the weights' own.
        checkpointing (`bool`, *optional*, defaults to `True`):
            Whether activations are checkpointed.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether the linear layers are in NF4 with nested quantisation.
        optimizer_states (`int`, *optional*, defaults to `2`):
            Values that the optimizer keeps for each parameter: AdamW's two moments.
        on_gpu (`bool`, *optional*, defaults to `True`):
            Whether the kernels are those of a GPU.
    """

    config: PreTrainedConfig
    peft_config: PeftConfig | None
    dtype: torch.dtype = torch.bfloat16
    mixed_precision: torch.dtype | None = torch.bfloat16
    checkpointing: bool = True
    load_in_4bit: bool = False
    optimizer_states: int = 2
    on_gpu: bool = True

    @functools.cached_property
    def sizes(self) -> ModelSizes:
        """Numbers of parameters."""
        return measure_model(self.config, self.peft_config)

    def adapter_dtype(self, placement: Placement) -> torch.dtype:
        """
        Dtype of the adapter in the forward pass.

        Args:
            placement ([`Placement`]):
                How the run is spread.

        Returns:
            [`torch.dtype`]: float32 under autocast; that of mixed precision where the launcher casts or TRL does (QLoRA).
        """
        if self.peft_config is None and not (placement.zero_stage or placement.fsdp):
            return self.dtype
        if self.mixed_precision is not None and (placement.zero_stage or placement.fsdp):
            return self.mixed_precision
        return torch.bfloat16 if self.load_in_4bit else torch.float32

    def trace(self, batch: Batch, placement: Placement) -> StageCosts:
        """
        Costs of a micro-batch.

        Args:
            batch ([`Batch`]):
                The micro-batch.
            placement ([`Placement`]):
                How the run is spread, of which the dtype of the adapter depends.

        Returns:
            [`StageCosts`]: The costs.
        """
        # DeepSpeed casts the whole model, and has no autocast
        autocast = None if placement.zero_stage else self.mixed_precision
        dtype = self.mixed_precision if placement.zero_stage and self.mixed_precision else self.dtype
        return self._trace(batch, dtype, self.adapter_dtype(placement), autocast)

    @functools.lru_cache(maxsize=64)  # noqa: B019  # a setup lives as long as its estimates are made
    def _trace(
        self, batch: Batch, dtype: torch.dtype, adapter: torch.dtype, autocast: torch.dtype | None
    ) -> StageCosts:
        return trace_training_step(
            self.config,
            self.peft_config,
            batch,
            dtype=dtype,
            adapter_dtype=adapter,
            autocast_dtype=autocast,
            checkpointing=self.checkpointing,
            quantised=self.load_in_4bit,
            on_gpu=self.on_gpu,
        )


def training_memory(setup: TrainingSetup, batch: Batch, placement: Placement) -> MemoryEstimate:
    """
    Estimates the memory of training.

    Activations are those of a trace ([`trace_training_step`]); weights, gradients and optimizer state are counted, and so
    are the buffers that DeepSpeed, FSDP2 and DDP allocate. Not compared with a GPU.

    Args:
        setup ([`TrainingSetup`]):
            What is trained.
        batch ([`Batch`]):
            The largest micro-batch.
        placement ([`Placement`]):
            How it is spread over GPUs.

    Returns:
        [`MemoryEstimate`]: Bytes on each GPU.
    """
    sizes, n, stage = setup.sizes, placement.processes, placement.zero_stage
    own = setup.adapter_dtype(placement).itemsize
    weights = float(setup.sizes.weight_bytes(setup.dtype, setup.load_in_4bit))
    if setup.peft_config is None:
        weights = 0.0  # all of it is counted below
    trained, states = sizes.trained, setup.optimizer_states
    buffers, host = 0.0, 0.0
    if stage:
        # The optimizer has a copy in float32, and so are its gradients when it steps
        master = trained * 4 * (2 + states) / n
        parameters = trained * own / (n if stage == 3 else 1)
        gradients = trained * own / (n if stage >= 2 else 1)
        if n > 1 or stage == 3:
            buffers += _REDUCE_BUCKET * own
        if stage == 3:
            weights /= n
            buffers += gathered_bytes(sizes, setup.dtype, placement)
        if placement.offload_optimizer:
            host, master = host + master, 0.0
    else:
        # FSDP2 computes with a cast copy of its float32 shards
        own = 4 if placement.fsdp and setup.mixed_precision is not None else own
        share = n if placement.fsdp else 1
        parameters = gradients = trained * own / share
        master = trained * own * states / share
        if placement.fsdp:
            weights /= n
            buffers += gathered_bytes(sizes, setup.dtype, placement)
        elif n > 1:
            buffers += gradients  # DDP's buckets
        if placement.offload_optimizer:
            host, master = host + master + gradients, 0.0
            gradients = 0.0
    if placement.offload_parameters:
        host += weights + parameters
        weights = parameters = 0.0
    adapter = parameters + gradients + master
    return MemoryEstimate(
        *(round(size) for size in (weights, adapter, buffers, setup.trace(batch, placement).peak, host))
    )


def gathered_bytes(sizes: ModelSizes, dtype: torch.dtype, placement: Placement) -> int:
    """
    Bytes of the weights that are whole at a time, where each GPU holds a share of the model.

    Args:
        sizes ([`ModelSizes`]):
            Numbers of parameters.
        dtype ([`torch.dtype`]):
            Of the weights.
        placement ([`Placement`]):
            How they are shared out.

    Returns:
        `int`: 0 if every GPU holds the whole model.
    """
    if not placement.shards_parameters:
        return 0
    if placement.fsdp:
        # What is in no layer stays, and the next layer is gathered while one computes
        return dtype.itemsize * (sizes.outside + 2 * sizes.layer)
    return dtype.itemsize * min(sizes.parameters, max(_MAX_GATHERED, sizes.outside, sizes.layer) + _PREFETCH_BUCKET)


def needed_memory(size: float) -> float:
    """
    Memory of a GPU on which an estimate leaves room for what CUDA and the allocator keep.

    Args:
        size (`float`):
            Bytes that are estimated.

    Returns:
        `float`: GiB.
    """
    share, fixed = _RESERVE
    return size / 2**30 * (1 + share) + fixed
