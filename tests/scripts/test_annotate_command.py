"""`gift-trl annotate`: folder, import, server, and what it refuses."""

import json

import pytest
from vllm_server import VLLMServer

from gift_trl.annotation import annotate_dataset, load_annotated_dataset, read_provenance
from gift_trl.scripts.annotate import main
from gift_trl.scripts.train import main as train


def test_an_annotated_folder_holds_all_that_is_needed(pair, recipe, tmp_path, capsys):
    output = tmp_path / "annotated"
    main(["--config", recipe(), "--annotation_output_dir", str(output)])
    printed = capsys.readouterr().out
    assert "8 rows annotated by instruct (transformers, float32)" in printed
    assert "target tokens in 8 rows: mean confidence" in printed
    assert f"gift-trl report annotation {output}" in printed
    assert sorted(path.name for path in output.iterdir()) == ["data", "gift_provenance.json", "tokenizer"]
    assert (output / "tokenizer" / "tokenizer.json").is_file()


def test_dropped_rows_are_counted_and_listed(recipe, tmp_path, capsys):
    output = str(tmp_path / "annotated")
    main(["--config", recipe(max_length=70), "--annotation_output_dir", output])
    dataset = load_annotated_dataset(output)["train"]
    (provenance,) = read_provenance(dataset)
    (reason, dropped), *_ = provenance.dropped.items()
    assert f"{len(dropped)} rows left out: {reason}" in capsys.readouterr().out
    assert sorted([*dropped, *dataset["original_index"]]) == list(range(8))


def test_released_scores_are_imported(pair, conversations, recipe, tmp_path, capsys):
    annotated = annotate_dataset(conversations, pair[1])
    path = tmp_path / "released.jsonl"
    with path.open("w") as file:
        for row in annotated:
            end = max(i for i, token in enumerate(row["input_ids"]) if token == 2)
            scores = [
                [q, q] for q, label in zip(row["confidences"][:end], row["labels"][:end], strict=True) if label != -100
            ]
            line = {
                "instruction": row["prompt"][0]["content"],
                "response": row["completion"][0]["content"],
                "scores": scores,
            }
            file.write(json.dumps(line) + "\n")
    config = recipe(prompt_column=None, completion_column=None, prompt_suffix=None, system_prompt=None)
    output = str(tmp_path / "imported")
    main(["--config", config, "--annotation_output_dir", output, "--import_scores", str(path)])
    assert "8 rows annotated by instruct (imported, unknown)" in capsys.readouterr().out
    loaded = load_annotated_dataset(output)["train"]
    assert loaded["input_ids"][:] == annotated["input_ids"][:]
    train(["--config", config, "--dataset", output])


def test_a_server_gives_the_same_confidences(pair, recipe, tmp_path, caplog):
    outputs = [str(tmp_path / name) for name in ("here", "server")]
    config = recipe(annotation_cache_dir=str(tmp_path / "cache"))
    main(["--config", config, "--annotation_output_dir", outputs[0]])
    with VLLMServer(pair[1]) as server:
        arguments = ["--engine", "vllm", "--base_url", server.base_url]
        main(["--config", config, "--annotation_output_dir", outputs[1], *arguments])
        asked = len(server.prompts)
        main(["--config", config, "--annotation_output_dir", outputs[1], "--annotation_overwrite", *arguments])
        assert len(server.prompts) == asked, "what is in the cache is not asked again"
    # A finished annotation needs the server no more
    main(["--config", config, "--annotation_output_dir", outputs[1], "--annotation_overwrite", *arguments])
    here, there = (load_annotated_dataset(output)["train"] for output in outputs)
    assert here["input_ids"][:] == there["input_ids"][:]
    for a, b in zip(here["confidences"], there["confidences"], strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    (provenance,) = read_provenance(there)
    assert (provenance.engine, provenance.model, provenance.weights) == ("vllm", "instruct", None)
    assert "Make sure that it has loaded these weights" not in caplog.text
    train(["--config", config, "--dataset", outputs[1]])


def test_a_server_with_another_model_is_warned_of(pair, recipe, tmp_path, caplog):
    with VLLMServer(pair[0]) as server:
        arguments = ["--engine", "vllm", "--base_url", server.base_url]
        main(["--config", recipe(), "--annotation_output_dir", str(tmp_path / "annotated"), *arguments])
    assert "Make sure that it has loaded these weights" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        ({}, [], "Nothing says where to write: set `--annotation_output_dir`"),
        ({"push_to_hub": True}, ["OUT"], "name its repository with `--hub_dataset_id`"),
        ({}, ["OUT", "--hub_dataset_id", "a/b/c"], "a/b/c"),
        ({}, ["OUT", "--engine", "vllm"], "needs the address of a server"),
        ({}, ["OUT", "--base_url", "http://localhost:1/v1"], "`annotation_base_url` is the address of a server"),
        ({}, ["OUT", "--engine", "vllm", "--base_url", "http://127.0.0.1:9/v1"], "vllm serve"),
        ({}, ["OUT", "--import_scores", "nowhere.jsonl"], "There is no file `nowhere.jsonl`"),
        ({"annotation_tokens_per_batch": 0}, ["OUT"], "`annotation_tokens_per_batch` is 0"),
        ({"instruct_model_name_or_path": None}, ["OUT"], "Nothing says which model scores the tokens"),
    ],
)
def test_what_is_refused(recipe, tmp_path, fails, overrides, arguments, message):
    output = ["--annotation_output_dir", str(tmp_path / "annotated")]
    arguments = [part for argument in arguments for part in (output if argument == "OUT" else [argument])]
    assert message in fails(main, "--config", recipe(**overrides), *arguments)
    assert not (tmp_path / "annotated").exists()
