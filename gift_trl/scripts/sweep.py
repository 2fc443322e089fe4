"""`gift-trl sweep`: finds the scale of the update that is best on validation data."""

import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import TrlParser

    from gift_trl.evaluation.tasks import Task
    from gift_trl.merging import Sweep
    from gift_trl.scripts.arguments import GIFTScriptArguments


_DESCRIPTION = """\
Scores the instruct model with the adapter at several scales λ (θ_I + λ·M(φ)), applied at run time: no checkpoint is written.
A scale is scored by the likelihood of a dataset (--dataset), or by the answers to a task of `gift-trl evaluate` (--task).
Prints a table and writes sweep.json and sweep.png. The best scale is the best on the data given: use held-out data, and not
the data that the final result is reported on.
"""

_EPILOG = """\
examples:
  %(prog)s --adapter outputs/adapter --instruct_model Qwen/Qwen2.5-7B-Instruct --dataset validation.jsonl --output_dir sweep
  %(prog)s --adapter outputs/adapter --instruct_model Qwen/Qwen2.5-7B-Instruct --task math500 --dataset validation.jsonl \
    --scales 0 0.5 1 --output_dir sweep
"""


@dataclass
class SweepArguments:
    """
    Arguments of the sweep.

    Args:
        adapter (`str`):
            Folder or Hub id of the adapter.
        instruct_model (`str`):
            Folder or Hub id of the instruct model.
        output_dir (`str`):
            Folder for the table and the picture.
        scales (`list[float]`, *optional*, defaults to `[0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]`):
            The scales.
        task (`str`, *optional*, defaults to `"nll"`):
            How a scale is scored. `"nll"`: the mean negative log-likelihood of the target tokens of `dataset` in the chat
            format, lower is better. Else a task of `gift-trl evaluate`, higher is better: the name of a shipped one, the path
            of a YAML file, or `"lab"`, the quick start's own problems. With it, `dataset` is a local file or folder that takes
            the place of the task's.
        limit, n, max_new_tokens, temperature, seeds, tokens_per_batch, use_cpu (*optional*):
            Of a task, as in `gift-trl evaluate`.
        max_length (`int`, *optional*, defaults to `2048`):
            Longest row in tokens; what is beyond it is cut off.
        assistant_only_loss (`bool`, *optional*, defaults to `False`):
            As in [`~trl.SFTConfig`]: whether only the assistant's turns of conversations are targets. Without it, every
            token of `messages` is one, the user's too.
        completion_only_loss (`bool`, *optional*):
            As in [`~trl.SFTConfig`]: whether only completions are targets. By default they are where the rows have a prompt
            and a completion.
        saved_modules (`str`, *optional*):
            What to do with tensors that the adapter holds whole, see [`~gift_trl.merging.sweep_scales`].
        instruct_model_revision, adapter_revision (`str`, *optional*):
            Revisions on the Hub.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Dtype of the model.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace an output folder that a sweep wrote; with a task, whether to throw away what it holds of the
            same scales under another configuration.
    """

    adapter: str = field(metadata={"help": "Folder or Hub id of the adapter."})
    instruct_model: str = field(metadata={"help": "Folder or Hub id of the instruct model."})
    output_dir: str = field(metadata={"help": "Folder for the table and the picture."})
    scales: list[float] = field(
        default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5], metadata={"help": "The scales to compare."}
    )
    task: str = field(
        default="nll",
        metadata={
            "help": "nll: mean negative log-likelihood of the target tokens of the dataset, in the chat format. Else a task of "
            "`gift-trl evaluate`: a shipped one's name, a YAML file, or lab, the problems of the quick start. `--dataset` then "
            "takes the place of its data."
        },
    )
    limit: int | None = field(default=None, metadata={"help": "Of a task: number of rows, from the start."})
    n: int | None = field(default=None, metadata={"help": "Of a task: number of answers to each problem."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Of a task: longest answer."})
    temperature: float | None = field(
        default=None, metadata={"help": "Of a task: temperature; 0 takes the likeliest token."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Of a task: seeds, each with n answers a problem."}
    )
    tokens_per_batch: int = field(
        default=65536,
        metadata={"help": "Of a task: upper bound of answers × tokens of prompt and longest answer in a batch."},
    )
    use_cpu: bool = field(default=False, metadata={"help": "Of a task: leave GPUs alone."})
    max_length: int = field(default=2048, metadata={"help": "Longest row in tokens."})
    assistant_only_loss: bool = field(
        default=False,
        metadata={
            "help": "Score the assistant's turns of conversations only, as SFTConfig's option of that name. Without it, the "
            "user's turns of `messages` rows count too."
        },
    )
    completion_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Score completions only, as SFTConfig's option of that name; by default where rows have a prompt and a "
            "completion."
        },
    )
    saved_modules: str | None = field(
        default=None,
        metadata={
            "help": "What to do with tensors of the base model that the adapter holds whole, as in `gift-trl merge`: "
            "`replace` the instruct model's by them, at every scale, or `ignore` them.",
            "choices": ["replace", "ignore"],
        },
    )
    instruct_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the instruct model on the Hub."}
    )
    adapter_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the adapter on the Hub."}
    )
    dtype: str = field(default="auto", metadata={"help": "Dtype of the model; auto is the checkpoint's own."})
    overwrite: bool = field(default=False, metadata={"help": "Whether to replace what a sweep wrote."})


