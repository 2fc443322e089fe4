"""A run that was killed goes on from the last checkpoint that was written to its end."""

import errno
import glob
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import SafetensorError

from gift_trl import GIFTSFTTrainer, annotate_dataset
from gift_trl.training import resume
from gift_trl.training.resume import clear_checkpoint, explain_full_disk, find_checkpoint, last_complete_checkpoint


@pytest.fixture
def interrupted(pair, conversations, config, lora, tmp_path):
    """Output folder with the checkpoints of steps 2 and 4, and a way to go on to step 6."""
    settings = {"max_steps": 6, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}

    def train(folder, resume=None, model=pair[0], data=conversations, adapter=lora, **overrides):
        args = config(output_dir=str(folder), optim="adamw_torch", **{**settings, **overrides})
        trainer = GIFTSFTTrainer(model, args, train_dataset=data, peft_config=adapter)
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
    assert last_complete_checkpoint(resumed.args) == str(folder / "checkpoint-6")
    expected = adapter_weights(whole)
    for name, value in adapter_weights(resumed).items():
        assert value.equal(expected[name]), name
    logs = [trainer.state.log_history[:6] for trainer in (whole, resumed)]
    assert [log["num_tokens"] for log in logs[0]] == [log["num_tokens"] for log in logs[1]]


@pytest.mark.parametrize(
    ("written", "num_processes", "taken"),
    [
        ({2: 2, 4: 1}, 2, 2),  # the second process was killed before it wrote
        ({2: 4, 4: 3}, 4, 2),
        ({2: 4, 4: 3}, 2, 4),  # more than there are now is enough for them
        ({2: 4, 4: 4}, 2, 4),
        ({2: 2, 4: 2}, 4, 4),  # of a run of two processes, both of which wrote
        ({2: 2, 4: None}, 2, 4),  # of a single process
    ],
)
def test_every_process_must_have_written(tmp_path, config, caplog, written, num_processes, taken):
    for step, ranks in written.items():
        folder = tmp_path / "out" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text("{}")
        for name in ["rng_state.pth"] if ranks is None else [f"rng_state_{rank}.pth" for rank in range(ranks)]:
            torch.save({}, folder / name)
    args = config()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(args), "world_size", num_processes)
        assert last_complete_checkpoint(args).endswith(f"checkpoint-{taken}")
    assert ("was killed" in caplog.text) == (taken == 2)


def test_checkpoints_without_the_optimizer(interrupted, caplog):
    folder, train, _ = interrupted
    for step in (2, 4):
        (folder / f"checkpoint-{step}" / "rng_state.pth").unlink()
        (folder / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="None of the 2 checkpoints"):
        train(folder, resume=True)
    # As in SFTTrainer, and with a warning
    resumed = train(folder, resume=True, save_only_model=True)
    assert resumed.state.global_step == 6
    assert "`checkpoint-4` was saved without the state of the optimizer" in caplog.text


@pytest.mark.parametrize("lost", ["trainer_state.json", "optimizer.pt"])
@pytest.mark.parametrize("max_steps", [6, 8])
def test_a_checkpoint_that_was_being_deleted_is_deleted(interrupted, max_steps, lost):
    # Its folder has just been changed, by which transformers would take it for the newest, and delete others
    _, train, whole = interrupted
    folder = whole.args.output_dir
    os.unlink(f"{folder}/checkpoint-2/{lost}")
    train(folder, resume=True, save_total_limit=2, max_steps=max_steps)
    assert set(glob.glob("checkpoint-*", root_dir=folder)) == {f"checkpoint-{max_steps - step}" for step in (0, 2)}


def test_a_run_killed_before_its_last_rotation_keeps_no_checkpoint_too_many(interrupted, tmp_path):
    # After the last step, where no further checkpoint is written that would delete it
    _, train, whole = interrupted
    folder, best = Path(whole.args.output_dir), tmp_path / "with_best"
    shutil.copytree(folder, best)
    train(folder, resume=True, save_total_limit=2)
    assert set(glob.glob("checkpoint-*", root_dir=folder)) == {"checkpoint-4", "checkpoint-6"}
    state = best / "checkpoint-6" / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"best_model_checkpoint": f"{folder}/checkpoint-2"}))
    train(best, resume=True, save_total_limit=2)
    assert set(glob.glob("checkpoint-*", root_dir=best)) == {"checkpoint-2", "checkpoint-6"}


def test_older_checkpoints_stay_unless_they_were_being_deleted(interrupted):
    folder, train, _ = interrupted
    files = {path.name for path in (folder / "checkpoint-2").iterdir()}
    (folder / "checkpoint-4" / "of one's own").touch()
    (folder / "checkpoint-2" / "trainer_state.json").unlink()
    train(folder, resume=True, save_total_limit=3)  # too few for any to be deleted
    assert {path.name for path in (folder / "checkpoint-2").iterdir()} == files - {"trainer_state.json"}


