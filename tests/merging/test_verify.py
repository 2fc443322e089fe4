import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gift_trl.merging import merge_adapter, verify_merge


@pytest.fixture(params=["float32", "bfloat16"])
def merged(request, pair, tokenizer, tmp_path) -> tuple[Path, Path, Path, str]:
    """An instruct model of some dtype, an adapter, and the merged model."""
    model = AutoModelForCausalLM.from_pretrained(pair[1], dtype=getattr(torch, request.param))
    model.save_pretrained(tmp_path / "instruct")
    tokenizer.save_pretrained(tmp_path / "instruct")
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "instruct", tmp_path / "merged", scale=0.5)
    return tmp_path / "merged", tmp_path / "adapter", tmp_path / "instruct", request.param


def test_a_right_merge_is_within_the_bounds(merged):
    folder, adapter, instruct, dtype = merged
    result = verify_merge(folder, adapter, instruct, scale=0.5)
    assert not result.problems()
    assert result.mean_kl < {"float32": 1e-9, "bfloat16": 1e-3}[dtype]
    assert result.max_logit_difference < {"float32": 1e-4, "bfloat16": 0.5}[dtype]
    assert result.top1_agreement > {"float32": 0.999, "bfloat16": 0.9}[dtype]
    assert result.num_prompts == 8 and result.num_positions > 8
    assert len(result.changed) == 4 and not result.unexpected_changes and not result.unchanged_targets
    facts = json.loads((folder / "merge_verification.json").read_text())
    assert facts["mean_kl"] == result.mean_kl and facts["problems"] == []
    assert "within the bounds" in result.summary()


def test_another_scale_is_outside_the_bounds(merged):
    folder, adapter, instruct, _ = merged
    result = verify_merge(folder, adapter, instruct, scale=2.0, max_new_tokens=0, prompts=["Name a colour."])
    assert "above the bound" in result.problems()[0] and "OUTSIDE the bounds" in result.summary()


def test_changes_outside_the_targets_are_found(merged):
    folder, adapter, instruct, _ = merged
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] *= 1.5
    tensors["model.layers.0.self_attn.q_proj.weight"] = load_file(instruct / "model.safetensors")[
        "model.layers.0.self_attn.q_proj.weight"
    ]
    save_file(tensors, file, {"format": "pt"})
    result = verify_merge(folder, adapter, instruct, scale=0.5)
    assert result.unexpected_changes == ["model.norm.weight"]
    assert result.unchanged_targets == ["model.layers.0.self_attn.q_proj.weight"]
    assert any("does not target" in problem for problem in result.problems())


def test_answers_that_stop_are_counted(merged):
    folder, adapter, instruct, _ = merged
    result = verify_merge(folder, adapter, instruct, scale=0.5, prompts=["Name a colour.", "Is water wet?"])
    assert 0 <= result.stopped_merged <= 2 and result.same_stop >= 1
    none = verify_merge(folder, adapter, instruct, scale=0.5, prompts=["Name a colour."], max_new_tokens=0)
    assert (none.stopped_at_run_time, none.stopped_merged) == (0, 0)
    with pytest.raises(ValueError, match="no prompt"):
        verify_merge(folder, adapter, instruct, prompts=[])


def test_without_a_tokenizer_token_ids_are_compared(make_checkpoint, make_adapter, tmp_path):
    instruct = make_checkpoint(dtype=torch.bfloat16)
    (instruct / "tokenizer_config.json").unlink()
    adapter = make_adapter(instruct, spread=0.05)
    merge_adapter(adapter, instruct, tmp_path / "merged")
    result = verify_merge(tmp_path / "merged", adapter, instruct)
    assert not result.problems() and result.num_positions == 8 * 24
