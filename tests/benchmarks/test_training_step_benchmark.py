"""The training-step benchmark runs on a tiny model, and what does not depend on the machine's speed holds."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    # By its name, not by its path alone: the processes in which memory is measured import it again
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("training_step")
        for name in ("training_step", "step_audit", "annotation"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def run(benchmark, tmp_path_factory):
    def measure(*arguments: str, vocabulary: int = 1000) -> dict:
        folder = tmp_path_factory.mktemp("results")
        shape = ("--preset", "tiny", "--vocab", str(vocabulary), "--device", "cpu", "--output-dir", str(folder))
        threads = torch.get_num_threads()
        try:
            benchmark.main([*shape, *arguments])
        finally:
            torch.set_num_threads(threads)
        return json.loads((folder / "training-step-cpu.json").read_text())["runs"][f"tiny {vocabulary} float32"]

    return measure


@pytest.fixture(scope="module")
def result(run):
    return run("--rounds", "4", "--skip-memory", "--control", "--online")


def test_all_methods_are_measured(benchmark, result):
    methods = result["methods"]
    assert set(methods) == {*benchmark.METHODS, "online", "sft-again"}
    for method in methods.values():
        low, high = method["time_ratio_quartiles"]
        assert len(method["rounds"]) == 4 and min(method["rounds"]) > 0
        assert 0 < low <= method["time_ratio"] <= high
    # No name of a host or folder leaves the machine
    assert set(result["machine"]) == {"cpu", "cores", "threads", "gpu", "torch", "transformers", "trl"}


def test_the_methods_train_on_the_same_batches(result):
    losses = {name: method["first_loss"] for name, method in result["methods"].items()}
    assert losses["sft"] == losses["sft-again"]
    # In a step of one micro-batch the released loss is ours
    assert losses["gift"] == pytest.approx(losses["released"], rel=1e-5)
    assert losses["gift"] != pytest.approx(losses["sft"], rel=1e-5)


def test_a_step_waits_for_the_device_no_more_often_than_one_of_sft(result):
    sft, gift = result["methods"]["sft"]["audit"], result["methods"]["gift"]["audit"]
    assert sft["step"]["reads"] > 0 and sft["step"]["collectives"] > 0  # the counters do count
    assert gift["step"] == sft["step"]
    assert not [where for where in gift["step_by_file"] if "gift_trl" in where]
    # The sums that are logged: one collective, read once
    for kind in ("reads", "collectives"):
        assert gift["logging_step"][kind] <= sft["logging_step"][kind] + 1


def test_only_the_fused_head_makes_tensors_as_large_as_the_vocabulary(result):
    made = {
        name: method["audit"]["vocabulary_sized"] for name, method in result["methods"].items() if "audit" in method
    }
    assert made["gift"] == made["sft"] and set(made["sft"]) == {"trl/kernels/chunked_logprob.py"}
    # Tiles of the head that scores, which are smaller than a real vocabulary
    assert set(made["online"]) - set(made["gift"]) <= {"gift_trl/annotation/head.py"}
    # The full logits of the released code's loss are found
    assert {"benchmarks/training_step.py", "transformers/models/qwen2/modeling_qwen2.py"} <= set(made["released"])


@pytest.mark.slow
def test_memory_is_measured_and_the_bound_is_checked(benchmark, run, monkeypatch):
    monkeypatch.setattr(benchmark, "METHODS", ("sft", "gift"))
    monkeypatch.setattr(benchmark, "BOUNDS", {"cpu": 1e9})
    methods = run("--rounds", "1", "--check")["methods"]
    gift, sft = methods["gift"], methods["sft"]
    assert gift["memory_ratio"] == gift["peak_mb"] / sft["peak_mb"] > 0


def test_the_bound_is_that_of_gift_alone(benchmark):
    methods = {"gift": {"time_ratio": 1.02, "memory_ratio": 1.08}, "released": {"time_ratio": 2.0}}
    assert benchmark.violations({"methods": methods}, 1.05) == ["memory 1.080 > 1.05"]
    assert benchmark.violations({"methods": methods}, 1.09) == []