def test_no_checkpoint_to_go_on_from(interrupted, tmp_path):
    _, train, _ = interrupted
    with pytest.raises(ValueError, match="holds no checkpoint"):
        train(tmp_path / "new", resume=True)


def test_a_run_that_was_complete_trains_no_further(interrupted, adapter_weights):
    # Its last step is inside of an epoch. A process may be killed after its last checkpoint, before it has saved the adapter
    _, train, whole = interrupted
    again = train(whole.args.output_dir, resume=True)
    assert again.state.global_step == 6
    for name, value in adapter_weights(whole).items():
        assert value.equal(adapter_weights(again)[name]), name


def test_a_checkpoint_that_is_written_again_is_complete_only_at_its_end(interrupted, monkeypatch):
    folder, train, whole = interrupted

    def killed(trainer, output_dir):
        if output_dir.endswith("checkpoint-4"):
            raise KeyboardInterrupt
        return save(trainer, output_dir)

    save = GIFTSFTTrainer._save_optimizer_and_scheduler
    monkeypatch.setattr(GIFTSFTTrainer, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        train(folder, resume=str(folder / "checkpoint-2"))
    monkeypatch.undo()
    whole.args.output_dir = str(folder)
    assert last_complete_checkpoint(whole.args) == str(folder / "checkpoint-2")


def test_a_checkpoint_on_another_disk_is_written_again_there(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "global_step4").mkdir(parents=True)
    (elsewhere / "trainer_state.json").touch()
    (tmp_path / "checkpoint-4").symlink_to(elsewhere)
    (elsewhere / "linked").symlink_to(tmp_path)
    clear_checkpoint(tmp_path, 4)
    assert (tmp_path / "checkpoint-4").is_symlink() and list(elsewhere.iterdir()) == []


def test_one_command_starts_a_run_and_goes_on_with_it(interrupted, tmp_path, caplog):
    folder, train, whole = interrupted
    for step in (2, 4):
        (folder / f"checkpoint-{step}" / "trainer_state.json").unlink()
    again = train(folder, resume="auto", max_steps=2)
    assert "starting from the beginning" in caplog.text and again.state.global_step == 2
    caplog.clear()
    train(tmp_path / "new", resume="auto", max_steps=2)
    assert not caplog.text
    resumed = train(folder, resume="auto")
    assert [log["step"] for log in resumed.state.log_history] == [log["step"] for log in whole.state.log_history]


@pytest.mark.parametrize(
    ("wanted", "found"), [(None, None), (False, None), ("false", None), ("some/folder", "some/folder")]
)
def test_what_resume_from_checkpoint_asks_for(config, wanted, found):
    assert find_checkpoint(config(), wanted) == found


@pytest.mark.parametrize("wanted", [True, "auto"])
def test_every_process_goes_on_from_the_same_checkpoint(tmp_path, config, monkeypatch, wanted):
    folder = tmp_path / "out" / "checkpoint-2"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    torch.save({}, folder / "rng_state.pth")
    args = config()
    monkeypatch.setattr(type(args), "world_size", 2)
    # The disk of the main process is further ahead
    monkeypatch.setattr(resume, "broadcast_object_list", lambda found: found.__setitem__(0, "checkpoint-4"))
    assert find_checkpoint(args, wanted) == str(tmp_path / "out" / "checkpoint-4")


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"confidence_exponent": 0.0}, r"confidence_exponent \(1\.0, this run has 0\.0\)"),
        ({"eos_confidence": None}, r"eos_confidence \(1\.0, this run has None\)"),
        ({"model": 1}, r"base_model \(base, this run has instruct\)"),
        ({"adapter": {"r": 8}}, r"r \(4, this run has 8\)"),
        (
            {"adapter": {"target_modules": ["q_proj"]}},
            r"target_modules \(down_proj, gate_proj, .*, v_proj, this run has q_proj\)",
        ),
        ({"adapter": {"init_lora_weights": "pissa"}}, r"init_lora_weights \(None, this run has pissa\)"),
        ({"adapter": None}, r"adapter \(LORA, this run has none\)"),
    ],
    ids=["exponent", "eos", "model", "rank", "targets", "changed base", "whole model"],
)
def test_a_checkpoint_of_another_run_is_refused(interrupted, pair, lora, other, named):
    folder, train, _ = interrupted
    other = dict(other)
    if "model" in other:
        other["model"] = pair[other["model"]]
    if other.get("adapter"):
        other["adapter"] = LoraConfig(**{**lora.to_dict(), **other["adapter"]})
    with pytest.raises(ValueError, match=rf"checkpoint-4` was made by another run: {named}.*another `output_dir`"):
        train(folder, resume="auto", **other)
    assert not (folder / "checkpoint-6").exists()


