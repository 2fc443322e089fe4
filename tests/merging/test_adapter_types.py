"""Every kind of adapter that is merged comes out as PEFT's own `merge_and_unload()`, to the last bit."""

import copy

import peft
import pytest
import torch
from merge_helpers import merged_by_peft, same_bits, tensors_of
from peft import HiraConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, MissConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from gift_trl.checkpoints import safetensors_files
from gift_trl.merging import layers, merge_adapter
from gift_trl.merging.adapter import MERGED_TYPES
from gift_trl.merging.conversion import build_skeleton


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
# In a checkpoint, experts are stored one by one; transformers makes one parameter of them.
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

pytestmark = pytest.mark.filterwarnings("ignore:.*depends on the weights:UserWarning", "ignore:fan_in_fan_out")


def assert_same_as_peft(output, instruct, adapter, report, **options) -> None:
    expected, written, before = merged_by_peft(instruct, adapter, **options), tensors_of(output), tensors_of(instruct)
    assert list(written) == list(before)
    changed = 0
    for name, tensor in written.items():
        assert same_bits(tensor, expected[name]), name
        assert same_bits(tensor, before[name]) or name in report.merged_tensors, name
        changed += not same_bits(tensor, before[name])
    assert changed == report.num_changed > 0


LORA = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3, "c_proj": 3}},
    "lora_bias": {"lora_bias": True},
}


ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma", "gpt2", "qwen3_moe", "mixtral"]


def combinations():
    for kind in LORA:
        for architecture in ARCHITECTURES:
            # Layers without a bias have nothing that an update of a bias could be added to
            if kind == "lora_bias" and architecture not in ("qwen2", "gpt2"):
                continue
            for layout in ("single", "sharded", "tied"):
                # Gemma and GPT-2 are always tied
                if layout == "tied" and architecture in ("gemma", "gpt2"):
                    continue
                for dtype in (torch.float32, torch.bfloat16):
                    quick = (
                        (dtype == torch.bfloat16) if kind == "lora" else (layout, dtype) == ("single", torch.float32)
                    )
                    marks = () if quick else pytest.mark.slow
                    yield pytest.param(kind, architecture, layout, dtype, marks=marks)


@pytest.mark.parametrize(("kind", "architecture", "layout", "dtype"), list(combinations()), ids=str)
def test_lora(make_checkpoint, make_adapter, tmp_path, kind, architecture, layout, dtype):
    changes = {} if architecture in ("gemma", "gpt2") else {"tie_word_embeddings": layout == "tied"}
    shards = "20KB" if layout == "sharded" else "1GB"
    base = make_checkpoint("base", architecture, seed=5, **changes)
    instruct = make_checkpoint("instruct", architecture, dtype=dtype, max_shard_size=shards, **changes)
    assert (len(safetensors_files(instruct)) > 1) == (layout == "sharded")
    targets = ["c_attn", "c_fc", "c_proj"] if architecture == "gpt2" else ALL_LINEAR
    if kind == "lora_bias" and architecture == "qwen2":
        targets = ["q_proj", "k_proj", "v_proj"]
    settings = {"target_modules": ATTENTION if "m" == architecture[0] or "moe" in architecture else targets}
    if kind != "dora" and settings["target_modules"] is ATTENTION:
        settings["target_parameters"] = EXPERTS
    adapter = make_adapter(base, **settings, **LORA[kind])
    report = merge_adapter(adapter, instruct, tmp_path / "merged")
    assert_same_as_peft(tmp_path / "merged", instruct, adapter, report)


@pytest.mark.filterwarnings("ignore:.*embedding layers found:UserWarning", "ignore:.*ensure_weight_tying")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_embeddings(make_checkpoint, make_adapter, tmp_path, settings, dtype):
    instruct = make_checkpoint(dtype=dtype)
    adapter = make_adapter(
        make_checkpoint("base", seed=5),
        target_modules=["embed_tokens", "lm_head", "q_proj"],
        saving={"save_embedding_layers": False},
        **settings,
    )
    report = merge_adapter(adapter, instruct, tmp_path / "merged")
    assert "model.embed_tokens.weight" in report.merged_tensors
    assert_same_as_peft(tmp_path / "merged", instruct, adapter, report)


