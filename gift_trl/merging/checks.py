"""The single checks of a merge: of the adapter, the checkpoint, what is known of both, and the disk."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import TensorInfo
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CHAT_TEMPLATE_DIR

from gift_trl.checkpoints import ADAPTER_FILE, read_header
from gift_trl.merging.adapter import ADAPTER_CONFIG_FILE
from gift_trl.merging.conversion import DTYPES, misfits
from gift_trl.model_pair import check_same_architecture, load_tokenizer, vocabulary_conflicts


# The two factors of an update of LoRA, and the bias that it may have.
_FACTOR = re.compile(r"\.lora_(embedding_)?[AB](\.weight)?$")
_BIAS = re.compile(r"\.lora_B\.bias$")


# What older versions of transformers saved of a model though it is computed: causal masks and rotary frequencies
_COMPUTED = re.compile(r"\.(attn|attention)\.(attention\.)?(masked_)?bias$|\.rotary_emb\.inv_freq$|\.position_ids$")
_INPUT_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|tok_embeddings|word_embeddings|embed_in|wte)\.weight$")


def adapter_header(folder: Path) -> dict[str, TensorInfo]:
    """
    Reads the header of an adapter file.

    Args:
        folder (`Path`):
            Adapter folder.

    Returns:
        `dict[str, TensorInfo]`: Dtype and shape of its tensors.

    Raises:
        `FileNotFoundError`, `ValueError`: If there is none, or it holds nothing that could be merged.
    """
    if not (folder / ADAPTER_FILE).is_file():
        remedy = "pass the folder that `trainer.save_model()` wrote."
        if (folder / "adapter_model.bin").is_file():
            remedy = (
                "it has adapter_model.bin, which is not read; convert it with "
                "`PeftModel.from_pretrained(base_model, adapter).save_pretrained(new_folder)`."
            )
        raise FileNotFoundError(f"The adapter folder '{folder}' holds no {ADAPTER_FILE}: {remedy}")
    tensors = read_header(folder / ADAPTER_FILE)[0].tensors
    if not tensors:
        raise ValueError(
            f"'{folder / ADAPTER_FILE}' holds no tensors: save the adapter again, with all its parameters gathered if it "
            "was trained under ZeRO-3 or FSDP."
        )
    odd = sorted({info.dtype for info in tensors.values()} - {"F64", "F32", "F16", "BF16", "I32", "I64"})
    if odd:
        raise ValueError(f"The adapter is stored as {', '.join(odd)}: save it in float32 or bfloat16.")
    return tensors


def instruct_config(folder: Path) -> PreTrainedConfig:
    """
    Reads the configuration of the instruct checkpoint.

    Args:
        folder (`Path`):
            Its folder.

    Returns:
        [`~transformers.PreTrainedConfig`]: The configuration.

    Raises:
        `FileNotFoundError`, `ValueError`: If there is none, it cannot be read, or the checkpoint is quantised.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"'{folder}' holds no config.json, so it is no model checkpoint: pass the instruct model's folder or Hub id."
        )
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        raise ValueError(
            f"The instruct model's folder '{folder}' holds {ADAPTER_CONFIG_FILE}: transformers would put that adapter on "
            "top whenever it loads the model. Merge it first, or move it away."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"The configuration in '{folder}' cannot be read ({str(error).splitlines()[0]}): the model must be of a kind "
            "that the installed transformers knows without custom code; upgrade transformers if it is newer."
        ) from error
    quantization = config.to_dict().get("quantization_config")
    if quantization:
        raise ValueError(
            f"The instruct checkpoint is quantised ({quantization.get('quant_method', 'unknown method')}), and an update "
            "cannot be added to quantised weights: merge into the unquantised checkpoint, then quantise the result."
        )
    return config


def check_recorded_base(settings: dict[str, Any], instruct_dir: Path) -> None:
    """
    Compares the architecture of the base model that the adapter names, where it is at hand, with the instruct model's.

    Args:
        settings (`dict[str, Any]`):
            Contents of `adapter_config.json`.
        instruct_dir (`Path`):
            Folder of the instruct checkpoint.

    Raises:
        `ValueError`: If they differ.
    """
    base = settings.get("base_model_name_or_path")
    if not base:
        return
    folder = Path(base).expanduser()
    if not (folder / "config.json").is_file():
        try:
            cached = try_to_load_from_cache(base, "config.json", revision=settings.get("revision"))
        except HFValidationError:
            return
        if not isinstance(cached, str):
            return
        folder = Path(cached).parent
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return  # a base model that cannot be read here is no reason against the merge
    check_same_architecture(str(folder), str(instruct_dir))


