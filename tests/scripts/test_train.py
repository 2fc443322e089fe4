import gzip
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DatasetMixtureConfig

from gift_trl import GIFTConfig, merge_adapter
from gift_trl.annotation import load_annotated_dataset, read_provenance
from gift_trl.scripts import annotate, merge, train
from gift_trl.scripts.arguments import GIFTScriptArguments
from gift_trl.scripts.data import load_recipe_datasets
from gift_trl.scripts.recipes import recipes_folder


WORKER = Path(__file__).parents[1] / "distributed" / "command_worker.py"


def test_one_run_annotates_trains_and_merges(recipe, pair, tmp_path):
    train.main(["--config", recipe()])
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    # The merged model is the instruct model with the adapter, not the base model with it
    instruct = AutoModelForCausalLM.from_pretrained(pair[1])
    expected = PeftModel.from_pretrained(instruct, adapter).merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(pair[1]).chat_template
    state = json.loads((adapter / "checkpoint-4" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]


@pytest.mark.parametrize("choice", ["replace", "ignore"])
def test_modules_that_are_trained_whole(recipe, pair, tmp_path, choice):
    train.main(["--config", recipe(lora_modules_to_save=["norm"], merge_saved_modules=choice, max_steps=1)])
    adapter, instruct = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), Path(pair[1])
    expected = {
        "replace": adapter["base_model.model.model.norm.weight"],
        "ignore": load_file(instruct / "model.safetensors")["model.norm.weight"],
    }
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")["model.norm.weight"], expected[choice])
    assert not torch.equal(*expected.values())


def test_annotating_first_gives_the_same_adapter(recipe, tmp_path, capsys):
    config = recipe(merge_output_dir=None)
    train.main(["--config", config])
    annotate.main(["--config", config, "--annotation_output_dir", str(tmp_path / "annotated")])
    assert "8 rows annotated by instruct (transformers, float32)" in capsys.readouterr().out
    annotated = load_annotated_dataset(tmp_path / "annotated")["train"]
    assert annotated[0]["prompt"] == [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is two plus two? Be brief."},
    ]
    assert read_provenance(annotated)[0].rows == 8
    again = ["--output_dir", str(tmp_path / "again"), "--dataset", str(tmp_path / "annotated")]
    train.main(["--config", config, *again])
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_command_line_wins_over_the_recipe(recipe):
    config = recipe(confidence_exponent=2.0, learning_rate="1e-3")
    parsed = train.make_parser().parse_args_and_config(["--config", config, "--confidence_exponent", "0.5"])
    assert isinstance(parsed[1], GIFTConfig)
    assert parsed[1].confidence_exponent == 0.5
    assert parsed[1].learning_rate == 1e-3
    parsed = train.make_parser().parse_args_and_config([f"--config={config}"])
    assert parsed[1].confidence_exponent == 2.0


def test_eos_confidence_may_be_none_in_both(recipe):
    parser = train.make_parser()
    assert parser.parse_args_and_config(["--bf16", "false", "--eos_confidence", "none"])[1].eos_confidence is None
    path = Path(recipe())
    path.write_text(path.read_text() + "eos_confidence: null\n")
    assert train.make_parser().parse_args_and_config(["--config", str(path)])[1].eos_confidence is None


def test_resume_gives_the_uninterrupted_run(recipe, tmp_path):
    config = recipe(save_strategy="steps", save_steps=2, merge_output_dir=None)
    train.main(["--config", config])
    whole = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    # What a run killed after its second step leaves behind: a checkpoint, and no adapter yet
    interrupted = tmp_path / "interrupted"
    interrupted.mkdir()
    (tmp_path / "adapter" / "checkpoint-2").rename(interrupted / "checkpoint-2")
    train.main(["--config", config, "--output_dir", str(interrupted), "--resume_from_checkpoint", "true"])
    resumed = load_file(interrupted / "adapter_model.safetensors")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_resuming_another_run_s_checkpoint_is_refused(recipe, tmp_path, fails, monkeypatch):
    """One recipe with `auto`, and a baseline by the command line: its output folder has to be another one."""
    config = recipe(save_strategy="steps", save_steps=2, merge_output_dir=None, resume_from_checkpoint="auto")
    train.main(["--config", config])
    monkeypatch.setattr("gift_trl.training.confidences.Annotator", lambda *args, **kwargs: pytest.fail("scored"))
    error = fails(train.main, "--config", config, "--confidence_exponent", "0")
    assert "made by another run: confidence_exponent (1.0, this run has 0.0)." in error and "`output_dir`" in error


