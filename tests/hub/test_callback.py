"""`MergeAndPushCallback`, from Python and from a recipe, against a Hub on the loopback interface."""

import contextlib
import errno
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard, snapshot_download
from peft import LoraConfig, PeftModel
from torch.distributed.fsdp import StateDictType
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState

from gift_trl import GIFTConfig, GIFTSFTTrainer, MergeAndPushCallback, merge_adapter
from gift_trl.hub import push_folder
from gift_trl.scripts import push, train
from gift_trl.scripts.cli import run


TOKEN = "hf_canaryThatMustBeReadNowhere"
NAMES = iter(range(1000))


def command(main: str, *arguments: str, log: Path | None = None) -> int:
    """Runs a command in the process of the client; returns its exit status."""
    with contextlib.ExitStack() as stack:
        if log is not None:
            file = stack.enter_context(open(log, "w"))
            stack.enter_context(contextlib.redirect_stdout(file))
            stack.enter_context(contextlib.redirect_stderr(file))
        try:
            run({"train": train.main, "push": push.main}[main], list(arguments))
        except SystemExit as end:
            return end.code
    return 0


def command_on_a_full_disk(main: str, *arguments: str, log: Path) -> int:
    """The same, where no card can be written."""
    with mock.patch("gift_trl.cards.whole_file", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        return command(main, *arguments, log=log)


def command_without_notes(main: str, *arguments: str, log: Path) -> int:
    """The same, where the note of a push finds no room."""
    with mock.patch("gift_trl.hub.uploads.PushLedger._write", return_value=False):
        return command(main, *arguments, log=log)


def train_in_python(pair, rows, folder: Path, ids: tuple[str, str], *, later: bool) -> tuple[bool, str]:
    args = GIFTConfig(
        str(folder / "adapter"),
        instruct_model_name_or_path=pair[1],
        push_to_hub=True,
        hub_model_id=ids[0],
        max_steps=2,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    )
    callback = MergeAndPushCallback(folder / "merged", hub_merged_model_id=ids[1])
    peft_config = LoraConfig(r=4, target_modules=["q_proj"])
    callbacks = None if later else [callback]
    rows = Dataset.from_list(rows)
    trainer = GIFTSFTTrainer(pair[0], args, train_dataset=rows, peft_config=peft_config, callbacks=callbacks)
    if later:
        trainer.add_callback(callback)
    trainer.train()
    if later:
        trainer.push_to_hub("By hand")
    return args.push_to_hub, trainer.args.hub_model_id


def logits_of(folder_or_id: str | Path, adapter: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder_or_id)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(torch.arange(3, 30)[None]).logits


def download(repo_id: str, revision: str | None = None) -> str:
    return snapshot_download(repo_id, revision=revision)


def validate(card: str) -> None:
    ModelCard(card).validate()


def messages(server, name: str) -> list[str]:
    """Messages of the commits of a repository, the first one aside, with which it was created."""
    return [commit.message for commit in server.repositories["model", name].commits[1:]]


@pytest.fixture
def names() -> tuple[str, str]:
    """Repositories for an adapter and a merged model."""
    number = next(NAMES)
    return f"user/adapter{number}", f"user/merged{number}"


@pytest.fixture
def push_recipe(recipe, names):
    def write(**overrides) -> str:
        settings = {"push_to_hub": True, "hub_model_id": names[0], "hub_merged_model_id": names[1]}
        settings |= {"hub_strategy": "end", "save_strategy": "no", "max_steps": 2}
        return recipe(**{**settings, **overrides})

    return write


def test_one_run_to_two_pages(server, client, push_recipe, names, tmp_path, pair):
    name = names[0].removeprefix("user/")
    config = push_recipe(hub_model_id=name, hub_private_repo=True, hub_merged_tag="v1")
    assert client(command, "train", "--config", config) == 0
    for repo_id in names:
        repository = server.repositories["model", repo_id]
        assert repository.private and len(repository.commits) == 2
        assert repository.commits[1].message.startswith("Step 2, loss ")
        files = server.files("model", repo_id)
        client(validate, files["README.md"].decode())
        assert not any(TOKEN.encode() in content or str(tmp_path).encode() in content for content in files.values())
    assert (
        server.repositories["model", names[1]].tags["v1"].sha == server.repositories["model", names[1]].commits[1].sha
    )
    # The card of each names the other, and itself, with the namespace that nobody wrote into the recipe
    assert f'merge_adapter("{names[0]}"' in server.files("model", names[0])["README.md"].decode()
    card = server.files("model", names[1])["README.md"].decode()
    assert f'model="{names[1]}"' in card and f"[{names[0]}](https://huggingface.co/{names[0]})" in card
    merged, adapter = client(download, names[1]), client(download, names[0])
    expected = client(logits_of, tmp_path / "merged")
    assert torch.equal(client(logits_of, merged), expected)
    assert torch.allclose(client(logits_of, pair[1], adapter), expected, atol=1e-5)


def test_every_checkpoint_has_a_branch(server, client, push_recipe, names, tmp_path):
    config = push_recipe(
        merge_at_every_checkpoint=True,
        hub_strategy="every_save",
        hub_always_push=True,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
        save_total_limit=1,
    )
    assert client(command, "train", "--config", config) == 0
    steps = [f"step-00000{step}" for step in (1, 2, 3)]
    repository = server.repositories["model", names[1]]
    assert repository.branches.keys() == {"main", *steps}
    for number, step in enumerate(steps, 1):
        assert repository.branches[step].message.startswith(f"Step {number}, loss ")
        assert f'revision="{step}"' in server.files("model", names[1], step)["README.md"].decode()
    weights = [server.files("model", names[1], branch)["model.safetensors"] for branch in (*steps, "main")]
    assert len(set(weights)) == 3 and weights[2] == weights[3]
    # The adapter's main branch moves on with the training
    assert [message[:6] for message in messages(server, names[0])] == ["Step 1", "Step 2", "Step 3"]
    # A merged model goes when its checkpoint goes
    assert sorted(path.name for path in tmp_path.glob("merged*")) == ["merged", "merged-step-000003"]
    assert [path.name for path in tmp_path.glob(".*")] == []
    expected = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert expected == (tmp_path / "merged-step-000003" / "model.safetensors").read_bytes() == weights[3]


def test_a_failed_push_loses_nothing(server, client, push_recipe, names, tmp_path, pair):
    server.fail(f"POST /api/models/{names[1]}/commit/", status=403)
    log = tmp_path / "log"
    assert client(command, "train", "--config", push_recipe(), log=log) == 1
    error = log.read_text().rpartition("error: ")[2]
    assert "The training is complete" in error and "may not write" in error
    assert (len(messages(server, names[0])), len(messages(server, names[1]))) == (1, 0)
    told = error.split("`gift-trl push ", 1)[1].split("`", 1)[0]
    assert told.startswith(f"{tmp_path / 'merged'} --repo_id {names[1]}")
    assert [client(command, "push", *shlex.split(told)) for _ in range(2)] == [0, 0]
    assert len(messages(server, names[1])) == 1
    merge_adapter(tmp_path / "adapter", pair[1], tmp_path / "alone")
    expected = (tmp_path / "alone" / "model.safetensors").read_bytes()
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == expected
    assert server.files("model", names[1])["model.safetensors"] == expected


def test_a_merged_model_is_not_pushed_without_its_card(server, client, push_recipe, names, tmp_path):
    log = tmp_path / "log"
    assert client(command_on_a_full_disk, "train", "--config", push_recipe(), log=log) == 1
    error = log.read_text().rpartition("error: ")[2]
    assert "The training is complete" in error and error.count("README.md was not written") == 1
    assert ("model", names[1]) not in server.repositories and len(messages(server, names[0])) == 1
    told = error.split("`gift-trl push ", 1)[1].split("`", 1)[0]
    assert client(command, "push", *shlex.split(told)) == 0
    assert len(messages(server, names[1])) == 1 and "README.md" in server.files("model", names[1])


def test_nothing_is_pushed_that_a_resumed_run_could_not_replace(server, client, push_recipe, names, tmp_path):
    log = tmp_path / "log"
    assert client(command_without_notes, "train", "--config", push_recipe(), log=log) == 1
    error = log.read_text().rpartition("error: ")[2]
    assert error.count("a note of it found no room") == 2
    assert not any(("model", name) in server.repositories for name in names)
    for told in error.split("`gift-trl push ")[1:]:
        assert client(command, "push", *shlex.split(told.split("`", 1)[0])) == 0
    assert [len(messages(server, name)) for name in names] == [1, 1]


def test_a_failed_merge_stops_no_training(server, client, push_recipe, names, tmp_path):
    (tmp_path / "merged-step-000001").touch()  # in its way
    log = tmp_path / "log"
    saves = {"merge_at_every_checkpoint": True, "save_strategy": "steps", "save_steps": 1}
    assert client(command, "train", "--config", push_recipe(push_to_hub=False, **saves), log=log) == 1
    error = log.read_text().rpartition("error: ")[2]
    assert error.count("\n- ") == 1 and "'{}' is a file".format(tmp_path / "merged-step-000001") in error
    assert f"`gift-trl merge --adapter {tmp_path / 'adapter' / 'checkpoint-1'} --instruct_model " in error
    assert f"&& gift-trl push {tmp_path / 'merged-step-000001'} --repo_id {names[1]} --revision step-000001`" in error
    # Of the final model, success is said
    assert f"Pushed to {names[1]}, branch main" in log.read_text()
    assert server.repositories["model", names[1]].branches.keys() == {"main", "step-000002"}


@pytest.mark.parametrize("killed", ["before the merge", "before the push", "before its end"])
def test_a_killed_run_is_finished(server, client, push_recipe, names, tmp_path, killed):
    config = push_recipe(
        save_strategy="steps", save_steps=1, merge_at_every_checkpoint=True, hub_strategy="every_save"
    )
    assert client(command, "train", "--config", config) == 0
    merged = server.repositories["model", names[1]]
    expected = {branch: server.files("model", names[1], branch)["model.safetensors"] for branch in merged.branches}
    if killed != "before its end":
        for branch in ("main", "step-000002"):
            del merged.branches[branch]
        merged.branches["main"] = merged.commits[0]
    if killed == "before the merge":
        shutil.rmtree(tmp_path / "merged")
        shutil.rmtree(tmp_path / "merged-step-000002")
        (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("merged*/model.safetensors")}
    commits = (len(messages(server, names[0])), len(merged.commits))
    assert client(command, "train", "--config", config, "--resume_from_checkpoint", "true") == 0
    found = {branch: server.files("model", names[1], branch)["model.safetensors"] for branch in merged.branches}
    assert found == expected
    assert len(merged.commits) - commits[1] == (0 if killed == "before its end" else 2)
    assert len(messages(server, names[0])) == commits[0] or killed == "before the merge"
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())


