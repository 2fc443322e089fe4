"""`gift-trl train`: annotate if needed, train the adapter, save it, merge and push it."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    from gift_trl.scripts.arguments import GIFTScriptArguments, MergeArguments
    from gift_trl.training import GIFTConfig


def make_parser(prog: str | None = None) -> "TrlParser":
    """Parser of the command."""
    from gift_trl.scripts.arguments import make_recipe_parser

    return make_recipe_parser(
        prog=prog or "gift-trl train",
        description="Trains an adapter on the base model with the GIFT loss, as the recipe says: scores the data with "
        "the instruct model if it has no `confidences` yet, trains, saves the adapter to output_dir and, with "
        "merge_output_dir, merges it into the instruct model. With push_to_hub and hub_merged_model_id, adapter and merged "
        "model are pushed to the Hub. What stands on the command line wins over the recipe.",
        epilog="example: gift-trl train --config recipe.yaml --learning_rate 1e-4, on 8 GPUs gift-trl train "
        "--accelerate_config zero2 --num_processes 8 --config recipe.yaml (any option of `accelerate launch`)",
    )


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    train(*make_parser().parse_args_and_config(argv))


def train(
    script_args: "GIFTScriptArguments",
    training_args: "GIFTConfig",
    model_args: "ModelConfig",
    dataset_args: "DatasetMixtureConfig",
    merge_args: "MergeArguments",
) -> None:
    """
    Runs the stages of a parsed recipe.

    Args:
        script_args ([`GIFTScriptArguments`]):
            The data.
        training_args ([`GIFTConfig`]):
            The training.
        model_args ([`~trl.ModelConfig`]):
            The base model and its adapter.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            The `datasets:` section.
        merge_args ([`MergeArguments`]):
            The merge and the push.

    Raises:
        `ValueError`: If the recipe cannot be run; the message says what to change.
    """
    from trl import get_peft_config, get_quantization_config

    from gift_trl.hub import MergeAndPushCallback
    from gift_trl.merging.checks import overlapping_folders
    from gift_trl.scripts.data import load_recipe_datasets
    from gift_trl.training import GIFTSFTTrainer
    from gift_trl.training.resume import find_checkpoint

    if model_args.model_name_or_path is None:
        raise ValueError("Nothing says which model to train: set `model_name_or_path` to the base model.")
    base_dir, merged_dir = Path(model_args.model_name_or_path).expanduser(), merge_args.merge_output_dir
    # The instruct model's folder is compared with the others that a merge reads
    if merged_dir is not None and base_dir.is_dir():
        if problems := overlapping_folders(Path(merged_dir).expanduser().resolve(), base_dir):
            raise ValueError(problems[0])
    # Found now, before any long work
    resume = find_checkpoint(training_args, training_args.resume_from_checkpoint)
    training_args.resume_from_checkpoint = resume
    peft_config = get_peft_config(model_args)
    callbacks = []
    if training_args.push_to_hub or merge_args.is_asked_for:
        callbacks.append(MergeAndPushCallback(**asdict(merge_args)))
        # Found now, before the data is read: what would fail at the end
        training_args = callbacks[0].before_annotation(training_args, peft_config, resume or False)
    set_accumulation_steps(script_args, training_args)
    training_args.model_init_kwargs = base_model_init_kwargs(model_args, training_args)
    evaluate = training_args.eval_strategy != "no"
    train_dataset, eval_dataset = load_recipe_datasets(
        script_args, dataset_args, evaluate=evaluate, seed=training_args.seed
    )
    trainer = GIFTSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=peft_config,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    if not callbacks:
        trainer.save_model(training_args.output_dir)
        if peft_config is not None:
            trainer.accelerator.print(f"The adapter is in {training_args.output_dir}")
        else:
            trainer.accelerator.print(
                f"The model, trained whole, is in {training_args.output_dir}. What it learned is merged into the instruct model "
                f"by `{_full_delta_command(training_args, model_args)}`."
            )


def _full_delta_command(training_args: "GIFTConfig", model_args: "ModelConfig") -> str:
    command = ["gift-trl", "merge", "--method", "full_delta", "--tuned_model", str(training_args.output_dir)]
    command += ["--base_model", str(model_args.model_name_or_path)]
    command += ["--instruct_model", training_args.instruct_model_name_or_path or "INSTRUCT_MODEL"]
    revisions = {"base_model": model_args.model_revision, "instruct_model": training_args.instruct_model_revision}
    for name, revision in revisions.items():
        command += [f"--{name}_revision", revision] if revision not in (None, "main") else []
    return shlex.join([*command, "--output_dir", "DIR"])


def set_accumulation_steps(script_args: "GIFTScriptArguments", training_args: "GIFTConfig") -> None:
    """
    Sets `gradient_accumulation_steps` so that all processes together make steps of `global_batch_size` rows.

    Args:
        script_args ([`GIFTScriptArguments`]):
            Its `global_batch_size` is the number of rows; without one, nothing is set.
        training_args ([`GIFTConfig`]):
            The training, whose accumulation steps are set.

    Raises:
        `ValueError`: If no number of steps gives this number of rows, or another one is set already.
    """
    rows = script_args.global_batch_size
    if rows is None:
        return
    processes, at_once = training_args.world_size, training_args.train_batch_size
    if rows % (processes * at_once):
        raise ValueError(
            f"`global_batch_size` is {rows}, which {processes} processes × {at_once} rows (`per_device_train_batch_size`) do "
            "not divide. Change one of the three."
        )
    steps, given = rows // (processes * at_once), training_args.gradient_accumulation_steps
    if given not in (1, steps):
        raise ValueError(
            f"`gradient_accumulation_steps` is {given}, and `global_batch_size: {rows}` needs {steps} ({processes} processes × "
            f"{at_once} rows × {steps} steps). Unset one of the two (`--global_batch_size none`)."
        )
    if training_args.deepspeed is not None and given != steps:
        raise ValueError(
            "`deepspeed` names a configuration that has been filled in already. Set `gradient_accumulation_steps` to "
            f"{steps}, or launch with `--accelerate_config zero2` in its place."
        )
    training_args.gradient_accumulation_steps = steps


def base_model_init_kwargs(model_args: "ModelConfig", training_args: "GIFTConfig") -> dict[str, Any]:
    """Keyword arguments that the base model of a recipe is loaded with."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


if __name__ == "__main__":
    from gift_trl.scripts.cli import run

    run(main)
