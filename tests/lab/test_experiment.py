import dataclasses
import json

import pytest

from gift_trl.lab.experiment import (
    TREATMENTS,
    VARIANTS,
    Cell,
    Questions,
    load_experiment,
    make_grid,
    run_experiment,
)
from gift_trl.lab.experiment_report import write_experiment_report
from gift_trl.lab.pair import PairSettings
from gift_trl.lab.summary import Estimate, best_rows, shared_rows
from gift_trl.lab.weightings import Row, relative_to_base, smooth_over_answer, smooth_over_steps, trust_by_answer
from gift_trl.scripts import lab
from gift_trl.scripts.quickstart import load_recipe


SETTINGS = PairSettings(hidden_size=32, num_layers=1, num_heads=2, batch_size=4, base_steps=4, instruct_steps=2)
# As the recipe's runs, which see more than one rate
CELLS = [Cell(0, "A", 1e-3, 8), Cell(0, "A", 3e-3, 8), Cell(0, "A", 1e-3, 4)]


@pytest.fixture(scope="module")
def experiment_dir(tmp_path_factory, monkeypatch_module):
    folder = tmp_path_factory.mktemp("lab")
    monkeypatch_module.setenv("HF_HOME", str(folder / "home"))
    args, peft_config = load_recipe()
    questions = Questions.draw(num_validation=3, num_target=4, num_short=2, num_per_task=1)
    wanted = (*TREATMENTS, VARIANTS[0], next(v for v in VARIANTS if v.weighting == "trust"), VARIANTS[-1])
    run_experiment(CELLS, wanted, args, peft_config, folder, settings=SETTINGS, questions=questions)
    return folder


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield monkeypatch


@pytest.mark.slow
def test_a_grid_runs_once_and_is_reported(experiment_dir, monkeypatch):
    experiment = load_experiment(experiment_dir)
    assert len(experiment.runs) == 3 * 7
    assert set(experiment.models) == {0}
    rows = {row.method: row for row in shared_rows(experiment, "A", 1e-3, 8)}
    assert {"Instruct-SFT", "Shadow-FT", "GIFT-BaseT", "GIFT", "RE-Adapt", "LoRE-Adapt", "trust"} <= rows.keys()
    best = {row.method: row for row in best_rows(experiment, "A", 8)}
    candidates = [
        100 * sum(solved) / len(solved)
        for run in experiment.runs
        if run.treatment == "GIFT" and run.cell.num_examples == 8
        for solved in run.validation.values()
    ]
    assert best["GIFT"].outcomes[0].validation == max(candidates)

    # A second call finds every run, and makes no process work
    files = {file: file.stat().st_mtime_ns for file in experiment_dir.rglob("*.json")}
    args, peft_config = load_recipe()
    monkeypatch.setattr("gift_trl.lab.experiment._run_cell", lambda *arguments: pytest.fail("ran again"))
    run_experiment(CELLS, TREATMENTS, args, peft_config, experiment_dir)
    assert {file: file.stat().st_mtime_ns for file in experiment_dir.rglob("*.json")} == files

    sentences = write_experiment_report(experiment, experiment_dir, command="gift-trl lab")
    assert any("GIFT is" in sentence for sentence in sentences)
    assert any(sentence.startswith("Weights 'trust' in 3 settings") for sentence in sentences)
    assert sentences[-1].startswith("Weights that beat both plain q and the instruct model")
    page = (experiment_dir / "lab.html").read_text()
    assert "LoRE-Adapt" in page and str(experiment_dir) not in page
    assert "## The scale of the update" in (experiment_dir / "lab.md").read_text()
    assert len(json.loads((experiment_dir / "lab.json").read_text())["runs"]) == sum(
        len(run.scores) for run in experiment.runs
    )
    assert {file.name for file in experiment_dir.glob("*.png")} == {
        "learning_rate.png",
        "own_best.png",
        "merge_scale.png",
        "data_size.png",
        "signal.png",
    }


def test_methods_and_weights_are_chosen_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"`--variants` names 'windows': choose from .*'window'"):
        lab.main(["--output_dir", str(tmp_path / "lab"), "--variants", "windows"])
    with pytest.raises(ValueError, match="`--methods` names 'SFT': choose from 'Instruct-SFT', 'Shadow-FT'"):
        lab.main(["--output_dir", str(tmp_path / "lab"), "--methods", "SFT", "GIFT"])
    assert not (tmp_path / "lab").exists()


def test_weightings_against_their_formulas():
    row = Row([0.5, 0.125, 1.0, 0.25], [0.5, 0.5, 0.25, 0.25], ["1", ";", "so", "2"])
    assert smooth_over_answer(row) == pytest.approx([(0.5 * 0.125 * 0.25) ** 0.25] * 4)
    assert smooth_over_steps(row) == pytest.approx([0.25, 0.25, 0.5, 0.5])
    assert relative_to_base(row) == pytest.approx([0.5, 0.2, 0.8, 0.5])
    g = (0.5 * 0.125 * 0.25) ** 0.25
    assert trust_by_answer(row) == pytest.approx([q ** (1 - g) for q in row.confidences])


def test_estimates_use_students_t():
    estimate = Estimate.of([1.0, 2.0, 3.0])
    assert estimate.mean == 2.0
    assert estimate.margin == pytest.approx(4.303 / 3**0.5)
    assert Estimate.of([5.0]).verdict == "within error"
    assert dataclasses.replace(estimate, margin=1.9).verdict == "above"


def test_the_grid_takes_every_rate_at_the_middle_size():
    cells = list(make_grid((3,), ("A",), (1e-4, 1e-2), (4, 8, 16)))
    assert cells == [Cell(3, "A", 1e-4, 8), Cell(3, "A", 1e-2, 8), Cell(3, "A", 1e-3, 4), Cell(3, "A", 1e-3, 16)]
