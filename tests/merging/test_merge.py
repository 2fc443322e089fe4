import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub.utils import TensorInfo
from merge_helpers import merged_by_peft, same_bits, tensors_of
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Transpose, WeightConverter, WeightRenaming

from gift_trl.cards import public_name
from gift_trl.checkpoints import read_header, safetensors_files, weights_fingerprint
from gift_trl.merging import MergeRecipe, conversion, merge, merge_adapter, merge_recipe
from gift_trl.scripts.merge import main, make_parser


ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def assert_same_as_peft(output: Path, instruct: Path, adapter: Path, merged: list[str], scale: float = 1.0) -> None:
    expected, written, before = merged_by_peft(instruct, adapter, scale), tensors_of(output), tensors_of(instruct)
    assert list(written) == list(before)
    for name, tensor in written.items():
        assert same_bits(tensor, expected[name]), name
        assert same_bits(tensor, before[name]) == (name not in merged), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_same_bits_as_peft(make_checkpoint, make_adapter, tmp_path, dtype):
    instruct = make_checkpoint(dtype=dtype, max_shard_size="20KB")
    adapter = make_adapter(instruct, target_modules=ALL_LINEAR)
    report = merge_adapter(adapter, instruct, tmp_path / "merged")
    assert len(report.merged_tensors) == report.num_changed == 14
    assert_same_as_peft(tmp_path / "merged", instruct, adapter, list(report.merged_tensors))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6}, "alpha_pattern": {"v_proj": 3}},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5}},
        {"layers_to_transform": [1]},
        {"target_modules": r".*\.1\..*(q|k)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "lm_head"], "saving": {"save_embedding_layers": False}},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.05},
    ],
    ids=str,
)
def test_same_bits_as_peft_for_lora_settings(make_checkpoint, make_adapter, tmp_path, settings):
    instruct = make_checkpoint(dtype=torch.bfloat16)
    adapter = make_adapter(instruct, **settings)
    report = merge_adapter(adapter, instruct, tmp_path / "merged")
    assert_same_as_peft(tmp_path / "merged", instruct, adapter, list(report.merged_tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_as_peft_for_a_bf16_adapter(make_checkpoint, make_adapter, tmp_path, dtype):
    instruct = make_checkpoint(dtype=dtype)
    adapter = make_adapter(instruct, dtype=torch.bfloat16)
    report = merge_adapter(adapter, instruct, tmp_path / "merged")
    assert_same_as_peft(tmp_path / "merged", instruct, adapter, list(report.merged_tensors))


@pytest.mark.parametrize("scale", [0.5, -1.0, 1.7])
def test_scale_multiplies_the_update(make_checkpoint, make_adapter, tmp_path, scale):
    instruct = make_checkpoint(dtype=torch.bfloat16)
    adapter = make_adapter(instruct)
    report = merge_adapter(adapter, instruct, tmp_path / "merged", scale=scale)
    assert report.scale == scale
    assert_same_as_peft(tmp_path / "merged", instruct, adapter, list(report.merged_tensors), scale)


def test_every_tensor_keeps_its_own_dtype(make_checkpoint, make_adapter, tmp_path):
    instruct = make_checkpoint(dtype=torch.bfloat16)
    adapter = make_adapter(instruct)
    file = instruct / "model.safetensors"
    dtypes = {"model.layers.0.self_attn.q_proj.weight": torch.float16, "model.norm.weight": torch.float32}
    dtypes["model.layers.1.mlp.down_proj.weight"] = torch.float32
    save_file({name: t.to(dtypes.get(name, t.dtype)) for name, t in load_file(file).items()}, file, {"format": "pt"})
    report = merge_adapter(adapter, instruct, tmp_path / "merged")
    assert set(report.merged_tensors.values()) == {"bfloat16", "float16", "float32"}
    assert_same_as_peft(tmp_path / "merged", instruct, adapter, list(report.merged_tensors))


def test_checkpoint_names_without_the_model_prefix(make_checkpoint, make_adapter, tmp_path):
    # As GPT-2 is published: the names in the file lack `transformer.`, transformers adds it.
    instruct = make_checkpoint(architecture="gpt2")
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        adapter = make_adapter(instruct, target_modules=["c_attn"])
    file = instruct / "model.safetensors"
    save_file({name.removeprefix("transformer."): t for name, t in load_file(file).items()}, file, {"format": "pt"})
    report = merge_adapter(adapter, instruct, tmp_path / "merged")
    assert list(report.merged_tensors) == ["h.0.attn.c_attn.weight", "h.1.attn.c_attn.weight"]
    expected = merged_by_peft(instruct, adapter)
    for name, tensor in tensors_of(tmp_path / "merged").items():
        assert same_bits(tensor, expected[f"transformer.{name}"]), name


def test_files_outside_the_targets_keep_every_byte(make_checkpoint, make_adapter, tmp_path):
    instruct = make_checkpoint(max_shard_size="20KB")
    for file in safetensors_files(instruct):  # metadata beyond the usual must survive
        save_file(load_file(file), file, metadata={"format": "pt", "origin": file.name})
    adapter = make_adapter(instruct, target_modules=["q_proj"], layers_to_transform=[0])
    report = merge_adapter(adapter, instruct, tmp_path / "merged")
    assert list(report.merged_tensors) == ["model.layers.0.self_attn.q_proj.weight"]
    changed = []
    for file in safetensors_files(instruct):
        copy = tmp_path / "merged" / file.name
        before, after = file.read_bytes(), copy.read_bytes()
        data_start = read_header(file)[1]
        assert before[:data_start] == after[:data_start] and len(before) == len(after)
        with safe_open(copy, framework="pt") as opened:
            assert opened.metadata()["origin"] == file.name
        changed += [file.name] if before != after else []
    assert len(changed) == 1


def test_merged_model_equals_the_adapter_at_run_time(make_checkpoint, make_adapter, tmp_path):
    instruct = make_checkpoint(architecture="qwen2", tie_word_embeddings=True)
    adapter = make_adapter(instruct, target_modules=ALL_LINEAR)
    merge_adapter(adapter, instruct, tmp_path / "merged")
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(instruct)
        before = original(ids).logits
        expected = PeftModel.from_pretrained(original, adapter).eval()(ids).logits
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits - before).abs().max() > 0.01


def test_companion_files(adapter_and_instruct, tmp_path):
    adapter, instruct = adapter_and_instruct
    (instruct / "README.md").write_text("card of another model")
    for name in (
        "pytorch_model.bin",
        "model.gguf",
        ".gitattributes",
        "merge_report.json",
        "pytorch_model.bin.index.json",
        "merge_verification.json",
        "trainer_state.json",
        "optimizer.pt",
        "optimizer_state",
        "rng_state_0.pth",
        "scheduler.pt",
        "model.safetensors.tmp",
        "tokenizer.json.tmp",
    ):
        (instruct / name).write_text("x")
    for folder in ("original", ".git", "additional_chat_templates"):
        (instruct / folder).mkdir()
        (instruct / folder / "tool.jinja").write_text("x")
    before = {file: file.read_bytes() for file in instruct.rglob("*") if file.is_file()}
    merge_adapter(adapter, instruct, tmp_path / "merged")
    written = {str(f.relative_to(tmp_path / "merged")): f for f in (tmp_path / "merged").rglob("*") if f.is_file()}
    kept = {"config.json", "generation_config.json", "chat_template.jinja", "tokenizer_config.json", "LICENSE"}
    kept |= {"additional_chat_templates/tool.jinja"}
    made = {"model.safetensors", "merge_report.json", "merge_recipe.yaml", "mergekit_config.yml"}
    assert set(written) == kept | made
    for name in kept:
        assert written[name].read_bytes() == (instruct / name).read_bytes()
    assert {file: file.read_bytes() for file in instruct.rglob("*") if file.is_file()} == before


def test_report(make_checkpoint, make_adapter, tmp_path):
    instruct = make_checkpoint(dtype=torch.bfloat16)
    adapter = make_adapter(instruct, use_rslora=True)
    report = merge_adapter(adapter, instruct, tmp_path / "merged", scale=0.5)
    text = (tmp_path / "merged" / "merge_report.json").read_text()
    facts = json.loads(text)
    assert text == report.to_json()
    assert str(tmp_path) not in text
    assert (facts["instruct_model"], facts["adapter"], facts["adapter_base_model"]) == (
        "instruct",
        "adapter",
        "instruct",
    )
    assert facts["instruct_model_fingerprint"] == weights_fingerprint(instruct)
    assert facts["adapter_fingerprint"] == weights_fingerprint(adapter)
    assert facts["adapter_settings"]["r"] == 4 and facts["adapter_settings"]["use_rslora"]
    assert facts["scale"] == 0.5
    assert set(facts["merged_tensors"].values()) == {"bfloat16"} and len(facts["merged_tensors"]) == 6
    assert set(facts["versions"]) == {"gift_trl", "peft", "safetensors", "torch", "transformers"}
    summary = report.summary()
    assert "rsLoRA, r=4, alpha=8, scale 0.5" in summary and str(tmp_path / "merged") in summary


@pytest.mark.parametrize(
    ("base", "known"),
    [
        ("/home/alice/secret/base", "org/Model-7B"),
        ("~/secret/base", "/home/alice/secret/Model-7B"),
        ("../secret/base", "org/Model-7B"),
        (r"C:\Users\alice\secret\base", "org/Model-7B"),
    ],
)
def test_no_path_of_the_machine_is_written(adapter_and_instruct, tmp_path, base, known):
    adapter, instruct = adapter_and_instruct
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))
    (instruct / "README.md").write_text(f"---\nbase_model: {known}\n---\n")
    with pytest.warns(UserWarning, match="trained on 'base', while .* was made from (org/)?Model-7B:"):
        report = merge_adapter(adapter, instruct, tmp_path / "merged")
    assert report.adapter_base_model == "base"
    for written in (tmp_path / "merged").glob("merge*"):
        text = written.read_text()
        assert "alice" not in text and "secret" not in text and str(tmp_path) not in text


