"""The results folder: what is written is read back, and a damaged file is named."""

import json

import pytest

from gift_trl.evaluation.results import (
    Generation,
    Grade,
    Skip,
    Summary,
    check_name,
    load_results,
    write_config,
    write_json,
    write_lines,
)
from gift_trl.evaluation.statistics import Interval


# A separator at which `str.splitlines` would split
GENERATIONS = [
    Generation(p, s, 3, f"<s>{p}\u2028?", [1, p], str(p), "a\nb", [5, 2], "stop", {"level": p})
    for p in (0, 2)
    for s in (0, 1)
]
GRADES = [
    Grade(0, 0, 1.0, "0"),
    Grade(0, 1, 0.0, None),
    Grade(2, 0, 1.0, "2"),
    Grade(2, 1, 1.0, "2"),
]
SUMMARY = Summary(
    {"name": "exact_match"},
    num_problems=2,
    num_samples=2,
    average=Interval(0.75, 0.5, 1.0),
    pass_at_k={1: Interval(0.75, 0.5, 1.0), 2: Interval(1.0, 1.0, 1.0)},
    majority=Interval(1.0, 1.0, 1.0),
    truncated=0.0,
    never_stopped=0.0,
    mean_tokens=2.0,
    skipped=(Skip(1, "no answer"),),
)


@pytest.fixture
def folder(tmp_path):
    tasks = {"sums": {"role": "target"}, "kept": {"role": "retention"}}
    config = {"models": {"instruct": {}, "gift": {}}, "tasks": tasks, "baseline": "instruct"}
    write_config(tmp_path, config)
    run = tmp_path / "gift" / "sums"
    write_lines(run / "generations.jsonl", GENERATIONS)
    write_lines(run / "grades.jsonl", GRADES)
    write_json(run / "timing.json", {"seconds": 1.5, "tokens": 8})
    write_json(run / "summary.json", SUMMARY.to_dict())
    return tmp_path


def test_what_is_written_is_read_back(folder):
    results = load_results(folder)
    assert (results.models, results.tasks, results.baseline) == (["instruct", "gift"], ["sums", "kept"], "instruct")
    assert results.role("kept") == "retention"
    assert results.missing == (("instruct", "sums"), ("instruct", "kept"), ("gift", "kept"))
    run = results.runs["gift", "sums"]
    assert run.summary == SUMMARY
    assert run.grades == GRADES and run.scores == {0: [1.0, 0.0], 2: [1.0, 1.0]}
    assert list(run.generations()) == GENERATIONS
    assert list(run.generations({2})) == GENERATIONS[2:]
    assert run.timing["seconds"] == 1.5
    assert not [path.name for path in folder.rglob("*") if path.name.startswith(".")]


def test_files_of_the_standard_library_suffice_to_read_them(folder):
    lines = (folder / "gift" / "sums" / "generations.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert json.loads(lines[2])["prompt"] == "<s>2\u2028?" and len(lines) == 4
    assert json.loads((folder / "gift" / "sums" / "summary.json").read_text())["pass_at_k"]["2"]["mean"] == 1.0


@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        ("generations.jsonl", '{"problem": 0', lambda run: list(run.generations())),
        ("generations.jsonl", '{"problem": 0}\n', lambda run: list(run.generations())),
        ("grades.jsonl", "[1]\n", lambda run: run.grades),
        ("summary.json", '{"metric": {}}', lambda run: run.summary),
        ("timing.json", "", lambda run: run.timing),
    ],
)
def test_a_damaged_file_is_named(folder, name, content, read):
    (folder / "gift" / "sums" / name).write_text(content)
    with pytest.raises(ValueError, match=rf"Cannot read .*{name}.*run the evaluation again"):
        read(load_results(folder).runs["gift", "sums"])


def test_a_failed_write_leaves_what_was_there(folder):
    path = folder / "gift" / "sums" / "grades.jsonl"
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        write_lines(path, [Grade(0, 0, float("nan"))])
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 4


def test_a_folder_without_results(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no evaluation\.yaml: name the `output_dir`"):
        load_results(tmp_path)
    (tmp_path / "evaluation.yaml").write_text("models: [a]")
    with pytest.raises(ValueError, match="Cannot read"):
        load_results(tmp_path)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", 3, None])
def test_names_that_cannot_be_folders(name):
    with pytest.raises(ValueError, match="cannot be the name of a model"):
        check_name(name, "model")
    assert check_name("Qwen2.5-7B_gift", "model")
