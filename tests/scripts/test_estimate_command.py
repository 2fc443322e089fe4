"""`gift-trl estimate`: no weights, no Hub, no GPU."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from gift_trl.planning.memory import MemoryEstimate
from gift_trl.planning.placement import Placement
from gift_trl.planning.plan import Candidate, StageEstimate, recommend
from gift_trl.planning.timing import TimeEstimate
from gift_trl.scripts import estimate
from gift_trl.scripts.launch import accelerate_config_file


@pytest.fixture(scope="module")
def recipe(pair, tmp_path_factory) -> Path:
    """A recipe whose models are folders with no weights in them."""
    folder = tmp_path_factory.mktemp("estimate")
    for name, source in zip(("base", "instruct"), pair, strict=True):
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
    rows = [{"question": f"What is {i}?", "answer": "It is a number. " * (1 + i % 5)} for i in range(64)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = {
        "model_name_or_path": str(folder / "base"),
        "instruct_model_name_or_path": str(folder / "instruct"),
        "dtype": "bfloat16",
        "dataset_name": str(folder / "data.jsonl"),
        "prompt_column": "question",
        "completion_column": "answer",
        "max_length": 128,
        "use_peft": True,
        "lora_r": 8,
        "lora_target_modules": "all-linear",
        "bf16": True,
        "output_dir": str(folder / "adapter"),
        "merge_output_dir": str(folder / "merged"),
        "per_device_train_batch_size": 2,
        "global_batch_size": 32,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def result(recipe) -> dict:
    output = recipe.parent / "estimates" / "result.json"
    estimate.main(["--config", str(recipe), "--gpu", "H100", "--num_gpus", "4", "--output", str(output)])
    assert not (recipe.parent / "adapter").exists()
    return json.loads(output.read_text())


def test_every_configuration_is_estimated(result):
    found = {entry["accelerate_config"]: entry for entry in result["configurations"]}
    assert list(found) == ["single", "ddp", "zero1", "zero2", "zero3", "fsdp2", "zero3_offload"]
    assert [found[name]["gradient_accumulation_steps"] for name in ("single", "ddp")] == [16, 4]
    for entry in found.values():
        assert entry["works"] and entry["problem"] is None
        for stage in entry["stages"].values():
            assert stage["seconds"] > 0 and stage["memory_bytes"]["total"] > stage["memory_bytes"]["activations"] > 0
    training = {name: entry["stages"]["training"] for name, entry in found.items()}
    assert training["ddp"]["seconds"] == pytest.approx(training["single"]["seconds"] / 4, rel=0.1)
    # A model this small is gathered as a whole, and the rows of a GPU are the same everywhere
    weights = {name: stage["memory_bytes"]["weights"] for name, stage in training.items()}
    assert weights["zero3"] == pytest.approx(weights["ddp"] / 4, abs=1) and weights["zero3_offload"] == 0
    assert training["zero3_offload"]["memory_bytes"]["host"] > 0
    assert result["recommended"] == "ddp"
    assert result["merge"]["seconds"] > 0
    assert "64 rows" in result["assumptions"][0] and "counted" in result["assumptions"][0]
    assert any("has been compared with a GPU" in note for note in result["assumptions"])


def test_table_and_recommendation(recipe, capsys):
    estimate.main(["--config", str(recipe), "--gpu", "l4", "--num_gpus", "1", "--num_rows", "100"])
    output = capsys.readouterr().out
    assert "on l4 (24 GB each), estimated" in output and "single" in output and "ddp" not in output
    assert "100 rows of 128 tokens each, max_length, an upper bound" in output
    assert output.rstrip().endswith("Recommended: --accelerate_config single")


def test_what_does_not_fit_or_divide_is_said(recipe, monkeypatch, capsys, tmp_path):
    from gift_trl.planning import hardware

    monkeypatch.setitem(hardware.GPUS, "small", hardware.DataSheet(1.01, 100, 10, 500, 64))
    options = ("--num_rows", "100", "--per_device_train_batch_size", "8", "--num_gpus", "8")
    estimate.main(["--config", str(recipe), "--gpu", "small", *options, "--output", str(tmp_path / "out.json")])
    assert "No configuration works: fewer rows" in capsys.readouterr().out
    single, ddp, *_ = json.loads((tmp_path / "out.json").read_text())["configurations"]
    assert not single["works"] and not single["stages"]["training"]["fits"] and single["problem"] is None
    assert ddp["problem"] == "8 GPUs × 8 rows do not divide the global batch of 32" and not ddp["stages"]


@pytest.mark.parametrize(
    "working, expected",
    [
        (["single", "ddp", "zero1", "zero3"], "ddp"),
        (["single"], "single"),
        (["zero2", "zero3", "fsdp2"], "zero2"),
        (["zero3", "fsdp2", "zero3_offload"], "fsdp2"),  # so much faster that it is worth it
        (["zero3", "zero3_offload"], "zero3"),
        (["zero3_offload"], "zero3_offload"),
        ([], None),
    ],
)
def test_recommendation(working, expected):
    seconds = {"single": 80, "ddp": 10, "zero1": 9, "zero2": 9, "zero3": 30, "fsdp2": 20, "zero3_offload": 5}
    candidates = [
        Candidate(
            Placement.from_file(accelerate_config_file(name), 8),
            training=StageEstimate(MemoryEstimate(1, 1, 1, 1), TimeEstimate(time, "", {}), name in working),
        )
        for name, time in seconds.items()
    ]
    chosen = recommend(candidates)
    assert (chosen and chosen.placement.name) == expected


def test_annotated_data_is_not_scored_again(recipe, tmp_path, capsys):
    row = {"input_ids": [1, 5, 6, 7], "labels": [-100, 5, 6, 7], "confidences": [0.0, 0.5, 0.5, 0.5]}
    (tmp_path / "data.json").write_text("\n".join([json.dumps(row)] * 8))
    arguments = ["--config", str(recipe), "--num_gpus", "1", "--dataset", str(tmp_path / "data.json")]
    columns = ("--prompt_column", "none", "--completion_column", "none")
    estimate.main([*arguments, *columns, "--output", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert list(result["configurations"][0]["stages"]) == ["training"]
    assert any("no token is left to score" in note for note in result["assumptions"])


def test_errors_name_the_remedy(recipe, fails, tmp_path):
    arguments = ("--config", str(recipe))
    assert "`gtx-1` is not in the table: b200, h200" in fails(estimate.main, *arguments, "--gpu", "gtx-1")
    assert "between 0 and 1" in fails(estimate.main, *arguments, "--efficiency", "40")
    assert "spread evenly" in fails(estimate.main, *arguments, "--num_gpus", "8", "--num_machines", "3")
    assert "`--num_rows`" in fails(estimate.main, *arguments, "--dataset", "nobody/nothing")
    assert "`--num_rows`, too" in fails(estimate.main, *arguments, "--mean_length", "50")
    assert "There is no recipe file" in fails(estimate.main, "--config", str(tmp_path / "none.yaml"))
    assert "confidence_source" in fails(estimate.main, *arguments, "--confidence_source", "online")
    missing = str(tmp_path / "missing")
    assert "missing" in fails(estimate.main, *arguments, "--model_name_or_path", missing)
