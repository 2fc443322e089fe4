"""Training with every shipped configuration: the same adapter, however many processes share the batch."""

import shutil
import socket
import subprocess

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


ZERO_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3, "two_nodes": 3}
TWO_PROCESSES = ["ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"]
RESUMED = ["ddp", "zero3", "fsdp2"]
METRICS = {"loss", "nll", "num_tokens", "entropy", "mean_token_accuracy"} | {
    f"gift/{name}" for name in ("confidence_mean", "weight_mean", "signal_low", "signal_mid", "signal_high")
}
# A stateful optimizer and dropout, so that resuming has something to restore; five steps in the only epoch
RESUMABLE = {"args": {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}, "dropout": 0.1}
# Nine rows in the evaluation set, so that two processes repeat one of them
PACKED = {"packing": True, "max_length": 128, "eval_strategy": "epoch"}
LOCAL = ["--num_processes", "2", "--main_process_port", "0"]


def batch(rows: int, **args) -> dict:
    return {"args": {"per_device_train_batch_size": rows, "per_device_eval_batch_size": rows, **args}}


def common(rows: int) -> list[dict]:
    """The runs of every configuration: annotated at the start or before, cut once or twice."""
    accumulated = batch(rows, gradient_accumulation_steps=2, activation_checkpointing=True, eval_strategy="epoch")
    return [
        {"name": "plain", **batch(rows)},
        {"name": "accumulated", "annotated": True, **accumulated},
    ]


def resumable(name: str, **args) -> dict:
    return {"name": name, **RESUMABLE, "args": batch(2)["args"] | RESUMABLE["args"] | args}


@pytest.fixture(scope="session")
def reference(launcher):
    """One process with batches of four rows."""
    runs = [
        {"name": "adam", **batch(4, optim="adamw_torch")},
        {"name": "borrowed", "untrained": True, **batch(4, borrow_instruct_token_rows=True)},
        {"name": "packed", "annotated": True, **batch(2, **PACKED)},
    ]
    return launcher.run("single", "single", [*common(4), *runs])


@pytest.fixture(scope="session")
def launched(launcher):
    """Two processes with batches of two rows; every configuration is launched once."""
    done = {}

    def launch(config):
        if config in done:
            return done[config]
        done[config] = None  # what has failed fails once
        runs = common(2)
        settings = {"fsdp_on_cpu": config == "fsdp2"}
        if config in RESUMED:
            killed = resumable("killed")
            with launcher.start(config, config, [{**killed, "sleep_at": 3}], *LOCAL, **settings) as process:
                folder = launcher.folder / config / "killed"
                launcher.kill(process, config, [folder / f"pid-{rank}" for rank in range(2)])
            assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
            checkpoint = launcher.folder / config / "uninterrupted" / "checkpoint-2"
            runs += [
                {"name": "online", **batch(2, confidence_source="online")},
                {"name": "borrowed", "untrained": True, **batch(2, borrow_instruct_token_rows=True)},
                {"name": "packed", "annotated": True, **batch(1, **PACKED)},
                {"name": "packed online", **batch(1, confidence_source="online", **PACKED)},
                {"name": "own mean", **batch(2, average_tokens_across_devices=False)},
                {"name": "microbatch", **batch(2, weight_normalization="microbatch", gradient_accumulation_steps=2)},
                resumable("uninterrupted"),
                resumable("resumed", resume_from_checkpoint=str(checkpoint)),
                resumable("killed", resume_from_checkpoint=True),
            ]
        if config == "zero3_offload":
            runs += [{"name": "adam", **batch(2, optim="adamw_torch")}]
        done[config] = launcher.run(config, config, runs, *LOCAL, **settings)
        return done[config]

    return lambda config: launch(config) or pytest.fail(f"{config} was not launched")


