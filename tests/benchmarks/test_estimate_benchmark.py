"""The comparison of estimates with measurements runs on tiny models."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("estimate", "training_step", "step_audit", "annotation", "merge")


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        for name in MODULES:
            sys.modules.pop(name, None)
        yield importlib.import_module("estimate")
        for name in MODULES:
            sys.modules.pop(name, None)


def test_training_and_annotation_are_compared(benchmark, tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        options = ("--tiny", "--rounds", "1", "--skip-memory", "--output-dir", str(tmp_path))
        benchmark.main(["--shapes", "tiny", "--vocab", "500", "--layers", *options])
    finally:
        torch.set_num_threads(threads)
    stages = json.loads((tmp_path / "estimate-cpu.json").read_text())["stages"]
    for run in (stages["training"]["tiny"]["seconds"], stages["annotation"]["500"]["seconds"]):
        # So small a model is nothing but overhead, which an estimate leaves out
        assert run["predicted"] > 0 and run["measured"] == run["rounds"][0] > 0
        assert run["ratio"] == run["predicted"] / run["measured"]
    assert "| training | 2 × 32, 1,000, 2 × 24, float32 | CPU s |" in capsys.readouterr().out


def test_memory_is_that_of_the_measurement(benchmark):
    shape = benchmark.SHAPES["tiny"]
    setup = benchmark.setup_of(shape)
    peak = setup.trace(benchmark.batch_of(shape), benchmark.SINGLE).peak
    # The weights and the adapter are there before it; gradients and two moments are not
    assert benchmark.predicted_memory(shape) * 1e6 == pytest.approx(peak + 12 * setup.sizes.trained)


def test_results_that_are_kept_are_within_the_bound(benchmark):
    results = json.loads((BENCHMARKS / "results" / "estimate-cpu.json").read_text())
    runs = [(stage, name, run) for stage, found in results["stages"].items() for name, run in found.items()]
    assert {stage for stage, _, _ in runs} == {"training", "annotation", "merge"}
    readme = (BENCHMARKS / "README.md").read_text()
    for line in benchmark.table(results).splitlines():
        assert line in readme
    for _, _, run in runs:
        if "peak_mb" in run:
            assert abs(run["peak_mb"]["ratio"] - 1) <= benchmark.BOUND