def test_folders_of_the_hub_cache_are_reported_by_their_repository():
    folder = "/elsewhere/hub/models--org--Model--7B/snapshots/0123456789abcdef0123456789abcdef01234567"
    assert public_name(folder) == "org/Model--7B"
    assert public_name("/elsewhere/models--gpt2/snapshots/0123") == "gpt2"
    assert (public_name("org/model"), public_name(""), public_name(None)) == ("org/model", None, None)


def test_hub_ids_and_commits_are_reported(adapter_and_instruct, tmp_path, monkeypatch):
    adapter, instruct = adapter_and_instruct
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshots = tmp_path / "hub" / "models--org--instruct" / "snapshots"
    snapshots.mkdir(parents=True)
    instruct.rename(snapshots / commit)
    calls = []

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns):
        calls.append((name, revision, "*.safetensors" in allow_patterns))
        return str(snapshots / commit)

    monkeypatch.setattr("gift_trl.checkpoints.snapshot_download", snapshot_download)
    report = merge_adapter(adapter, "org/instruct", tmp_path / "merged", instruct_model_revision="v1")
    assert (report.instruct_model, report.instruct_model_commit) == ("org/instruct", commit)
    # The weights are asked for after the configuration has passed.
    assert calls == [("org/instruct", "v1", False), ("org/instruct", "v1", True)]


