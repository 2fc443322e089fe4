"""The evaluation benchmark runs on a tiny model, and every method answers every request."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("evaluation")
        for name in ("evaluation", "annotation"):
            sys.modules.pop(name, None)


def test_every_method_is_measured(benchmark, tmp_path, capsys):
    threads = torch.get_num_threads()
    arguments = ["--preset", "tiny", "--vocab", "200", "--samples", "2", "--rounds", "2", "--device", "cpu"]
    try:
        for more in ([], ["--growth"]):
            benchmark.main([*arguments, *more, "--output-dir", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    results = json.loads((tmp_path / "evaluation-cpu.json").read_text())
    (growth,), (run,) = results["growth"].values(), results["runs"].values()
    for costs in growth["milliseconds"].values():
        assert list(costs) == ["1", "4", "16", "64"] and min(costs.values()) > 0
    assert set(run["methods"]) == set(benchmark.METHODS) and run["answers"] == 6
    for method in run["methods"].values():
        assert len(method["rounds"]) == 2 and min(method["rounds"]) > 0
        assert 1 <= method["mean_tokens"] <= 12
    # No name of a host or folder leaves the machine
    assert set(run["machine"]) == {"cpu", "cores", "threads", "gpu", "torch", "transformers", "trl"}
    assert "| gift_trl |" in capsys.readouterr().out


def test_answers_end_at_the_same_tokens_whoever_draws_them(benchmark):
    """Lengths are geometric: their mean is that of the preset, cut off at the longest."""
    model = benchmark.make_model("tiny", 200, "float32", "cpu")
    requests = benchmark.draw_requests("tiny", 200, 100)
    args = benchmark.parse_arguments(["--batch-size", "300"])
    torch.manual_seed(0)
    methods = benchmark.make_methods(model, requests, args)
    lengths = {name: methods[name]() for name in ("file order", "gift_trl")}
    assert all(len(found) == 300 and max(found) == 12 and min(found) == 1 for found in lengths.values())
    means = {name: sum(found) / len(found) for name, found in lengths.items()}
    assert means["file order"] == pytest.approx(means["gift_trl"], rel=0.2)
