"""Pushes to a Hub on the loopback interface, and loads from it, in processes of their own."""

import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
from datasets import Dataset, load_dataset
from hub_server import HubServer, client_process
from huggingface_hub import HfApi, constants
from trl import DatasetMixtureConfig

from gift_trl import repositories
from gift_trl.annotation import Provenance, hub, read_provenance, save_annotated_dataset, storage
from gift_trl.annotation.provenance import add_provenance
from gift_trl.scripts.annotate import main as annotate_command
from gift_trl.scripts.arguments import GIFTScriptArguments
from gift_trl.scripts.cli import run
from gift_trl.scripts.data import load_recipe_datasets


TOKEN = "hf_canaryThatMustBeReadNowhere"


def make_annotated(rows: int, commit: str | None = None) -> Dataset:
    q = [[0.0, 0.5, i / rows] for i in range(rows)]
    dataset = Dataset.from_dict(
        {
            "input_ids": [[1, 5, i] for i in range(rows)],
            "labels": [[-100, 5, i] for i in range(rows)],
            "confidences": q,
        }
    )
    provenance = Provenance(
        model="org/Instruct",
        commit=commit,
        weights="f" * 64,
        dtype="bfloat16",
        vocabulary="v" * 16,
        chat_template="t" * 16,
        assistant_only_loss=False,
        completion_only_loss=None,
        max_length=1024,
        end_of_turn_token_ids=[2],
        rows=rows,
        truncated=3,
        dropped={"no target tokens": [4, 9]},
    )
    return add_provenance(dataset, provenance)


@pytest.fixture(scope="module")
def annotated() -> dict[str, Dataset]:
    return {"train": make_annotated(40, commit="c" * 40), "test": make_annotated(5)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, annotated, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("local") / "annotated"
    with patch.object(storage, "_SHARD_BYTES", annotated["train"].data.nbytes / 3):
        save_annotated_dataset(annotated, folder, processing_class=tokenizer)
    return folder


@pytest.fixture(scope="module")
def server():
    with HubServer(token=TOKEN) as server:
        yield server


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("log") / "output.txt"


@pytest.fixture(scope="module")
def client(server, log, tmp_path_factory):
    with client_process(server.environment(tmp_path_factory.mktemp("home")), log) as call:
        yield call


@pytest.fixture(autouse=True)
def no_faults(server):
    yield
    server.faults.clear()


@pytest.fixture
def refuses(client):
    """Calls a function that must fail in the client; returns the message."""

    def refuse(error: type[Exception], function, *args, **kwargs) -> str:
        with pytest.raises(error) as raised:
            client(function, *args, **kwargs)
        # With the traceback of the other process
        assert TOKEN not in f"{raised.value}{raised.value.__cause__}"
        return str(raised.value)

    return refuse


def push(folder, repo_id, token=TOKEN, waits=(0, 0), **kwargs):
    environment = {"HF_TOKEN": token} if token else {}
    with patch.dict(os.environ, environment), patch.object(repositories, "RETRY_WAITS", waits):
        if token is None:
            del os.environ["HF_TOKEN"]
        return hub.push_annotated_dataset(folder, repo_id, **kwargs)


def upload(repo_id: str, name: str, content: bytes):
    HfApi().upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repo_id, repo_type="dataset")


def create(repo_id: str):
    HfApi().create_repo(repo_id, repo_type="dataset")


def download_provenance_offline(repo_id):
    with patch.object(constants, "HF_HUB_OFFLINE", True):
        return hub.download_provenance(repo_id)


def load_recipe(dataset_name, streaming=False, test_split="test"):
    script_args = GIFTScriptArguments(
        dataset_name=dataset_name, dataset_streaming=streaming, dataset_test_split=test_split
    )
    loaded = load_recipe_datasets(script_args, DatasetMixtureConfig(), evaluate=True, seed=0)
    return [(list(split), read_provenance(split)) for split in loaded]