def make_parser(prog: str | None = None) -> "TrlParser":
    """
    Parser of the command line and of the YAML file.

    Args:
        prog (`str`, *optional*):
            Name of the command in the help text.

    Returns:
        [`~trl.TrlParser`]: Parser for [`SweepArguments`] and [`~gift_trl.scripts.arguments.GIFTScriptArguments`].
    """
    from trl import TrlParser

    from gift_trl.scripts.arguments import GIFTScriptArguments
    from gift_trl.scripts.cli import ExampleHelpFormatter

    return TrlParser(
        (SweepArguments, GIFTScriptArguments),
        prog=prog,
        usage="%(prog)s --adapter ADAPTER --instruct_model MODEL --dataset FILE --output_dir DIR [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=ExampleHelpFormatter,
    )


def main(argv: list[str] | None = None) -> None:
    """
    Runs `gift-trl sweep`.

    Args:
        argv (`list[str]`, *optional*):
            Arguments; those of the process if not given.

    Raises:
        `ValueError`, `OSError`: If the data, the adapter or the model cannot be used.
    """
    arguments, script_args = make_parser("gift-trl sweep").parse_args_and_config(argv)
    sweep = (_sweep_likelihood if arguments.task == "nll" else _sweep_task)(arguments, script_args)
    if sweep is not None:
        print(f"{sweep.table()}\n{_conclusion(sweep)} (see {arguments.output_dir}).")


def _conclusion(sweep: "Sweep") -> str:
    alike = ", ".join(f"{scale:g}" for scale in sweep.not_told_apart())
    chance = f"; on as many examples, {alike} may be as good" if alike else ""
    scales = [entry.scale for entry in sweep.scores]
    edge = ""
    if len(scales) > 1 and sweep.best.scale == max(scales):
        edge = ", the largest that was tried: larger ones may be better"
    elif len(scales) > 1 and sweep.best.scale == min(scales) != 0:
        edge = ", the smallest that was tried: smaller ones may be better"
    return f"The best scale on this data is {sweep.best.scale:g}{edge}{chance}"


def _sweep_likelihood(arguments: SweepArguments, script_args: "GIFTScriptArguments") -> "Sweep":
    from transformers import AutoTokenizer
    from trl import DatasetMixtureConfig

    from gift_trl.checkpoints import check_output_folder
    from gift_trl.merging.sweep import SWEEP_MARKS, sweep_scales
    from gift_trl.scripts.data import load_recipe_datasets

    check_output_folder(arguments.output_dir, overwrite=arguments.overwrite, marks=SWEEP_MARKS)
    tokenizer = AutoTokenizer.from_pretrained(
        arguments.instruct_model, revision=arguments.instruct_model_revision, padding_side="left"
    )
    dataset, _ = load_recipe_datasets(script_args, DatasetMixtureConfig(), evaluate=False, seed=0)

    def score(model: "PreTrainedModel") -> tuple[float, float]:
        return negative_log_likelihood(
            model,
            tokenizer,
            dataset,
            arguments.max_length,
            assistant_only_loss=arguments.assistant_only_loss,
            completion_only_loss=arguments.completion_only_loss,
        )

    sweep = sweep_scales(
        arguments.adapter,
        arguments.instruct_model,
        arguments.scales,
        score,
        metric="negative log-likelihood per token",
        higher_is_better=False,
        adapter_revision=arguments.adapter_revision,
        instruct_model_revision=arguments.instruct_model_revision,
        saved_modules=arguments.saved_modules,
        dtype=arguments.dtype,
    )
    sweep.write(arguments.output_dir, overwrite=arguments.overwrite)
    return sweep


