"""Pushes in the background: their order, how many wait, and what may be replaced, without a Hub."""

import shutil
import threading

import pytest

from gift_trl.hub import uploads
from gift_trl.hub.uploads import PushLedger, Upload, UploadQueue, remove_snapshots, take_snapshot


@pytest.fixture
def pushes(monkeypatch):
    """Calls of `push_folder`, each of which waits for its `release`, and raises what `errors` has for its folder."""

    class Pushes:
        calls, release, errors = [], threading.Semaphore(0), {}

    def push(folder, repo_id, **options):
        Pushes.calls.append((folder.name, options))
        assert Pushes.release.acquire(timeout=30)
        if folder.name in Pushes.errors:
            raise Pushes.errors[folder.name]
        return f"report of {folder.name}"

    monkeypatch.setattr(uploads, "push_folder", push)
    return Pushes


def test_in_order_and_bounded(pushes, tmp_path):
    queue = UploadQueue(PushLedger(tmp_path))
    for name in ("a", "b", "c"):  # one that runs, two that wait
        queue.add(Upload(tmp_path / name, "user/x", {"revision": name}))
    fourth = threading.Thread(
        target=queue.add, args=[Upload(tmp_path / "d", "user/x", {"revision": "d"})], daemon=True
    )
    fourth.start()
    fourth.join(0.5)
    assert fourth.is_alive() and [name for name, _ in pushes.calls] == ["a"]
    assert queue.is_pending(("user/x", "b")) and queue.holds(tmp_path / "b")
    pushes.release.release(4)
    fourth.join(30)
    assert [(upload.folder.name, upload.report) for upload in queue.wait()] == [
        (name, f"report of {name}") for name in "abcd"
    ]
    assert [name for name, _ in pushes.calls] == ["a", "b", "c", "d"]
    assert not queue.is_pending(("user/x", "b")) and not queue.holds(tmp_path / "b")


def test_only_what_this_run_has_pushed_is_replaced(pushes, tmp_path):
    pushes.release.release(10)
    pushes.errors["theirs"] = FileExistsError("there is another model")
    queue = UploadQueue(PushLedger(tmp_path))
    for name, repo_id in (("first", "user/x"), ("second", "user/x"), ("theirs", "user/y"), ("again", "user/y")):
        queue.add(Upload(tmp_path / name, repo_id))
    queue.wait()
    assert [options.get("overwrite", False) for _, options in pushes.calls] == [False, True, False, False]
    # The same of a run that was killed and goes on
    resumed = UploadQueue(PushLedger(tmp_path))
    resumed.add(Upload(tmp_path / "third", "user/x"))
    resumed.wait()
    assert pushes.calls[-1] == ("third", {"overwrite": True})
    assert ("user/x", None) in PushLedger(tmp_path) and ("user/x", "main") in PushLedger(tmp_path)


def test_the_last_push_to_a_branch_counts(pushes, tmp_path):
    pushes.release.release(10)
    pushes.errors = {"early": ConnectionError("gone"), "late": ConnectionError("gone for good")}
    queue = UploadQueue(PushLedger(tmp_path))
    for name, repo_id in (("early", "user/x"), ("whole", "user/x"), ("late", "user/y")):
        (tmp_path / name).mkdir()
        queue.add(Upload(tmp_path / name, repo_id, is_snapshot=name == "early"))
    whole, late = queue.wait()
    assert whole.report == "report of whole" and whole.problem is None
    assert "gone for good" in late.problem and f"`gift-trl push {tmp_path / 'late'} --repo_id user/y`" in late.problem
    assert queue.holds(tmp_path / "late") and not queue.holds(tmp_path / "whole")
    assert not (tmp_path / "early").exists() and (tmp_path / "late").exists()


def test_a_snapshot_outlives_its_checkpoint(pair, tmp_path):
    output = tmp_path / "run"
    checkpoint = output / "checkpoint-1"
    shutil.copytree(pair[1], checkpoint)
    (checkpoint / "optimizer.pt").write_bytes(b"")
    (output / "README.md").write_text("the card")
    weights = (checkpoint / "model.safetensors").read_bytes()
    snapshot = take_snapshot(checkpoint, output)
    shutil.rmtree(checkpoint)
    (output / "README.md").write_text("another card")
    assert (snapshot / "model.safetensors").read_bytes() == weights
    assert (snapshot / "README.md").read_text() == "the card"
    assert not (snapshot / "optimizer.pt").exists()
    others = tmp_path / f".run.v2{snapshot.name.removeprefix('.run')}"  # of a run in `run.v2`
    others.mkdir()
    remove_snapshots(output)
    assert {path.name for path in tmp_path.iterdir()} == {"run", others.name}
    with pytest.raises(FileNotFoundError, match="no folder"):
        take_snapshot(checkpoint, output)
