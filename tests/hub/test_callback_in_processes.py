"""`gift-trl train` over two processes, from the last step to two repositories on a Hub on the loopback interface."""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_callback import TOKEN, command, download, logits_of, validate

from gift_trl.hub.files import list_model_files
from gift_trl.scripts.recipes import recipes_folder


WORKER = Path(__file__).parents[1] / "distributed" / "command_worker.py"
TYPES = {"ddp": "MULTI_CPU", "zero3": "DEEPSPEED"}


@pytest.mark.slow
@pytest.mark.parametrize("outcome", ["pushed", "failed"])
@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_two_processes(server, client, recipe, pair, tmp_path, config, outcome):
    adapter_id, merged_id = (f"user/{kind}-{config}-{outcome}" for kind in ("adapter", "merged"))
    settings = {"push_to_hub": True, "hub_model_id": adapter_id, "hub_merged_model_id": merged_id}
    settings |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "hub_always_push": True}
    settings |= {"merge_at_every_checkpoint": True}
    if config == "ddp":
        # The Hub asks to wait for longer than any collective operation may take
        settings["ddp_timeout"] = 15
        server.fail(f"POST /api/models/{merged_id}/preupload/main", status=503, headers={"Retry-After": "20"})
    if outcome == "failed":
        server.fail(f"POST /api/models/{merged_id}/commit/main", status=403)
        # In the way of a merge during the training
        (tmp_path / "merged-step-000001").touch()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launch += [str(recipes_folder() / "accelerate_configs" / f"{config}.yaml"), "--mixed_precision", "no"]
    launch += ["--num_processes", "2", "--main_process_port", "0", str(WORKER), str(tmp_path), config]
    environment = server.environment(tmp_path / "home") | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "--config", recipe(**settings)], capture_output=True, text=True, timeout=400, env=environment
    )
    assert TOKEN not in done.stdout + done.stderr
    notes = [json.loads((tmp_path / f"process{rank}.json").read_text()) for rank in range(2)]
    for note in notes:
        assert (note["distributed_type"], note["num_processes"]) == (TYPES[config], 2), done.stderr[-3000:]
        assert note["status"] == (0 if outcome == "pushed" else 1), done.stderr[-3000:]
        # Once, and when nothing keeps its threads
        assert note["wrapped_models"] == ([0] if outcome == "pushed" else [])
    merged = server.repositories["model", merged_id]
    if outcome == "failed":
        assert done.returncode != 0
        assert done.stderr.count("error: ") == 1
        error = done.stderr.partition("error: ")[2]
        assert "may not write" in error and "is a file" in error
        assert len([commit for commit in merged.commits if commit in merged.branches.values()]) == 2  # first, step 2
        told = re.findall(rf"`gift-trl push ({re.escape(str(tmp_path / 'merged'))} [^`]*)`", error)
        assert len(told) == 1
        before = len(merged.commits)
        assert [client(command, "push", *shlex.split(told[0])) for _ in range(2)] == [0, 0]
        assert len(merged.commits) == before + 1
    else:
        assert done.returncode == 0, done.stderr[-3000:]
        assert merged.branches.keys() == {"main", "step-000001", "step-000002"}
        # First commit, steps 1 and 2, and the end, which adds nothing to the adapter of step 2
        assert len(merged.commits) == 4
    assert not list(tmp_path.glob(".*"))
    for repo_id, folder in ((adapter_id, tmp_path / "adapter"), (merged_id, tmp_path / "merged")):
        found = server.files("model", repo_id)
        local = {file.name: file.path.read_bytes() for file in list_model_files(folder)[0]}
        assert found == local | {".gitattributes": b""}
        assert not any(TOKEN.encode() in content for content in found.values())
        client(validate, found["README.md"].decode())
    assert torch.equal(client(logits_of, client(download, merged_id)), client(logits_of, tmp_path / "merged"))
    with_adapter = client(logits_of, pair[1], client(download, adapter_id))
    assert torch.allclose(with_adapter, client(logits_of, tmp_path / "merged"), atol=1e-4)


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_pushes(server, client, recipe, tmp_path):
    adapter_id, merged_id = "user/adapter-killed", "user/merged-killed"
    settings = {"push_to_hub": True, "hub_model_id": adapter_id, "hub_merged_model_id": merged_id, "max_steps": 2}
    settings |= {"save_strategy": "steps", "save_steps": 1, "hub_always_push": True, "merge_at_every_checkpoint": True}
    config = recipe(**settings, resume_from_checkpoint="auto")
    # The commit is made, and its answer never comes
    server.fail(f"POST /api/models/{merged_id}/commit/step-000001", "stall", applied=True)
    server.requests.clear()
    environment = server.environment(tmp_path / "home") | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command_line = [sys.executable, "-m", "gift_trl.scripts.train", "--config", config]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command_line, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + 300
        # The local work is done by then, and two more pushes wait
        while not ((tmp_path / "merged" / "config.json").exists() and any(map(is_stalled, server.requests))):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.1)
        process.kill()
        process.wait()
    merged = server.repositories["model", merged_id]
    made = merged.branches["step-000001"]
    weights = {path: path.stat().st_ino for path in tmp_path.glob("merged*/model.safetensors")}
    assert client(command, "train", "--config", config, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()[
        -3000:
    ]
    assert merged.branches.keys() == {"main", "step-000001", "step-000002"} and merged.branches["step-000001"] is made
    # The one with which it was created, and one for each branch
    assert len(merged.commits) == 4
    assert weights == {path: path.stat().st_ino for path in tmp_path.glob("merged*/model.safetensors")}
    for repo_id, folder in ((adapter_id, tmp_path / "adapter"), (merged_id, tmp_path / "merged")):
        local = {file.name: file.path.read_bytes() for file in list_model_files(folder)[0]}
        assert server.files("model", repo_id) == local | {".gitattributes": b""}
    assert not list(tmp_path.glob(".*"))


def is_stalled(request: str) -> bool:
    return request.endswith("/merged-killed/commit/step-000001")
