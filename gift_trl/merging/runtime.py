"""Adapters at run time: put on a model, scaled, and compared with the merged checkpoint."""

import gc
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from gift_trl.checkpoints import ADAPTER_FILE
from gift_trl.merging.adapter import ADAPTER_CONFIG_FILE
from gift_trl.merging.preflight import AdapterPlan
from gift_trl.merging.proof import stop_ids


# Logits that float32 does not tell apart, a bound from large models
_NOISE_LOGITS = 1e-3
_RANDOM_ROWS = 8


def apply_adapter(model: PreTrainedModel, adapter_dir: Path, scale: float = 1.0) -> PreTrainedModel:
    """
    Puts an adapter on a model, to be applied at run time.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model. It is changed.
        adapter_dir (`Path`):
            Adapter folder.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor of the update.

    Returns:
        [`~transformers.PreTrainedModel`]: The model with PEFT's layers in it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT says of the adapter was checked before the merge
        peft_model = PeftModel.from_pretrained(model, adapter_dir)
    set_scale(peft_model.get_base_model(), scale)
    return peft_model.get_base_model().eval()


def apply_plan(
    model: PreTrainedModel, adapter: AdapterPlan, saved_modules: str | None, scale: float = 1.0
) -> PreTrainedModel:
    """
    Puts an adapter that has passed its checks on a model, so that it computes what the merge would make of it.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model. It is changed.
        adapter (`AdapterPlan`):
            The adapter.
        saved_modules (`str`, *optional*):
            `"ignore"` leaves out what the adapter holds whole.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor of the update.

    Returns:
        [`~transformers.PreTrainedModel`]: The model with PEFT's layers in it.
    """
    if saved_modules != "ignore":
        return apply_adapter(model, adapter.folder, scale)
    with tempfile.TemporaryDirectory() as updates:
        return apply_adapter(model, _only_updates(adapter.folder, adapter.settings, Path(updates)), scale)


def _only_updates(folder: Path, settings: Mapping[str, Any], copy: Path) -> Path:
    """A copy of an adapter without the tensors that it holds whole."""
    mark = f".{PEFT_TYPE_TO_PREFIX_MAPPING[settings['peft_type']]}"
    tensors = {key: tensor for key, tensor in load_file(folder / ADAPTER_FILE).items() if mark in key}
    save_file(tensors, copy / ADAPTER_FILE, metadata={"format": "pt"})
    plain = {**settings, "modules_to_save": None, **({"bias": "none"} if "bias" in settings else {})}
    (copy / ADAPTER_CONFIG_FILE).write_text(json.dumps(plain), encoding="utf-8")
    return copy


def set_scale(model: PreTrainedModel, scale: float) -> None:
    """
    Sets the factor of the update that an adapter makes at run time.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A model with PEFT's layers in it.
        scale (`float`):
            Factor; 1.0 is the update as it was trained.
    """
    for module in model.modules():
        scaling: Any = getattr(module, "scaling", None)
        # Layers of GraLoRA and PEANUT have a factor that cannot be set: what passes the checks leaves it at 1
        if isinstance(scaling, dict) and "default" in scaling and (scale != 1.0 or hasattr(module, "set_scale")):
            module.set_scale("default", scale)


def _rounded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its adapter merged by PEFT and rounded to a dtype, computed in float32: what no merge avoids."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    return model


def compare_at_run_time(
    instruct_dir: Path,
    adapter: AdapterPlan,
    merged_dir: Path,
    rows: list[list[int]] | None,
    saved_modules: str | None,
    scale: float,
    max_new_tokens: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """
    Compares the merged checkpoint with the instruct model to which the adapter is applied at run time, both in float32.

    Args:
        instruct_dir, merged_dir (`Path`):
            Folders.
        adapter (`AdapterPlan`):
            The adapter.
        rows (`list[list[int]]`, *optional*):
            Token ids of the prompts. Random ones if there are none.
        saved_modules (`str`, *optional*):
            `"ignore"` leaves out what the adapter holds whole.
        scale (`float`):
            Factor of the update.
        max_new_tokens (`int`):
            Length of the answers whose end is compared.
        dtype (`torch.dtype`):
            Coarsest dtype of the merged tensors.

    Returns:
        `dict[str, Any]`: The fields of [`~gift_trl.merging.verify.Verification`] about it.
    """
    model = AutoModelForCausalLM.from_pretrained(instruct_dir, dtype=torch.float32)
    if rows is None:  # token ids need not mean anything
        generator, vocab_size = torch.Generator().manual_seed(0), model.config.get_text_config().vocab_size
        rows = torch.randint(vocab_size, (_RANDOM_ROWS, 24), generator=generator).tolist()
    stops = [sorted({*chain(*stop_ids(folder).values())}) for folder in (instruct_dir, merged_dir)]
    with tqdm(total=4 * len(rows), desc="Verifying", unit="prompt", delay=2) as bar:
        instruct = _logits(model, rows, bar)
        model = apply_plan(model, adapter, saved_modules, scale)
        run_time = _logits(model, rows, bar)
        answers = [_answer(model, ids, stops[0], max_new_tokens) for ids in rows]
        # Rounding to what it runs in changes nothing
        precise = torch.finfo(dtype).eps <= torch.finfo(torch.float32).eps
        rounded = run_time if precise else _logits(_rounded(model, dtype), rows, bar)
        del model
        gc.collect()  # before the next one is loaded
        model = AutoModelForCausalLM.from_pretrained(merged_dir, dtype=torch.float32)
        merged = _logits(model, rows, bar)
        merged_answers = [_answer(model, ids, stops[1], max_new_tokens) for ids in rows]
    pairs = list(zip(run_time, merged, strict=True))
    positions = sum(map(len, rows))
    noise = max(_NOISE_LOGITS, *(float((a - b).abs().max()) for a, b in zip(run_time, rounded, strict=True)))
    alike = [a.stopped == b.stopped for a, b in zip(answers, merged_answers, strict=True)]
    return {
        "max_logit_difference": max(float((a - b).abs().max()) for a, b in pairs),
        "mean_kl": _mean_kl(run_time, merged),
        "mean_kl_instruct": _mean_kl(run_time, instruct),
        "mean_kl_rounding": _mean_kl(run_time, rounded),
        "top1_agreement": sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs) / positions,
        "num_positions": positions,
        "num_prompts": len(rows),
        "stopped_at_run_time": sum(answer.stopped for answer in answers),
        "stopped_merged": sum(answer.stopped for answer in merged_answers),
        "same_stop": sum(alike),
        "tied_stops": sum(
            not same and part_at_a_tie(a, b, noise) for same, a, b in zip(alike, answers, merged_answers, strict=True)
        ),
    }


@dataclass(frozen=True)
class Answer:
    """
    A greedy answer.

    Args:
        tokens (`list[int]`):
            Its tokens.
        logits (`Sequence[torch.Tensor]`):
            Logits, of shape `(vocabulary,)`, that each was chosen by.
        stopped (`bool`):
            Whether it ended by itself.
    """

    tokens: list[int]
    logits: Sequence[torch.Tensor]
    stopped: bool


def part_at_a_tie(expected: Answer, found: Answer, noise: float) -> bool:
    """
    Whether two answers part where the likeliest tokens are as good as equal.

    Args:
        expected, found ([`Answer`]):
            The answers.
        noise (`float`):
            Difference of logits that rounding explains.

    Returns:
        `bool`: Whether they do.
    """
    for logits, token, other in zip(expected.logits, expected.tokens, found.tokens, strict=False):
        if token != other:
            # Each of the two logits may move by the noise; the prompts show about the largest move, not more than it.
            return float(logits[token] - logits[other]) <= 4 * noise
    return False


def _mean_kl(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    total = 0.0
    for a, b in zip(expected, found, strict=True):
        log_p, log_q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / sum(map(len, expected))


@torch.inference_mode()
def _logits(model: PreTrainedModel, rows: list[list[int]], bar: tqdm) -> list[torch.Tensor]:
    logits = []
    for ids in rows:
        logits.append(model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().cpu())
        bar.update()
    return logits


@torch.inference_mode()
def _answer(model: PreTrainedModel, ids: list[int], stops: list[int], max_new_tokens: int) -> Answer:
    if not max_new_tokens or not stops:
        return Answer([], [], False)
    tensor = torch.tensor([ids], device=model.device)
    output = model.generate(
        input_ids=tensor,
        attention_mask=torch.ones_like(tensor),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=stops[0],
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = output.sequences[0, len(ids) :].tolist()
    return Answer(tokens, [step[0].float().cpu() for step in output.logits], bool(set(tokens) & set(stops)))
