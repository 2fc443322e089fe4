"""`gift-trl annotate`: stage 1 of a recipe, written to a folder."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from trl import ModelConfig, TrlParser

    from gift_trl.annotation import Provenance
    from gift_trl.annotation.annotator import Annotator
    from gift_trl.training import GIFTConfig


@dataclass
class AnnotationArguments:
    """
    Arguments of `gift-trl annotate` that a recipe does not hold.

    Args:
        annotation_output_dir (`str`):
            Folder to write the annotated dataset to, as Parquet.
        annotation_overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a folder that `gift-trl annotate` wrote before.
        import_scores (`str`, *optional*):
            JSON-lines file of the paper's released scripts, whose scores are used; no model is loaded.
        hub_dataset_id (`str`, *optional*):
            Dataset repository on the Hub to push the annotated dataset to.
    """

    annotation_output_dir: str | None = field(
        default=None, metadata={"help": "Folder to write the annotated dataset to, as Parquet."}
    )
    annotation_overwrite: bool = field(
        default=False, metadata={"help": "Replace a folder that is not empty, once the new data is complete."}
    )
    import_scores: str | None = field(
        default=None,
        metadata={
            "help": "JSON-lines file of the paper's released scripts (`instruction`, `response`, `scores`): its rows are "
            "the training data and its scores the confidences, and no model is loaded."
        },
    )
    hub_dataset_id: str | None = field(
        default=None,
        metadata={
            "help": "Dataset repository on the Hub to push the annotated dataset to (private with --hub_private_repo)."
        },
    )


def make_parser(prog: str | None = None) -> "TrlParser":
    """Parser of the command."""
    from gift_trl.scripts.arguments import make_recipe_parser

    return make_recipe_parser(
        prog=prog or "gift-trl annotate",
        description="Tokenises the recipe's dataset as training will, and adds the probability that the instruct model "
        "gives to every target token (the column `confidences`). Takes the same recipe as `gift-trl train`.",
        epilog="example: gift-trl annotate --config recipe.yaml --annotation_output_dir annotated, then gift-trl train "
        "--config recipe.yaml --dataset annotated",
        extra=(
            AnnotationArguments,
            {"output": "annotation_output_dir annotation_overwrite import_scores hub_dataset_id"},
        ),
        without=("GIFT", "adapter", "training", "merge", "Hub"),
    )


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    parser = make_parser()
    script_args, training_args, model_args, dataset_args, _, annotation_args = parser.parse_args_and_config(argv)

    from accelerate import PartialState

    from gift_trl.annotation import read_provenance, save_annotated_dataset
    from gift_trl.annotation.hub import check_push_target, push_annotated_dataset
    from gift_trl.annotation.storage import ANNOTATION_MARKS
    from gift_trl.annotation.summary import summarize_confidences
    from gift_trl.checkpoints import check_output_folder
    from gift_trl.scripts.data import load_recipe_datasets

    state = PartialState()
    output_dir = annotation_args.annotation_output_dir
    if output_dir is None:
        raise ValueError("Nothing says where to write: set `--annotation_output_dir`.")
    check_output_folder(
        output_dir,
        overwrite=annotation_args.annotation_overwrite,
        marks=ANNOTATION_MARKS,
        option="`annotation_overwrite`",
    )
    repo_id = annotation_args.hub_dataset_id
    if training_args.push_to_hub and repo_id is None:
        raise ValueError(
            "`push_to_hub` is set, but nothing says where the annotated dataset goes: name its repository with "
            "`--hub_dataset_id`, or set `--push_to_hub false` to keep it in the folder."
        )
    if repo_id is not None and state.is_main_process:
        repo_id = check_push_target(repo_id, private=training_args.hub_private_repo)

    kept_columns = ()
    if annotation_args.import_scores is not None:
        from gift_trl.annotation.imports import SCORES_COLUMN

        kept_columns = (SCORES_COLUMN,)
        script_args.dataset_name, dataset_args.datasets = annotation_args.import_scores, []
        script_args.prompt_column = script_args.prompt_column or "instruction"
        script_args.completion_column = script_args.completion_column or "response"
    evaluate = training_args.eval_strategy != "no" and annotation_args.import_scores is None
    train, test = load_recipe_datasets(
        script_args, dataset_args, evaluate=evaluate, seed=training_args.seed, kept_columns=kept_columns
    )
    eval_packing = training_args.packing if training_args.eval_packing is None else training_args.eval_packing
    annotated = {}
    with _make_annotator(training_args, model_args) as annotator:
        annotate = annotator.annotate if annotation_args.import_scores is None else annotator.import_scores
        for split, dataset, packing in (
            (script_args.dataset_train_split, train, training_args.packing),
            (script_args.dataset_test_split, test, eval_packing),
        ):
            if dataset is not None:
                annotated[split] = annotate(dataset, packing=packing, dataset_name=split)
    if state.is_main_process:
        save_annotated_dataset(
            annotated,
            output_dir,
            processing_class=annotator.processing_class,
            overwrite=annotation_args.annotation_overwrite,
        )
        for split, dataset in annotated.items():
            print(f"{split}: {describe_provenance(read_provenance(dataset)[0])}")
            print(summarize_confidences(dataset).describe())
        print(f"Written to {output_dir}. See it with: gift-trl report annotation {output_dir}")
        if repo_id is not None:
            url = push_annotated_dataset(output_dir, repo_id, private=training_args.hub_private_repo)
            print(f"Pushed to {url}")
    state.wait_for_everyone()


def _make_annotator(training_args: "GIFTConfig", model_args: "ModelConfig") -> "Annotator":
    from gift_trl.annotation.annotator import Annotator
    from gift_trl.model_pair import check_same_architecture, load_tokenizer
    from gift_trl.scripts.train import base_model_init_kwargs

    instruct = training_args.instruct_model_name_or_path
    if instruct is None:
        raise ValueError("Nothing says which model scores the tokens: set `instruct_model_name_or_path`.")
    trust = {"trust_remote_code": training_args.trust_remote_code}
    revision, init_kwargs = training_args.instruct_model_revision, training_args.instruct_model_init_kwargs or {}
    tokenizer = load_tokenizer(instruct, revision=revision, **trust)
    scoring_model = instruct
    if training_args.annotator == "base":
        scoring_model, init_kwargs = model_args.model_name_or_path, base_model_init_kwargs(model_args, training_args)
        if scoring_model is None:
            raise ValueError("`annotator: base` needs the base model: set `model_name_or_path`.")
        base_kwargs = {"revision": init_kwargs["revision"], **trust}
        check_same_architecture(
            scoring_model, instruct, model_kwargs=base_kwargs, other_kwargs={"revision": revision, **trust}
        )
        revision = init_kwargs["revision"]
    return Annotator(
        scoring_model,
        tokenizer,
        args=training_args,
        revision=revision,
        model_init_kwargs={**trust, **init_kwargs},
        **training_args.annotation_options(),
    )


def describe_provenance(provenance: "Provenance") -> str:
    """
    What became of the rows of a dataset when it was annotated.

    Args:
        provenance ([`Provenance`]):
            Its provenance.

    Returns:
        `str`: One line, and one for each reason to leave rows out.
    """
    cut = f", {provenance.truncated} of them cut to {provenance.max_length} tokens" if provenance.truncated else ""
    lines = [f"{provenance.rows} rows annotated by {provenance.model} ({provenance.engine}, {provenance.dtype}){cut}"]
    lines += [f"{len(rows)} rows left out: {reason}" for reason, rows in provenance.dropped.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    from gift_trl.scripts.cli import run

    run(main)