def test_a_model_that_was_trained_whole_names_its_merge(recipe, tmp_path, capsys):
    train.main(["--config", recipe(use_peft=False, merge_output_dir=None, max_steps=1)])
    told = capsys.readouterr().out
    assert "The model, trained whole, is in" in told and "adapter is" not in told
    command = shlex.split(told.split("by `gift-trl merge ")[1].split("`")[0].replace("DIR", str(tmp_path / "merged")))
    merge.main(command)
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_the_merged_model_does_not_replace_the_base_model(recipe, pair, fails):
    error = fails(train.main, "--config", recipe(merge_output_dir=pair[0], merge_overwrite=True))
    assert "holds the input folder" in error


def test_mixture_and_evaluation_split(recipe, tmp_path):
    path = Path(recipe(dataset_name=None, eval_strategy="epoch", test_split_size=0.25, merge_output_dir=None))
    settings = yaml.safe_load(path.read_text())
    settings["datasets"] = [{"path": "json", "data_files": str(tmp_path / "data.jsonl")}]
    path.write_text(yaml.safe_dump(settings))
    train.main(["--config", str(path)])
    state = json.loads((tmp_path / "adapter" / "checkpoint-4" / "trainer_state.json").read_text())
    evaluations = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert evaluations and "eval_gift/confidence_mean" in evaluations[0]


def test_local_file_is_split_for_evaluation(recipe, tmp_path):
    train.main(["--config", recipe(eval_strategy="epoch", test_split_size=0.25, merge_output_dir=None, max_samples=4)])
    state = json.loads((tmp_path / "adapter" / "checkpoint-2" / "trainer_state.json").read_text())
    assert any("eval_loss" in entry for entry in state["log_history"])


def test_annotated_folders_hold_the_evaluation_split_too(recipe, tmp_path):
    config = recipe(eval_strategy="epoch", test_split_size=0.25, merge_output_dir=None)
    annotate.main(["--config", config, "--annotation_output_dir", str(tmp_path / "annotated")])
    splits = load_annotated_dataset(tmp_path / "annotated")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 6, "test": 2}
    train.main(["--config", config, "--dataset", str(tmp_path / "annotated")])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_mixtures_are_split_alike_every_time(tmp_path, recipe):
    recipe()
    mixture = DatasetMixtureConfig(
        datasets=[{"path": "json", "data_files": str(tmp_path / "data.jsonl")}], test_split_size=0.25
    )
    splits = [load_recipe_datasets(GIFTScriptArguments(), mixture, evaluate=True, seed=seed) for seed in (1, 1, 2)]
    questions = [[rows["question"] for rows in part] for split in splits for part in split]
    assert questions[:2] == questions[2:4] != questions[4:]
    whole, _ = load_recipe_datasets(GIFTScriptArguments(), mixture, evaluate=False, seed=1)
    assert len(whole) == 8


def test_a_stream_is_scored_online(recipe, tmp_path, fails):
    settings = {"dataset_streaming": True, "num_train_epochs": None, "max_steps": 2, "merge_output_dir": None}
    assert "confidence_source: online" in fails(train.main, "--config", recipe(**settings))
    train.main(["--config", recipe(**settings, confidence_source="online")])
    state = json.loads((tmp_path / "adapter" / "checkpoint-2" / "trainer_state.json").read_text())
    assert 0 < state["log_history"][0]["gift/confidence_mean"] < 1


