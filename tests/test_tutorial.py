"""The commands of the tutorial, as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gift_trl.evaluation.results import load_results
from gift_trl.lab.evaluation import read_scores


ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_tutorial(tmp_path):
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert [language for language, _ in blocks].count("bash") == 6
    command = tmp_path / "bin" / "gift-trl"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m gift_trl.scripts.cli "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    outputs = []
    for language, block in blocks:
        run = ["bash", "-euo", "pipefail", "-c", block] if language == "bash" else [sys.executable, "-c", block]
        done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=1500)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        outputs.append(done.stdout)

    # What the page says of them
    assert "Shadow-FT" in outputs[0]
    assert re.search(r"512 rows annotated by instruct.*13,430 target tokens in 512 rows", outputs[1], flags=re.DOTALL)
    confidences = [float(line.split()[-1]) for line in outputs[2].splitlines()]
    assert len(confidences) > 5 and all(0 <= q <= 1 for q in confidences)
    assert "14 of 20 tensors updated" in outputs[5] and "within the bounds" in outputs[5]
    results = load_results(tmp_path / "outputs" / "quickstart" / "results")
    assert {"instruct", "GIFT@A-3e-3", "GIFT-by-hand"} <= set(results.models) and results.missing == ()
    assert read_scores(results, "GIFT-by-hand") == read_scores(results, "GIFT@A-3e-3")
    assert "7" in outputs[7]
    for name in (
        "quickstart/report.html",
        "report/report.html",
        "annotated.html",
        "shadow_merged/model.safetensors",
        "merged/kinship.png",
    ):
        assert (tmp_path / "outputs" / name).is_file()
