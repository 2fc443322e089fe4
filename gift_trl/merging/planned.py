"""What the merge of an adapter that is yet to be trained would be refused for: the merge's own checks, without the adapter."""

import contextlib
import copy
import os
import warnings
from pathlib import Path

from huggingface_hub.utils import TensorInfo
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from gift_trl.checkpoints import checkpoint_folder, safetensors_files
from gift_trl.merging.adapter import unsupported_settings
from gift_trl.merging.checks import (
    checkpoint_tensors,
    disk_problems,
    instruct_config,
    missing_parameters,
    overlapping_folders,
)
from gift_trl.merging.conversion import build_skeleton
from gift_trl.merging.layers import ADAPTER_NAME
from gift_trl.merging.preflight import Findings, find_adapter_targets


def preflight_training(
    peft_config: PeftConfig,
    instruct_model: str,
    output_dir: str | os.PathLike,
    *,
    instruct_model_revision: str | None = None,
    scale: float = 1.0,
    saved_modules: str | None = None,
) -> list[str]:
    """
    Checks before a training that its adapter can be merged; reads configurations and the headers of weights that are here.

    Args:
        peft_config ([`~peft.PeftConfig`]):
            Configuration of the adapter.
        instruct_model (`str`):
            Checkpoint folder or Hub id. Of a model on the Hub, only the configuration is downloaded.
        output_dir (`str` or `os.PathLike`):
            Folder of the merged checkpoint.
        instruct_model_revision (`str`, *optional*):
            Revision of the instruct model on the Hub.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor of the update.
        saved_modules (`str`, *optional*):
            What to do with tensors that the adapter holds whole, `"replace"` or `"ignore"`.

    Returns:
        `list[str]`: One sentence for each thing that the merge would refuse, with its remedy.
    """
    findings = Findings()
    unsupported = unsupported_settings(peft_config.to_dict(), saved_modules, scale)
    findings += unsupported
    instruct_dir = config = None
    with findings.collect():
        instruct_dir = checkpoint_folder(instruct_model, instruct_model_revision, weights=False)
        config = instruct_config(instruct_dir)
    output = Path(output_dir).expanduser().resolve()
    findings += overlapping_folders(output, instruct_dir)
    if config is None:
        return findings
    tensors: dict[str, TensorInfo] = {}
    is_local = instruct_dir == Path(instruct_model).expanduser()
    with findings.collect() if is_local else contextlib.suppress(OSError, ValueError):
        shards = safetensors_files(instruct_dir)
        tensors = checkpoint_tensors(shards)
        findings += missing_parameters(build_skeleton(config), tensors)
        findings += disk_problems(output, sum(shard.stat().st_size for shard in shards))
    if not unsupported:
        with findings.collect():
            findings += _target_problems(peft_config, config, tensors, saved_modules)
    return findings


def _target_problems(
    peft_config: PeftConfig, config: PreTrainedConfig, checkpoint: dict[str, TensorInfo], saved_modules: str | None
) -> list[str]:
    planned = copy.deepcopy(peft_config)
    # Neither matters to what is saved, and PEFT would look for the one and compute the other
    planned.base_model_name_or_path = None
    if hasattr(planned, "init_lora_weights"):
        planned.init_lora_weights = False
    try:
        with warnings.catch_warnings(), no_init_weights():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(
                build_skeleton(config), planned, adapter_name=ADAPTER_NAME, low_cpu_mem_usage=True
            )
            tensors = get_peft_model_state_dict(adapted, adapter_name=ADAPTER_NAME)
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return [f"PEFT cannot put this adapter on the instruct model: {error}"]
    settings = planned.to_dict()
    if not checkpoint:  # not downloaded yet: as if it held what transformers would save
        checkpoint = _headers(config)
        problems = find_adapter_targets(settings, tensors, build_skeleton(config), checkpoint, saved_modules)[1]
        return [problem for problem in problems if "does not hold what its configuration promises" not in problem]
    return find_adapter_targets(settings, tensors, build_skeleton(config), checkpoint, saved_modules)[1]


def _headers(config: PreTrainedConfig) -> dict[str, TensorInfo]:
    state = build_skeleton(config).state_dict()
    return {name: TensorInfo("BF16", list(tensor.shape), (0, 2 * tensor.numel())) for name, tensor in state.items()}