SETTINGS = {
    "IA3": {"target_modules": ["q_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "OFT": {"oft_block_size": 4, "r": 0},
    "BOFT": {"boft_block_size": 4},
    "FOURIERFT": {"n_frequency": 20},
    "WAVEFT": {"n_frequency": 20},
    "C3A": {"block_size": 16, "target_modules": ["q_proj", "o_proj"]},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "MISS": {"r": 4},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("peft_type", [name for name in MERGED_TYPES if name != "LORA"])
def test_other_types(make_checkpoint, make_adapter, tmp_path, peft_type, dtype):
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"]}
    config_class = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
    config = config_class(**{**settings, **SETTINGS.get(peft_type, {})})
    # Qwen2, whose attention has biases
    base = make_checkpoint("base", "qwen2", seed=5)
    adapter = make_adapter(base, config=config, spread=0.1)
    instruct = make_checkpoint(architecture="qwen2", dtype=dtype, max_shard_size="20KB")
    report = merge_adapter(adapter, instruct, tmp_path / "merged")
    assert_same_as_peft(tmp_path / "merged", instruct, adapter, report)


# Types that PEFT puts on GPT-2's transposed layers
TRANSPOSED = ["FOURIERFT", "WAVEFT", "GRALORA", "HIRA", "IA3"]
OTHER_MODELS = ["llama", "gemma", "gpt2", "qwen3_moe"]


def types_and_models():
    for peft_type in (name for name in MERGED_TYPES if name != "LORA"):
        for architecture in OTHER_MODELS:
            if architecture != "gpt2" or peft_type in TRANSPOSED:
                marks = () if architecture == "gpt2" else pytest.mark.slow
                yield pytest.param(peft_type, architecture, marks=marks)


@pytest.mark.parametrize(("peft_type", "architecture"), list(types_and_models()))
def test_other_types_in_other_models(make_checkpoint, make_adapter, tmp_path, peft_type, architecture):
    # Single files, and tied weights where the model above has none
    changes = {"tie_word_embeddings": True} if architecture == "llama" else {}
    targets = {"gpt2": ["c_attn", "c_fc"], "qwen3_moe": ["q_proj", "o_proj"]}.get(
        architecture, ["q_proj", "down_proj"]
    )
    settings = {"task_type": "CAUSAL_LM", **SETTINGS.get(peft_type, {}), "target_modules": targets}
    if peft_type == "IA3":
        settings["feedforward_modules"] = targets[1:]
    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](**settings)
    adapter = make_adapter(make_checkpoint("base", architecture, seed=5, **changes), config=config, spread=0.1)
    instruct = make_checkpoint(architecture=architecture, dtype=torch.bfloat16, **changes)
    report = merge_adapter(adapter, instruct, tmp_path / "merged")
    assert_same_as_peft(tmp_path / "merged", instruct, adapter, report)


def test_what_depends_on_the_weights_is_warned_of(make_checkpoint, make_adapter, tmp_path):
    instruct = make_checkpoint()
    with pytest.warns(UserWarning, match="A DoRA adapter does not add an update but depends on the weights"):
        report = merge_adapter(make_adapter(instruct, use_dora=True), instruct, tmp_path / "merged")
    assert len(report.warnings) == 1


@pytest.mark.filterwarnings("ignore:.*embedding layers found:UserWarning")
@pytest.mark.parametrize("choice", ["replace", "ignore"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_modules_to_save(make_checkpoint, make_adapter, tmp_path, choice, dtype):
    instruct = make_checkpoint(dtype=dtype)
    base = make_checkpoint("base", seed=5)
    adapter = make_adapter(base, modules_to_save=["lm_head", "input_layernorm"])
    report = merge_adapter(adapter, instruct, tmp_path / "merged", saved_modules=choice)
    assert ("lm_head.weight" in report.merged_tensors) == (choice == "replace")
    if choice == "replace":
        assert_same_as_peft(tmp_path / "merged", instruct, adapter, report)
    else:
        written, before, expected = (
            tensors_of(tmp_path / "merged"),
            tensors_of(instruct),
            merged_by_peft(instruct, adapter),
        )
        for name in ("lm_head.weight", "model.layers.1.input_layernorm.weight"):
            assert same_bits(written[name], before[name]) and not same_bits(written[name], expected[name])
        assert same_bits(
            written["model.layers.1.mlp.down_proj.weight"], expected["model.layers.1.mlp.down_proj.weight"]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trained_tokens_and_biases_replace(make_checkpoint, make_adapter, tmp_path, dtype):
    instruct = make_checkpoint(architecture="qwen2", dtype=dtype)
    base = make_checkpoint("base", "qwen2", seed=5)
    adapter = make_adapter(base, trainable_token_indices=[3, 9], bias="lora_only")
    report = merge_adapter(adapter, instruct, tmp_path / "merged", saved_modules="replace")
    assert "model.embed_tokens.weight" in report.merged_tensors
    assert "model.layers.0.self_attn.q_proj.bias" in report.merged_tensors
    assert_same_as_peft(tmp_path / "merged", instruct, adapter, report)


def test_a_replacement_is_not_scaled(make_checkpoint, make_adapter, tmp_path):
    instruct = make_checkpoint()
    adapter = make_adapter(make_checkpoint("base", seed=5), trainable_token_indices=[3, 9])
    for name, scale in (("whole", 1.0), ("half", 0.5)):
        merge_adapter(adapter, instruct, tmp_path / name, saved_modules="replace", scale=scale)
    whole, half = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "half")
    tokens, before = "model.embed_tokens.weight", tensors_of(instruct)
    assert same_bits(half[tokens], whole[tokens]) and not same_bits(half[tokens], before[tokens])
    target = "model.layers.0.mlp.down_proj.weight"
    assert not same_bits(half[target], whole[target]) and not same_bits(half[target], before[target])


def test_experts_of_an_adapter_that_names_them_one_by_one(make_checkpoint, make_adapter, tmp_path):
    # As PEFT saved them while transformers had a module for each expert
    instruct = make_checkpoint(architecture="qwen3_moe")
    adapter = make_adapter(instruct, target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for layer in range(2):
        for expert in range(4):
            for name, width, height in (("gate_proj", 32, 16), ("up_proj", 32, 16), ("down_proj", 16, 32)):
                key = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(4, width)
                tensors[f"{key}.lora_B.weight"] = torch.randn(height, 4)
    save_file(tensors, file, metadata={"format": "pt"})
    config = LoraConfig.from_pretrained(adapter)
    config.target_modules = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    config.save_pretrained(adapter)
    report = merge_adapter(adapter, instruct, tmp_path / "merged")
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in report.merged_tensors
    assert_same_as_peft(tmp_path / "merged", instruct, adapter, report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [8, 64, 256])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize(("alpha", "scale"), [(24, 0.7), (512, 1.0), (16, -0.5)])
def test_blocks_of_rows_equal_the_whole(settings, rank, dtype, alpha, scale):
    # Sizes that no block divides evenly, and one with as many columns as a large model's
    config = LlamaConfig(
        vocab_size=4003, hidden_size=300, intermediate_size=4001, num_hidden_layers=1, num_attention_heads=1
    )
    targets = ["down_proj", "up_proj", *([] if settings else ["embed_tokens"])]
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM", **settings)
    torch.manual_seed(0)
    shapes = {}
    for name, rows, columns in (("mlp.down_proj", 300, 4001), ("mlp.up_proj", 4001, 300)):
        key = f"base_model.model.model.layers.0.{name}"
        shapes |= {f"{key}.lora_A.weight": (rank, columns), f"{key}.lora_B.weight": (rows, rank)}
        shapes |= {f"{key}.lora_magnitude_vector": (rows,)} if settings else {}
    if not settings:
        key = "base_model.model.model.embed_tokens"
        shapes |= {f"{key}.lora_embedding_A": (rank, 4003), f"{key}.lora_embedding_B": (300, rank)}
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    loaded = layers.load_adapter(lora.to_dict(), tensors, build_skeleton(config))
    assert len(loaded.layers) == len(targets)
    for layer in loaded.layers:
        weight = torch.randn(layer.layer.get_base_layer().weight.shape).to(dtype)
        assert layer.merges_by_rows and len(layer.row_blocks(*weight.shape)) > 1
        whole = layer.merge({"weight": weight.clone()}, scale=scale)["weight"]
        assert not same_bits(whole, weight)
        assert same_bits(layer.merge_rows(weight.clone(), scale=scale), whole), layer.module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        (LoHaConfig(r=16, alpha=24), ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
        (LoKrConfig(r=8, alpha=24), ("lokr_w1", "lokr_w2_a", "lokr_w2_b")),
        (LoKrConfig(r=4000, alpha=24), ("lokr_w1", "lokr_w2")),
        (IA3Config(feedforward_modules=["down_proj"]), ("ia3_l",)),
        (HiraConfig(r=8), ("hira_A", "hira_B")),
        (MissConfig(r=50), ("miss_block",)),
        (MissConfig(r=64), ("miss_block",)),
    ],
    ids=["loha", "lokr", "lokr-whole", "ia3", "hira", "miss", "miss-remainder"],
)
def test_blocks_of_rows_of_other_types_equal_the_whole(settings, factors, dtype):
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=300,
        intermediate_size=4000,
        num_hidden_layers=1,
        num_attention_heads=1,
        mlp_bias=True,
    )
    settings.target_modules, settings.task_type = ["down_proj", "up_proj"], "CAUSAL_LM"
    torch.manual_seed(0)
    with torch.device("meta"):
        empty = get_peft_model(AutoModelForCausalLM.from_config(config), copy.deepcopy(settings)).state_dict()
    tensors = {
        key.replace(".default", ""): torch.randn(value.shape)
        for key, value in empty.items()
        if any(factor in key for factor in factors)
    }
    assert len(tensors) == 2 * len(factors)
    loaded = layers.load_adapter(settings.to_dict(), tensors, build_skeleton(config))
    assert len(loaded.layers) == 2
    for layer in loaded.layers:
        base_layer = layer.layer.get_base_layer()
        weight, bias = (torch.randn(getattr(base_layer, name).shape).to(dtype) for name in ("weight", "bias"))
        assert layer.merges_by_rows and len(layer.row_blocks(*weight.shape)) > 1
        weights = {
            name: value.clone() for name, value in (("weight", weight), ("bias", bias)) if name in layer.parameters
        }
        whole = layer.merge(weights)
        assert not same_bits(whole["weight"], weight)
        assert same_bits(layer.merge_rows(weight.clone()), whole["weight"]), layer.module
        if "bias" in layer.parameters:
            assert not same_bits(whole["bias"], bias)
            assert same_bits(layer.merge_bias(bias.clone()), whole["bias"])


def test_blocks_of_rows_of_transposed_weights(make_checkpoint, make_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "_BLOCK_ELEMENTS", 1)
    instruct = make_checkpoint(architecture="gpt2", dtype=torch.bfloat16)
    adapter = make_adapter(instruct, target_modules=["c_attn", "c_fc", "c_proj"])
    report = merge_adapter(adapter, instruct, tmp_path / "merged")
    assert_same_as_peft(tmp_path / "merged", instruct, adapter, report)
