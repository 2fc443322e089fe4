"""What `MergeAndPushCallback` leaves alone: models, checkpoints and disks of others. No Hub is asked."""

import shutil
from pathlib import Path

import pytest
from peft import LoraConfig

from gift_trl import GIFTConfig, GIFTSFTTrainer, MergeAndPushCallback
from gift_trl.hub import callback as callback_module


LORA = LoraConfig(r=4, target_modules=["q_proj"])


@pytest.fixture
def prepare(pair, tmp_path):
    def make(folder: str, max_steps: int = 2, **settings) -> tuple[GIFTConfig, MergeAndPushCallback]:
        args = GIFTConfig(
            str(tmp_path / folder),
            instruct_model_name_or_path=pair[1],
            max_steps=max_steps,
            per_device_train_batch_size=2,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
        )
        return args, MergeAndPushCallback(tmp_path / "merged", merge_at_every_checkpoint=True, **settings)

    return make


@pytest.fixture
def train(prepare, pair, conversations):
    def run(folder: str, resume: str | None = None, **settings) -> None:
        args, callback = prepare(folder, **settings)
        args = callback.before_annotation(args, LORA, resume or False)
        trainer = GIFTSFTTrainer(pair[0], args, train_dataset=conversations, peft_config=LORA, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)

    return run


def merged(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("merged*"))


def test_models_of_another_run_are_not_deleted(train, tmp_path):
    train("one")
    shutil.copytree(tmp_path / "merged", tmp_path / "merged-step-000007")
    train("another", merge_overwrite=True)
    assert merged(tmp_path) == ["merged", "merged-step-000002", "merged-step-000007"]


def test_a_run_that_goes_on_from_another_one_s_checkpoint(train, tmp_path):
    train("one")
    shutil.rmtree(tmp_path / "merged")
    resume = str(tmp_path / "one" / "checkpoint-2")
    with pytest.raises(FileExistsError, match="merged-step-000002"):
        train("another", resume, max_steps=3)
    assert merged(tmp_path) == ["merged-step-000002"]


def test_a_run_that_goes_on_from_its_own_checkpoint(train, tmp_path):
    train("one")
    shutil.rmtree(tmp_path / "merged")
    (tmp_path / "merged-step-000002").rename(
        tmp_path / "merged-step-000001"
    )  # it was killed before this one was deleted
    (tmp_path / "one" / "checkpoint-2-kept").mkdir()  # by a person
    train("one", str(tmp_path / "one" / "checkpoint-2"), max_steps=3)
    assert merged(tmp_path) == ["merged", "merged-step-000003"]


def test_every_process_goes_by_the_main_one_s_disk(prepare, tmp_path, monkeypatch):
    """A process that sees no checkpoints has to check as often as the main one, or each would wait for the other."""
    args, callback = prepare("run")
    answers = iter([str(tmp_path / "run" / "checkpoint-1"), (None, None)])
    monkeypatch.setattr(callback_module, "run_on_main_process", lambda work: next(answers))
    callback.before_annotation(args, LORA)
    assert callback._checked_for == str(tmp_path / "run" / "checkpoint-1")
