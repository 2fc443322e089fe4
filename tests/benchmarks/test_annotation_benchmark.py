"""The annotation benchmark runs, and measures what it says, on a tiny model."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("annotation")
        sys.modules.pop("annotation", None)


def run(benchmark, folder: Path, *arguments: str) -> dict:
    threads = torch.get_num_threads()
    try:
        benchmark.main(
            ["--preset", "tiny", "--vocab", "300", "--device", "cpu", "--output-dir", str(folder), *arguments]
        )
    finally:
        torch.set_num_threads(threads)
    return json.loads((folder / "annotation-cpu.json").read_text())


def test_the_methods_agree_and_are_measured(benchmark, tmp_path, capsys):
    arguments = ("--dtype", "float32", "bfloat16", "--rounds", "1", "--skip-memory", "--tokens-per-batch", "1024")
    results = run(benchmark, tmp_path, *arguments)
    printed = capsys.readouterr().out
    for dtype, bound in (("float32", 1e-4), ("bfloat16", 0.5)):
        result = results["runs"][f"tiny 300 {dtype} 1024"]
        assert f"| tiny | 300 | {dtype} | 1,024 |" in printed
        assert result["rows"] == 4 and 0 < result["targets"] < result["tokens"]
        for method in benchmark.METHODS:
            assert result["methods"][method]["seconds"] > 0
        for method in ("plain", "gift_trl"):
            assert 0 < result["methods"][method]["error_max"] < bound


def test_results_of_other_runs_are_kept(benchmark, tmp_path):
    run(benchmark, tmp_path, "--head-only", "--rounds", "1")
    results = run(benchmark, tmp_path, "--rounds", "1", "--skip-memory", "--exact-rows", "0")
    (heads,) = results["heads"].values()
    assert len(heads["methods"]) == 4 and len(results["runs"]) == 1
    assert all(head["error_max"] < 1e-4 for head in heads["methods"].values())
    # No name of a host or folder leaves the machine
    assert set(heads["machine"]) == {"cpu", "cores", "threads", "gpu", "torch", "transformers", "trl"}


def test_peak_memory_is_that_of_the_call(benchmark):
    size = 64 * 2**20
    peak = benchmark.peak_of(lambda: np.ones(size // 8).sum(), torch.device("cpu"))
    assert peak == pytest.approx(size / 1e6, rel=0.1)


def test_rows_are_as_long_as_those_of_numina(benchmark):
    rows, longest = benchmark.draw_rows(1000, 2000)
    completions = np.array([len(row.targets) for row in rows])
    median = benchmark.COMPLETION_CHARACTERS[benchmark.PERCENTILES.index(50)] / benchmark.CHARACTERS_PER_TOKEN
    assert np.median(completions) == pytest.approx(median, rel=0.1)
    assert max(len(row.input_ids) for row in rows) == len(longest[-1].input_ids) <= benchmark.MAX_LENGTH
    assert all(row.targets[-1] == len(row.input_ids) - 1 for row in rows if len(row.targets))
    few, _ = benchmark.draw_rows(1000, 24)
    assert np.mean([len(row.input_ids) for row in few]) == pytest.approx(
        np.mean([len(r.input_ids) for r in rows]), rel=0.02
    )


def test_lengths_are_measured(benchmark, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"instruction": "a" * n, "response": "b" * (2 * n)}) + "\n" for n in range(1, 102))
    )
    benchmark.main(["--measure-lengths", str(path)])
    prompts, completions, correlation = capsys.readouterr().out.splitlines()
    assert prompts == "(1, 2, 6, 11, 21, 31, 41, 51, 61, 71, 81, 91, 96, 100, 101)"
    assert completions.startswith("(2, 4, 12, 22, 42,") and correlation == "1.00"
