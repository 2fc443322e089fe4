"""How an accelerate configuration spreads a run over GPUs."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gift_trl.data_files import read_yaml


@dataclass(frozen=True)
class Placement:
    """
    What is shared out between GPUs.

    Args:
        name (`str`):
            Name of the accelerate configuration.
        processes (`int`):
            Number of GPUs.
        zero_stage (`int`, *optional*, defaults to `0`):
            DeepSpeed's stage: 1 shares out the optimizer state, 2 the gradients, 3 the parameters.
        fsdp (`bool`, *optional*, defaults to `False`):
            Whether PyTorch's FSDP2 shares out all three.
        offload_parameters, offload_optimizer (`bool`, *optional*, defaults to `False`):
            Whether the shares are in the memory of the host.
    """

    name: str
    processes: int
    zero_stage: int = 0
    fsdp: bool = False
    offload_parameters: bool = False
    offload_optimizer: bool = False

    @property
    def shards_parameters(self) -> bool:
        """Whether no GPU holds the whole model."""
        return self.fsdp or self.zero_stage == 3

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], processes: int) -> "Placement":
        """
        Reads an accelerate configuration.

        Args:
            path (`str` or `os.PathLike`):
                File that `accelerate config` wrote, or one of `recipes/accelerate_configs`.
            processes (`int`):
                Number of GPUs, in place of the file's own.

        Returns:
            [`Placement`]: What it says.

        Raises:
            `ValueError`: If it spreads a run in a way that is not known here.
        """
        content: dict[str, Any] = read_yaml(path, "accelerate configuration")
        kind = str(content.get("distributed_type", "NO"))
        name = Path(path).stem
        if kind == "DEEPSPEED":
            settings = content.get("deepspeed_config") or {}
            if "zero_stage" not in settings:
                raise ValueError(
                    f"'{path}' names no `zero_stage`; a configuration file of DeepSpeed's own is not read."
                )
            return cls(
                name,
                processes,
                zero_stage=int(settings["zero_stage"]),
                offload_parameters=settings.get("offload_param_device", "none") != "none",
                offload_optimizer=settings.get("offload_optimizer_device", "none") != "none",
            )
        if kind == "FSDP":
            settings = content.get("fsdp_config") or {}
            offload = bool(settings.get("fsdp_offload_params"))
            return cls(name, processes, fsdp=True, offload_parameters=offload, offload_optimizer=offload)
        if kind in ("NO", "MULTI_GPU"):
            return cls(name, 1 if kind == "NO" else processes)
        raise ValueError(
            f"'{path}' has the `distributed_type` {kind}; NO, MULTI_GPU, DEEPSPEED and FSDP can be estimated."
        )