def check_distribution(facts: dict, config: str) -> None:
    """Two processes, and in each what this kind of sharding leaves there."""
    stage = ZERO_STAGES.get(config)
    assert facts["num_processes"] == 2
    assert facts["mixed_precision"] == "no"
    assert facts["zero3"] == (stage == 3)
    assert facts["ddp"] == (config == "ddp")
    assert facts["dtensors"] == (facts["parameters"] if config == "fsdp2" else 0)
    assert facts["units"].count("FSDPLlamaDecoderLayer") == (2 if config == "fsdp2" else 0), (
        "each layer is gathered alone"
    )
    if stage is None:
        assert facts["distributed_type"] == {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}[config]
        return
    assert (facts["distributed_type"], facts["stage"]) == ("DEEPSPEED", stage)
    assert facts["optimized_here"] == facts["trained"] / 2, "the optimizer state is sharded"
    assert facts["sharded"] == (facts["parameters"] if stage == 3 else 0)
    if stage < 3:
        assert facts["partitions_gradients"] == (stage == 2)
    assert facts["offload"] == (["cpu", "cpu"] if config == "zero3_offload" else ["none", "none"])
    assert facts["clipping"] == 0.0, "clipping is the recipe's"


@pytest.mark.slow
def test_single_is_one_process(reference):
    facts = reference["plain"].facts
    assert (facts["distributed_type"], facts["num_processes"]) == ("NO", 1)


@pytest.mark.slow
@pytest.mark.parametrize("config", TWO_PROCESSES)
def test_two_processes_train_what_one_does(reference, launched, relative_difference, config):
    for name, steps in (("plain", 1), ("accumulated", 2)):
        one, two = reference[name], launched(config)[name]
        facts = two.facts
        check_distribution(facts, config)
        if config in ZERO_STAGES:
            assert facts["optimizer"] == "SGD"
            assert facts["accumulation_steps"] == steps, "accumulation is the recipe's"
        assert relative_difference(two.initial, one.initial) == 0.0
        assert relative_difference(one.final, one.initial) > 1e-3, "too short a way to tell two runs apart"
        assert relative_difference(two.final, one.final) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("config", RESUMED)
def test_an_online_instruct_model_gives_the_same_adapter(reference, launched, relative_difference, config):
    run = launched(config)["online"]
    check_distribution(run.facts, config)
    assert relative_difference(run.final, reference["plain"].final) < 1e-6
    # It is shared out as the trained model is
    whole = config == "ddp"
    assert run.facts["scoring_parameters_sharded"] == (0 if whole else run.facts["scoring_parameters"])


@pytest.mark.slow
@pytest.mark.parametrize("config", RESUMED)
def test_borrowed_rows_reach_every_process(pair, reference, launched, relative_difference, config):
    run, instruct = launched(config)["borrowed"], AutoModelForCausalLM.from_pretrained(pair[1])
    rows = [
        w[[1, 2]].tolist() for w in (instruct.get_input_embeddings().weight, instruct.get_output_embeddings().weight)
    ]
    for found in (run, reference["borrowed"]):
        assert found.facts["chat_rows"] == [*rows[0], *rows[1]]
    assert run.facts["chat_rows"] != launched(config)["plain"].facts["chat_rows"]
    check_distribution(run.facts, config)
    assert relative_difference(run.final, reference["borrowed"].final) < 1e-6


@pytest.mark.slow
def test_two_machines_train_what_one_process_does(launcher, reference, relative_difference):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    runs = common(2)[:1]
    with (
        launcher.start("machine0", "two_nodes", runs, *rendezvous, "--machine_rank", "0") as first,
        launcher.start("machine1", "two_nodes", runs, *rendezvous, "--machine_rank", "1") as second,
    ):
        launcher.finish(first, "machine0")
        launcher.finish(second, "machine1")
    (run,) = launcher.runs("machine0", runs).values()
    check_distribution(run.facts, "two_nodes")
    assert run.facts["local_processes"] == 1
    assert relative_difference(run.final, reference["plain"].final) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero3", "zero3_offload"])
