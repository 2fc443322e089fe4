"""`gift-trl sweep`: finds the scale of the update that is best on validation data."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import TrlParser


_DESCRIPTION = """\
Scores the instruct model with the adapter at several scales λ (θ_I + λ·M(φ)), applied at run time: no checkpoint is written.
Prints a table and writes sweep.json and sweep.png. The best scale is the best on the data given: use held-out data, and not
the data that the final result is reported on.
"""

_EPILOG = """\
example:
  %(prog)s --adapter outputs/adapter --instruct_model Qwen/Qwen2.5-7B-Instruct --dataset validation.jsonl --output_dir sweep
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
            How a scale is scored: `"nll"`, the mean negative log-likelihood of the target tokens of `dataset` in the chat
            format, lower is better; `"lab"`, the accuracy on the quick start's own held-out problems.
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
            Whether to replace an existing output folder.
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
            "help": "nll: mean negative log-likelihood of the target tokens of the dataset, in the chat format. lab: "
            "accuracy on the held-out problems of the quick start.",
            "choices": ["nll", "lab"],
        },
    )
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
    overwrite: bool = field(default=False, metadata={"help": "Whether to replace an output folder."})


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

    from transformers import AutoTokenizer
    from trl import DatasetMixtureConfig

    from gift_trl.checkpoints import check_output_folder
    from gift_trl.merging.sweep import sweep_scales
    from gift_trl.scripts.data import load_recipe_datasets

    check_output_folder(arguments.output_dir, overwrite=arguments.overwrite)
    tokenizer = AutoTokenizer.from_pretrained(
        arguments.instruct_model, revision=arguments.instruct_model_revision, padding_side="left"
    )
    if arguments.task == "nll":
        dataset, _ = load_recipe_datasets(script_args, DatasetMixtureConfig(), evaluate=False, seed=0)
        metric, higher_is_better = "negative log-likelihood per token", False

        def score(model: "PreTrainedModel") -> tuple[float, float]:
            return negative_log_likelihood(
                model,
                tokenizer,
                dataset,
                arguments.max_length,
                assistant_only_loss=arguments.assistant_only_loss,
                completion_only_loss=arguments.completion_only_loss,
            )

    else:
        from gift_trl.lab.evaluation import evaluate_model, make_evaluation_set

        questions = make_evaluation_set()
        metric, higher_is_better = "accuracy on the target problems, percent", True

        def score(model: "PreTrainedModel") -> tuple[float, float]:
            accuracy = evaluate_model(model, tokenizer, questions).accuracies["target"]
            return accuracy, (accuracy * (100 - accuracy) / len(questions.target)) ** 0.5

    sweep = sweep_scales(
        arguments.adapter,
        arguments.instruct_model,
        arguments.scales,
        score,
        metric=metric,
        higher_is_better=higher_is_better,
        adapter_revision=arguments.adapter_revision,
        instruct_model_revision=arguments.instruct_model_revision,
        saved_modules=arguments.saved_modules,
        dtype=arguments.dtype,
    )
    sweep.write(arguments.output_dir, overwrite=arguments.overwrite)
    print(f"{sweep.table()}\nThe best scale on this data is {sweep.best.scale:g} (see {arguments.output_dir}).")


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
