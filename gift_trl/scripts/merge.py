"""`gift-trl merge`: adds an adapter to the instruct model's checkpoint."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gift_trl.scripts.cli import ExampleHelpFormatter


if TYPE_CHECKING:
    from trl import TrlParser

    from gift_trl.merging import MergeRecipe


_DESCRIPTION = """\
Adds an adapter that was trained on the base model to the instruct model (θ'_I = θ_I + λ·M(φ)) and writes the merged
checkpoint: the instruct model's files, with the targeted tensors updated by PEFT's arithmetic. The instruct checkpoint is
streamed, so that the merge needs little memory and no GPU. What would come out wrong is refused before a weight is read.
Several adapters are combined by --method; given --base_model, the kinship of the two models is reported too.
The options may also come from a YAML recipe (--config FILE); the command line wins over it. The recipe that was followed
is written beside the weights.
"""

_EPILOG = """\
examples:
  %(prog)s --adapter outputs/adapter --instruct_model Qwen/Qwen2.5-7B-Instruct --output_dir outputs/merged --verify
  %(prog)s --adapter math --adapter code --adapter_weight 0.7 0.5 --method ties --density 0.5 \\
      --instruct_model Qwen/Qwen2.5-7B-Instruct --output_dir outputs/merged
"""


class _Listed(argparse.Action):
    """Values that may be given together or one by one; the first on the command line replace those of the recipe."""

    def __call__(self, parser, namespace, values, option_string=None):
        current = getattr(namespace, self.dest)
        setattr(namespace, self.dest, list(values) if current is self.default else [*current, *values])


def _listed(text: str) -> dict:
    return {"help": text, "action": _Listed}


@dataclass
class MergeScriptArguments:
    """
    Arguments of `gift-trl merge`: the fields of a [`~gift_trl.merging.MergeRecipe`], and where its result goes.

    Args:
        instruct_model (`str`):
            Folder or Hub id of the instruct model.
        output_dir (`str`):
            Folder to write the merged checkpoint to.
        adapter, adapter_revision, adapter_weight, method, scale, instruct_weight, density, majority_sign, seed, rank,
        explained_variance, base_model, tuned_model, instruct_model_revision, base_model_revision, tuned_model_revision,
        saved_modules, adapter_fingerprint, instruct_model_fingerprint, base_model_fingerprint, tuned_model_fingerprint
        (*optional*):
            As in [`~gift_trl.merging.MergeRecipe`].
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace an existing output folder.
        verify (`bool`, *optional*, defaults to `False`):
            Whether to prove the merged checkpoint: tensors and files byte by byte, and the model against the adapter at run
            time; what is wrong or outside the bounds is an error.
        verify_prompts (`str`, *optional*):
            File with a prompt on each line. Eight built-in ones by default.
        verify_max_kl (`float`, *optional*):
            Bound of the mean KL divergence.
        verify_max_new_tokens (`int`, *optional*, defaults to `32`):
            Longest greedy answer of the comparison.
    """

    instruct_model: str = field(metadata={"help": "Folder or Hub id of the instruct model, in safetensors."})
    output_dir: str = field(metadata={"help": "Folder to write the merged checkpoint to."})
    adapter: list[str] = field(
        default_factory=list, metadata=_listed("Folders or Hub ids of the adapters; may be given several times.")
    )
    adapter_revision: list[str] = field(
        default_factory=list, metadata=_listed("Branch, tag or commit of each adapter on the Hub.")
    )
    adapter_weight: list[float] = field(
        default_factory=list, metadata=_listed("Weight of each adapter's update; all 1 by default.")
    )
    method: str = field(
        default="linear",
        metadata={
            "help": "linear, ties, dare_linear, dare_ties or magnitude_prune: how several updates become one. "
            "task_arithmetic, re_adapt or lore_adapt: the difference of instruct and base model is scaled or truncated "
            "too. full_delta: the difference of tuned_model and base_model takes the place of adapters."
        },
    )
    scale: float = field(
        default=1.0, metadata={"help": "Factor λ of the update; 1.0 adds it as it was trained, 0.5 half of it."}
    )
    instruct_weight: float = field(
        default=1.0, metadata={"help": "Factor β of θ_I − θ_B in task_arithmetic, re_adapt and lore_adapt."}
    )
    density: float | None = field(
        default=None, metadata={"help": "Share of each update that ties, dare_* and magnitude_prune keep."}
    )
    majority_sign: str = field(
        default="total", metadata={"help": "How ties and dare_ties elect a sign.", "choices": ["total", "frequency"]}
    )
    seed: int = field(default=0, metadata={"help": "Seed of what dare_linear and dare_ties drop."})
    rank: int | None = field(default=None, metadata={"help": "Rank to which lore_adapt truncates θ_I − θ_B."})
    explained_variance: float | None = field(
        default=None, metadata={"help": "Share of the squared norm that lore_adapt keeps, in place of rank."}
    )
    base_model: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of the base model: reports the kinship of the two models."},
    )
    tuned_model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a fully fine-tuned base model, for full_delta."}
    )
    instruct_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the instruct model on the Hub."}
    )
    base_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the base model on the Hub."}
    )
    tuned_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the tuned model on the Hub."}
    )
    saved_modules: str | None = field(
        default=None,
        metadata={
            "help": "What to do with tensors of the base model that an adapter holds whole (modules_to_save, trained "
            "biases and token embeddings): `replace` the instruct model's by them, or `ignore` them.",
            "choices": ["replace", "ignore"],
        },
    )
    adapter_fingerprint: list[str] = field(
        default_factory=list,
        metadata=_listed("Fingerprint of each adapter's weights, as a written recipe records it; others are refused."),
    )
    instruct_model_fingerprint: str | None = field(
        default=None, metadata={"help": "Fingerprint of the instruct model's weights; others are refused."}
    )
    base_model_fingerprint: str | None = field(
        default=None, metadata={"help": "Fingerprint of the base model's weights; others are refused."}
    )
    tuned_model_fingerprint: str | None = field(
        default=None, metadata={"help": "Fingerprint of the tuned model's weights; others are refused."}
    )
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Whether to replace an output folder that has something in it, once the merge has succeeded."
        },
    )
    verify: bool = field(
        default=False,
        metadata={
            "help": "Prove the merged checkpoint: compute every tensor once more, compare the files beside the weights, and "
            "the model with the adapter at run time; exit 1 if they differ."
        },
    )
    verify_prompts: str | None = field(
        default=None, metadata={"help": "File with a prompt on each line; eight built-in ones by default."}
    )
    verify_max_kl: float | None = field(
        default=None, metadata={"help": "Bound of the mean KL divergence; default: what rounding explains."}
    )
    verify_max_new_tokens: int = field(
        default=32, metadata={"help": "Longest greedy answer of the comparison; 0: none."}
    )


def make_parser(prog: str | None = None) -> "TrlParser":
    """
    Parser of the command line and of the YAML file.

    Args:
        prog (`str`, *optional*):
            Name of the command in the help text.

    Returns:
        [`~trl.TrlParser`]: Parser for [`MergeScriptArguments`].
    """
    from trl import TrlParser

    return TrlParser(
        MergeScriptArguments,
        prog=prog,
        usage="%(prog)s --adapter ADAPTER [--adapter ADAPTER ...] --instruct_model MODEL --output_dir DIR [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=ExampleHelpFormatter,
    )


def main(argv: list[str] | None = None) -> None:
    """
    Runs `gift-trl merge`.

    Args:
        argv (`list[str]`, *optional*):
            Arguments; those of the process if not given.

    Raises:
        `ValueError`, `OSError`: As [`~gift_trl.merge_adapter`], and for an option that does not exist or has no value.
    """
    (arguments,) = make_parser("gift-trl merge").parse_args_and_config(argv)
    missing = [name for name in ("instruct_model", "output_dir") if getattr(arguments, name) in (None, "", "None")]
    if missing:
        raise ValueError(f"`gift-trl merge` needs a value for {', '.join(f'--{name}' for name in missing)}.")

    from gift_trl.merging import merge_recipe

    recipe = recipe_of(arguments)
    if arguments.verify_prompts is not None and not arguments.verify:
        raise ValueError(
            "`--verify_prompts` names prompts, and nothing is verified: set `--verify` too, or leave it out."
        )
    prompts = _read_prompts(arguments, recipe) if arguments.verify else None
    report = merge_recipe(recipe, arguments.output_dir, overwrite=arguments.overwrite)
    print(report.summary())
    if arguments.verify:
        from gift_trl.merging import verify_recipe

        verification = verify_recipe(
            report.output_dir,
            recipe,
            prompts=prompts,
            max_new_tokens=arguments.verify_max_new_tokens,
            max_kl=arguments.verify_max_kl,
        )
        print(verification.summary())
        if problems := verification.problems():
            raise ValueError(
                f"The merged checkpoint in '{report.output_dir}' is not what it should be: {' '.join(problems)}"
            )
    from gift_trl.hub import write_merged_card

    write_merged_card(report.output_dir)


def recipe_of(arguments: MergeScriptArguments) -> "MergeRecipe":
    """
    The recipe that the arguments describe.

    Args:
        arguments ([`MergeScriptArguments`]):
            The arguments. In YAML, a single adapter need not be a list.

    Returns:
        [`~gift_trl.merging.MergeRecipe`]: The recipe.

    Raises:
        `ValueError`: If it makes no sense.
    """
    from gift_trl.merging import MergeRecipe

    values = {entry.name: getattr(arguments, entry.name) for entry in dataclasses.fields(MergeRecipe)}
    for name in ("adapter", "adapter_revision", "adapter_weight", "adapter_fingerprint"):
        if not isinstance(values[name], list):
            values[name] = [values[name]]
    return MergeRecipe(**values)


def _read_prompts(arguments: MergeScriptArguments, recipe: "MergeRecipe") -> list[str] | None:
    if arguments.verify_prompts is None:
        return None
    path = Path(arguments.verify_prompts)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file '{path}': give `--verify_prompts` a text file, a prompt on each line."
        )
    prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"'{path}' holds no prompt: write one on each line.")
    from gift_trl.merging.verify import check_prompts

    check_prompts(prompts, recipe.instruct_model, recipe.instruct_model_revision)
    return prompts


if __name__ == "__main__":
    from gift_trl.scripts.cli import run

    run(main)
