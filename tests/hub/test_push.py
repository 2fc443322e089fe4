"""Pushes of models and adapters to a Hub on the loopback interface."""

import contextlib
import io
import json
import os
import shlex
import shutil
import warnings
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from fault_bench import make_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gift_trl.hub import PushReport, check_push_target, push_folder
from gift_trl.repositories import redact
from gift_trl.scripts.push import main as push_command_line


TOKEN = "hf_canaryThatMustBeReadNowhere"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model in three shards."""
    return make_model(tmp_path / "merged", 1, 3)


@pytest.fixture
def refuses(server, client):
    """Calls a push that must fail before anything is changed on the Hub; returns the message."""

    def refuse(error: type[Exception], function, *args, **kwargs) -> str:
        server.requests.clear()
        with pytest.raises(error) as raised:
            client(function, *args, **kwargs)
        written = [line for line in server.requests if not line.startswith(("GET", "POST /api/validate-yaml"))]
        assert not written and TOKEN not in str(raised.value)
        return str(raised.value)

    return refuse


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def push_as(token: str | None, *args, **kwargs) -> PushReport:
    with patch.dict(os.environ, {"HF_TOKEN": token or ""}):
        return push_folder(*args, **kwargs)


def push_and_warn(*args, **kwargs) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        push_folder(*args, **kwargs)
    return [str(warning.message) for warning in caught if "gift" in warning.filename or "hub" in warning.filename]


def load(repo_id: str, revision: str | None, ids: list[list[int]]) -> tuple[list, str]:
    """Logits of a model from the Hub, and the text of some tokens."""
    tokenizer = AutoTokenizer.from_pretrained(repo_id, revision=revision)
    model = AutoModelForCausalLM.from_pretrained(repo_id, revision=revision, dtype="auto")
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.tolist(), tokenizer.decode(ids[0])


def test_one_commit_with_the_model_and_nothing_else(server, client, folder):
    expected = contents(folder)
    report: PushReport = client(push_folder, folder, "merged", private=True, tag="v1", commit_message="At step 100")
    repository = server.repositories["model", "user/merged"]
    assert repository.private
    _, commit = repository.commits
    assert report.repo_id == "user/merged" and report.commit == commit.sha == repository.tags["v1"].sha
    assert commit.message == "At step 100" and report.url == f"{server.endpoint}/user/merged/commit/{commit.sha}"
    assert server.files("model", "user/merged") == expected | {".gitattributes": b""}
    assert sorted(report.uploaded) == sorted(expected) and not report.left_out
    assert report.num_bytes == sum(map(len, expected.values()))
    again = client(push_folder, folder, "user/merged", tag="v1")
    assert (again.commit, again.uploaded) == (commit.sha, []) and len(repository.commits) == 2
    assert contents(folder) == expected


def test_round_trip(server, client, pair, tmp_path):
    """What was pushed loads from the Hub, and is the same model, bit for bit."""
    ids = [[1, 20, 30, 40], [1, 7, 300, 2]]
    client(push_folder, pair[1], "user/loads", revision="step-000100")
    logits, text = client(load, "user/loads", "step-000100", ids)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(pair[1], dtype="auto")(torch.tensor(ids)).logits
    assert torch.equal(torch.tensor(logits), expected.float())
    assert text == AutoTokenizer.from_pretrained(pair[1]).decode(ids[0])


def test_only_what_is_missing_is_uploaded(server, client, folder):
    server.fail("POST .*/commit/", status=400)
    with pytest.raises(OSError, match="to finish, run `gift-trl push"):
        client(push_folder, folder, "user/resumed")
    server.requests.clear()
    client(push_folder, folder, "user/resumed")
    assert not [line for line in server.requests if line.startswith("PUT")]
    (folder / "LICENSE").write_text("the licence")
    report = client(push_folder, folder, "user/resumed")
    assert report.uploaded == ["LICENSE"] and len(report.unchanged) == len(contents(folder)) - 1
    assert server.files("model", "user/resumed") == contents(folder) | {".gitattributes": b""}


def test_branches(server, client, folder):
    client(push_folder, folder, "user/branches", revision="step-000100")
    assert server.files("model", "user/branches").keys() == {".gitattributes"}
    assert server.files("model", "user/branches", "step-000100") == contents(folder) | {".gitattributes": b""}
    # A new branch is a copy of the main one, whose model may be replaced on it, and only there
    client(push_folder, folder, "user/branches")
    other = make_model(folder.parent / "other", 2, 2)
    client(push_folder, other, "user/branches", revision="step-000200")
    assert server.files("model", "user/branches", "step-000200") == contents(other) | {".gitattributes": b""}
    assert server.files("model", "user/branches") == contents(folder) | {".gitattributes": b""}


def test_a_revision_that_is_there_stays_unless_told(server, client, refuses, folder):
    """Stale shards, pickles and descriptions go with the model they are of; documents and pictures stay."""
    earlier = make_model(folder.parent / "earlier", 2, 4)
    (earlier / "generation_config.json").write_text("{}")
    (earlier / "training_curve.png").write_bytes(b"picture")
    for revision in (None, "step-000100"):
        client(push_folder, earlier, "user/twice", revision=revision, overwrite=True)
    repository = server.repositories["model", "user/twice"]
    server.commit("model", "user/twice", {"pytorch_model.bin": b"pickle", "NOTES.md": b"kept"}, "main")
    message = refuses(FileExistsError, push_folder, folder, "user/twice", tag="v2")
    assert "would be replaced or deleted (README.md, config.json, generation_config.json and " in message
    assert f"That would be `gift-trl push {folder} --repo_id user/twice --tag v2 --overwrite`." in message
    assert "`--overwrite`" in refuses(FileExistsError, check_push_target, "user/twice")
    report = client(push_folder, folder, "user/twice", overwrite=True)
    shards = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert sorted(report.deleted) == ["generation_config.json", *shards, "pytorch_model.bin"]
    kept = {".gitattributes": b"", "NOTES.md": b"kept", "training_curve.png": b"picture"}
    assert server.files("model", "user/twice") == contents(folder) | kept
    assert repository.branches["step-000100"].files.keys() >= set(shards)
    # The branch held what the main one did, until that moved on
    refuses(FileExistsError, push_folder, folder, "user/twice", revision="step-000100")


def test_tags(server, client, refuses, folder):
    client(push_folder, folder, "user/tagged", tag="v1")
    (folder / "NOTICE").write_text("new")
    message = refuses(FileExistsError, push_folder, folder, "user/tagged", tag="v1")
    assert "The tag 'v1' of 'user/tagged' exists, at the commit" in message and "choose another one" in message
    assert "choose another one" in refuses(FileExistsError, check_push_target, "user/tagged", tag="v1", overwrite=True)
    client(push_folder, folder, "user/tagged", tag="v2")
    repository = server.repositories["model", "user/tagged"]
    assert [repository.tags[tag].sha for tag in ("v1", "v2")] == [commit.sha for commit in repository.commits[1:]]
    # A tag that somebody puts elsewhere meanwhile is not taken for that of this push
    (folder / "LICENSE").write_text("the licence")
    server.fail("POST .*/tag/", "none", action=lambda: repository.tags.update(v3=repository.commits[0]))
    with pytest.raises(OSError, match="The tag 'v3' of 'user/tagged' exists, at the commit"):
        client(push_folder, folder, "user/tagged", tag="v3")


@pytest.mark.parametrize("revision", ["refs/pr/1", "0123456789" * 4, "", "v1"])
def test_what_is_no_branch(client, refuses, folder, revision):
    if revision == "v1":
        client(push_folder, folder, "user/no-branch", tag="v1")
    message = refuses(ValueError, push_folder, folder, "user/no-branch", revision=revision)
    assert "is no name of a branch" in message or "is a tag of 'user/no-branch'" in message


def test_who_may_not_write(server, refuses, folder):
    server.tokens |= {"hf_reads": "read", "hf_narrow": "fineGrained"}
    server.create("model", "user/public")
    assert "can only read: make one that can write" in refuses(PermissionError, push_as, "hf_reads", folder, "user/a")
    assert "run `hf auth login`, or set `HF_TOKEN`" in refuses(PermissionError, push_as, None, folder, "user/a")
    assert "expired or revoked. Run `hf auth login`" in refuses(PermissionError, push_as, "hf_old", folder, "user/a")
    assert "check the namespace" in refuses(PermissionError, push_folder, folder, "somebody-else/a")
    assert "write USER/NAME" in refuses(ValueError, push_folder, folder, "a/b/c")
    assert "is public: make it private" in refuses(ValueError, push_folder, folder, "user/public", private=True)
    server.fail("auth-check/write", status=403)
    message = refuses(PermissionError, push_as, "hf_narrow", folder, "user/public")
    assert f"write permission for it at {'https://huggingface.co/settings/tokens'}" in message
    assert f"Then push with `gift-trl push {folder} --repo_id user/public`." in message


def test_size(server, client, refuses, folder):
    message = refuses(ValueError, push_folder, folder, "user/large", max_size_gb=1e-5)
    assert "The upload has 0.05 MB, more than the 1e-05 GB of `max_size_gb`: make room on the Hub" in message
    client(push_folder, folder, "user/large", max_size_gb=1)
    # What is there already needs no room
    (folder / "LICENSE").write_text("the licence")
    client(push_folder, folder, "user/large", max_size_gb=1e-5)


def test_storage_that_is_used_up(server, client, folder):
    body = b'{"error": "Private repository storage limit reached, please upgrade your plan"}'
    server.fail("objects/batch", status=403, body=body, headers={"X-Error-Message": "storage limit reached"})
    with pytest.raises(OSError, match=r"The Hub has no room for 'user/full': .*storage limit reached"):
        client(push_folder, folder, "user/full")


def test_adapter(server, client, tmp_path, pair):
    from peft import LoraConfig, get_peft_model

    adapter = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(pair[0])
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
    (adapter / "README.md").write_text("---\nlibrary_name: peft\nbase_model: org/Base\n---\nAn adapter.\n")
    report = client(push_folder, adapter, "user/adapter")
    assert server.files("model", "user/adapter") == contents(adapter) | {".gitattributes": b""}
    assert "adapter_model.safetensors" in report.uploaded


def test_what_is_left_out(server, client, folder):
    """What a trainer keeps of its run, pickles and what is hidden; not what loading or a reader needs."""
    expected = contents(folder)
    for name in ("chat_template.jinja", "additional_chat_templates/tool.jinja", "LICENSE", "assets/figure.png"):
        expected[name] = b"kept"
    left_out = ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
    left_out += ["pytorch_model.bin", "model.gguf", ".env", ".git/config", ".cache/huggingface/upload/a.json"]
    left_out += ["checkpoint-100/model.safetensors", "checkpoint-100/README.md", "runs/Nov30/events.out.tfevents.1"]
    left_out += ["_gift_trl_pushes.json"]
    for name in [name for name in expected if not (folder / name).exists()] + left_out:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"kept")
    report = client(push_folder, folder, "user/clean")
    assert server.files("model", "user/clean") == expected | {".gitattributes": b""}
    assert sorted(report.left_out) == sorted(left_out)
    assert "left out, as no part of a model: .cache/huggingface/upload/a.json" in report.summary()


def test_symbolic_links(server, client, refuses, folder):
    """The Hub's cache keeps a model as links; one that leads nowhere is a file that is missing."""
    expected, snapshot = contents(folder), folder.parent / "snapshot"
    snapshot.mkdir()
    for name in expected:
        (snapshot / name).symlink_to(folder / name)
    client(push_folder, snapshot, "user/links")
    assert server.files("model", "user/links") == expected | {".gitattributes": b""}
    (snapshot / "generation_config.json").symlink_to("nowhere")
    message = refuses(FileNotFoundError, push_folder, snapshot, "user/links")
    assert "generation_config.json' is a link that leads nowhere: copy or download" in message


