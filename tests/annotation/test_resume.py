"""Annotation over several processes, with a cache, and after a kill: always the same bytes."""

import contextlib
import copy
import filecmp
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import annotation_worker as worker
import numpy as np
import pytest
import torch
from datasets import disable_caching, enable_caching
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from gift_trl.annotation import annotate_dataset, annotator, cache, engine, load_annotated_dataset, read_provenance


TOKENS_PER_BATCH = 400
ZERO3 = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "DEEPSPEED",
    "deepspeed_config": {"zero_stage": 3, "zero3_init_flag": True},
    "mixed_precision": "no",
    "num_machines": 1,
    # Not with `use_cpu`, which would make DDP of it
    "main_process_port": 0,
}
# A part is written when 0.1 s have passed, in which a child that takes 0.01 s for a row scores ten rows: at most as many
# batches. Some more may pass on a busy machine before the child's clock is read
BATCHES_PER_PART = 12


@pytest.fixture
def many_rows(tmp_path) -> Path:
    """Sixty tokenised rows of different lengths."""
    generator = random.Random(0)
    path = tmp_path / "rows.jsonl"
    rows = [[generator.randrange(3, 384) for _ in range(generator.randrange(4, 200))] for _ in range(60)]
    path.write_text("".join(json.dumps({"input_ids": ids, "labels": ids}) + "\n" for ids in rows))
    return path


@pytest.fixture
def launch(tmp_path, pair, many_rows):
    """Starts the worker, in one process or several, and waits for it unless told otherwise."""

    def start(name: str, processes: int = 1, environment: dict | None = None, zero3: bool = False, **settings):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        settings = {
            "model": pair[1],
            "data": str(many_rows),
            "output": str(folder / "annotated"),
            "log": str(folder / "log"),
            "cache_dir": str(folder / "cache"),
            "tokens_per_batch": TOKENS_PER_BATCH,
            **settings,
        }
        (folder / "settings.json").write_text(json.dumps(settings))
        command = [sys.executable, "-m"]
        if zero3:
            (folder / "zero3.yaml").write_text(json.dumps(ZERO3 | {"num_processes": processes}))
            command += ["accelerate.commands.launch", "--config_file", str(folder / "zero3.yaml")]
        elif processes > 1:
            command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        else:
            command.pop()
        process = subprocess.run(
            [*command, worker.__file__, str(folder / "settings.json")],
            env={**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return folder, process.returncode, process.stdout

    return start


def assert_same_files(folder: Path, other: Path) -> None:
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(other)) for path in other.rglob("*") if path.is_file())
    assert filecmp.cmpfiles(folder, other, names, shallow=False) == (names, [], [])


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_files(launch):
    one, status, output = launch("one")
    assert status == 0, output
    for processes in (2, 3):
        # A disk each: nothing is read that another process has written
        many, status, output = launch(f"many{processes}", processes, cache_dir=str(one.parent / "disk{rank}"))
        assert status == 0, output
        facts = json.loads((many / "facts.json").read_text())
        assert facts == {"num_processes": processes, "distributed_type": "MULTI_CPU", "zero3": False}
        for rank in range(processes):
            assert_same_files(one / "annotated", many / ("annotated" + (f"-{rank}" if rank else "")))
        ranks = Counter(line.split()[0] for line in (many / "log").read_text().splitlines())
        assert len(ranks) == processes, "every process scores a share"
        assert sum(ranks.values()) == 60, "and no row is scored twice"
        for disk in one.parent.glob("disk*"):
            os.rename(disk, many / disk.name)


@pytest.fixture
def in_child(pair, many_rows, tmp_path):
    """Annotates in a forked child, which logs every row it scores and can be killed."""

    def start(cache_dir: Path, **settings) -> tuple[int, Path]:
        log = tmp_path / f"{cache_dir.name}.log"
        path = tmp_path / f"{settings.pop('name', cache_dir.name)}.json"
        path.write_text(
            json.dumps(
                {
                    "model": pair[1],
                    "data": str(many_rows),
                    "output": str(cache_dir) + "-annotated",
                    "log": str(log),
                    "cache_dir": str(cache_dir),
                    "tokens_per_batch": TOKENS_PER_BATCH,
                    **settings,
                }
            )
        )
        sys.stdout.flush(), sys.stderr.flush()
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BaseException):
                worker.main(str(path))
                status = 0
            os._exit(status)
        return child, log

    return start


