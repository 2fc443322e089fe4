"""Pushes of models and adapters to a Hub on the loopback interface."""

import shutil
from pathlib import Path

import pytest
from hub_server import HubServer, client_process

from gift_trl.hub import PushReport, check_push_target, push_folder


TOKEN = "hf_canaryThatMustBeReadNowhere"


@pytest.fixture(scope="module")
def server():
    with HubServer(token=TOKEN) as server:
        yield server


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "output.txt"
    with client_process(server.environment(tmp_path_factory.mktemp("home")), log) as call:
        yield call


@pytest.fixture
def folder(tmp_path, pair) -> Path:
    """A model as the merge leaves it, with files beside it that nobody needs."""
    shutil.copytree(pair[1], tmp_path / "merged")
    (tmp_path / "merged" / "LICENSE").write_text("the licence")
    (tmp_path / "merged" / "training_args.bin").write_bytes(b"pickle")
    return tmp_path / "merged"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_commit_with_the_model_and_nothing_else(server, client, folder):
    expected = contents(folder)
    del expected["training_args.bin"]
    report: PushReport = client(push_folder, folder, "merged", private=True, tag="v1")
    repository = server.repositories["model", "user/merged"]
    assert repository.private
    _, commit = repository.commits
    assert report.repo_id == "user/merged" and report.commit == commit.sha == repository.tags["v1"].sha
    assert server.files("model", "user/merged") == expected | {".gitattributes": b""}
    assert sorted(report.uploaded) == sorted(expected) and report.left_out == ["training_args.bin"]
    again = client(push_folder, folder, "user/merged", tag="v1")
    assert (again.commit, again.uploaded) == (commit.sha, []) and len(repository.commits) == 2


def test_another_model_is_replaced_only_if_told(server, client, folder):
    client(push_folder, folder, "user/twice")
    (folder / "chat_template.jinja").rename(folder / "NOTICE")
    for refused in (
        lambda: client(push_folder, folder, "user/twice"),
        lambda: client(check_push_target, "user/twice"),
    ):
        with pytest.raises(FileExistsError, match="`--overwrite`"):
            refused()
    report = client(push_folder, folder, "user/twice", overwrite=True)
    assert (report.uploaded, report.deleted) == (["NOTICE"], ["chat_template.jinja"])
    assert "chat_template.jinja" not in server.files("model", "user/twice")


def test_branch(server, client, folder):
    client(push_folder, folder, "user/branches", revision="step-000100")
    assert server.files("model", "user/branches").keys() == {".gitattributes"}
    assert "model.safetensors" in server.files("model", "user/branches", "step-000100")
