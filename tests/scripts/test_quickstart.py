"""The quick start, as a newcomer runs it."""

import json
import os
import subprocess
import sys

import pytest

from gift_trl.evaluation.results import load_results
from gift_trl.lab.comparison import METHODS
from gift_trl.lab.corpora import MIXES
from gift_trl.lab.evaluation import read_scores
from gift_trl.scripts import lab, quickstart


def test_help_names_every_mix():
    text = quickstart.make_parser().format_help()
    assert tuple(MIXES) == quickstart.MIXES
    assert all(f"  {mix} " in text for mix in MIXES)


def test_foreign_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "results.json").touch()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"holds `thesis.tex`.*name a new folder"):
        quickstart.main(["--output_dir", str(tmp_path)])
    with pytest.raises(NotADirectoryError, match="is a file: name a folder"):
        quickstart.main(["--output_dir", str(tmp_path / "thesis.tex")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "thesis.tex"]


def test_a_folder_with_names_like_its_own_is_not_replaced(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "years.csv").write_text("work")
    with pytest.raises(FileExistsError, match=r"holds `data`, which the quick start did not write"):
        quickstart.main(["--output_dir", str(tmp_path)])
    assert (tmp_path / "data" / "years.csv").read_text() == "work"


def test_the_lab_writes_beside_nothing_else(tmp_path):
    (tmp_path / "lab.html").write_text("the cat Lab")
    with pytest.raises(ValueError, match=r"holds `lab\.html` and nothing of the lab"):
        lab.main(["--output_dir", str(tmp_path), "--report_only"])
    assert (tmp_path / "lab.html").read_text() == "the cat Lab"
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no finished run of the lab"):
        lab.main(["--output_dir", str(tmp_path), "--report_only"])


def test_seed_out_of_range_leaves_an_earlier_result_alone(tmp_path):
    earlier = tmp_path / "quickstart"
    earlier.mkdir()
    (earlier / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="seeds run from 0 to"):
        quickstart.main(["--output_dir", str(earlier), "--seed", "-1"])
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart"]
    assert (earlier / "results.json").read_text() == "{}"


@pytest.mark.slow
def test_quickstart_from_nothing(tmp_path):
    output = tmp_path / "outputs" / "quickstart"
    command = [sys.executable, "-m", "gift_trl.scripts.quickstart", "--output_dir", str(output)]
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "140"}, timeout=1500, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stdout + run.stderr
    assert [path.name for path in output.parent.iterdir()] == ["quickstart"]
    assert {path.name for path in output.iterdir()} == quickstart._WRITTEN
    assert "What it does not show" in run.stdout

    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    answered = load_results(output / "results")
    assert len(answered.models) == 2 + 3 * len(METHODS) and answered.missing == ()
    harsh_gift = read_scores(answered, "GIFT@A-3e-3")
    assert harsh_gift.accuracies == results["settings"][0]["methods"]["GIFT"]["accuracies"]
    settings = {(setting["mix"], setting["learning_rate"]): setting for setting in results["settings"]}
    assert list(settings) == [("A", 3e-3), ("A", 1e-3), ("Z", 3e-3)]
    for setting in settings.values():
        assert list(setting["methods"]) == [method.name for method in METHODS]
    for name in [*results["models"], *settings["Z", 3e-3]["methods"]]:
        assert name.split()[0] in run.stdout

    instruct = results["models"]["instruct"]["accuracies"]["target"]
    harsh, mild, clean = (setting["methods"] for setting in settings.values())
    # What held, with room to spare, for every seed tried; the rest is reported by the run and not asserted.
    assert instruct > 65
    assert harsh["Instruct-SFT"]["accuracies"]["target"] < instruct - 20
    assert mild["Instruct-SFT"]["accuracies"]["target"] < instruct - 10
    assert harsh["GIFT"]["accuracies"]["target"] > harsh["Instruct-SFT"]["accuracies"]["target"] + 15
    assert min(method["accuracies"]["target"] for method in clean.values()) > instruct - 12
    assert harsh["Instruct-SFT"]["signal"]["q < 0.2"] > 70
    assert harsh["Shadow-FT"]["signal"]["q < 0.2"] > 60
    assert harsh["GIFT"]["signal"]["q < 0.2"] < 20