def test_a_checkpoint_of_another_run_is_refused_before_the_data_is_scored(interrupted, lora, monkeypatch):
    folder, train, _ = interrupted
    monkeypatch.setattr("gift_trl.training.confidences.Annotator", lambda *args, **kwargs: pytest.fail("scored"))
    settings = {"adapter": LoraConfig(**{**lora.to_dict(), "r": 8}), "confidence_exponent": 0.5}
    for wanted in (True, str(folder / "checkpoint-2")):
        with pytest.raises(
            ValueError, match=r"confidence_exponent \(1\.0, this run has 0\.5\); r \(4, this run has 8\)"
        ):
            train(folder, resume_from_checkpoint=wanted, **settings)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"r \(4, this run has 8\)"):
        train(folder, resume=str(folder / "checkpoint-2"), adapter=settings["adapter"])


def test_annotated_data_are_those_that_were_annotated(interrupted, pair, conversations):
    folder, train, _ = interrupted
    annotated = annotate_dataset(conversations, pair[1])
    assert train(folder, resume=True, data=annotated).state.global_step == 6


@pytest.mark.parametrize("rows", [range(7), range(7, -1, -1)], ids=["fewer", "others"])
def test_other_data_are_warned_of_and_refused_if_none_is_trained_on(interrupted, conversations, caplog, rows):
    folder, train, whole = interrupted
    data = conversations.select(rows)
    with pytest.raises(ValueError, match=r"training data \(8 rows, digest \w+, this run has \d rows"):
        train(whole.args.output_dir, resume=True, data=data)
    assert train(folder, resume=True, data=data).state.global_step == 6
    assert caplog.text.count("with other settings: training data (8 rows") == 1


def test_what_the_training_does_not_read_may_change(interrupted, conversations, lora, caplog):
    folder, train, _ = interrupted
    data = conversations.add_column("id", list(range(len(conversations))))
    adapter = LoraConfig(**{**lora.to_dict(), "init_lora_weights": "gaussian"})
    assert train(folder, resume=True, data=data, adapter=adapter).state.global_step == 6
    assert "other settings" not in caplog.text


def test_what_may_change_on_the_way_is_warned_of(interrupted, caplog):
    folder, train, _ = interrupted
    train(folder, resume=True, max_steps=5)
    assert "other settings" not in caplog.text
    changed = {"learning_rate": 1e-3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    resumed = train(folder, resume=str(folder / "checkpoint-4"), **changed)
    assert resumed.state.global_step == 6 and caplog.text.count("other settings") == 1
    warning = next(record.message for record in caplog.records if "other settings" in record.message)
    assert "optimizer (adamw_torch, learning rate 0.05" in warning and "rows per step" not in warning


@pytest.mark.parametrize("shorter", [{"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 1}])
def test_a_run_that_ends_before_its_checkpoint_says_that_it_trains_nothing(interrupted, caplog, shorter):
    folder, train, whole = interrupted
    assert train(folder, resume=True, **shorter).state.global_step == 4
    assert "Nothing is trained: `checkpoint-4` is at step 4" in caplog.text
    caplog.clear()
    train(whole.args.output_dir, resume=True)
    assert "Nothing is trained" not in caplog.text


def test_a_checkpoint_of_another_trainer_is_not_known(interrupted, caplog):
    folder, train, _ = interrupted
    (folder / "checkpoint-4" / "gift_training.json").unlink()
    assert train(folder, resume=True, confidence_exponent=0.0).state.global_step == 6
    assert caplog.text.count("`checkpoint-4` holds no `gift_training.json`") == 1


def test_every_process_refuses_what_the_main_one_does(interrupted, config, monkeypatch):
    folder, _, whole = interrupted
    args, facts = whole.args, whole._training_facts()
    monkeypatch.setattr(type(args), "world_size", 2)
    monkeypatch.setattr(type(args), "process_index", 1)
    # What this process sees says nothing
    monkeypatch.setattr(resume, "broadcast_object_list", lambda found: found.__setitem__(0, "made by another run"))
    with pytest.raises(ValueError, match="made by another run"):
        resume.check_checkpoint(str(folder / "checkpoint-4"), args, facts, None, loaded=True)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["system", "safetensors"],
)
def test_a_full_disk_is_explained(interrupted, monkeypatch, error):
    folder, train, _ = interrupted

    def full(*args):
        raise error

    monkeypatch.setattr(GIFTSFTTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match=r"The disk is full.*free some space.*go on with `resume_from_checkpoint: true`"):
        train(folder, resume=True)


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    for error in (RuntimeError("CUDA error"), ValueError("wrong"), PermissionError(errno.EACCES, "denied")):
        with pytest.raises(type(error)) as raised, explain_full_disk(tmp_path / "new"):
            raise error
        assert raised.value is error
