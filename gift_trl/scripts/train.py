"""`gift-trl train`: annotate if needed, train the adapter, save it, merge it."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from accelerate import Accelerator
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
        "merge_output_dir, merges it into the instruct model. What stands on the command line wins over the recipe.",
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
            The merge.

    Raises:
        `ValueError`: If the recipe cannot be run; the message says what to change.
    """
    from trl import get_peft_config, get_quantization_config

    from gift_trl.scripts.data import load_recipe_datasets
    from gift_trl.training import GIFTSFTTrainer

    resume = _check_recipe(training_args, model_args, merge_args)
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
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"The adapter is in {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    if merge_args.merge_output_dir is not None:
        _on_main_process(trainer.accelerator, lambda: _merge(training_args, merge_args))
    trainer.end()


def _merge(training_args: "GIFTConfig", merge_args: "MergeArguments") -> None:
    from gift_trl.merging import merge_adapter

    report = merge_adapter(
        training_args.output_dir,
        training_args.instruct_model_name_or_path,
        merge_args.merge_output_dir,
        instruct_model_revision=training_args.instruct_model_revision,
        scale=merge_args.merge_scale,
        saved_modules=merge_args.merge_saved_modules,
        overwrite=merge_args.merge_overwrite,
    )
    print(report.summary())


def _on_main_process(accelerator: "Accelerator", work: Callable[[], None]) -> None:
    """Does something on the main process; if it fails there, the others end too, instead of waiting for it."""
    from accelerate.utils import broadcast_object_list

    accelerator.wait_for_everyone()
    done = [False]
    try:
        if accelerator.is_main_process:
            work()
            done = [True]
    finally:
        broadcast_object_list(done)
    if not done[0]:
        raise SystemExit(1)  # the main process has said why


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


def _check_recipe(
    training_args: "GIFTConfig", model_args: "ModelConfig", merge_args: "MergeArguments"
) -> bool | str | None:
    from trl import get_peft_config

    from gift_trl.checkpoints import check_output_folder
    from gift_trl.merging.adapter import unsupported_settings
    from gift_trl.merging.report import REPLACED_MARKS
    from gift_trl.training.resume import last_complete_checkpoint

    if model_args.model_name_or_path is None:
        raise ValueError("Nothing says which model to train: set `model_name_or_path` to the base model.")
    if merge_args.merge_output_dir is not None:
        if not model_args.use_peft:
            raise ValueError("`merge_output_dir` is set, but no adapter is trained: set `use_peft: true`.")
        if training_args.instruct_model_name_or_path is None:
            raise ValueError(
                "`merge_output_dir` is set, but nothing says what to merge into: set `instruct_model_name_or_path`."
            )
        merged = check_output_folder(
            merge_args.merge_output_dir, overwrite=merge_args.merge_overwrite, marks=REPLACED_MARKS
        )
        adapter = Path(training_args.output_dir).resolve()
        if merged.is_relative_to(adapter) or adapter.is_relative_to(merged):
            raise ValueError(
                f"`merge_output_dir` ({merged}) and `output_dir` ({adapter}) lie in one another. The adapter's folder is "
                "an input of the merge and is not written to: put them side by side."
            )
        # What the merge would refuse after the training is refused before it
        settings = get_peft_config(model_args).to_dict()
        if unsupported := unsupported_settings(settings, merge_args.merge_saved_modules, merge_args.merge_scale):
            raise ValueError(" ".join(unsupported))
    # The command line gives text where YAML gives a boolean
    resume = training_args.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        resume = resume.lower() == "true"
    if resume is True:  # found now, before any long work
        resume = last_complete_checkpoint(training_args)
    return resume


if __name__ == "__main__":
    from gift_trl.scripts.cli import run

    run(main)