def push_while(folder: Path, repo_id: str, change: str) -> PushReport:
    from huggingface_hub import HfApi

    preupload = HfApi.preupload_lfs_files

    def change_after(*args, **kwargs):
        preupload(*args, **kwargs)
        if change == "written":
            (folder / "config.json").write_text('{"model_type": "llama", "changed": true}')
        elif change == "deleted":
            (folder / "model-00002-of-00003.safetensors").unlink()

    with patch.object(HfApi, "preupload_lfs_files", change_after):
        return push_folder(folder, repo_id)


@pytest.mark.parametrize("change", ["written", "deleted"])
def test_a_folder_that_changes_meanwhile_is_not_committed(server, client, folder, change):
    with pytest.raises(OSError, match="failed while uploading the files: ") as raised:
        client(push_while, folder, f"user/{change}", change)
    assert ("'config.json' was written to meanwhile" if change == "written" else "model-00002") in str(raised.value)
    assert server.files("model", f"user/{change}").keys() == {".gitattributes"}


def test_a_difference_after_the_commit_is_no_success(server, client, folder):
    repository = server.create("model", "user/differs")

    def lose():
        files = dict(repository.commits[-1].files)
        del files["model-00003-of-00003.safetensors"]
        object.__setattr__(repository.commits[-1], "files", files)

    server.fail(r"GET .*/tree/", "none", after="POST .*/commit/", action=lose)
    server.requests.clear()
    with pytest.raises(OSError, match=r"the Hub and the folder differ in model-00003-of-00003\.safetensors"):
        client(push_folder, folder, "user/differs")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "There is no folder"),
        (lambda folder: (folder / "config.json").unlink(), "lacks config.json, without which nothing loads"),
        (lambda folder: (folder / "config.json").write_text("{"), "is no readable configuration"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is no readable configuration"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "a model without its tokenizer"),
        (lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(), "lacks 1 of 3 shards"),
        (lambda folder: os.truncate(folder / "model-00002-of-00003.safetensors", 9000), "copy or download it again"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "holds no model.safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").touch(), "push them from a folder each"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "holds no model.safetensors"),
        (lambda folder: (folder / "README.md").write_text("---\nlicense: [\n---\n"), "cannot be read"),
        (lambda folder: (folder / "README.md").write_text("---\n- a\n---\n"), "cannot be read"),
        (lambda folder: (folder / "README.md").write_text("---\nbase_model: 3\n---\n"), "The Hub does not take"),
    ],
)
def test_what_is_no_complete_model(refuses, folder, spoil, message):
    spoil(folder)
    found = refuses((ValueError, FileNotFoundError), push_folder, folder, "user/spoilt")
    assert message in found and str(folder) in found