def test_a_killed_child_leaves_no_bar_locked():
    child = os.fork()
    if child == 0:
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert tqdm.get_lock().acquire(timeout=5)
    tqdm.get_lock().release()


def rows_in(log: Path) -> list[int]:
    return [int(line.split()[1]) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.slow
def test_a_kill_at_any_moment_costs_one_part_at_most(in_child, many_rows, tmp_path):
    child, _ = in_child(tmp_path / "whole")
    assert os.waitpid(child, 0)[1] == 0
    lengths = [len(json.loads(line)["input_ids"]) for line in many_rows.read_text().splitlines()]
    batches = [set(batch) for batch in engine.token_budget_batches(lengths, TOKENS_PER_BATCH)]
    generator = random.Random(1)
    killed_while_scoring = 0
    for attempt in range(20):
        cache_dir = tmp_path / f"killed{attempt}"
        child, log = in_child(cache_dir, seconds_per_part=0.1, seconds_per_row=0.01)
        target, deadline = generator.randrange(60), time.monotonic() + 60
        while len(rows_in(log)) < target and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(generator.random() * 0.15)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        before = rows_in(log)
        kept = set()
        for part in cache_dir.rglob("part-*.npz"):
            with np.load(part) as arrays:
                kept |= set(arrays["rows"].tolist())
        killed_while_scoring += 0 < len(before) < 60 and not list(cache_dir.rglob("*.arrow"))
        child, log = in_child(cache_dir)
        assert os.waitpid(child, 0)[1] == 0
        assert_same_files(Path(f"{tmp_path / 'whole'}-annotated"), Path(f"{cache_dir}-annotated"))
        again = rows_in(log)[len(before) :]
        # A batch is always scored whole, and every batch that a part holds whole is not scored again
        assert not any(batch <= kept for batch in batches if batch & set(again))
        lost = [batch for batch in batches if batch <= set(before) & set(again)]
        assert len(lost) <= BATCHES_PER_PART, f"{len(lost)} finished batches were scored twice"
    assert killed_while_scoring >= 12


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("write", [1, 2, 3, 4], ids=["plan", "part", "table", "record"])
def test_a_kill_between_any_two_writes_loses_nothing(in_child, tmp_path, write, moment):
    child, _ = in_child(tmp_path / "whole")
    assert os.waitpid(child, 0)[1] == 0
    child, log = in_child(tmp_path / "killed", kill_at=[moment, write])
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    before = rows_in(log)
    child, _ = in_child(tmp_path / "killed")
    assert os.waitpid(child, 0)[1] == 0
    assert_same_files(Path(f"{tmp_path / 'whole'}-annotated"), Path(f"{tmp_path / 'killed'}-annotated"))
    written = write > 2 or (write, moment) == (2, "after")
    assert len(rows_in(log)) - len(before) == (0 if written else 60), "what is in a part is not scored again"
    assert sorted(path.name for path in next((tmp_path / "killed").iterdir()).glob("[!.]*")) == [
        "annotation.json",
        "confidences.arrow",
    ]


def test_two_runs_of_one_annotation(in_child, tmp_path):
    child, _ = in_child(tmp_path / "whole")
    assert os.waitpid(child, 0)[1] == 0
    children = [
        in_child(
            tmp_path / "cache",
            name=f"run{i}",
            output=str(tmp_path / f"run{i}"),
            seconds_per_part=0,
            seconds_per_row=0.002 * i,
        )[0]
        for i in range(3)
    ]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    for i in range(3):
        assert_same_files(Path(f"{tmp_path / 'whole'}-annotated"), tmp_path / f"run{i}")


@pytest.mark.parametrize("completed", [True, False], ids=["by another run", "by nobody"])
def test_vanished_parts_are_never_taken_for_zeros(pair, conversations, tmp_path, monkeypatch, completed):
    good = annotate_dataset(conversations, pair[1], cache_dir=tmp_path / "good")
    assemble = cache.AnnotationCache.assemble

    def assemble_late(self, *args):
        for part in self.folder.glob("part-*"):
            part.unlink()
        if completed:  # another run has been faster, and has removed the parts
            shutil.copytree(next((tmp_path / "good").iterdir()), self.folder, dirs_exist_ok=True)
        assemble(self, *args)

    monkeypatch.setattr(cache.AnnotationCache, "assemble", assemble_late)
    if completed:
        found = annotate_dataset(conversations, pair[1], cache_dir=tmp_path / "cache")
        assert found["confidences"][:] == good["confidences"][:]
    else:
        with pytest.raises(ValueError, match=r"The confidences of 8 rows have gone from"):
            annotate_dataset(conversations, pair[1], cache_dir=tmp_path / "cache")
        monkeypatch.undo()
        found = annotate_dataset(conversations, pair[1], cache_dir=tmp_path / "cache")
        assert found["confidences"][:] == good["confidences"][:]


def test_damaged_files_are_noticed(in_child, tmp_path):
    child, _ = in_child(tmp_path / "whole")
    assert os.waitpid(child, 0)[1] == 0
    child, _ = in_child(tmp_path / "cache", seconds_per_part=0, kill_at=["before", 30])
    os.waitpid(child, 0)
    parts = sorted((tmp_path / "cache").rglob("part-*"))
    assert len(parts) > 10
    parts[0].write_bytes(b"")
    parts[1].write_bytes(parts[1].read_bytes()[:100])
    next((tmp_path / "cache").rglob("plan.json")).write_text("")
    child, _ = in_child(tmp_path / "cache")
    assert os.waitpid(child, 0)[1] == 0
    assert_same_files(Path(f"{tmp_path / 'whole'}-annotated"), Path(f"{tmp_path / 'cache'}-annotated"))
    table = next((tmp_path / "cache").rglob("*.arrow"))
    table.write_bytes(table.read_bytes()[:1000])
    child, _ = in_child(tmp_path / "cache", output=str(tmp_path / "again"))
    assert os.waitpid(child, 0)[1] != 0
    assert "is damaged" in (tmp_path / "cache.error").read_text()
    assert "Delete the folder and run again" in (tmp_path / "cache.error").read_text()


def test_the_second_call_loads_no_model(pair, conversations, tmp_path, monkeypatch):
    options = {"args": SFTConfig(bf16=False, use_cpu=True), "cache_dir": tmp_path}
    first = annotate_dataset(conversations, pair[1], **options)
    monkeypatch.setattr(annotator, "load_scoring_model", None)
    assert annotate_dataset(conversations, pair[1], **options).to_list() == first.to_list()
    assert read_provenance(annotate_dataset(conversations, pair[1], **options)) == read_provenance(first)
    assert len(list(tmp_path.rglob("*.arrow"))) == 1


def copy_of(folder: str, destination: Path) -> str:
    return str(shutil.copytree(folder, destination))


def test_whatever_changes_the_confidences_is_scored_again(pair, conversations, tokenizer, tmp_path):
    def folders() -> int:
        return len(list((tmp_path / "cache").iterdir()))

    def run(model=pair[1], dataset=conversations, processing_class=None, model_init_kwargs=None, **args):
        options = {"model_init_kwargs": model_init_kwargs, "cache_dir": tmp_path / "cache"}
        return annotate_dataset(dataset, model, processing_class, args=SFTConfig(bf16=False, **args), **options)

    run()
    # The same weights under another name, and the same tokens in another dataset, are the same annotation
    run(copy_of(pair[1], tmp_path / "renamed"))
    run(dataset=conversations.map(lambda row: {"more": 1}))
    run(model_init_kwargs={"device_map": None, "trust_remote_code": False, "dtype": "auto"})
    assert folders() == 1
    run(pair[0])
    run(dataset=conversations.select(range(7)))
    run(dataset=conversations.select([1, 0, *range(2, 8)]))
    run(model_init_kwargs={"dtype": "bfloat16"})
    run(max_length=30)
    run(completion_only_loss=False)
    other = copy.deepcopy(tokenizer)
    other.chat_template += "{# another template #}"
    run(processing_class=other)
    assert folders() == 8
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "renamed")
    changed = run(str(tmp_path / "renamed"))
    assert folders() == 9
    # The same weights under another configuration
    config = json.loads((tmp_path / "renamed" / "config.json").read_text())
    (tmp_path / "renamed" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert run(str(tmp_path / "renamed"))["confidences"][:] != changed["confidences"][:]
    assert folders() == 10
    assert changed["confidences"][:] != run()["confidences"][:]


def test_a_loaded_model_is_scored_every_time(pair, conversations, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    first = annotate_dataset(conversations, model, cache_dir=tmp_path)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert annotate_dataset(conversations, model, cache_dir=tmp_path)["confidences"][:] != first["confidences"][:]
    assert not any(tmp_path.iterdir())


def test_without_caching_nothing_is_kept(pair, conversations, tmp_path):
    disable_caching()
    try:
        annotated = annotate_dataset(conversations, pair[1], cache_dir=tmp_path)
    finally:
        enable_caching()
    assert not any(tmp_path.iterdir())
    assert annotated.map(lambda row: {"sum": sum(row["confidences"])}, num_proc=2)["sum"][0] > 0


def test_random_numbers_are_left_alone(pair, conversations, tmp_path):
    def state() -> tuple:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = state()
    annotate_dataset(conversations, pair[1], cache_dir=tmp_path)
    assert state() == before


def test_a_full_disk_is_found_before_the_model_is_loaded(pair, conversations, tmp_path, monkeypatch):
    monkeypatch.setattr(annotator, "load_scoring_model", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(
        OSError, match=r"need 0.0\d+ MB, and 0.0001 MB are free. Free some space, or set `annotation_cache_dir`"
    ):
        annotate_dataset(conversations, pair[1], cache_dir=tmp_path)


def test_a_disk_that_fills_up_keeps_what_is_scored(in_child, tmp_path, many_rows, pair):
    # The size of the files a process writes is limited, as a full disk limits it
    child, _ = in_child(tmp_path / "cache", seconds_per_part=0, file_bytes=4000)
    assert os.waitpid(child, 0)[1] != 0
    message = (tmp_path / "cache.error").read_text()
    assert "the confidences scored until now are kept. Free some space and run again" in message
    kept = len(list((tmp_path / "cache").rglob("part-*.npz")))
    assert kept > 0
    assert not list((tmp_path / "cache").rglob(".tmp-*"))
    child, _ = in_child(tmp_path / "cache")
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.slow
def test_a_failing_process_fails_the_run_and_names_its_rows(launch):
    folder, status, output = launch("failing", processes=2, fail_rank=1)
    assert status != 0
    assert re.search(
        r"Process 1 of 2 failed while it scored its \d+ rows \([\d, …]+\). What was scored until then is kept; run again to "
        r"go on. MemoryError: no memory left",
        output,
    )
    scored = rows_in(folder / "log")
    assert scored
    _, status, output = launch("failing", processes=2)
    assert status == 0, output
    assert sorted(rows_in(folder / "log")) == list(range(60)), "the other process's rows are not scored again"


@pytest.mark.slow
def test_sharded_weights_give_the_same_confidences(launch, make_model, tmp_path):
    # DeepSpeed ZeRO-3 keeps parameters of less than 100,000 elements whole; this model has larger ones
    model = str(make_model(tmp_path / "wide", hidden_size=512, intermediate_size=512))
    whole, status, output = launch("whole", model=model)
    assert status == 0, output
    sharded, status, output = launch("sharded", processes=2, model=model, zero3=True)
    assert status == 0, output
    facts = json.loads((sharded / "facts.json").read_text())
    assert (facts["num_processes"], facts["zero3"]) == (2, True)
    assert {"model.embed_tokens.weight", "lm_head.weight"} < set((sharded / "partitioned").read_text().split())
    q, q_sharded = (
        load_annotated_dataset(folder / "annotated")["train"]["confidences"] for folder in (whole, sharded)
    )
    for a, b in zip(q, q_sharded, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.slow
def test_fsdp_loads_the_instruct_model_whole(launch):
    # Its RAM-efficient loading would leave the weights of every process but the first empty
    whole, status, output = launch("whole")
    assert status == 0, output
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    fsdp, status, output = launch("fsdp", processes=2, environment=environment)
    assert status == 0, output
    assert_same_files(whole / "annotated", fsdp / "annotated")