def test_zero3_releases_what_it_gathers(launched, config):
    facts = launched(config)["plain"].facts
    assert facts["released"] == facts["sharded"] == facts["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("config", RESUMED)
@pytest.mark.parametrize(("broken", "exact"), [("own mean", "plain"), ("microbatch", "accumulated")])
def test_a_normalization_of_each_process_is_noticed(reference, launched, relative_difference, config, broken, exact):
    # Without this, the test above might compare what no error could part
    assert relative_difference(launched(config)[broken].final, reference[exact].final) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("config", TWO_PROCESSES)
def test_two_processes_log_what_one_does(reference, launched, config):
    for name, entries in (("plain", 6), ("accumulated", 5)):
        one, two = reference[name].facts["log"], launched(config)[name].facts["log"]
        assert len(one) == len(two) == entries
        for expected, found in zip(one[:-1], two[:-1], strict=True):  # the last one tells the time
            assert found.keys() == expected.keys()
            metrics = {key: key.removeprefix("eval_") for key in expected}
            assert set(metrics.values()) >= METRICS
            for key, metric in metrics.items():
                # In an evaluation, SFTTrainer means its own metrics over batches, repeated rows included
                if metric.startswith("gift/") or metric == "nll" or (key in METRICS and metric == key):
                    assert found[key] == pytest.approx(expected[key], rel=1e-6), key


@pytest.mark.slow
@pytest.mark.parametrize("config", RESUMED)
def test_packed_rows_that_are_repeated_count_once(reference, launched, relative_difference, config):
    for name in ("packed", "packed online"):
        one, two = reference["packed"], launched(config)[name]
        check_distribution(two.facts, config)
        assert relative_difference(two.final, one.final) < 1e-6
        expected, found = (next(entry for entry in run.facts["log"] if "eval_nll" in entry) for run in (one, two))
        for key in ("eval_nll", *(f"eval_{metric}" for metric in METRICS if metric.startswith("gift/"))):
            assert found[key] == pytest.approx(expected[key], rel=1e-6), key


@pytest.mark.slow
def test_offload_trains_with_the_cpu_adam(reference, launched, relative_difference):
    run = launched("zero3_offload")["adam"]
    check_distribution(run.facts, "zero3_offload")
    assert run.facts["optimizer"] == "DeepSpeedCPUAdam"
    assert relative_difference(run.final, reference["adam"].final) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("config", TWO_PROCESSES)
def test_the_saved_adapter_is_the_trained_one(launched, pair, config):
    run = launched(config)["plain"]
    adapter, final = run.adapter, run.final
    assert adapter.keys() == final.keys()
    for name, value in final.items():
        assert torch.equal(adapter[name], value), name
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[0]), run.folder)
    loaded = {name.replace(".default.", "."): p for name, p in model.named_parameters() if "lora_" in name}
    assert loaded.keys() == final.keys()
    for name, value in final.items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("config", RESUMED)
@pytest.mark.parametrize("resumed", ["resumed", "killed"])
def test_resuming_gives_the_uninterrupted_run(launched, config, resumed):
    whole, part = launched(config)["uninterrupted"], launched(config)[resumed]
    check_distribution(part.facts, config)
    assert (whole.facts["steps"], part.facts["steps"]) == (5, 3), "two steps are those of the checkpoint"
    assert [entry["step"] for entry in part.facts["log"] if "loss" in entry] == [1, 2, 3, 4, 5]
    for name, value in whole.final.items():
        assert torch.equal(part.final[name], value), name


@pytest.fixture
def gpus() -> int:
    """Number of GPUs, which `tests/conftest.py` hides."""
    if shutil.which("nvidia-smi") is None:
        pytest.skip("no GPU")
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    return done.stdout.count("GPU ") or pytest.skip("no GPU")


@pytest.mark.slow
def test_fsdp2_on_gpus(launcher, gpus, relative_difference):
    # As it is shipped, with NCCL: on two GPUs where there are two, else on one, which holds the whole of each shard
    processes = min(gpus, 2)
    (one,) = launcher.run("single_gpu", "single", common(4)[:1], device="cuda").values()
    options = ["--num_processes", str(processes), "--main_process_port", "0"]
    (sharded,) = launcher.run("fsdp2_gpu", "fsdp2", common(4 // processes)[:1], *options, device="cuda").values()
    facts = sharded.facts
    assert (facts["distributed_type"], facts["num_processes"]) == ("FSDP", processes)
    assert facts["dtensors"] == facts["parameters"]
    assert relative_difference(sharded.final, one.final) < 1e-6
    for name, value in sharded.final.items():
        assert torch.equal(sharded.adapter[name], value), name