def annotate(arguments: list[str]):
    with patch.dict(os.environ, {"HF_TOKEN": TOKEN}):
        run(annotate_command, arguments)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pushed_and_loaded_elsewhere(server, client, annotated, folder, log, tmp_path):
    before = contents(folder)
    assert (
        len([name for name in before if name.startswith("data/train-")]) > 1 and "tokenizer/tokenizer.json" in before
    )
    url = client(push, folder, "annotated", private=True)
    assert contents(folder) == before

    repository = server.repositories["dataset", "user/annotated"]
    assert repository.private
    assert [commit.message for commit in repository.commits[1:]] == ["Upload dataset annotated with gift_trl"]
    assert url == f"{server.endpoint}/datasets/user/annotated/commit/{repository.commits[-1].sha}"
    pushed = server.files("dataset", "user/annotated")
    assert pushed.keys() == before.keys() | {".gitattributes", "README.md"}
    for content in pushed.values():
        assert TOKEN.encode() not in content and str(folder.parent).encode() not in content

    expected = [(list(annotated[split]), read_provenance(annotated[split])) for split in ("train", "test")]
    home = tmp_path / "home"
    with client_process(server.environment(home), log) as elsewhere:
        plain = elsewhere(load_dataset, "user/annotated")
        assert {split: list(rows) for split, rows in plain.items()} == {k: list(v) for k, v in annotated.items()}
        assert elsewhere(load_recipe, "user/annotated") == expected
        server.requests.clear()
        assert elsewhere(load_recipe, "user/annotated", streaming=True) == expected
        # In the cache, under the commit of the data
        assert not any("gift_provenance" in request for request in server.requests)
    server.requests.clear()
    with client_process(server.environment(home, offline=True), log) as offline:
        assert offline(load_recipe, "user/annotated") == expected
    assert server.requests == []


def test_card(server, client, folder):
    client(push, folder, "card")
    card = server.files("dataset", "user/card")["README.md"].decode()
    assert "gift-trl train --config recipe.yaml --dataset user/card" in card
    assert f"[`cccccccccccc`](https://huggingface.co/org/Instruct/tree/{'c' * 40})" in card
    assert "| test | `org/Instruct` | none | bfloat16 | transformers | 1,024 | 5 | 3 | 2 (no target tokens) |" in card
    # The card says which files are the data, whatever lies beside them
    client(upload, "user/card", "data/more-00000-of-00001.json", b'{"a": 1}\n')
    assert client(load_dataset, "user/card").num_rows == {"train": 40, "test": 5}


def test_second_push_replaces_the_first(server, client, folder, tmp_path):
    client(push, folder, "user/twice")
    client(upload, "user/twice", "notes.md", b"kept")
    smaller = tmp_path / "smaller"
    save_annotated_dataset(make_annotated(7), smaller)
    (smaller / "README.md").write_text("My own card")
    (smaller / ".env").write_text("SECRET=1")
    client(push, smaller, "user/twice")
    (smaller / ".env").unlink()
    assert server.files("dataset", "user/twice") == contents(smaller) | {".gitattributes": b"", "notes.md": b"kept"}
    assert client(load_dataset, "user/twice").num_rows == {"train": 7}
    commits = len(server.repositories["dataset", "user/twice"].commits)
    client(push, smaller, "user/twice")
    assert len(server.repositories["dataset", "user/twice"].commits) == commits


def test_branch(server, client, folder):
    client(push, folder, "user/branches", revision="scored-by-7b")
    assert server.files("dataset", "user/branches").keys() == {".gitattributes"}
    assert "gift_provenance.json" in server.files("dataset", "user/branches", "scored-by-7b")
    found = client(hub.download_provenance, "user/branches", "scored-by-7b")
    assert found == storage.read_provenance_file(folder / "gift_provenance.json")
    assert client(hub.download_provenance, "user/branches") is None


def test_refused_before_anything_is_uploaded(server, client, refuses, folder, tmp_path):
    server.tokens["hf_reads"] = "read"
    client(create, "user/public")
    client(create, "user/raw")
    client(upload, "user/raw", "data/train-00000-of-00001.parquet", b"raw")
    repositories = dict(server.repositories)
    server.requests.clear()

    assert "can only read: make one that can write" in refuses(
        PermissionError, push, folder, "user/new", token="hf_reads"
    )
    assert "run `hf auth login`, or set `HF_TOKEN`" in refuses(PermissionError, push, folder, "user/new", token=None)
    assert "expired or revoked. Run `hf auth login`" in refuses(
        PermissionError, push, folder, "user/new", token="hf_old"
    )
    assert "cannot be the id of a repository on the Hub: write USER/NAME" in refuses(ValueError, push, folder, "a/b/c")
    assert "check the namespace" in refuses(PermissionError, push, folder, "somebody-else/new")
    assert "exists and is public: make it private" in refuses(ValueError, push, folder, "user/public", private=True)
    message = refuses(FileExistsError, push, folder, "user/raw")
    assert "no annotated dataset (data/train-00000-of-00001.parquet)" in message and "push to another one" in message
    assert "pass a folder that `save_annotated_dataset`" in refuses(FileNotFoundError, push, tmp_path, "user/new")

    server.tokens["hf_narrow"] = "fineGrained"
    server.fail("auth-check/write", status=403)
    assert "give the token write permission" in refuses(
        PermissionError, push, folder, "user/public", token="hf_narrow"
    )
    server.fail("whoami", "drop", times=9)
    assert "cannot be reached" in refuses(ConnectionError, push, folder, "user/new", token="hf_other")

    assert server.repositories == repositories
    assert not [request for request in server.requests if not request.startswith("GET ")]


