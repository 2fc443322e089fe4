"""A run that was killed goes on from the last checkpoint that was written to its end."""

import shutil

import pytest

from gift_trl import GIFTSFTTrainer
from gift_trl.training.resume import last_complete_checkpoint


@pytest.fixture
def interrupted(pair, conversations, config, lora, tmp_path):
    """Output folder with the checkpoints of steps 2 and 4, and a way to go on to step 6."""
    settings = {"max_steps": 6, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}

    def train(folder, resume=None):
        args = config(output_dir=str(folder), optim="adamw_torch", **settings)
        trainer = GIFTSFTTrainer(pair[0], args, train_dataset=conversations, peft_config=lora)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoint-6")
    return tmp_path / "killed", train, whole


@pytest.mark.parametrize("lost", ["trainer_state.json", "half of it", "rng_state.pth", "half of the random numbers"])
def test_a_checkpoint_cut_short_is_not_taken(interrupted, adapter_weights, caplog, lost):
    folder, train, whole = interrupted
    last = folder / "checkpoint-4"
    if lost.startswith("half"):
        file = last / ("rng_state.pth" if "random" in lost else "trainer_state.json")
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        (last / lost).unlink()
    resumed = train(folder, resume=True)
    assert "`checkpoint-4` is not complete" in caplog.text
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-6")
    expected = adapter_weights(whole)
    for name, value in adapter_weights(resumed).items():
        assert value.equal(expected[name]), name


def test_every_process_must_have_written(interrupted):
    folder, _, _ = interrupted
    for step, ranks in ((2, 2), (4, 1)):
        state = folder / f"checkpoint-{step}" / "rng_state.pth"
        for rank in range(ranks):
            shutil.copy(state, state.with_name(f"rng_state_{rank}.pth"))
        state.unlink()
    assert last_complete_checkpoint(folder, num_processes=2).endswith("checkpoint-2")
    # Of another number of processes, if there is none of this one
    assert last_complete_checkpoint(folder, num_processes=3).endswith("checkpoint-4")


def test_no_checkpoint_to_go_on_from(interrupted, tmp_path):
    folder, train, _ = interrupted
    with pytest.raises(ValueError, match="holds no checkpoint"):
        train(tmp_path / "new", resume=True)
    for step in (2, 4):
        (folder / f"checkpoint-{step}" / "rng_state.pth").unlink()
    with pytest.raises(ValueError, match="None of the 2 checkpoints"):
        train(folder, resume=True)