def test_what_speaks_against_it_is_said_before_the_data_is_read(server, client, push_recipe, names, tmp_path, pair):
    def error(**settings) -> str:
        log = tmp_path / "log"
        config = push_recipe(dataset_name=str(tmp_path / "missing.jsonl"), **settings)
        assert client(command, "train", "--config", config, log=log) == 1
        text = log.read_text()
        assert text.count("error: ") == 1 and "missing.jsonl" not in text and TOKEN not in text
        return text

    client(push_folder, pair[1], names[1])
    requests = len(server.repositories)
    text = error(hub_model_id="no/legal/name", merge_scale=0.0, lora_modules_to_save=["norm"])
    assert text.count("\n- ") == 3
    for part in ("'no/legal/name' cannot be the id", "hub_overwrite: true", "saved_modules"):
        assert part in text
    assert "give each a repository of its own" in error(
        hub_model_id=names[1].removeprefix("user/"), hub_overwrite=True
    )
    assert "set `merge_output_dir`" in error(merge_output_dir=None)
    assert "set it to 'every_save' or 'end'" in error(hub_strategy="checkpoint", hub_overwrite=True)
    assert "set `save_strategy`" in error(merge_at_every_checkpoint=True, hub_overwrite=True)
    server.tokens[TOKEN] = "read"
    try:
        assert "may not write" in error()
    finally:
        server.tokens[TOKEN] = "write"
    assert len(server.repositories) == requests and not (tmp_path / "merged").exists()
    # Told to, another run's model is replaced; the next run in the same folders is another one
    assert client(command, "train", "--config", push_recipe(hub_overwrite=True)) == 0
    text = error()
    assert text.count("hub_overwrite: true") == 2
    assert "exists and is not empty" in text and "overwrite it (`merge_overwrite`)" in text


