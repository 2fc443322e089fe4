"""Exact proof of a merge: the tensors are computed once more, and the files beside them compared byte by byte."""

import fnmatch
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import CHAT_TEMPLATE_DIR, GENERATION_CONFIG_NAME

from gift_trl.checkpoints import safetensors_files
from gift_trl.merging.conversion import DTYPES
from gift_trl.merging.methods import merge_by_method
from gift_trl.merging.preflight import MergePlan, preflight
from gift_trl.merging.recipe import MergeRecipe
from gift_trl.merging.stream import CheckpointReader, merge_targets
from gift_trl.model_pair import load_config


_CHUNK_BYTES = 4 * 2**20
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
# Files by which a folder is loaded or used in another way, should the instruct model not have them
_DECISIVE = (
    "adapter_config.json",
    "added_tokens.json",
    f"{CHAT_TEMPLATE_DIR}/*",
    "chat_template.*",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer*",
    "vocab.*",
    "*.py",
)


@dataclass(frozen=True)
class TensorProof:
    """
    The tensors of a merged checkpoint against those that the merge has to give.

    Args:
        dtypes (`dict[str, torch.dtype]`):
            The tensors that the merge updates, by what adapter and recipe say, with their dtypes.
        changed (`list[str]`):
            Tensors whose bytes differ from the instruct model's.
        wrong (`dict[str, float]`):
            Tensors whose bytes differ from what the merge has to give, with the largest absolute difference.
    """

    dtypes: dict[str, torch.dtype]
    changed: list[str]
    wrong: dict[str, float]


