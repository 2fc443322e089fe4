"""Proof of a merge: the merged checkpoint against the instruct model with the adapter applied at run time."""

import gc
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gift_trl.checkpoints import checkpoint_folder, safetensors_files
from gift_trl.merging.stream import CheckpointReader
from gift_trl.model_pair import end_of_turn_token_ids


VERIFICATION_FILE = "merge_verification.json"
PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Solve step by step: a train travels 120 km in 1.5 hours. What is its average speed?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Translate into German: The weather is nice today.",
    "List three differences between cats and dogs.",
    "Summarise: The committee met on Monday, agreed on the budget, and postponed all other questions to the next meeting.",
    "Is 97 a prime number? Answer yes or no, then give the reason.",
)
# Mean KL divergence that rounding the merged weights to a dtype explains: both models run in float32, and what is left is
# that rounding, which falls with the square of the dtype's precision.
MAX_KL = {"float64": 1e-8, "float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Verification:
    """
    What a comparison of the two showed.

    Args:
        max_logit_difference (`float`):
            Largest |Δlogit| over all positions and tokens.
        mean_kl (`float`):
            Mean over the positions of KL(run time ‖ merged), in nats.
        top1_agreement (`float`):
            Share of the positions at which both find the same token likeliest.
        num_positions (`int`):
            Number of positions compared.
        num_prompts (`int`):
            Number of prompts.
        stopped_at_run_time, stopped_merged (`int`):
            Number of prompts whose greedy answer ends by itself within `max_new_tokens`.
        same_stop (`int`):
            Number of prompts at which both stop, or neither does.
        changed (`list[str]`):
            Tensors whose values differ from the instruct model's.
        unexpected_changes (`list[str]`):
            Those among them that the adapter does not target.
        unchanged_targets (`list[str]`):
            Targets whose values are the instruct model's.
        max_kl (`float`):
            Bound of `mean_kl`.
    """

    max_logit_difference: float
    mean_kl: float
    top1_agreement: float
    num_positions: int
    num_prompts: int
    stopped_at_run_time: int
    stopped_merged: int
    same_stop: int
    changed: list[str]
    unexpected_changes: list[str]
    unchanged_targets: list[str]
    max_kl: float

    def problems(self) -> list[str]:
        """
        What is outside the bounds.

        Returns:
            `list[str]`: One sentence each; empty if the merge is proven.
        """
        problems = []
        if not self.mean_kl <= self.max_kl:
            problems.append(
                f"The mean KL divergence is {self.mean_kl:.2e}, above the bound of {self.max_kl:.0e} that rounding explains."
            )
        if self.unexpected_changes:
            problems.append(
                f"{len(self.unexpected_changes)} tensors changed that the adapter does not target, the first being "
                f"{self.unexpected_changes[0]}."
            )
        return problems

    def summary(self) -> str:
        """
        The comparison in a few lines for the terminal.

        Returns:
            `str`: Text of a few lines.
        """
        verdict = "within" if not self.problems() else "OUTSIDE"
        return "\n".join(
            [
                f"Verified against the adapter at run time, on {self.num_positions} positions of {self.num_prompts} prompts: "
                f"{verdict} the bounds",
                f"  max |logit difference| {self.max_logit_difference:.2e}, mean KL {self.mean_kl:.2e} (bound "
                f"{self.max_kl:.0e}), same likeliest token at {100 * self.top1_agreement:.1f} %",
                f"  greedy answers that end by themselves: {self.stopped_at_run_time} at run time, {self.stopped_merged} "
                f"merged, alike for {self.same_stop} of {self.num_prompts} prompts",
                f"  {len(self.changed)} tensors changed, {len(self.unexpected_changes)} of them no target; "
                f"{len(self.unchanged_targets)} targets unchanged",
                *(f"  {problem}" for problem in self.problems()),
            ]
        )


def verify_merge(
    merged_dir: str | os.PathLike,
    adapter: str | os.PathLike,
    instruct_model: str | os.PathLike,
    *,
    adapter_revision: str | None = None,
    instruct_model_revision: str | None = None,
    scale: float = 1.0,
    prompts: Sequence[str] | None = None,
    max_new_tokens: int = 32,
    max_kl: float | None = None,
) -> Verification:
    """
    Compares a merged checkpoint with the instruct model that has the adapter applied at run time, both in float32.

    The result is also written into the merged folder. One model is in memory at a time.

    Args:
        merged_dir (`str` or `os.PathLike`):
            Folder that [`merge_adapter`] wrote.
        adapter (`str` or `os.PathLike`):
            Folder or Hub id of the adapter.
        instruct_model (`str` or `os.PathLike`):
            Folder or Hub id of the instruct model.
        adapter_revision, instruct_model_revision (`str`, *optional*):
            Revisions on the Hub.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor of the update in the merge.
        prompts (`Sequence[str]`, *optional*):
            Questions, each put into the chat format as the only message where there is one. Defaults to eight built-in
            ones.
        max_new_tokens (`int`, *optional*, defaults to `32`):
            Longest greedy answer. 0 generates none.
        max_kl (`float`, *optional*):
            Bound of the mean KL divergence. Defaults to what rounding to the checkpoint's dtype explains, see `MAX_KL`.

    Returns:
        [`Verification`]: The comparison.

    Raises:
        `ValueError`: If there is no prompt.
    """
    merged_dir = Path(merged_dir)
    adapter_dir = checkpoint_folder(os.fspath(adapter), adapter_revision)
    instruct_dir = checkpoint_folder(os.fspath(instruct_model), instruct_model_revision)
    facts = json.loads((merged_dir / "merge_report.json").read_text(encoding="utf-8"))
    if max_kl is None:
        max_kl = max(MAX_KL[dtype] for dtype in facts["merged_tensors"].values())
    changed = _changed_tensors(merged_dir, instruct_dir)
    targets = set(facts["merged_tensors"])

    tokenizer = _tokenizer(merged_dir)
    stops: list[int] = []
    results = []
    with tqdm(total=2 * len(prompts or PROMPTS), desc="Verifying", unit="prompt", delay=2) as bar:
        for merged in (False, True):
            model = AutoModelForCausalLM.from_pretrained(merged_dir if merged else instruct_dir, dtype=torch.float32)
            if not merged:
                model = apply_adapter(model, adapter_dir, scale)
                rows = _token_rows(tokenizer, prompts, model.config.get_text_config().vocab_size)
                stops = end_of_turn_token_ids(tokenizer, str(instruct_dir)) if tokenizer is not None else []
            results.append([_run(model, ids, stops, max_new_tokens, bar) for ids in rows])
            del model
            gc.collect()  # before the next one is loaded
    difference, kl, agreed, positions = 0.0, 0.0, 0, 0
    for (expected, _), (found, _) in zip(*results, strict=True):
        difference = max(difference, float((found - expected).abs().max()))
        log_p, log_q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        agreed += int((expected.argmax(-1) == found.argmax(-1)).sum())
        positions += len(expected)
    stopped = [[stop for _, stop in result] for result in results]
    verification = Verification(
        max_logit_difference=difference,
        mean_kl=kl / positions,
        top1_agreement=agreed / positions,
        num_positions=positions,
        num_prompts=len(rows),
        stopped_at_run_time=sum(stopped[0]),
        stopped_merged=sum(stopped[1]),
        same_stop=sum(a == b for a, b in zip(*stopped, strict=True)),
        changed=changed,
        unexpected_changes=[name for name in changed if name not in targets],
        unchanged_targets=sorted(targets - set(changed)),
        max_kl=max_kl,
    )
    text = json.dumps({**asdict(verification), "problems": verification.problems()}, indent=2) + "\n"
    (merged_dir / VERIFICATION_FILE).write_text(text, encoding="utf-8")
    return verification


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
        if isinstance(scaling, dict) and "default" in scaling:
            module.set_scale("default", scale)


def _changed_tensors(merged_dir: Path, instruct_dir: Path) -> list[str]:
    with (
        CheckpointReader(safetensors_files(merged_dir)) as merged,
        CheckpointReader(safetensors_files(instruct_dir)) as instruct,
    ):
        changed = []
        for name, tensor in instruct.tensors.items():
            step = 2**22
            for start in range(0, tensor.num_bytes, step):
                count = min(step, tensor.num_bytes - start)
                parts = [reader.read_bytes(reader.tensors[name], start, count) for reader in (merged, instruct)]
                if not torch.equal(*parts):
                    changed.append(name)
                    break
        return changed


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    # A checkpoint without a tokenizer is compared on token ids, which need not mean anything
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    return AutoTokenizer.from_pretrained(folder)


def _token_rows(
    tokenizer: PreTrainedTokenizerBase | None, prompts: Sequence[str] | None, vocab_size: int
) -> list[list[int]]:
    if prompts is not None and not prompts:
        raise ValueError(
            "There is no prompt to verify the merge on: give at least one, or none for the built-in ones."
        )
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (len(PROMPTS), 24), generator=generator).tolist()
    rows = []
    for prompt in prompts or PROMPTS:
        if tokenizer.chat_template:
            message = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        else:
            ids = tokenizer(prompt).input_ids
        rows.append(list(ids))
    return rows


@torch.inference_mode()
def _run(
    model: PreTrainedModel, ids: list[int], stops: list[int], max_new_tokens: int, bar: tqdm
) -> tuple[torch.Tensor, bool]:
    """Logits of every position, and whether the greedy answer ends by itself."""
    tensor = torch.tensor([ids], device=model.device)
    logits = model(input_ids=tensor).logits[0].float().cpu()
    stopped = False
    if max_new_tokens and stops:
        answer = model.generate(
            input_ids=tensor,
            attention_mask=torch.ones_like(tensor),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=stops[0],
        )
        stopped = bool(set(answer[0, len(ids) :].tolist()) & set(stops))
    bar.update()
    return logits, stopped