def overlapping_folders(output: Path, *inputs: Path | None) -> list[str]:
    """
    Names input folders that the output lies in, or of which it holds something.

    Args:
        output (`Path`):
            Folder to be written.
        inputs (`Path`):
            Folders to be read.

    Returns:
        `list[str]`: One sentence each.
    """
    problems = []
    for folder in inputs:
        if folder is None:
            continue
        # Files may be links: the weights of a Hub cache lie in another folder than the one that is read.
        files = [*folder.glob("*"), *folder.glob(f"{CHAT_TEMPLATE_DIR}/*")]
        folder = folder.resolve()
        held = next((file for file in files if file.resolve().is_relative_to(output)), None)
        if output.is_relative_to(folder) or folder.is_relative_to(output):
            problems.append(
                f"The output folder '{output}' is, lies in, or holds the input folder '{folder}', which is never written "
                "to: choose an output folder beside it."
            )
        elif held is not None:
            problems.append(
                f"The output folder '{output}' holds what '{held}' links to, which is read and never written to: choose "
                "another output folder."
            )
    return problems


def disk_problems(output: Path, num_bytes: int) -> list[str]:
    """
    Looks for room and for permission to write.

    Args:
        output (`Path`):
            Folder to be written.
        num_bytes (`int`):
            Size of the merged weights.

    Returns:
        `list[str]`: One sentence per problem.
    """
    parent = output.parent  # where the folder is written before it is renamed
    while not parent.is_dir():
        parent = parent.parent
    problems = []
    if not os.access(parent, os.W_OK | os.X_OK):
        problems.append(f"'{parent}' cannot be written to: choose an output folder elsewhere.")
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        problems.append(
            f"The merged checkpoint takes {num_bytes / 1e9:.1f} GB, '{parent}' has {free / 1e9:.1f} GB free: make room, or "
            "choose an output folder on another disk."
        )
    return problems


def check_values(tensors: dict[str, torch.Tensor], findings: list[str]) -> bool:
    """
    Looks for values that are not finite.

    Args:
        tensors (`dict[str, torch.Tensor]`):
            The adapter's tensors.
        findings (`list[str]`):
            Gets a sentence if there are any.

    Returns:
        `bool`: Whether every update of a LoRA adapter is zero, having a zero factor.
    """
    broken, zeros = [], set()
    for key, tensor in tensors.items():
        # The extremes show a NaN or an infinity without a copy of the tensor.
        extremes = torch.stack(tensor.aminmax()) if tensor.numel() else tensor
        if extremes.is_floating_point() and not extremes.isfinite().all():
            broken.append(key)
        if not extremes.any():
            zeros.add(key)
    if broken:
        findings.append(
            f"{len(broken)} of {len(tensors)} tensors of the adapter hold NaN or infinite values (first: {broken[0]}): the "
            "training diverged; train again with a lower learning rate, or take an earlier adapter."
        )
    factors = {key: _FACTOR.split(key)[0] for key in tensors if _FACTOR.search(key)}
    without = {factors[key] for key in zeros & factors.keys()}
    # A trained bias counts by itself; with a magnitude vector, or in the other types, zeros are no zero update.
    return all(factors[key] in without if key in factors else _BIAS.search(key) and key in zeros for key in tensors)


def check_tokenizers(adapter_dir: Path, instruct_dir: Path) -> list[str]:
    """
    Compares the tokenizer that was saved with the adapter with the instruct model's, where both have one.

    Args:
        adapter_dir (`Path`):
            Adapter folder.
        instruct_dir (`Path`):
            Folder of the instruct checkpoint.

    Returns:
        `list[str]`: A sentence if special tokens have other names.

    Raises:
        `ValueError`: If ordinary token ids mean something else.
    """
    files = [folder / "tokenizer.json" for folder in (adapter_dir, instruct_dir)]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return []
    trained, instruct = (load_tokenizer(str(folder)) for folder in (adapter_dir, instruct_dir))
    if conflicts := vocabulary_conflicts(trained, instruct):
        raise ValueError(
            f"The tokenizer saved with the adapter and the instruct model's do not fit together: {conflicts}. The adapter "
            "was trained on token ids that mean something else here: pass the instruct model whose tokenizer it was "
            "trained with."
        )
    tokens, others = ({i: token for token, i in t.get_vocab().items()} for t in (trained, instruct))
    renamed = [i for i in sorted(tokens.keys() & others.keys()) if tokens[i] != others[i]]
    if not renamed:
        return []
    shown = ", ".join(f"{i} ({tokens[i]!r} against {others[i]!r})" for i in renamed[:3])
    return [
        f"The tokenizer saved with the adapter names {len(renamed)} special tokens otherwise than the instruct model's, the "
        f"first being {shown}: if the adapter was trained in a chat format, it was another one."
    ]


