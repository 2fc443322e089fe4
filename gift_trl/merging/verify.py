"""Proof of a merge: its tensors and files, and the merged model against the adapter applied at run time."""

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from gift_trl.checkpoints import VERIFICATION_FILE, checkpoint_folder
from gift_trl.merging.proof import (
    different_files,
    different_prompts,
    has_tokenizer,
    load_own_tokenizer,
    plan_merge,
    prove_tensors,
    render,
    scale_of,
    stop_ids,
)
from gift_trl.merging.recipe import MergeRecipe
from gift_trl.merging.runtime import compare_at_run_time


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
# Mean KL divergence that rounding the merged weights to a dtype explains at most: both models run in float32, and what is
# left is that rounding, which falls with the square of the dtype's precision.
MAX_KL = {"float64": 1e-8, "float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}
# The merged model must be much closer to the adapter at run time than the instruct model is, by this factor, or as close as
# rounding the same weights brings it (with some room, for another order of sums), or nothing but noise away.
_MAX_SHARE, _ROUNDING_ROOM, _NOISE_KL = 0.1, 3.0, 1e-9


@dataclass(frozen=True)
class Verification:
    """
    What the checks showed. The numbers of the comparison at run time are `None` where there was none.

    Args:
        num_targets (`int`):
            Number of tensors that the merge updates, by what the adapter says.
        wrong_tensors (`dict[str, float]`):
            Tensors whose bytes differ from those that the merge gives, computed once more, with the largest absolute
            difference.
        changed (`list[str]`):
            Tensors whose bytes differ from the instruct model's.
        unexpected_changes (`list[str]`):
            Those among them that the adapter does not target.
        unchanged_targets (`list[str]`):
            Targets that are the instruct model's. Unless they are wrong too, rounding swallowed their update.
        different_files (`list[str]`):
            Files beside the weights that are not the instruct model's.
        different_prompts (`list[str]`):
            Prompts of which the merged folder's tokenizer and chat template make other token ids than the instruct model's.
        stop_ids_instruct, stop_ids_merged (`dict[str, list[int]]`):
            Token ids at which an answer ends, by generation, model configuration and tokenizer of each folder.
        max_logit_difference (`float`, *optional*):
            Largest |Δlogit| over all positions and tokens, in float32.
        mean_kl (`float`, *optional*):
            Mean over the positions of KL(run time ‖ merged), in nats.
        mean_kl_instruct (`float`, *optional*):
            The same of KL(run time ‖ instruct): what the adapter does.
        mean_kl_rounding (`float`, *optional*):
            The same of KL(run time ‖ run time, merged by PEFT in memory and rounded to the checkpoint's dtype): what
            rounding does.
        top1_agreement (`float`, *optional*):
            Share of the positions at which run time and merged find the same token likeliest.
        num_positions, num_prompts (`int`):
            Number of positions and prompts compared.
        stopped_at_run_time, stopped_merged (`int`):
            Number of prompts whose greedy answer ends by itself within `max_new_tokens`.
        same_stop (`int`):
            Number of prompts at which both stop, or neither does.
        tied_stops (`int`):
            Number of the others whose answers part at a tie: the two tokens are so close that rounding decides.
        max_kl (`float`, *optional*):
            Bound of `mean_kl`.
        run_time_reason (`str`):
            Why there was no comparison at run time; empty if there was.
    """

    num_targets: int
    wrong_tensors: dict[str, float]
    changed: list[str]
    unexpected_changes: list[str]
    unchanged_targets: list[str]
    different_files: list[str]
    different_prompts: list[str]
    stop_ids_instruct: dict[str, list[int]]
    stop_ids_merged: dict[str, list[int]]
    max_logit_difference: float | None = None
    mean_kl: float | None = None
    mean_kl_instruct: float | None = None
    mean_kl_rounding: float | None = None
    top1_agreement: float | None = None
    num_positions: int = 0
    num_prompts: int = 0
    stopped_at_run_time: int = 0
    stopped_merged: int = 0
    same_stop: int = 0
    tied_stops: int = 0
    max_kl: float | None = None
    run_time_reason: str = ""

    def problems(self) -> list[str]:
        """
        What is wrong.

        Returns:
            `list[str]`: One sentence each; empty if the merge is proven.
        """
        problems = []
        if self.unexpected_changes:
            problems.append(
                f"{len(self.unexpected_changes)} tensors changed that the adapter does not target, the first being "
                f"{_first(self.unexpected_changes)}."
            )
        wrong = [name for name in self.wrong_tensors if name not in self.unexpected_changes]
        if wrong:
            problems.append(
                f"{len(wrong)} of {self.num_targets} targeted tensors are not what the merge gives, by up to "
                f"{max(self.wrong_tensors[name] for name in wrong):.1e}: {_first(wrong)}. Merge again; differences in "
                "the last digit come from a merge on another processor or with other versions of the libraries."
            )
        if self.different_files:
            problems.append(
                f"{len(self.different_files)} files beside the weights are not the instruct model's: "
                f"{_first(self.different_files)}. Copy them from there."
            )
        if self.different_prompts:
            problems.append(
                f"Tokenizer or chat template make other token ids of {len(self.different_prompts)} prompts, the first being "
                f"{self.different_prompts[0]!r}: copy them from the instruct model."
            )
        if self.stop_ids_instruct != self.stop_ids_merged:
            problems.append(
                f"Answers end at other token ids ({self.stop_ids_merged}) than the instruct model's "
                f"({self.stop_ids_instruct}): copy its configuration and tokenizer files."
            )
        if self.mean_kl is None:
            return problems
        if not self.mean_kl <= self.max_kl:
            problems.append(
                f"The mean KL divergence is {self.mean_kl:.2e}, above the bound of {self.max_kl:.0e} that rounding explains."
            )
        share = max(_MAX_SHARE * self.mean_kl_instruct, _ROUNDING_ROOM * self.mean_kl_rounding, _NOISE_KL)
        if not self.mean_kl <= share:
            problems.append(
                f"The merged model is no closer to the adapter at run time (mean KL divergence {self.mean_kl:.2e}) than "
                f"rounding explains ({self.mean_kl_rounding:.2e}), for an adapter that moves the instruct model by "
                f"{self.mean_kl_instruct:.2e}: part of the update is missing or wrong."
            )
        if self.same_stop + self.tied_stops < self.num_prompts:
            problems.append(
                f"The answers to {self.num_prompts - self.same_stop - self.tied_stops} of {self.num_prompts} prompts end by "
                "themselves in one of the two models only, and not because of a tie within rounding."
            )
        return problems

    def summary(self) -> str:
        """
        The checks in a few lines for the terminal.

        Returns:
            `str`: Text of a few lines.
        """
        verdict = "within" if not self.problems() else "OUTSIDE"
        lines = [
            f"  computed once more: {len(self.changed)} tensors changed, {len(self.unexpected_changes)} of them no target; "
            f"{len(self.unchanged_targets)} of {self.num_targets} targets unchanged, {len(self.wrong_tensors)} tensors wrong",
            f"  beside the weights: {len(self.different_files)} files differ, {len(self.different_prompts)} prompts differ",
        ]
        if self.mean_kl is None:
            lines.insert(0, f"Verified, {verdict} the bounds; without the run-time comparison: {self.run_time_reason}")
        else:
            lines = [
                f"Verified against the adapter at run time, on {self.num_positions} positions of {self.num_prompts} "
                f"prompts: {verdict} the bounds",
                f"  max |logit difference| {self.max_logit_difference:.2e}, mean KL {self.mean_kl:.2e} (bound "
                f"{self.max_kl:.0e}; rounding {self.mean_kl_rounding:.2e}, instruct model {self.mean_kl_instruct:.2e}), "
                f"same likeliest token at {100 * self.top1_agreement:.1f} %",
                f"  greedy answers that end by themselves: {self.stopped_at_run_time} at run time, {self.stopped_merged} "
                f"merged, alike for {self.same_stop} of {self.num_prompts} prompts, {self.tied_stops} parted by a tie",
                *lines,
            ]
        return "\n".join([*lines, *(f"  {problem}" for problem in self.problems())])


def verify_merge(
    merged_dir: str | os.PathLike,
    adapter: str | os.PathLike,
    instruct_model: str | os.PathLike,
    *,
    adapter_revision: str | None = None,
    instruct_model_revision: str | None = None,
    scale: float = 1.0,
    saved_modules: str | None = None,
    prompts: Sequence[str] | None = None,
    max_new_tokens: int = 32,
    max_kl: float | None = None,
) -> Verification:
    """
    Checks a merged checkpoint against the instruct model and the adapter; nothing is taken from its own report.

    Every tensor has to have the bytes that the merge gives, computed once more, and every file beside the weights those of
    the instruct model. Its tokenizer and chat template have to give the same token ids, its answers to end at the same
    ones. Then both models run in float32: the merged one, and the instruct model with the adapter applied at run time.

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
        saved_modules (`str`, *optional*):
            As in the merge, see [`merge_adapter`].
        prompts (`Sequence[str]`, *optional*):
            Questions, each put into the chat format as the only message where there is one. Defaults to eight built-in
            ones, or to rows of random token ids if there is no tokenizer.
        max_new_tokens (`int`, *optional*, defaults to `32`):
            Longest greedy answer. 0 generates none.
        max_kl (`float`, *optional*):
            Bound of the mean KL divergence. Defaults to what rounding to the checkpoint's dtype explains, see `MAX_KL`.

    Returns:
        [`Verification`]: What was found.

    Raises:
        `ValueError`: If there is no prompt, or no tokenizer for those that are given; if adapter and instruct model cannot
            be merged; or if the merged checkpoint does not have the instruct model's tensors.
        `FileNotFoundError`: If the merged checkpoint lacks its configuration or weights.
    """
    recipe = MergeRecipe(
        instruct_model=os.fspath(instruct_model),
        adapter=[os.fspath(adapter)],
        adapter_revision=[adapter_revision],
        scale=scale,
        instruct_model_revision=instruct_model_revision,
        saved_modules=saved_modules,
    )
    return verify_recipe(merged_dir, recipe, prompts=prompts, max_new_tokens=max_new_tokens, max_kl=max_kl)


def verify_recipe(
    merged_dir: str | os.PathLike,
    recipe: MergeRecipe,
    *,
    prompts: Sequence[str] | None = None,
    max_new_tokens: int = 32,
    max_kl: float | None = None,
) -> Verification:
    """
    Checks the merge of a recipe as [`verify_merge`] does; other recipes than one adapter's without the run-time comparison.

    Args:
        merged_dir (`str` or `os.PathLike`):
            Folder that [`merge_recipe`] wrote.
        recipe ([`MergeRecipe`]):
            The recipe.
        prompts, max_new_tokens, max_kl (*optional*):
            As in [`verify_merge`].

    Returns:
        [`Verification`]: What was found.

    Raises:
        `ValueError`, `FileNotFoundError`: As [`verify_merge`].
    """
    merged_dir = Path(merged_dir)
    check_prompts(prompts, recipe.instruct_model, recipe.instruct_model_revision)
    if not (merged_dir / "config.json").is_file():
        raise FileNotFoundError(f"'{merged_dir}' has no config.json, so nothing loads it: merge again.")
    plan = plan_merge(recipe)
    instruct_dir = plan.instruct_dir
    proof = prove_tensors(merged_dir, recipe, plan)
    rows, reason = None, "has no tokenizer"
    if (tokenizer := load_own_tokenizer(instruct_dir)) is not None:
        try:
            rows = render(tokenizer, PROMPTS if prompts is None else prompts)
        except ValueError as error:  # such as a vocabulary of words, for other texts than these
            if prompts is not None:
                raise
            reason = f"cannot write the built-in prompts ({error})"
    if rows is None:
        warnings.warn(
            f"'{recipe.instruct_model}' {reason}: the merge is verified on random token ids. Prompts of your own are better "
            "(`prompts`, `--verify_prompts FILE`).",
            stacklevel=3,
        )
    prompts = list(PROMPTS if prompts is None else prompts)
    facts = {
        "num_targets": len(proof.dtypes),
        "wrong_tensors": proof.wrong,
        "changed": proof.changed,
        "unexpected_changes": [name for name in proof.wrong if name not in proof.dtypes],
        "unchanged_targets": [name for name in proof.dtypes if name not in set(proof.changed)],
        "different_files": different_files(merged_dir, plan),
        "different_prompts": different_prompts(merged_dir, prompts, rows) if rows is not None else [],
        "stop_ids_instruct": stop_ids(instruct_dir),
        "stop_ids_merged": stop_ids(merged_dir),
    }
    if not recipe.is_plain:
        facts["run_time_reason"] = f"PEFT applies one adapter at run time, and not the method {recipe.method}."
    else:
        dtype = min(set(proof.dtypes.values()), key=lambda dtype: -torch.finfo(dtype).eps, default=torch.float32)
        facts["max_kl"] = MAX_KL[str(dtype).removeprefix("torch.")] if max_kl is None else max_kl
        parts = (instruct_dir, plan.adapters[0], merged_dir)
        facts |= compare_at_run_time(*parts, rows, recipe.saved_modules, scale_of(recipe), max_new_tokens, dtype)
    verification = Verification(**facts)
    text = json.dumps({**asdict(verification), "problems": verification.problems()}, indent=2) + "\n"
    (merged_dir / VERIFICATION_FILE).write_text(text, encoding="utf-8")
    return verification


def check_prompts(
    prompts: Sequence[str] | None, instruct_model: str, instruct_model_revision: str | None = None
) -> None:
    """
    Checks that a merge can be verified on prompts, before the merge.

    Args:
        prompts (`Sequence[str]`, *optional*):
            As in [`verify_merge`].
        instruct_model (`str`):
            Folder or Hub id of the instruct model.
        instruct_model_revision (`str`, *optional*):
            Its revision on the Hub.

    Raises:
        `ValueError`: If there is no prompt, or no tokenizer that can write those that are given.
    """
    if prompts is not None and not prompts:
        raise ValueError(
            "There is no prompt to verify the merge on: give at least one, or `None` for the built-in ones."
        )
    folder = checkpoint_folder(instruct_model, instruct_model_revision, weights=False)
    if prompts is not None and not has_tokenizer(folder):
        raise ValueError(
            f"'{instruct_model}' has no tokenizer, so the prompts cannot become token ids: add its tokenizer files, or verify "
            "without prompts of your own, on random token ids."
        )
    if prompts is not None:
        render(load_own_tokenizer(folder), prompts)


def _first(items: list[str], count: int = 3) -> str:
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")
