"""The benchmark of the merge: what it refuses to start with, and how it counts."""

import importlib
import sys
from pathlib import Path

import pytest


@pytest.fixture
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        yield importlib.import_module("merge")
        sys.modules.pop("merge", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "gift_trl", "before"], "before: name the checkout"),
        (["--methods", "gift_trl", "mergekit"], "mergekit: name the checkout"),
        (["--methods", "cp"], "gift_trl has to be among them"),
    ],
)
def test_methods_that_cannot_be_measured(benchmark, capsys, arguments, message):
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert message in capsys.readouterr().err


def test_a_checkout_is_what_is_imported(benchmark, tmp_path):
    (tmp_path / "gift_trl").mkdir()
    (tmp_path / "gift_trl" / "__init__.py").write_text("block = bytearray(b'x' * 10) * 5_000_000\n")
    measured = benchmark.run(sys.executable, "import gift_trl; import time; time.sleep(0.2)", 1, tmp_path)
    assert 50 < measured["peak_mb"] < 200 and measured["cpu"] < 5


def test_kernels_are_timed(benchmark, capsys):
    benchmark.main(["--kernels", "--preset", "tiny", "--rank", "4"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 6 and "| multiply and add |" in rows[0] and " yes |" in rows[0]
    assert sum(row.endswith("| yes |") for row in rows) == 2
