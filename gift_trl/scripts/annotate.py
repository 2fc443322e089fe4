"""`gift-trl annotate`: stage 1 of a recipe, written to a folder."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset
    from trl import TrlParser

    from gift_trl.annotation import Provenance


@dataclass
class AnnotationArguments:
    """
    Arguments of `gift-trl annotate` that a recipe does not hold.

    Args:
        annotation_output_dir (`str`):
            Folder to write the annotated dataset to, as Parquet.
        annotation_overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a folder that is not empty.
    """

    annotation_output_dir: str | None = field(
        default=None, metadata={"help": "Folder to write the annotated dataset to, as Parquet."}
    )
    annotation_overwrite: bool = field(
        default=False, metadata={"help": "Replace a folder that is not empty, once the new data is complete."}
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
        extra=(AnnotationArguments, {"annotation": "annotation_output_dir annotation_overwrite"}),
    )


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    parser = make_parser()
    script_args, training_args, model_args, dataset_args, _, annotation_args = parser.parse_args_and_config(argv)

    from accelerate import PartialState

    from gift_trl.annotation import annotate_dataset, read_provenance, save_annotated_dataset
    from gift_trl.checkpoints import check_output_folder
    from gift_trl.model_pair import check_same_architecture, load_tokenizer
    from gift_trl.scripts.data import load_recipe_datasets
    from gift_trl.scripts.train import base_model_init_kwargs

    if annotation_args.annotation_output_dir is None:
        raise ValueError("Nothing says where to write: set `--annotation_output_dir`.")
    check_output_folder(annotation_args.annotation_output_dir, overwrite=annotation_args.annotation_overwrite)
    instruct = training_args.instruct_model_name_or_path
    if instruct is None:
        raise ValueError("Nothing says which model scores the tokens: set `instruct_model_name_or_path`.")
    trust = {"trust_remote_code": training_args.trust_remote_code}
    revision, init_kwargs = training_args.instruct_model_revision, training_args.instruct_model_init_kwargs or {}
    tokenizer = load_tokenizer(instruct, revision=revision, **trust)
    annotator = instruct
    if training_args.annotator == "base":
        annotator, init_kwargs = model_args.model_name_or_path, base_model_init_kwargs(model_args, training_args)
        if annotator is None:
            raise ValueError("`annotator: base` needs the base model: set `model_name_or_path`.")
        base_kwargs = {"revision": init_kwargs["revision"], **trust}
        check_same_architecture(
            annotator, instruct, model_kwargs=base_kwargs, other_kwargs={"revision": revision, **trust}
        )
        revision = init_kwargs["revision"]
    evaluate = training_args.eval_strategy != "no"
    train, test = load_recipe_datasets(script_args, dataset_args, evaluate=evaluate, seed=training_args.seed)
    eval_packing = training_args.packing if training_args.eval_packing is None else training_args.eval_packing
    annotated = {
        split: annotate_dataset(
            dataset,
            annotator,
            tokenizer,
            args=training_args,
            revision=revision,
            model_init_kwargs={**trust, **init_kwargs},
            packing=packing,
            dataset_name=split,
        )
        for split, dataset, packing in (
            (script_args.dataset_train_split, train, training_args.packing),
            (script_args.dataset_test_split, test, eval_packing),
        )
        if dataset is not None
    }
    state = PartialState()
    if state.is_main_process:
        output_dir = annotation_args.annotation_output_dir
        save_annotated_dataset(annotated, output_dir, overwrite=annotation_args.annotation_overwrite)
        for split, dataset in annotated.items():
            print(f"{split}: {summarize_annotation(dataset, read_provenance(dataset)[0])}")
        print(f"Written to {output_dir}")
    state.wait_for_everyone()


def summarize_annotation(dataset: "Dataset", provenance: "Provenance") -> str:
    """
    What a person wants to know of an annotation: rows kept and left out, and how sure the instruct model is.

    Args:
        dataset ([`~datasets.Dataset`]):
            Annotated dataset.
        provenance ([`Provenance`]):
            Its provenance.

    Returns:
        `str`: A few lines.
    """
    import numpy as np

    targets = np.concatenate(
        [
            np.asarray(q)[1:][np.asarray(labels)[1:] != -100]
            for q, labels in zip(dataset["confidences"], dataset["labels"], strict=True)
        ]
    )
    low, high = float((targets < 0.2).mean()), float((targets > 0.8).mean())
    lines = [
        f"{provenance.rows} rows annotated by {provenance.model} ({provenance.dtype}), {provenance.truncated} of them "
        f"cut to {provenance.max_length} tokens",
        f"{len(targets)} target tokens: mean confidence {targets.mean():.3g}; {low:.1%} below 0.2, "
        f"{1 - low - high:.1%} from 0.2 to 0.8, {high:.1%} above 0.8",
    ]
    lines += [f"{count} rows left out: {reason}" for reason, count in provenance.dropped.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    from gift_trl.scripts.cli import run

    run(main)