def _sweep_task(arguments: SweepArguments, script_args: "GIFTScriptArguments") -> "Sweep | None":
    from gift_trl.evaluation.scale_sweep import sweep_task

    with tempfile.TemporaryDirectory() as folder:
        return sweep_task(
            arguments.adapter,
            arguments.instruct_model,
            arguments.scales,
            _load_task(arguments, script_args, Path(folder)),
            arguments.output_dir,
            adapter_revision=arguments.adapter_revision,
            instruct_model_revision=arguments.instruct_model_revision,
            saved_modules=arguments.saved_modules,
            seeds=arguments.seeds,
            dtype=arguments.dtype,
            tokens_per_batch=arguments.tokens_per_batch,
            use_cpu=arguments.use_cpu,
            overwrite=arguments.overwrite,
        )


def _load_task(arguments: SweepArguments, script_args: "GIFTScriptArguments", folder: Path) -> "Task":
    from gift_trl.data_files import read_yaml
    from gift_trl.evaluation.tasks import load_task
    from gift_trl.lab.evaluation import TASKS, make_evaluation_set, write_questions
    from gift_trl.scripts.recipes import recipes_folder

    sampling = {name: getattr(arguments, name) for name in ("n", "max_new_tokens", "temperature")}
    overrides = {"limit": arguments.limit, "sampling": {k: v for k, v in sampling.items() if v is not None}}
    if arguments.task != "lab":
        dataset = script_args.dataset_name
        task = load_task(arguments.task, recipes_folder() / "evaluation", dataset=dataset, **overrides)
        if dataset is None and not Path(arguments.task).expanduser().is_file():
            warnings.warn(
                f"The scale is chosen on the test set of `{task.name}`, and a result on it is no longer a test: pass other "
                "problems of the kind with `--dataset`.",
                stacklevel=2,
            )
        return task
    if script_args.dataset_name is not None:
        raise ValueError("`--task lab` has questions of its own: leave `--dataset` out, or name another task.")
    write_questions(make_evaluation_set(), folder)
    recipe = read_yaml(recipes_folder() / "quickstart" / "evaluation.yaml", "recipe")
    fields = next(task for task in recipe["tasks"] if task["name"] == TASKS[0])
    return load_task(fields, dataset=str(folder / f"{TASKS[0]}.jsonl"), **overrides)


def negative_log_likelihood(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    dataset: "Dataset",
    max_length: int,
    *,
    assistant_only_loss: bool = False,
    completion_only_loss: bool | None = None,
) -> tuple[float, float]:
    """
    Mean negative log-likelihood of the target tokens, tokenised as for the training.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with the chat template.
        dataset ([`~datasets.Dataset`]):
            Rows in any of TRL's formats.
        max_length (`int`):
            Longest row in tokens.
        assistant_only_loss (`bool`, *optional*, defaults to `False`):
            Whether only the assistant's turns of conversations are targets.
        completion_only_loss (`bool`, *optional*):
            Whether only completions are targets; by default where the rows have a prompt and a completion.

    Returns:
        `tuple[float, float]`: The mean over all target tokens, and its standard error over the rows.
    """
    import numpy as np
    from trl import SFTConfig

    from gift_trl.annotation import annotate_dataset

    args = SFTConfig(
        max_length=max_length,
        assistant_only_loss=assistant_only_loss,
        completion_only_loss=completion_only_loss,
        bf16=False,
        report_to="none",
    )
    columns = [name for name in dataset.column_names if name not in ("confidences", "original_index")]
    scored = annotate_dataset(dataset.select_columns(columns), model, tokenizer, args=args, dataset_name="validation")
    sums, counts = [], []
    for row in scored.with_format("numpy").select_columns(["labels", "confidences"]):
        targets = row["labels"][1:] != -100
        # The smallest number above zero that float32 holds in full: of a token that is less likely, no more is known
        q = np.maximum(row["confidences"][1:][targets].astype(np.float64), np.finfo(np.float32).tiny)
        sums.append(-np.log(q).sum())
        counts.append(targets.sum())
    sums, counts = np.array(sums), np.array(counts, dtype=np.float64)
    mean = sums.sum() / counts.sum()
    # Of a ratio of sums over rows
    error = np.sqrt(((sums - mean * counts) ** 2).sum()) / counts.sum()
    return float(mean), float(error)


if __name__ == "__main__":
    from gift_trl.scripts.cli import run

    run(main)
