"""`gift-trl merge`: adds an adapter to the instruct model's checkpoint."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gift_trl.scripts.cli import ExampleHelpFormatter


if TYPE_CHECKING:
    from trl import TrlParser


_DESCRIPTION = """\
Adds a LoRA adapter that was trained on the base model to the instruct model (θ'_I = θ_I + λ·M(φ)) and writes the merged
checkpoint: the instruct model's files, with the targeted tensors updated by PEFT's arithmetic. The instruct checkpoint is
streamed, so that the merge needs little memory and no GPU. What would come out wrong is refused before a weight is read.
The options may also come from a YAML file (--config FILE); the command line wins over it.
"""

_EPILOG = """\
example:
  %(prog)s --adapter outputs/adapter --instruct_model Qwen/Qwen2.5-7B-Instruct --output_dir outputs/merged
"""


@dataclass
class MergeScriptArguments:
    """
    Arguments of `gift-trl merge`, which are those of [`~gift_trl.merge_adapter`].

    Args:
        adapter (`str`):
            Folder or Hub id of the adapter.
        instruct_model (`str`):
            Folder or Hub id of the instruct model.
        output_dir (`str`):
            Folder to write the merged checkpoint to.
        instruct_model_revision (`str`, *optional*):
            Branch, tag or commit of the instruct model on the Hub.
        adapter_revision (`str`, *optional*):
            Branch, tag or commit of the adapter on the Hub.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor λ of the update.
        saved_modules (`str`, *optional*):
            What to do with tensors that the adapter holds whole.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace an existing output folder.
    """

    adapter: str = field(metadata={"help": "Folder or Hub id of the LoRA adapter."})
    instruct_model: str = field(metadata={"help": "Folder or Hub id of the instruct model, in safetensors."})
    output_dir: str = field(metadata={"help": "Folder to write the merged checkpoint to."})
    instruct_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the instruct model on the Hub."}
    )
    adapter_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the adapter on the Hub."}
    )
    scale: float = field(
        default=1.0, metadata={"help": "Factor λ of the update; 1.0 adds it as it was trained, 0.5 half of it."}
    )
    saved_modules: str | None = field(
        default=None,
        metadata={
            "help": "What to do with tensors of the base model that the adapter holds whole (modules_to_save, trained "
            "biases and token embeddings): `replace` the instruct model's by them, or `ignore` them.",
            "choices": ["replace", "ignore"],
        },
    )
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Whether to replace an output folder that has something in it, once the merge has succeeded."
        },
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
        usage="%(prog)s --adapter ADAPTER --instruct_model MODEL --output_dir DIR [options]",
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
    missing = [
        name for name in ("adapter", "instruct_model", "output_dir") if getattr(arguments, name) in (None, "", "None")
    ]
    if missing:
        raise ValueError(f"`gift-trl merge` needs a value for {', '.join(f'--{name}' for name in missing)}.")

    from gift_trl.merging import merge_adapter

    print(merge_adapter(**vars(arguments)).summary())


if __name__ == "__main__":
    from gift_trl.scripts.cli import run

    run(main)
