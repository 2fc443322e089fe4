"""`gift-trl recipe`: writes a recipe for a pair of models that has none."""

import argparse
from pathlib import Path

from gift_trl.scripts.cli import ExampleHelpFormatter


_DESCRIPTION = """\
Writes a recipe with the paper's settings for a base model, the instruct model that was post-trained from it, and data. No
weights are read: it compares architecture, shapes, vocabulary and tokenizers, looks up the linear layers to adapt, recognises
the columns of local data, chooses how many rows a GPU holds by an estimate of its memory, and notes what the chat template
does. What it says is that `gift-trl train` runs it.
"""
_EPILOG = """\
examples:
  gift-trl recipe --base Qwen/Qwen2.5-7B --instruct Qwen/Qwen2.5-7B-Instruct --dataset data.jsonl --output recipe.yaml
  gift-trl recipe --base google/gemma-3-1b-pt --instruct google/gemma-3-1b-it --dataset math --gpu_memory_gb 24
"""
_ROWS = (8, 4, 2, 1)
_GPUS = (1, 2, 4, 8, 16, 32, 64)


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Parser of the command."""
    parser = argparse.ArgumentParser(
        prog=prog or "gift-trl recipe",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=ExampleHelpFormatter,
        allow_abbrev=False,
    )
    optional = {"default": argparse.SUPPRESS}
    parser.add_argument("--base", required=True, metavar="MODEL", help="base model: Hub id or folder", **optional)
    parser.add_argument("--instruct", required=True, metavar="MODEL", help="its instruct model", **optional)
    parser.add_argument("--base_revision", help="revision of the base model on the Hub")
    parser.add_argument("--instruct_revision", help="revision of the instruct model on the Hub")
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="DATA",
        help="local file or folder, Hub id, or `math`, `medical` or `summaries`, the data of the shipped recipes",
        **optional,
    )
    parser.add_argument("--prompt_column", help="column with the question, if it is not recognised")
    parser.add_argument("--completion_column", help="column with the answer")
    parser.add_argument("--output", metavar="FILE", help="file to write to; the screen without it")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    parser.add_argument("--max_length", type=int, default=2048, help="longest row in tokens")
    parser.add_argument("--gpu_memory_gb", type=float, default=80.0, metavar="GB", help="memory of a GPU")
    parser.add_argument("--load_in_4bit", action="store_true", help="train on the base model in NF4 (QLoRA)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    options = make_parser().parse_args(argv)
    if options.output is not None and Path(options.output).exists() and not options.overwrite:
        raise FileExistsError(
            f"'{options.output}' exists: choose another `--output`, or replace it with `--overwrite`."
        )
    text = make_recipe(options)
    if options.output is None:
        print(text, end="")
        return
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(f".{output.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(output)
    print(f"Written to {output}. Read it, then: gift-trl train --config {output}")


def make_recipe(options: argparse.Namespace) -> str:
    """
    Makes the recipe that the options of the command ask for.

    Args:
        options (`argparse.Namespace`):
            Options of the command.

    Returns:
        `str`: The recipe.

    Raises:
        `ValueError`: If the two models are no pair, or the data is not understood.
        `FileNotFoundError`: If a model or file is not found.
    """
    from gift_trl.model_pair import check_same_architecture, check_same_vocabulary, load_config, load_tokenizer
    from gift_trl.planning.stages import build_skeleton
    from gift_trl.scripts.recipe_facts import (
        can_mask_turns,
        data_settings,
        linear_target_modules,
        read_template,
    )
    from gift_trl.scripts.recipe_writer import RecipeChoices, write_recipe

    base_kwargs, instruct_kwargs = {"revision": options.base_revision}, {"revision": options.instruct_revision}
    check_same_architecture(options.base, options.instruct, model_kwargs=base_kwargs, other_kwargs=instruct_kwargs)
    tokenizer = load_tokenizer(options.instruct, **instruct_kwargs)
    try:
        base_tokenizer = load_tokenizer(options.base, **base_kwargs)
    except ValueError:  # a base checkpoint without tokenizer files has nothing to compare
        pass
    else:
        check_same_vocabulary(base_tokenizer, tokenizer)
    facts = read_template(tokenizer, options.instruct, options.instruct_revision)
    data, name = data_settings(options.dataset, options.prompt_column, options.completion_column)
    notes = list(facts.notes)
    if any(setting.key == "assistant_only_loss" for setting in data) and not can_mask_turns(tokenizer):
        data = [setting for setting in data if setting.key != "assistant_only_loss"]
        notes += [
            "It does not mark the answers, so every turn of the data is a target. Questions and answers in two columns, or "
            "`{% generation %}` in the template, make targets of the answers only."
        ]
    config = load_config(options.base, **base_kwargs)
    skeleton = build_skeleton(config)
    targets = linear_target_modules(skeleton)
    rows, hardware = _place(config, targets, options)
    file = options.output or "recipe.yaml"
    header = [
        f"GIFT on {options.base}, merged into {options.instruct}, with the paper's settings. Written by `gift-trl recipe`.",
        "",
        f"  gift-trl train --config {file}",
        f"  gift-trl train --accelerate_config zero2 --num_processes 8 --config {file}",
        "",
        *hardware,
        "The instruct model's chat template:",
        *(f"- {note}" for note in notes),
    ]
    if any("expert" in module for module, _ in skeleton.named_modules()):
        header += [
            "The experts are not adapted: their weights are no linear layers. `lora_target_parameters` names such."
        ]
    choices = RecipeChoices(
        base=options.base,
        instruct=options.instruct,
        data=data,
        target_modules=targets,
        rows=rows,
        output_dir=f"outputs/{Path(options.base).name.lower()}/{name}",
        base_revision=options.base_revision,
        instruct_revision=options.instruct_revision,
        chat_template_kwargs=facts.template_kwargs,
        max_length=options.max_length,
        load_in_4bit=options.load_in_4bit,
    )
    return write_recipe(header, choices)


def _place(config, targets: list[str], options: argparse.Namespace) -> tuple[int, list[str]]:
    """Rows of a forward pass and lines about the hardware: one GPU if that is enough, or ZeRO-3 over the fewest."""
    from peft import LoraConfig

    from gift_trl.planning.memory import TrainingSetup, needed_memory, training_memory
    from gift_trl.planning.placement import Placement
    from gift_trl.planning.stages import Batch
    from gift_trl.scripts.recipe_writer import GLOBAL_BATCH, LORA_RANK, accumulation_steps, gibibytes

    lora = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, lora_dropout=0.05, target_modules=targets)
    setup = TrainingSetup(config, lora, load_in_4bit=options.load_in_4bit)
    for processes in _GPUS:
        placement = Placement("zero3", processes, zero_stage=3 if processes > 1 else 0)
        for rows in (rows for rows in _ROWS if GLOBAL_BATCH % (processes * rows) == 0):
            batch = Batch(rows, options.max_length, rows * (options.max_length - 1), masked=rows > 1)
            size = training_memory(setup, batch, placement).total
            if needed_memory(size) <= options.gpu_memory_gb:
                where = "one GPU" if processes == 1 else f"{processes} GPUs with `--accelerate_config zero3`"
                steps = accumulation_steps(processes, rows)
                return rows, [
                    f"Hardware: {where} of {options.gpu_memory_gb:g} GB ({gibibytes(size)} by estimate, not measured).",
                    f"Global batch: 256 rows = {processes} GPU{'s' * (processes > 1)} × {rows} rows × {steps} accumulation "
                    "steps; the steps follow from the number of GPUs.",
                ]
        if options.load_in_4bit:
            break  # NF4 weights are not sharded
    more = ", or leave out `--load_in_4bit` to shard the model over GPUs" if options.load_in_4bit else ""
    raise ValueError(
        f"By estimate, not even one row fits on {processes} GPU{'s' * (processes > 1)} of {options.gpu_memory_gb:g} GB. Give a "
        f"larger `--gpu_memory_gb` or a smaller `--max_length`{more}."
    )


if __name__ == "__main__":
    from gift_trl.scripts.cli import run

    run(main)