def test_zero_adapter_warns_once(make_checkpoint, make_adapter, tmp_path):
    instruct = make_checkpoint()
    adapter = make_adapter(instruct, spread=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = merge_adapter(adapter, instruct, tmp_path / "merged")
    messages = [str(w.message) for w in caught if "nothing was learned" in str(w.message)]
    assert len(messages) == 1 and list(report.warnings) == messages
    assert report.num_changed == 0


def zero_factors(adapter, name="lora_B"):
    file = adapter / "adapter_model.safetensors"
    tensors = {key: t.zero_() if f"{name}.weight" in key else t for key, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_zero_factors_that_are_no_zero_update(make_checkpoint, make_adapter, tmp_path, settings, factor):
    instruct = make_checkpoint(architecture="qwen2")
    adapter = make_adapter(instruct, **{"target_modules": ["q_proj"], **settings})
    zero_factors(adapter, factor)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = merge_adapter(adapter, instruct, tmp_path / "merged")
    assert report.num_changed == 2
    assert not [w for w in (*report.warnings, *caught) if "exactly zero" in str(w)]


def test_zero_adapter_in_a_recipe_that_changes_the_rest(make_checkpoint, make_adapter, tmp_path):
    instruct, base = make_checkpoint(), make_checkpoint("base", seed=3)
    adapter = make_adapter(instruct, spread=0.0)
    recipe = MergeRecipe(str(instruct), [str(adapter)], method="re_adapt", instruct_weight=0.5, base_model=str(base))
    with pytest.warns(UserWarning, match="nothing was learned.$"):
        assert merge_recipe(recipe, tmp_path / "merged").num_changed


def test_what_replaces_a_tensor_is_not_scaled(make_checkpoint, make_adapter, tmp_path):
    instruct, base = make_checkpoint(), make_checkpoint("base", seed=3)
    adapter = make_adapter(base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    whole = {k: t for k, t in load_file(adapter / "adapter_model.safetensors").items() if "lm_head" in k}
    with pytest.warns(
        UserWarning, match="scale 0.5 is the update's alone: .* .1 tensors, the first of lm_head.* unscaled"
    ):
        merge_adapter(adapter, instruct, tmp_path / "half", scale=0.5, saved_modules="replace")
    assert same_bits(tensors_of(tmp_path / "half")["lm_head.weight"], *whole.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merge_adapter(adapter, instruct, tmp_path / "one", saved_modules="replace")
        merge_adapter(adapter, instruct, tmp_path / "without", scale=0.5, saved_modules="ignore")


@pytest.mark.parametrize(
    ("where", "code", "message"),
    [
        ("instruct/model.safetensors", errno.EACCES, "The merge cannot read '.*instruct/model.safetensors'"),
        ("merged", errno.EACCES, "could not be written to '.*merged', it cannot be written to"),
        (".merged.0123.tmp/config.json", errno.EROFS, "could not be written to '.*merged', it cannot be written to"),
        ("", errno.EACCES, "could not be written to '.*merged', it cannot be written to"),
        (None, errno.EPERM, "could not be written to '.*merged', it cannot be written to"),
        ("instruct/config.json", errno.ENOSPC, "there is no room"),  # as a failing copy names its source
    ],
)
def test_errors_of_the_disk_name_the_side_they_are_on(
    adapter_and_instruct, tmp_path, monkeypatch, where, code, message
):
    def fail(plan, folder):
        raise OSError(code, os.strerror(code), *([] if where is None else [str(tmp_path / where)]))

    monkeypatch.setattr(merge, "_copy_companions", fail)
    with pytest.raises(OSError, match=message) as error:
        merge_adapter(*adapter_and_instruct, tmp_path / "merged")
    assert error.value.errno == code and not (tmp_path / "merged").exists()


def test_update_lost_in_rounding_warns_once(make_checkpoint, make_adapter, tmp_path):
    instruct = make_checkpoint(dtype=torch.bfloat16)
    adapter = make_adapter(instruct, spread=1e-6)
    with pytest.warns(UserWarning, match="lost in rounding to bfloat16") as caught:
        report = merge_adapter(adapter, instruct, tmp_path / "merged")
    assert len([w for w in caught if "No tensor changed" in str(w.message)]) == 1
    assert report.num_changed == 0 and len(report.merged_tensors) == 6


def test_scale_of_zero_warns(adapter_and_instruct, tmp_path):
    with pytest.warns(UserWarning, match="The scale is 0: the merged checkpoint is the instruct model"):
        report = merge_adapter(*adapter_and_instruct, tmp_path / "merged", scale=0.0)
    assert report.num_changed == 0


def test_overflow_is_an_error_and_leaves_nothing(make_checkpoint, make_adapter, tmp_path):
    instruct = make_checkpoint(dtype=torch.float16)
    adapter = make_adapter(instruct, spread=1000.0)
    with pytest.raises(ValueError, match=r"'model.layers.\d.[a-z_.]+.weight' holds NaN or infinite values after"):
        merge_adapter(adapter, instruct, tmp_path / "new" / "merged")
    assert list((tmp_path / "new").iterdir()) == []


def test_broken_instruct_tensor_is_named(adapter_and_instruct, tmp_path):
    adapter, instruct = adapter_and_instruct
    file = instruct / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"'model.layers.1.self_attn.q_proj.weight' of the instruct checkpoint"):
        merge_adapter(adapter, instruct, tmp_path / "merged")


def test_overwrite_replaces_after_success_only(make_checkpoint, make_adapter, tmp_path):
    instruct = make_checkpoint(dtype=torch.float16)
    output = tmp_path / "merged"
    output.mkdir()
    for name in ("old.txt", "config.json"):
        (output / name).write_text("old")
    with pytest.raises(ValueError, match="holds NaN"):
        merge_adapter(make_adapter(instruct, "bad", spread=1000.0), instruct, output, overwrite=True)
    assert sorted(f.name for f in output.iterdir()) == ["config.json", "old.txt"]
    merge_adapter(make_adapter(instruct), instruct, output, overwrite=True)
    assert (output / "model.safetensors").exists() and not (output / "old.txt").exists()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter", "bad", "instruct", "merged"]


def test_a_layer_that_merges_nothing_is_an_error(adapter_and_instruct, tmp_path, monkeypatch):
    adapter, instruct = adapter_and_instruct
    monkeypatch.setattr("peft.tuners.lora.Linear.merge", lambda self, adapter_names: None)
    with pytest.raises(RuntimeError, match="merged nothing"):
        merge_adapter(adapter, instruct, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_kill_leaves_no_output(adapter_and_instruct, tmp_path):
    adapter, instruct = adapter_and_instruct
    # Each child kills itself with SIGKILL at another moment; a survivor shows that the moments are reached.
    script = """
        import os, signal, sys
        from gift_trl import checkpoints
        from gift_trl.merging import merge, merge_adapter
        from gift_trl.merging.stream import MergedWriter

        adapter, instruct, output = sys.argv[1:]

        def kill(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)

        def on_third_call(function):
            calls = []
            def counted(*args, **kwargs):
                calls.append(1)
                return kill() if len(calls) == 3 else function(*args, **kwargs)
            return counted

        moments = [
            (MergedWriter, "write", on_third_call(MergedWriter.write)),
            (merge, "_copy_companions", kill),
            (checkpoints.os, "fsync", on_third_call(os.fsync)),
            (checkpoints.os, "rename", kill),
        ]
        for moment, (module, name, replacement) in enumerate([*moments, (merge, "unused", None)]):
            child = os.fork()
            if not child:
                setattr(module, name, replacement)
                merge_adapter(adapter, instruct, f"{output}/{moment}/merged")
                os._exit(0)
            # Flushed, or the next child inherits the text and may print it again
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    """
    # One thread: a child of fork has none of its parent's workers.
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), adapter, instruct, tmp_path / "out"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.stdout.split() == [str(-signal.SIGKILL)] * 4 + ["0"], run.stderr
    for moment in range(4):
        left = list((tmp_path / "out" / str(moment)).iterdir())
        assert [folder.suffix for folder in left] == [".tmp"]
        assert left[0].name.startswith(".")
    # What was killed before the configuration was copied is no model even under its hidden name.
    assert not list((tmp_path / "out" / "0").glob("**/config.json"))
    assert [folder.name for folder in (tmp_path / "out" / "4").iterdir()] == ["merged"]


def test_output_appears_only_whole(adapter_and_instruct, tmp_path, monkeypatch):
    adapter, instruct = adapter_and_instruct
    seen = []

    def spy(plan, folder):
        seen.append((folder.parent == tmp_path, (tmp_path / "merged").exists()))
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "_copy_companions", spy)
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(adapter, instruct, tmp_path / "merged")
    assert seen == [(True, False)]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter", "instruct"]


def test_config_is_copied_last(adapter_and_instruct, tmp_path, monkeypatch):
    # Without it nothing loads, so what a killed merge leaves under its hidden name is not taken for a model.
    adapter, instruct = adapter_and_instruct
    copied, real = [], merge.shutil.copyfile
    monkeypatch.setattr(merge.shutil, "copyfile", lambda a, b: copied.append((a.name, b.parent)) or real(a, b))
    merge_adapter(adapter, instruct, tmp_path / "merged")
    assert copied[-1][0] == "config.json" and len(copied) == 5


def test_stored_parameters_follow_transformers(adapter_and_instruct, monkeypatch):
    _, instruct = adapter_and_instruct
    model = AutoModelForCausalLM.from_pretrained(instruct)
    mapping = [
        WeightRenaming("old_proj", "q_proj"),
        WeightRenaming("k_proj", "key"),
        WeightConverter(["up_t"], ["up_proj"], [Transpose(0, 1)]),
    ]
    monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda model: mapping)
    model._weight_conversions = mapping
    layer = "model.layers.0"
    shapes = {
        f"{layer}.self_attn.old_proj.weight": [32, 32],
        f"{layer}.self_attn.k_proj.weight": [16, 32],
        f"{layer}.mlp.up_t.weight": [32, 48],
        "layers.1.mlp.down_proj.weight": [32, 48],
        "unknown": [3],
    }
    checkpoint = {name: TensorInfo("F32", shape, (0, 4 * math.prod(shape))) for name, shape in shapes.items()}
    found = conversion.stored_parameters(model, checkpoint)
    assert {name: stored.tensors[0] for name, stored in found.items()} == {
        f"{layer}.self_attn.q_proj.weight": f"{layer}.self_attn.old_proj.weight",
        # Renamed to what the model does not have, a name that the model has stays.
        f"{layer}.self_attn.k_proj.weight": f"{layer}.self_attn.k_proj.weight",
        f"{layer}.mlp.up_proj.weight": f"{layer}.mlp.up_t.weight",
        "model.layers.1.mlp.down_proj.weight": "layers.1.mlp.down_proj.weight",
    }
    stored = found[f"{layer}.mlp.up_proj.weight"]
    values = torch.randn(32, 48)
    assert torch.equal(stored.assemble({stored.tensors[0]: values}), values.T)
    assert torch.equal(stored.take_apart(values.T)[stored.tensors[0]], values)


def test_command_line_wins_over_yaml(adapter_and_instruct, tmp_path, capsys):
    adapter, instruct = adapter_and_instruct
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(f"adapter: {adapter}\ninstruct_model: {instruct}\nscale: 0.25\noutput_dir: {tmp_path / 'a'}\n")
    main(["--config", str(recipe), "--output_dir", str(tmp_path / "b")])
    assert not (tmp_path / "a").exists()
    assert json.loads((tmp_path / "b" / "merge_report.json").read_text())["scale"] == 0.25
    assert "6 of 21 tensors updated, 6 of them changed" in capsys.readouterr().out


def test_command_refuses_wrong_options(tmp_path, capsys):
    recipe = tmp_path / "merge.yaml"
    recipe.write_text("adapter: a\ninstruct_model: b\noutput_dir: c\nscael: 2\n")
    with pytest.raises(ValueError, match="scael"):
        main(["--config", str(recipe)])
    recipe.write_text("adapter: a\ninstruct_model:\noutput_dir: c\n")
    with pytest.raises(ValueError, match="needs a value for --instruct_model"):
        main(["--config", str(recipe)])
    with pytest.raises(SystemExit) as stop:
        main(["--adapter", "a"])
    assert stop.value.code == 2
    assert "the following arguments are required: --instruct_model" in capsys.readouterr().err


def test_several_adapters_on_the_command_line(make_checkpoint, make_adapter, tmp_path):
    instruct = make_checkpoint()
    adapters = [str(make_adapter(instruct, name, seed=seed)) for seed, name in enumerate("ab")]
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(f"adapter: [{adapters[1]}]\ninstruct_model: {instruct}\nadapter_weight: [3.0]\nscale: 0.5\n")
    options = ["--config", str(recipe), "--output_dir", str(tmp_path / "merged")]
    main([*options, "--adapter", adapters[0], "--adapter", adapters[1], "--adapter_weight", "0.5", "0.25"])
    written = yaml.safe_load((tmp_path / "merged" / "merge_recipe.yaml").read_text())
    assert (written["adapter"], written["adapter_weight"], written["scale"]) == (["a", "b"], [0.5, 0.25], 0.5)


def test_the_written_recipe_can_be_run_again(make_checkpoint, make_adapter, tmp_path, monkeypatch):
    instruct = make_checkpoint()
    adapter = make_adapter(instruct)
    options = ["--adapter", str(adapter), "--instruct_model", str(instruct), "--scale", "0.7"]
    main([*options, "--output_dir", str(tmp_path / "merged")])
    monkeypatch.chdir(tmp_path)  # local folders are named by their last part
    main(["--config", "merged/merge_recipe.yaml", "--output_dir", "again"])
    for name, tensor in tensors_of(tmp_path / "merged").items():
        assert same_bits(tensors_of(tmp_path / "again")[name], tensor)


def test_a_recipe_that_was_written_merges_no_other_weights(make_checkpoint, make_adapter, tmp_path, monkeypatch):
    """Its paths are not kept: in another folder, there may be another adapter of the same name."""
    instruct = make_checkpoint()
    adapter = make_adapter(instruct, seed=1)
    main(["--adapter", str(adapter), "--instruct_model", str(instruct), "--output_dir", str(tmp_path / "merged")])
    recipe = tmp_path / "merged" / "merge_recipe.yaml"
    assert "# Paths are not kept: fill in those of the folders of adapter, instruct_model." in recipe.read_text()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    shutil.move(make_adapter(instruct, "second", seed=2), adapter.name)
    options = ["--config", str(recipe), "--output_dir", "again", "--instruct_model", str(instruct)]
    with pytest.raises(
        ValueError, match=rf"'{adapter.name}' holds other weights.*`adapter_fingerprint`.*the right one"
    ):
        main(options)
    assert not Path("again").exists()
    main([*options, "--adapter", str(adapter)])
    assert tensors_of(Path("again")).keys() == tensors_of(tmp_path / "merged").keys()
    shutil.copytree(make_checkpoint("another", seed=9), instruct.name)
    with pytest.raises(ValueError, match="instruct_model_fingerprint"):
        main(["--config", str(recipe), "--output_dir", "third", "--adapter", str(adapter)])


def test_verify_on_the_command_line(make_checkpoint, make_adapter, tmp_path, capsys):
    instruct = make_checkpoint()
    (instruct / "tokenizer_config.json").unlink()
    adapter = make_adapter(instruct, spread=0.05)
    options = ["--adapter", str(adapter), "--instruct_model", str(instruct), "--verify"]
    main([*options, "--output_dir", str(tmp_path / "merged")])
    assert "within the bounds" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is not what it should be: The mean KL divergence is"):
        main([*options, "--output_dir", str(tmp_path / "tight"), "--verify_max_kl", "-1"])
    # PEFT applies no such method at run time, but every tensor is computed once more
    main([*options, "--output_dir", str(tmp_path / "ties"), "--method", "ties", "--density", "0.5"])
    assert "PEFT applies one adapter at run time, and not the method ties" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="a prompt on each line"):
        main([*options, "--output_dir", str(tmp_path / "prompts"), "--verify_prompts", "nowhere.txt"])
    with pytest.raises(ValueError, match="`--verify_prompts` names prompts, and nothing is verified"):
        main([*options[:-1], "--output_dir", str(tmp_path / "prompts"), "--verify_prompts", "nowhere.txt"])
    assert not (tmp_path / "prompts").exists()


