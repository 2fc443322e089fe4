"""`gift-trl evaluate`: from a recipe and from the command line."""

import json

import pytest
import yaml
from transformers import PreTrainedModel

from gift_trl.evaluation.results import load_results
from gift_trl.scripts import evaluate
from gift_trl.scripts.launch import wants_launch


@pytest.fixture
def settings(tmp_path, pair):
    """A recipe's fields."""
    rows = [{"question": f"Name {n} colours.", "answer": "Blue."} for n in range(4)]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "dataset": str(tmp_path / "colours.jsonl"),
        "sampling": {"max_new_tokens": 8, "n": 2},
        "metric": "exact_match",
    }
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump(task))
    return {
        "output_dir": str(tmp_path / "results"),
        "models": {"instruct": pair[1], "base": {"model": pair[0], "dtype": "float32"}},
        "tasks": [str(tmp_path / "colours.yaml"), {**task, "name": "inline", "role": "retention"}],
        "use_cpu": True,
    }


@pytest.fixture
def write(tmp_path, settings):
    """Writes the recipe with changes."""

    def write(**changes) -> str:
        (tmp_path / "eval.yaml").write_text(yaml.safe_dump({**settings, **changes}, sort_keys=False))
        return str(tmp_path / "eval.yaml")

    return write


def test_recipe(write, tmp_path, capsys):
    evaluate.main(["--config", write(), "--limit", "3", "--max_new_tokens", "5"])
    results = load_results(tmp_path / "results")
    assert (results.models, results.tasks) == (["instruct", "base"], ["colours", "inline"])
    assert results.role("inline") == "retention" and results.baseline == "instruct"
    assert results.runs["base", "colours"].summary.num_problems == 3
    assert max(len(g.ids) for g in results.runs["base", "colours"].generations()) <= 5
    table = capsys.readouterr().out
    lines = table.splitlines()
    assert lines[0].split() == ["average", "score,", "%", "colours", "inline"]
    assert lines[1].startswith("instruct") and lines[1].count(" ± ") == 2
    assert f"Written to {tmp_path / 'results'}" in lines[-1]
    assert "of the answers were cut off" in table
    evaluate.main(["--grade_only", "--output_dir", str(tmp_path / "results")])
    assert capsys.readouterr().out == table


def test_command_line_alone(settings, tmp_path, pair):
    arguments = ["--models", f"instruct={pair[1]}", f"again={pair[1]}", "--tasks", str(tmp_path / "colours.yaml")]
    arguments += [
        "--output_dir",
        str(tmp_path / "results"),
        "--n",
        "1",
        "--temperature",
        "0",
        "--seeds",
        "4",
        "--use_cpu",
    ]
    evaluate.main(arguments)
    results = load_results(tmp_path / "results")
    first, again = ([g.ids for g in results.runs[m, "colours"].generations()] for m in ("instruct", "again"))
    assert first == again and len(first) == 4
    assert results.config["seeds"] == [4] and results.config["tasks"]["colours"]["sampling"]["temperature"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "x"}, "Unknown arguments from config file: ['--model', 'x']"),
        ({"output_dir": None}, "Nothing says where the results go: set `output_dir`"),
        ({"models": None}, "`models` is None: map names to Hub ids or folders"),
        (
            {"models": ["nameless"]},
            "'nameless' does not say what the model is called in the results: write NAME=MODEL",
        ),
        ({"models": ["a=x", "a=y"]}, "Two models are named 'a'"),
        ({"tasks": ["maths500"]}, "There is no task 'maths500': give the path of a YAML file, or one of "),
        ({"engine": "vllm"}, "The engine `vllm` needs the URL of the server that holds `instruct`: set `base_url`"),
        ({"tokens_per_batch": "many"}, "`tokens_per_batch`"),
    ],
)
def test_wrong_recipes(write, fails, monkeypatch, changes, message):
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", None)
    if changes == {"tokens_per_batch": "many"}:
        with pytest.raises(SystemExit):
            evaluate.main(["--config", write(**changes)])
    else:
        assert message in fails(evaluate.main, "--config", write(**changes))


def test_a_key_that_stands_there_twice(write, tmp_path, fails):
    path = write()
    with open(path, "a", encoding="utf-8") as file:
        file.write("models: {other: x}\n")
    assert "the key `models` stands there twice" in fails(evaluate.main, "--config", path)


def test_it_can_be_launched_over_processes():
    assert wants_launch("evaluate", ["--accelerate_config", "ddp"])
    assert evaluate.make_parser().find_recipe(["--limit", "3"]) == ["--limit", "3"]