def test_what_a_card_should_say(client, folder):
    (folder / "README.md").write_text("---\ntags: [a]\n---\n")
    (warning,) = client(push_and_warn, folder, "user/no-licence")
    assert "names no licence (`license:`)" in warning and "Take that of the instruct model" in warning
    (folder / "README.md").unlink()
    (warning,) = client(push_and_warn, folder, "user/no-card")
    assert "has no card: nobody will know what the model is. Write a README.md." in warning


def test_an_adapter_that_names_a_folder_of_this_machine(client, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"base_model.model.lora_A.weight": torch.ones(2, 2)}, adapter / "adapter_model.safetensors")
    (adapter / "README.md").write_text("---\ntags: [a]\n---\n")

    def warnings_with(base: str) -> list[str]:
        settings = {"peft_type": "LORA", "base_model_name_or_path": base}
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
        return client(push_and_warn, adapter, "user/adapter-of-a-folder", overwrite=True)

    (warning,) = warnings_with(str(tmp_path))
    assert f"'{tmp_path}', which everybody can read" in warning and "write that into `adapter_config.json`" in warning
    assert warnings_with("org/base") == []


def run_command(arguments: list[str], interrupt: bool = False) -> tuple[str, str, int]:
    from huggingface_hub import HfApi

    out, err, status = io.StringIO(), io.StringIO(), 0
    interrupted = patch.object(HfApi, "create_commit", side_effect=KeyboardInterrupt)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with interrupted if interrupt else contextlib.nullcontext():
            try:
                push_command_line(arguments)
            except SystemExit as end:
                status = end.code
    return out.getvalue(), err.getvalue(), status


def test_the_command(server, client, folder):
    options = ["--private", "--revision", "step-000100", "--tag", "v1", "--commit_message", "Merge at step 100"]
    arguments = [str(folder), "--repo_id", "user/command", *options, "--max_size_gb", "1"]
    _, err, status = client(run_command, arguments, True)
    assert status == 130 and "Interrupted. To finish, run `" in err
    command = shlex.split(err.split("`")[1])
    assert command == ["gift-trl", "push", str(folder), "--repo_id", "user/command", *options]
    out, _, status = client(run_command, command[2:])
    assert status == 0
    assert out.startswith("Pushed to user/command, branch step-000100, tag v1\n  7 files (0.05 MB), 0 unchanged; ")
    out, _, _ = client(run_command, command[2:])
    assert out.startswith("Nothing to push: the files are there already (user/command, branch step-000100, tag v1)")
    assert len(server.repositories["model", "user/command"].commits) == 2


def test_what_a_message_leaves_out(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    text = f"GET https://me:secret@proxy:3128/a/b?X-Signature=secret&x=1 'https://hub/a?b' with {TOKEN} at 12:30"
    assert redact(text) == "GET https://[…]@proxy:3128/a/b?[…] 'https://hub/a?[…]' with [token] at 12:30"