def test_help_names_every_option_and_an_example():
    text = make_parser("gift-trl merge").format_help()
    for option in ("--adapter", "--instruct_model", "--output_dir", "--scale", "--overwrite", "--method", "--verify"):
        assert option in text
    assert "gift-trl merge --adapter outputs/adapter" in text


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path):
    script = """
        import sys, threading, time
        from pathlib import Path
        import torch
        from peft import LoraConfig, get_peft_model
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM, Qwen2Config
        from gift_trl.merging import merge_adapter

        def anonymous_mb():
            status = Path("/proc/self/status").read_text()
            return int(status.split("RssAnon:")[1].split()[0]) / 1024

        command, folder = sys.argv[1], Path(sys.argv[2])
        if command == "make":
            # The shape of Qwen2.5-0.5B: 0.99 GB in bfloat16.
            config = Qwen2Config(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                                 num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.save_pretrained(folder / "instruct")
            adapter = get_peft_model(model, LoraConfig(r=64, lora_alpha=128, target_modules="all-linear",
                                                       init_lora_weights=False))
            adapter.save_pretrained(folder / "adapter")
        else:
            peak, done = [0.0], threading.Event()

            def watch():
                while not done.is_set():
                    peak[0] = max(peak[0], anonymous_mb())
                    time.sleep(0.001)

            before = anonymous_mb()
            thread = threading.Thread(target=watch)
            thread.start()
            started, cpu = time.monotonic(), time.process_time()
            report = merge_adapter(folder / "adapter", folder / "instruct", folder / "merged")
            seconds, cpu = time.monotonic() - started, time.process_time() - cpu
            done.set()
            thread.join()
            print(len(report.merged_tensors), report.num_bytes, peak[0] - before, seconds, cpu)
    """
    for command in ("make", "merge"):
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), command, tmp_path],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert run.returncode == 0, run.stderr
    shutil.rmtree(tmp_path)  # two gigabytes that pytest would keep
    num_merged, num_bytes, megabytes, seconds, cpu = map(float, run.stdout.split())
    print(f"{num_bytes / 1e9:.2f} GB, {megabytes:.0f} MB above import, {seconds:.1f} s, {cpu:.1f} CPU s")
    assert num_merged == 168 and num_bytes > 0.9e9
    assert megabytes < 64