def test_offline_mode_is_refused_first(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="offline mode: unset `HF_HUB_OFFLINE`"):
        hub.check_push_target("user/new")


def test_failed_push_says_how_to_finish(server, client, refuses, folder):
    before = contents(folder)
    server.fail("POST .*/commit/", status=503, times=3)
    message = refuses(OSError, push, folder, "user/unlucky", private=True)
    assert "503 Service Unavailable: injected. The dataset is complete in" in message
    assert f"`hf upload user/unlucky {folder} --repo-type dataset --delete 'data/*.parquet' --private`" in message
    assert contents(folder) == before
    assert server.files("dataset", "user/unlucky").keys() == {".gitattributes"}
    client(push, folder, "user/unlucky", private=True)
    assert server.files("dataset", "user/unlucky").keys() > before.keys()


def test_lost_answer_makes_no_second_commit(server, client, folder):
    server.fail("POST .*/commit/", status=503)
    server.fail("POST .*/commit/", "drop", applied=True)
    url = client(push, folder, "user/flaky")
    _, commit = server.repositories["dataset", "user/flaky"].commits
    assert url.endswith(commit.sha)


def push_while_the_folder_changes(folder):
    create_commit = HfApi.create_commit

    def change_after(*args, **kwargs):
        commit = create_commit(*args, **kwargs)
        next(Path(folder).glob("data/train-*")).write_bytes(b"other")
        return commit

    with patch.object(HfApi, "create_commit", change_after):
        push(folder, "user/changing")


def test_difference_after_the_push_is_no_success(refuses, tmp_path):
    save_annotated_dataset(make_annotated(3), tmp_path / "annotated")
    message = refuses(OSError, push_while_the_folder_changes, tmp_path / "annotated")
    assert "the Hub and the folder differ in data/train-00000-of-00001.parquet" in message


def make_foreign(repo_id, columns):
    Dataset.from_dict(columns).push_to_hub(repo_id)


def test_datasets_of_others(server, client, refuses):
    client(make_foreign, "user/plain", {"text": ["a", "b"]})
    client(make_foreign, "user/scored", {"input_ids": [[1, 2]], "confidences": [[0.0, 0.5]]})
    for streaming in (False, True):
        server.requests.clear()
        assert client(load_recipe, "user/plain", streaming, "train")[0] == ([{"text": "a"}, {"text": "b"}], [])
        assert server.requests and not any("gift_provenance" in request for request in server.requests)
        [(rows, provenances), _] = client(load_recipe, "user/scored", streaming, "train")
        assert rows == [{"input_ids": [1, 2], "confidences": [0.0, 0.5]}] and provenances == []
    # Offline, that there is none is known of what was loaded, and of nothing else
    assert client(download_provenance_offline, "user/scored") is None
    message = refuses(FileNotFoundError, download_provenance_offline, "user/never-loaded")
    assert "load the dataset once online" in message


def test_the_provenance_must_be_readable(server, client, refuses, folder):
    client(push, folder, "user/newer")
    client(upload, "user/newer", "gift_provenance.json", b'{"train": [{"model": "m", "invented_later": 1}]}')
    message = refuses(ValueError, load_recipe, "user/newer")
    assert "install the version that annotated the data, or annotate it again" in message
    # Not taken for a repository without one
    client(push, folder, "user/unreachable")
    server.fail("gift_provenance", status=403, times=9)
    assert "load the dataset once online" in refuses(FileNotFoundError, load_recipe, "user/unreachable")


def test_token_is_not_printed(log, client, folder):
    client(push, folder, "user/quiet")
    # By this push, and by all that went before in this module
    printed = log.read_text()
    assert "Upload" in printed and TOKEN not in printed


def test_the_command_pushes_what_it_writes(server, client, pair, conversations, log, tmp_path):
    conversations.to_json(tmp_path / "rows.jsonl")
    recipe = {
        "instruct_model_name_or_path": pair[1],
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "bf16": False,
        "use_cpu": True,
        "output_dir": str(tmp_path / "adapter"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    arguments = ["--config", str(tmp_path / "recipe.yaml"), "--annotation_output_dir", str(tmp_path / "annotated")]
    client(annotate, [*arguments, "--hub_dataset_id", "user/by-command", "--hub_private_repo", "true"])
    pushed = server.files("dataset", "user/by-command")
    local = contents(tmp_path / "annotated")
    assert pushed.keys() == local.keys() | {".gitattributes", "README.md"}
    assert all(pushed[name] == content for name, content in local.items())
    assert server.repositories["dataset", "user/by-command"].private
    printed = log.read_text()
    assert f"Pushed to {server.endpoint}/datasets/user/by-command/commit/" in printed
    assert TOKEN not in printed