def test_a_whole_model_is_pushed_without_a_merge(server, client, push_recipe, names, tmp_path):
    settings = {"use_peft": False, "merge_output_dir": None, "hub_merged_model_id": None, "hub_strategy": "every_save"}
    settings |= {"save_strategy": "steps", "save_steps": 1, "hub_always_push": True}
    assert client(command, "train", "--config", push_recipe(**settings)) == 0
    for commit in server.repositories["model", names[0]].commits[1:]:
        assert commit.files.keys() >= {"model.safetensors", "tokenizer.json", "README.md"}
    assert ("model", names[1]) not in server.repositories


@pytest.mark.parametrize("later", [False, True], ids=["constructor", "added later"])
def test_from_python(server, client, names, pair, conversations, tmp_path, later):
    pushes, hub_model_id = client(train_in_python, pair, conversations.to_list(), tmp_path, names, later=later)
    assert pushes and hub_model_id == names[0]  # the user's own arguments are as they were
    for repo_id, weights in zip(names, ("adapter_model.safetensors", "model.safetensors"), strict=True):
        # Not the trainer's too, but for the one that was asked for
        assert len(messages(server, repo_id)) == 1 + (later and repo_id == names[0])
        assert weights in server.files("model", repo_id)
        assert "pushes.json" not in "".join(server.files("model", repo_id))


def test_a_trainer_that_does_not_save_for_it(tmp_path):
    callback = MergeAndPushCallback(tmp_path / "merged")
    with pytest.raises(ValueError, match="use a `GIFTSFTTrainer`"):
        callback.on_train_begin(GIFTConfig(str(tmp_path), bf16=False), TrainerState(), TrainerControl())


def test_an_adapter_that_fsdp_saves_in_shards(tmp_path):
    plugin = SimpleNamespace(state_dict_type=StateDictType.SHARDED_STATE_DICT)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    trainer = SimpleNamespace(is_fsdp_enabled=True, accelerator=accelerator)
    with pytest.raises(ValueError, match="FULL_STATE_DICT"):
        MergeAndPushCallback(tmp_path / "merged").before_training(trainer, None)