@pytest.mark.slow
def test_two_processes_train_what_one_does(recipe, tmp_path):
    """DDP: 2 processes × 2 rows equal 1 process × 4 rows, annotation included."""
    # At a rate of 0.05, four steps make 6e-8 after the first into up to 3e-6: also between two ways to accumulate in one
    # process, which differ to the same last bit
    config = recipe(optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant", learning_rate=0.01)
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import sys\n"
        "from accelerate import PartialState\n"
        "from gift_trl.scripts import train\n"
        "expected = int(sys.argv.pop(1))\n"
        "train.main(sys.argv[1:])\n"
        "state = PartialState()\n"
        "assert state.num_processes == expected, state\n"
        "assert state.distributed_type.value == ('MULTI_CPU' if expected > 1 else 'NO'), state\n"
    )
    for processes in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"] if processes == 2 else []
        command = [
            *(launch or [sys.executable]),
            str(probe),
            str(processes),
            "--config",
            config,
            "--output_dir",
            str(tmp_path / f"adapter{processes}"),
            "--merge_output_dir",
            str(tmp_path / f"merged{processes}"),
            "--per_device_train_batch_size",
            str(4 // processes),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / f"adapter{n}" / "adapter_model.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    difference = sum((two[name].double() - value.double()).square().sum() for name, value in one.items()).sqrt()
    assert difference / sum(value.double().square().sum() for value in one.values()).sqrt() < 1e-6
    assert (tmp_path / "merged2" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("outcome", ["merged", "failed"])
@pytest.mark.parametrize(("config", "distributed_type"), [("zero3", "DEEPSPEED"), ("fsdp2", "FSDP")])
def test_merge_after_training_in_several_processes(recipe, pair, tmp_path, config, distributed_type, outcome):
    # What is empty when it is checked before the training, and is not when it is time to merge
    failing = {"annotation_cache_dir": str(tmp_path / "merged")} if outcome == "failed" else {}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(recipes_folder() / "accelerate_configs" / f"{config}.yaml"), "--mixed_precision", "no"]
    command += ["--num_processes", "2", "--main_process_port", "0", str(WORKER), str(tmp_path), config]
    command += ["--config", recipe(max_steps=1, **failing)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    notes = [json.loads((tmp_path / f"process{rank}.json").read_text()) for rank in range(2)]
    for note in notes:
        assert (note["distributed_type"], note["num_processes"]) == (distributed_type, 2)
        assert note["status"] == (1 if outcome == "failed" else 0)
    if outcome == "failed":
        assert done.returncode != 0
        assert done.stderr.count("error: ") == 1 and "exists and is not empty" in done.stderr
        assert not (tmp_path / "merged" / "config.json").exists()
        return
    assert done.returncode == 0, done.stderr[-3000:]
    report = merge_adapter(tmp_path / "adapter", pair[1], tmp_path / "alone")
    assert report.num_changed > 0
    merged, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "alone"))
    assert merged.keys() == alone.keys()
    for name, value in alone.items():
        assert torch.equal(merged[name].view(torch.uint8), value.view(torch.uint8)), name


def test_compressed_data(recipe, tmp_path):
    path = recipe(dataset_name=str(tmp_path / "data.jsonl.gz"), max_steps=1, merge_output_dir=None)
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress((tmp_path / "data.jsonl").read_bytes()))
    train.main(["--config", path])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_merge_is_unset_on_the_command_line(recipe):
    given = ["--merge_output_dir", "none", "--hub_merged_model_id", "None"]
    arguments = train.make_parser().parse_args_and_config(["--config", recipe(hub_merged_model_id="user/x"), *given])
    assert not arguments[-1].is_asked_for


def test_models_in_the_home_folder(recipe, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    names = {"model_name_or_path": "~/base", "instruct_model_name_or_path": "~/instruct"}
    _, training_args, model_args, *_ = train.make_parser().parse_args_and_config(["--config", recipe(**names)])
    assert training_args.instruct_model_name_or_path == "/somewhere/instruct"
    assert model_args.model_name_or_path == "/somewhere/base"