class _Comparison:
    """In the place of `MergedWriter`: what it would write is compared with what the merged checkpoint holds."""

    def __init__(self, source: CheckpointReader, merged: CheckpointReader):
        self.source = source
        self.merged = merged
        self.wrong: dict[str, float] = {}

    def copy_rest(self, touched: set[str]) -> None:
        for name in self.source.tensors:
            if name not in touched:
                self.wrong |= _difference(self.source, self.merged, name)

    def write(self, name: str, values: torch.Tensor, start: int = 0) -> None:
        tensor, position = self.merged.tensors[name], start * values.element_size()
        for piece in values.contiguous().view(-1).split(_CHUNK_BYTES // values.element_size()):
            found = self.merged.read_bytes(tensor, position, piece.nbytes)
            position += piece.nbytes
            if not torch.equal(found, piece.view(torch.uint8)):
                self.wrong[name] = max(self.wrong.get(name, 0.0), _largest(found.view(piece.dtype), piece))


def plan_merge(recipe: MergeRecipe) -> MergePlan:
    """
    The plan of a merge that is not written.

    Args:
        recipe ([`MergeRecipe`]):
            The recipe.

    Returns:
        [`MergePlan`]: What the merge does, from the adapters and checkpoints alone.

    Raises:
        `ValueError`: As [`preflight`].
    """
    roles = {} if recipe.is_plain else {"base_model": recipe.base_model, "tuned_model": recipe.tuned_model}
    return preflight(
        list(zip(recipe.adapter, recipe.adapter_revision, strict=True)),
        recipe.instruct_model,
        None,
        instruct_model_revision=recipe.instruct_model_revision,
        scale=scale_of(recipe),
        saved_modules=recipe.saved_modules,
        companions={role: (name, getattr(recipe, f"{role}_revision")) for role, name in roles.items() if name},
        scaled_by_layers=recipe.is_plain,
    )


def scale_of(recipe: MergeRecipe) -> float:
    """
    Factor of the update that PEFT's layers apply.

    Args:
        recipe ([`MergeRecipe`]):
            The recipe.

    Returns:
        `float`: The factor, of one adapter together with its weight.
    """
    return recipe.scale * recipe.adapter_weight[0] if recipe.is_plain else recipe.scale


def prove_tensors(merged_dir: Path, recipe: MergeRecipe, plan: MergePlan) -> TensorProof:
    """
    Computes the merge once more, tensor by tensor, and compares its bytes with those of a merged checkpoint.

    Nothing is written, and no more is in memory than during the merge. The bytes are the same where the processor and the
    versions of the libraries are.

    Args:
        merged_dir (`Path`):
            The merged checkpoint.
        recipe ([`MergeRecipe`]):
            The recipe.
        plan ([`MergePlan`]):
            Its plan.

    Returns:
        [`TensorProof`]: What differs.

    Raises:
        `ValueError`: If the checkpoint does not have the tensors of the instruct model, or the merge cannot be computed.
        `FileNotFoundError`: If it lacks a file.
    """
    with ExitStack() as stack:
        source = stack.enter_context(CheckpointReader(plan.shards))
        merged = stack.enter_context(CheckpointReader(safetensors_files(merged_dir)))
        others = {role: stack.enter_context(CheckpointReader(shards)) for role, (_, shards) in plan.companions.items()}
        kinds = [
            {name: (tensor.info.dtype, list(tensor.info.shape)) for name, tensor in reader.tensors.items()}
            for reader in (source, merged)
        ]
        unlike = [name for name in kinds[0] | kinds[1] if kinds[0].get(name) != kinds[1].get(name)]
        if unlike:
            raise ValueError(
                f"'{merged_dir}' does not hold the tensors of the instruct model: {len(unlike)} are missing, additional or "
                f"of another dtype or shape, the first being {unlike[0]}. Merge again, or pass the instruct model that it "
                "was merged from."
            )
        comparison = _Comparison(source, merged)
        if recipe.is_plain:
            targets = plan.adapters[0].targets
            comparison.copy_rest({tensor for target in targets for tensor in target.tensors})
            made = dict(merge_targets(targets, source, comparison, scale_of(recipe)))
        else:
            others = [others.get(role) for role in ("base_model", "tuned_model")]
            made = dict(merge_by_method(recipe, plan.adapters, source, comparison, *others))
        changed = [
            name
            for name in source.tensors
            if (_difference(source, merged, name) if name in comparison.wrong else made.get(name))
        ]
        return TensorProof({name: source.tensors[name].dtype for name in made}, changed, comparison.wrong)


def different_files(merged_dir: Path, plan: MergePlan) -> list[str]:
    """
    Compares the files beside the weights: configuration, generation configuration, tokenizer, chat templates, code.

    Args:
        merged_dir (`Path`):
            The merged checkpoint.
        plan ([`MergePlan`]):
            The plan of the merge.

    Returns:
        `list[str]`: Name of each file that is missing, has other bytes, or decides how the folder is loaded although the
        instruct model has none of that name; with a word on which of these.
    """
    # Inside, because the merge module needs the name of the file that the comparison is written to
    from gift_trl.merging.merge import _copy_companions

    found = []
    # Copied once more, so that there is one rule of what belongs to a merged checkpoint
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _copy_companions(plan, folder)
        expected = sorted(file for file in folder.rglob("*") if file.is_file())
        for file in expected:
            other = merged_dir / file.relative_to(folder)
            if not other.is_file():
                found.append(f"{file.relative_to(folder)} (missing)")
            elif other.read_bytes() != file.read_bytes():
                found.append(f"{file.relative_to(folder)} (different)")
        names = {file.relative_to(folder).as_posix() for file in expected}
    for file in sorted([*merged_dir.iterdir(), *merged_dir.glob(f"{CHAT_TEMPLATE_DIR}/*")]):
        relative = file.relative_to(merged_dir).as_posix()
        if file.is_file() and relative not in names and any(fnmatch.fnmatch(relative, mark) for mark in _DECISIVE):
            found.append(f"{relative} (additional)")
    return found


def has_tokenizer(folder: Path) -> bool:
    """
    Whether a checkpoint folder has a tokenizer.

    Args:
        folder (`Path`):
            The folder.

    Returns:
        `bool`: Whether it has.
    """
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def load_own_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """
    The tokenizer of a checkpoint folder.

    Args:
        folder (`Path`):
            The folder.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`] or `None`: The tokenizer, `None` if there is none.
    """
    return AutoTokenizer.from_pretrained(folder) if has_tokenizer(folder) else None


def render(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """
    Token ids of questions.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, whose chat template is used if it has one.
        prompts (`Sequence[str]`):
            The questions.

    Returns:
        `list[list[int]]`: The token ids of each.

    Raises:
        `ValueError`: If the tokenizer or its chat template cannot write one.
    """
    rows = []
    for prompt in prompts:
        message = [{"role": "user", "content": prompt}]
        try:
            if tokenizer.chat_template:
                ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
            else:
                ids = tokenizer(prompt).input_ids
        except Exception as error:  # tokenizers raises no other class, and templates raise what they like
            raise ValueError(f"The tokenizer or its chat template cannot write {prompt!r}: {error}") from error
        rows.append(list(ids))
    return rows


def different_prompts(merged_dir: Path, prompts: Sequence[str], rows: list[list[int]]) -> list[str]:
    """
    Prompts of which the merged folder's own tokenizer and chat template make other token ids.

    Args:
        merged_dir (`Path`):
            The merged checkpoint.
        prompts (`Sequence[str]`):
            The prompts.
        rows (`list[list[int]]`):
            What the instruct model's make of them.

    Returns:
        `list[str]`: The prompts; all of them if there is no tokenizer that loads.
    """
    try:
        tokenizer = load_own_tokenizer(merged_dir)
        found = render(tokenizer, prompts) if tokenizer is not None else [None] * len(prompts)
    except Exception:  # a damaged tokenizer or template may raise anything, and each means that it is not the same
        return list(prompts)
    return [prompt for prompt, expected, row in zip(prompts, rows, found, strict=True) if expected != row]


def stop_ids(folder: Path) -> dict[str, list[int]]:
    """
    Token ids at which an answer ends, by each of the places that say so.

    Args:
        folder (`Path`):
            Checkpoint folder.

    Returns:
        `dict[str, list[int]]`: Sorted ids by `generation_config.json`, `config.json` and tokenizer; without those that are
        not there.
    """
    found = {"config.json": load_config(str(folder)).get_text_config().eos_token_id}
    if (folder / GENERATION_CONFIG_NAME).is_file():
        found[GENERATION_CONFIG_NAME] = GenerationConfig.from_pretrained(folder).eos_token_id
    try:
        if (tokenizer := load_own_tokenizer(folder)) is not None:
            found["tokenizer"] = tokenizer.eos_token_id
    except Exception:
        found["tokenizer"] = None  # as it cannot be loaded, it ends nothing
    return {
        name: [] if ids is None else sorted(set(ids if isinstance(ids, list) else [ids]))
        for name, ids in found.items()
    }


def _difference(source: CheckpointReader, merged: CheckpointReader, name: str) -> dict[str, float]:
    """The name with the largest absolute difference, or nothing if the bytes are the same."""
    largest = {}
    tensor = source.tensors[name]
    for start in range(0, tensor.num_bytes, _CHUNK_BYTES):
        count = min(_CHUNK_BYTES, tensor.num_bytes - start)
        a, b = (reader.read_bytes(reader.tensors[name], start, count) for reader in (source, merged))
        if not torch.equal(a, b):
            # Of a dtype that is never merged, the values are not read
            size = _largest(a.view(tensor.dtype), b.view(tensor.dtype)) if tensor.info.dtype in DTYPES else 0.0
            largest[name] = max(largest.get(name, 0.0), size)
    return largest


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    # Values that are not finite are as wrong as can be.
    return float((a.double() - b.double()).abs().nan_to_num(nan=float("inf")).max())
