"""Calls of the public names, for `make types` and never run: a line marked `type: ignore` must be a type error."""

from datasets import Dataset
from peft import LoraConfig

from gift_trl import (
    GIFTConfig,
    GIFTSFTTrainer,
    MergeAndPushCallback,
    MergeReport,
    annotate_dataset,
    merge_adapter,
)
from gift_trl.hub import PushReport, push_folder


def right(dataset: Dataset) -> MergeReport:
    annotated: Dataset = annotate_dataset(dataset, "instruct", args=GIFTConfig(max_length=2048))
    trainer = GIFTSFTTrainer(
        model="base",
        args=GIFTConfig(output_dir="adapter", instruct_model_name_or_path="instruct", confidence_exponent=1.0),
        train_dataset=annotated,
        peft_config=LoraConfig(target_modules="all-linear"),
        callbacks=[MergeAndPushCallback("merged", hub_merged_model_id="user/merged")],
    )
    pushed: PushReport = push_folder("merged", "user/name", private=True)
    print(pushed.commit)
    metrics: dict[str, float] = trainer.train().metrics
    print(metrics, trainer.args.weight_normalization)
    return merge_adapter("adapter", "instruct", "merged", scale=0.5)


def wrong(dataset: Dataset) -> None:
    annotate_dataset(dataset)  # type: ignore[call-arg]
    annotate_dataset(dataset, 1)  # type: ignore[arg-type]
    GIFTConfig(confidence_exponent="two")  # type: ignore[arg-type]
    GIFTConfig(exponent=2.0)  # type: ignore[call-arg]
    GIFTSFTTrainer(model="base", instruct_model=1)  # type: ignore[arg-type]
    print(GIFTSFTTrainer("base").args.exponent)  # type: ignore[attr-defined]
    merge_adapter("adapter", "instruct")  # type: ignore[call-arg]
    MergeAndPushCallback("merged", merge_scale="half")  # type: ignore[arg-type]
    merge_adapter("adapter", "instruct", "merged", scale="half")  # type: ignore[arg-type]
    MergeAndPushCallback("merged", hub_model_id="user/name")  # type: ignore[call-arg]
    push_folder("merged")  # type: ignore[call-arg]
    push_folder("merged", "user/name", private="yes")  # type: ignore[arg-type]