def unlike_tensors(role: str, name: str, tensors: dict[str, TensorInfo], instruct: dict[str, TensorInfo]) -> list[str]:
    """
    Names what keeps a checkpoint from being subtracted from the instruct checkpoint, tensor by tensor.

    Args:
        role (`str`):
            Its part in the merge.
        name (`str`):
            Its name, as it was given.
        tensors (`dict[str, TensorInfo]`):
            Its tensors.
        instruct (`dict[str, TensorInfo]`):
            Those of the instruct checkpoint.

    Returns:
        `list[str]`: A sentence if they differ.
    """
    pairs = counterparts(tensors, instruct)
    problems = [f"{tensor} is missing" for tensor, other in pairs.items() if other not in tensors]
    held = {tensor: tensors[other] for tensor, other in pairs.items() if other in tensors}
    problems += [
        f"{tensor} is {list(info.shape)}, not {list(instruct[tensor].shape)}"
        for tensor, info in held.items()
        if list(info.shape) != list(instruct[tensor].shape)
    ]
    problems += [f"{tensor} is of dtype {info.dtype}" for tensor, info in held.items() if info.dtype not in DTYPES]
    if not problems or not instruct:
        return []
    shown = "; ".join(problems[:3]) + ("; ..." if len(problems) > 3 else "")
    return [
        f"`{role}` '{name}' differs from the instruct checkpoint in {len(problems)} tensors ({shown}): pass the unquantised "
        "checkpoint of the model that the instruct model was post-trained from."
    ]


def counterparts(tensors: Mapping[str, TensorInfo], instruct: Mapping[str, TensorInfo]) -> dict[str, str]:
    """
    Pairs the weights of the instruct checkpoint with those of another checkpoint.

    Args:
        tensors (`Mapping[str, TensorInfo]`):
            Tensors of the other checkpoint.
        instruct (`Mapping[str, TensorInfo]`):
            Those of the instruct checkpoint.

    Returns:
        `dict[str, str]`: For each weight of the instruct checkpoint, the name of its counterpart, which the other checkpoint
        may lack. Masks and other values that are computed and not learned are left out.
    """
    pairs = {}
    for name, info in instruct.items():
        if _COMPUTED.search(name) or info.dtype == "BOOL" or info.dtype.startswith(("U", "I")):
            continue
        pairs[name] = name
        if name not in tensors and name.endswith(("lm_head.weight", "embed_out.weight")):
            # A model whose output layer is its input embedding need not store it twice
            pairs[name] = next((n for n in tensors if _INPUT_EMBEDDING.search(n)), name)
    return pairs


def checkpoint_tensors(shards: list[Path]) -> dict[str, TensorInfo]:
    """
    Lists the tensors of all shards.

    Args:
        shards (`list[Path]`):
            Safetensors files.

    Returns:
        `dict[str, TensorInfo]`: Dtype and shape by name.

    Raises:
        `ValueError`: If two shards hold the same tensor, or one is damaged.
    """
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        held = read_header(shard)[0].tensors
        if twice := sorted(tensors.keys() & held.keys()):
            raise ValueError(
                f"'{shard.name}' in '{shard.parent}' holds {twice[0]}, which another shard holds too: copy or download the "
                "checkpoint again."
            )
        tensors |= held
    return tensors


def missing_parameters(model: PreTrainedModel, tensors: dict[str, TensorInfo]) -> list[str]:
    """
    Names parameters that the checkpoint lacks.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The instruct model without weights.
        tensors (`dict[str, TensorInfo]`):
            Tensors of its checkpoint.

    Returns:
        `list[str]`: A sentence if there are any.
    """
    problems = misfits(model, tensors)
    if not problems:
        return []
    shown = "; ".join(problems[:3]) + ("; ..." if len(problems) > 3 else "")
    return [
        f"The instruct checkpoint does not hold what its configuration promises, in {len(problems)} places ({shown}): "
        "transformers would load random values there. Copy or download the checkpoint again, unquantised and saved whole."
    ]
