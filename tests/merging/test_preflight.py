import errno
import json
import shutil
import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file, save_file

from gift_trl.merging import MergeRecipe, merge_adapter, merge_recipe
from gift_trl.merging.planned import preflight_training


def change_settings(adapter, **settings):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def change_config(instruct, **settings):
    file = instruct / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def change_tensors(folder, change):
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refused(adapter, instruct, output, match, **options):
    """Asserts the refusal, and that it came before anything was written."""
    with pytest.raises(ValueError, match=match) as error:
        merge_adapter(adapter, instruct, output, **options)
    assert not list(output.parent.glob(".*.tmp"))
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"peft_type": "VERA"}, "of type VERA, which is not merged; these are: LORA, LOHA"),
        ({"peft_type": "PREFIX_TUNING"}, "of type PREFIX_TUNING"),
        ({"use_dora": True}, r"lacks tensors of 6 targeted modules .*no lora_magnitude_vector\)"),
        ({"lora_bias": True}, r"lacks tensors of 6 targeted modules .*no lora_B.bias\)"),
        ({"bias": "lora_only"}, "the model's biases .`bias='lora_only'`. whole.*--saved_modules ignore"),
        ({"modules_to_save": ["embed_tokens"]}, "fully trained modules .*saved_modules='ignore'.*'replace'"),
        ({"trainable_token_indices": [3]}, "trained token embeddings .`trainable_token_indices`. whole"),
        ({"init_lora_weights": "pissa_niter_4"}, "PiSSA.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "OLoRA.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "CorDA.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "lora_ga"}, "LoRA-GA.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "LoftQ.*no conversion"),
        ({"init_lora_weights": "mica"}, "MiCA"),
        ({"alora_invocation_tokens": [5]}, "activated LoRA"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "replicated layers"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
        ({"kasa_config": {"beta": 1.0}}, "KaSA"),
        ({"task_type": "SEQ_CLS"}, "task SEQ_CLS"),
        ({"use_lora_of_tomorrow": True, "peft_version": "99.1"}, "know .use_lora_of_tomorrow.*upgrade PEFT to 99.1"),
        ({"lora_dtype": "float32", "peft_version": "99.1.dev0@0123abc"}, "upgrade PEFT to 99.1.dev0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_adapter_kinds_are_refused_by_name(adapter_and_instruct, tmp_path, settings, match):
    adapter, instruct = adapter_and_instruct
    change_settings(adapter, **settings)
    refused(adapter, instruct, tmp_path / "merged", match)


@pytest.mark.parametrize("init", ["eva", "orthogonal", "gaussian", True, False], ids=str)
def test_initialisations_that_leave_the_base_alone_are_merged(adapter_and_instruct, tmp_path, init):
    adapter, instruct = adapter_and_instruct
    change_settings(adapter, init_lora_weights=init)
    assert merge_adapter(adapter, instruct, tmp_path / "merged").num_changed == 6


def test_all_findings_come_in_one_message(adapter_and_instruct, tmp_path):
    adapter, instruct = adapter_and_instruct
    change_settings(adapter, use_qalora=True, bias="all")
    change_config(instruct, quantization_config={"quant_method": "gptq", "bits": 4})
    change_tensors(adapter, lambda t: t[next(iter(t))].fill_(float("nan")))
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "file").touch()
    message = refused(adapter, instruct, tmp_path / "merged", "for 6 reasons", scale=float("inf"))
    for part in ("1. The scale is inf", "2. '", "not empty", "QA-LoRA", "biases", "NaN", "quantised (gptq)"):
        assert part in message


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
def test_scale_must_be_finite(adapter_and_instruct, tmp_path, scale):
    refused(*adapter_and_instruct, tmp_path / "merged", "pass a finite number", scale=scale)


def test_missing_and_unreadable_adapters(adapter_and_instruct, tmp_path):
    adapter, instruct = adapter_and_instruct
    output = tmp_path / "merged"
    refused(tmp_path / "nowhere", instruct, output, "There is no folder '.*nowhere'")
    refused("org/nowhere", instruct, output, "'org/nowhere', the Hub cache does not hold it")
    refused(instruct, instruct, output, "holds no adapter_config.json")
    file = adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    refused(adapter, instruct, output, "damaged or was not copied to its end")
    file.write_bytes(b"not safetensors at all")
    refused(adapter, instruct, output, "not a readable safetensors file")
    file.rename(adapter / "adapter_model.bin")
    refused(adapter, instruct, output, "has adapter_model.bin.*save_pretrained")
    (adapter / "adapter_model.bin").unlink()
    refused(adapter, instruct, output, "holds no adapter_model.safetensors")
    save_file({}, file)
    refused(adapter, instruct, output, "holds no tensors")
    (adapter / "adapter_config.json").write_text("{")
    refused(adapter, instruct, output, "not valid JSON")


def test_missing_and_unreadable_instruct_models(adapter_and_instruct, tmp_path):
    adapter, instruct = adapter_and_instruct
    output = tmp_path / "merged"
    refused(adapter, tmp_path / "nowhere", output, "There is no folder '.*nowhere'")
    refused(adapter, instruct / "config.json", output, "is a file")
    shutil.copytree(instruct, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").unlink()
    refused(adapter, tmp_path / "copy", output, "holds no config.json")
    change_config(instruct, model_type="of_tomorrow")
    refused(adapter, instruct, output, "cannot be read.*upgrade transformers")
    change_config(instruct, model_type="llama")
    file = instruct / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    refused(adapter, instruct, output, "damaged or was not copied to its end")
    file.rename(instruct / "pytorch_model.bin")
    refused(adapter, instruct, output, "only safetensors are read: convert")


def test_instruct_folder_that_loads_an_adapter_of_its_own(adapter_and_instruct, tmp_path):
    adapter, instruct = adapter_and_instruct
    shutil.copy(adapter / "adapter_config.json", instruct)
    refused(adapter, instruct, tmp_path / "merged", "would put that adapter on top")


def test_adapter_of_a_deeper_model(make_checkpoint, make_adapter, tmp_path):
    adapter = make_adapter(make_checkpoint("base", num_hidden_layers=3))
    shutil.rmtree(tmp_path / "base")
    match = r"3 of 9 modules in the adapter do not exist in the instruct model \(model.layers.2.mlp.down_proj; "
    refused(adapter, make_checkpoint(), tmp_path / "merged", match)


def test_adapter_of_a_shallower_model(make_checkpoint, make_adapter, tmp_path):
    adapter = make_adapter(make_checkpoint("base", num_hidden_layers=1))
    shutil.rmtree(tmp_path / "base")
    match = r"lacks tensors of 3 targeted modules \(model.layers.1.self_attn.q_proj \(no lora_A and no lora_B\)"
    refused(adapter, make_checkpoint(), tmp_path / "merged", match)


def test_adapter_of_a_wider_model(make_checkpoint, make_adapter, tmp_path):
    adapter = make_adapter(make_checkpoint("base", intermediate_size=64))
    shutil.rmtree(tmp_path / "base")
    match = r"2 tensors of the adapter have another shape.*lora_A.weight is \[4, 64\], not \[4, 48\]"
    refused(adapter, make_checkpoint(), tmp_path / "merged", match)


def test_recorded_base_model_is_compared(make_checkpoint, make_adapter, tmp_path):
    adapter = make_adapter(make_checkpoint("base", vocab_size=72), target_modules=["q_proj"])
    instruct = make_checkpoint()
    # Every shape that the adapter touches fits; only the base model's configuration tells.
    refused(adapter, instruct, tmp_path / "merged", r"differ in vocab_size \(72 against 64\)")
    shutil.rmtree(tmp_path / "base")
    assert merge_adapter(adapter, instruct, tmp_path / "merged").num_changed == 2


def test_recorded_base_model_is_looked_up_in_the_hub_cache(make_checkpoint, make_adapter, tmp_path, monkeypatch):
    base = make_checkpoint("base", num_attention_heads=2, head_dim=16)
    adapter = make_adapter(base, target_modules=["down_proj"])
    change_settings(adapter, base_model_name_or_path="org/base", revision="v2")
    asked = []

    def try_to_load_from_cache(name, file, revision):
        asked.append((name, file, revision))
        return str(base / "config.json")

    monkeypatch.setattr("gift_trl.merging.checks.try_to_load_from_cache", try_to_load_from_cache)
    refused(adapter, make_checkpoint(), tmp_path / "merged", r"num_attention_heads \(2 against 4\)")
    assert asked == [("org/base", "config.json", "v2")]


def test_half_a_pair_of_factors(adapter_and_instruct, tmp_path):
    adapter, instruct = adapter_and_instruct
    change_tensors(adapter, lambda t: t.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"))
    refused(adapter, instruct, tmp_path / "merged", r"layers.0.self_attn.q_proj \(no lora_B\)")


def test_tensors_that_the_settings_do_not_target(adapter_and_instruct, tmp_path):
    adapter, instruct = adapter_and_instruct
    change_settings(adapter, target_modules=["q_proj", "v_proj"])
    refused(adapter, instruct, tmp_path / "merged", r"2 modules that its own `target_modules` do not name")


def test_targets_that_the_model_does_not_have(adapter_and_instruct, tmp_path):
    adapter, instruct = adapter_and_instruct
    change_settings(adapter, target_modules=["c_attn"])
    refused(adapter, instruct, tmp_path / "merged", "PEFT cannot put this adapter on the instruct model: .*c_attn")


def test_values_that_are_not_finite(adapter_and_instruct, tmp_path):
    adapter, instruct = adapter_and_instruct
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    for value in ("nan", "inf"):
        change_tensors(adapter, lambda t, value=value: t[key].view(-1)[7].fill_(float(value)))
        refused(adapter, instruct, tmp_path / "merged", rf"1 of 12 tensors .* NaN or infinite values \(first: {key}\)")


@pytest.mark.filterwarnings("ignore:.*embedding layers found:UserWarning", "ignore:.*ensure_weight_tying")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_embeddings_are_no_target(make_checkpoint, make_adapter, tmp_path, target):
    instruct = make_checkpoint(tie_word_embeddings=True)
    adapter = make_adapter(instruct, target_modules=["q_proj", target], saving={"save_embedding_layers": False})
    match = "shares between its embedding and its output layer.*train without"
    assert target in refused(adapter, instruct, tmp_path / "merged", match)


@pytest.mark.filterwarnings("ignore:.*embedding layers found:UserWarning", "ignore:.*ensure_weight_tying")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("choice", [None, "replace", "ignore"])
def test_tied_targets_have_one_reason(make_checkpoint, make_adapter, tmp_path, choice, target):
    # The file holds the weight whole too, but no choice about that would help; nor does the checkpoint lack its second name
    instruct = make_checkpoint(tie_word_embeddings=True)
    adapter = make_adapter(instruct, target_modules=["q_proj", target])
    assert any("base_layer" in key for key in load_file(adapter / "adapter_model.safetensors"))
    message = refused(adapter, instruct, tmp_path / "merged", "shares between", saved_modules=choice)
    assert "reasons" not in message and "saved_modules" not in message


@pytest.mark.filterwarnings("ignore:.*embedding layers found:UserWarning")
def test_whole_layers_in_the_adapter_file(make_checkpoint, make_adapter, tmp_path):
    instruct = make_checkpoint()
    adapter = make_adapter(instruct, target_modules=["q_proj", "lm_head"])
    match = r"whole layers .*\(base_model.model.lm_head.base_layer.weight\).*save_embedding_layers=False"
    refused(adapter, instruct, tmp_path / "merged", match)


def test_targeted_tensor_missing_from_the_checkpoint(adapter_and_instruct, tmp_path):
    adapter, instruct = adapter_and_instruct
    name = "model.layers.0.self_attn.q_proj.weight"
    change_tensors(instruct, lambda t: t.pop(name))
    refused(adapter, instruct, tmp_path / "merged", f"{name} is missing")
    change_tensors(instruct, lambda t: t.update({name: torch.zeros(8, 8)}))
    refused(adapter, instruct, tmp_path / "merged", rf"{name} is \[8, 8\], not \[32, 32\]")
    change_tensors(instruct, lambda t: t.update({name: torch.zeros(32, 32, dtype=torch.int8)}))
    refused(adapter, instruct, tmp_path / "merged", f"{name} is of dtype I8.*unquantised")


def test_output_apart_from_the_inputs(adapter_and_instruct, tmp_path):
    adapter, instruct = adapter_and_instruct
    before = sorted(tmp_path.rglob("*"))
    refused(adapter, instruct, instruct, "not empty")
    for output in (instruct, instruct / "merged", adapter / "deep" / "merged", tmp_path):
        refused(adapter, instruct, output, "choose an output folder beside it", overwrite=True)
    (tmp_path / "link").symlink_to(instruct)
    refused(adapter, instruct, tmp_path / "link" / "merged", "choose an output folder beside it")
    (tmp_path / "link").unlink()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("linked", ["model.safetensors", "adapter_model.safetensors", "tool.jinja", "base"])
def test_output_apart_from_what_the_inputs_link_to(adapter_and_instruct, make_checkpoint, tmp_path, linked):
    # As in the Hub's cache, whose snapshots hold links only
    adapter, instruct = adapter_and_instruct
    base = make_checkpoint("base")
    (instruct / "additional_chat_templates").mkdir()
    (instruct / "additional_chat_templates" / "tool.jinja").write_text("x")
    blob = tmp_path / "cache" / "blobs" / "w"
    blob.parent.mkdir(parents=True)
    (tmp_path / "cache" / "blobs" / "config.json").write_text("{}")
    files = {"adapter_model.safetensors": adapter / linked, "base": base / "model.safetensors"}
    files["tool.jinja"] = instruct / "additional_chat_templates" / linked
    file = files.get(linked, instruct / linked)
    file.rename(blob)
    file.symlink_to(blob)
    recipe = MergeRecipe(instruct_model=str(instruct), adapter=[str(adapter)], base_model=str(base))
    with pytest.raises(ValueError, match=r"holds what '.*' links to.*choose another"):
        merge_recipe(recipe, blob.parent, overwrite=True)
    assert file.read_bytes()
    (tmp_path / "cache" / "merged").mkdir()
    merge_recipe(recipe, tmp_path / "cache" / "merged")


def test_folders_that_are_no_checkpoint_are_not_overwritten(adapter_and_instruct, tmp_path):
    output = tmp_path / "documents"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    match = "holds no config.json and no merge_report.json: it is not overwritten. Choose another output folder"
    refused(*adapter_and_instruct, output, match, overwrite=True)
    assert (output / "thesis.txt").read_text() == "years of work"
    (output / "merge_report.json").touch()
    merge_adapter(*adapter_and_instruct, output, overwrite=True)
    assert (output / "config.json").exists()


def test_mount_point_as_output(adapter_and_instruct, tmp_path, monkeypatch):
    mount = tmp_path / "volume"
    mount.mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: str(path) == str(mount))
    refused(*adapter_and_instruct, mount, "is a mount point.*choose a folder inside it")
    merge_adapter(*adapter_and_instruct, mount / "merged")


def test_disk_is_looked_at_where_the_temporary_folder_is(adapter_and_instruct, tmp_path, monkeypatch):
    looked = []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("gift_trl.merging.checks.shutil.disk_usage", lambda path: looked.append(path) or usage)
    (tmp_path / "merged").mkdir()
    merge_adapter(*adapter_and_instruct, tmp_path / "merged")
    merge_adapter(*adapter_and_instruct, tmp_path / "new" / "merged")
    assert looked == [tmp_path, tmp_path]


def test_inputs_that_may_not_be_read(adapter_and_instruct, tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("gift_trl.merging.checks.read_header", refuse)
    match = "'.*adapter_model.safetensors' cannot be accessed .*: change its permissions"
    refused(*adapter_and_instruct, tmp_path / "merged", match)


def test_disk_space(adapter_and_instruct, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("gift_trl.merging.checks.shutil.disk_usage", lambda path: usage)
    refused(*adapter_and_instruct, tmp_path / "new" / "merged", r"0.0 GB free: make room")


def test_weights_are_not_downloaded_for_a_merge_that_is_refused(adapter_and_instruct, tmp_path, monkeypatch):
    adapter, instruct = adapter_and_instruct
    change_settings(adapter, use_qalora=True)
    asked = []

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns):
        asked.append("*.safetensors" in allow_patterns)
        return str(instruct)

    monkeypatch.setattr("gift_trl.checkpoints.snapshot_download", snapshot_download)
    refused(adapter, "org/instruct", tmp_path / "merged", "QA-LoRA")
    assert asked == [False]


def test_checkpoint_without_a_parameter_that_no_adapter_targets(adapter_and_instruct, tmp_path):
    # transformers would load random values in its place, and warn
    adapter, instruct = adapter_and_instruct
    change_tensors(instruct, lambda t: t.pop("model.norm.weight"))
    refused(adapter, instruct, tmp_path / "merged", r"in 1 places \(model.norm.weight is missing\).*random values")


def test_tied_checkpoint_without_its_embedding(make_checkpoint, make_adapter, tmp_path):
    instruct = make_checkpoint(tie_word_embeddings=True)
    adapter = make_adapter(instruct)
    change_tensors(instruct, lambda t: t.pop("model.embed_tokens.weight"))
    refused(adapter, instruct, tmp_path / "merged", "model.embed_tokens.weight is missing")


def test_tensor_in_two_shards(make_checkpoint, make_adapter, tmp_path):
    instruct = make_checkpoint(max_shard_size="20KB")
    adapter = make_adapter(instruct)
    shards = sorted(instruct.glob("*.safetensors"))
    twice = load_file(shards[0]) | load_file(shards[1])
    save_file(twice, shards[1], metadata={"format": "pt"})
    refused(adapter, instruct, tmp_path / "merged", "which another shard holds too")


def test_base_model_that_the_card_of_the_instruct_model_does_not_name(adapter_and_instruct, tmp_path):
    adapter, instruct = adapter_and_instruct
    change_settings(adapter, base_model_name_or_path="org/Other-7B")
    (instruct / "README.md").write_text("---\nbase_model: org/Model-7B\n---\n")
    with pytest.warns(UserWarning, match="trained on 'org/Other-7B', while .* was made from org/Model-7B"):
        merge_adapter(adapter, instruct, tmp_path / "merged")
    change_settings(adapter, base_model_name_or_path="mirror/model-7b")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merge_adapter(adapter, instruct, tmp_path / "second")


@pytest.mark.parametrize(
    "base",
    [
        "/elsewhere/hub/models--org--Model-7B/snapshots/0123456789abcdef0123456789abcdef01234567",
        "unsloth/Model-7B-bnb-4bit",
        "unsloth/model-7b-unsloth-bnb-4bit",
        "org/Model-7B-GPTQ-Int4",
        "/elsewhere/Model-7B/",
        "org/instruct",  # the baseline that is trained on the instruct model itself
        "unsloth/Instruct-bnb-4bit",
    ],
)
def test_other_names_of_the_same_base_model(adapter_and_instruct, tmp_path, base):
    adapter, instruct = adapter_and_instruct
    change_settings(adapter, base_model_name_or_path=base)
    (instruct / "README.md").write_text("---\nbase_model: org/Model-7B\n---\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merge_adapter(adapter, instruct, tmp_path / "merged")


def test_settings_of_another_tool(adapter_and_instruct, tmp_path):
    adapter, instruct = adapter_and_instruct
    for number, version in enumerate([{}, {"peft_version": "0.1.0"}, {"peft_version": None}, {"peft_version": "?"}]):
        change_settings(adapter, lora_dtype="float32", another=1, third=None, **version)
        with pytest.warns(UserWarning, match=r"PEFT does not know \(another, lora_dtype\)") as caught:
            report = merge_adapter(adapter, instruct, tmp_path / str(number))
        assert len(caught) == len(report.warnings) == 1 and report.num_changed == 6


def test_tokenizer_of_the_adapter(adapter_and_instruct, tokenizer, tmp_path):
    adapter, instruct = adapter_and_instruct
    tokenizer.save_pretrained(instruct)
    tokenizer.save_pretrained(adapter)
    # A padding token that the trainer added does no harm
    file = adapter / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["added_tokens"].append({**settings["added_tokens"][0], "id": 384, "content": "<|new|>"})
    file.write_text(json.dumps(settings))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merge_adapter(adapter, instruct, tmp_path / "merged")
    settings["added_tokens"][1]["content"] = "<|other|>"
    settings["model"]["vocab"] = {
        k.replace("<|start|>", "<|other|>"): v for k, v in settings["model"]["vocab"].items()
    }
    file.write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match=r"names 1 special tokens otherwise .* 1 \('<.other.>' against '<.start.>'\)"):
        merge_adapter(adapter, instruct, tmp_path / "renamed")
    vocabulary = settings["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(settings))
    refused(adapter, instruct, tmp_path / "swapped", "2 token ids mean something else.*was trained on token ids")


def test_choices_about_saved_modules(adapter_and_instruct, tmp_path):
    adapter, instruct = adapter_and_instruct
    refused(adapter, instruct, tmp_path / "merged", "pass one of 'replace', 'ignore'", saved_modules="keep")
    change_settings(adapter, trainable_token_indices=[3])
    refused(adapter, instruct, tmp_path / "merged", "cannot be left out", saved_modules="ignore")


def test_scale_of_a_type_that_has_none(make_checkpoint, make_adapter, tmp_path):
    instruct = make_checkpoint()
    adapter = make_adapter(instruct, config=IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    refused(adapter, instruct, tmp_path / "merged", "IA3 layers have none: merge with scale 1.0", scale=0.5)


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        ("llama", ["q_proj", "embed_tokens"]),
        ("qwen3_moe", ["q_proj", "gate_proj", "up_proj", "down_proj"]),
        ("gpt2", ["c_attn"]),
    ],
)
def test_training_into_a_model_that_is_not_downloaded(make_checkpoint, tmp_path, monkeypatch, architecture, targets):
    instruct = make_checkpoint(architecture=architecture, tie_word_embeddings=architecture == "llama")
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    here = preflight_training(config, str(instruct), tmp_path / "merged")
    for file in instruct.glob("*.safetensors*"):
        file.unlink()
    monkeypatch.setattr("gift_trl.merging.planned.checkpoint_folder", lambda *args, **kwargs: instruct)
    assert preflight_training(config, "someone/instruct", tmp_path / "merged") == here
    assert len(here) == (architecture == "llama") and all("shares between its embedding" in text for text in here)
    assert config.init_lora_weights is True and config.target_modules == set(targets)
