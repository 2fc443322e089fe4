import json
import math

import pytest
import torch
from merge_helpers import tensors_of
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gift_trl.merging import MergeRecipe, merge_recipe
from gift_trl.merging.kinship import kind_of


def descend(base, make_checkpoint, distance, **settings):
    """An instruct model that is some way from the base model."""
    instruct = make_checkpoint(seed=9, **settings)
    start = tensors_of(base)
    torch.manual_seed(3)
    file = instruct / "model.safetensors"
    save_file({k: start[k] + distance * torch.randn_like(start[k]) for k in load_file(file)}, file, {"format": "pt"})
    return instruct


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_numbers(make_checkpoint, make_adapter, tmp_path, architecture):
    base = make_checkpoint("base", architecture)
    instruct = descend(base, make_checkpoint, 0.01, architecture=architecture)
    experts = ["mlp.experts.gate_up_proj"] if architecture == "qwen3_moe" else None
    adapter = make_adapter(base, target_modules=["q_proj", "v_proj"], target_parameters=experts)
    recipe = MergeRecipe(str(instruct), [str(adapter)], base_model=str(base), scale=0.5)
    report = merge_recipe(recipe, tmp_path / "merged")
    facts = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert facts["kinship"] == report.kinship
    assert (tmp_path / "merged" / "kinship.png").read_bytes().startswith(b"\x89PNG")
    assert "of the base model's norm away" in report.summary()

    theta_b, theta_i = tensors_of(base), tensors_of(instruct)
    names = [name for name in theta_b if kind_of(name) == "q_proj"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(instruct), adapter)
    join = torch.cat
    update = 0.5 * join(
        [
            model.get_submodule(f"base_model.model.{n.removesuffix('.weight')}")
            .get_delta_weight("default")
            .reshape(-1)
            for n in names
        ]
    )
    before = join([theta_b[name].reshape(-1) for name in names])
    difference = join([theta_i[name].reshape(-1) for name in names]) - before
    numbers = report.kinship["q_proj"]
    assert numbers["relative_change"] == pytest.approx(float(difference.norm() / before.norm()), rel=1e-4)
    assert numbers["update_ratio"] == pytest.approx(float(update.norm() / difference.norm()), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(update, difference, dim=0)
    assert numbers["cosine"] == pytest.approx(float(cosine), abs=1e-5)
    untargeted = "down_proj" if architecture == "llama" else "experts.down_proj"
    assert report.kinship[untargeted]["update_ratio"] is None
    assert (report.kinship.get("experts.up_proj", numbers))["update_ratio"] > 0
    whole = sum(float((theta_i[name] - theta_b[name]).double().norm()) ** 2 for name in theta_b)
    norm = sum(float(theta_b[name].double().norm()) ** 2 for name in theta_b)
    assert report.kinship["all"]["relative_change"] == pytest.approx(math.sqrt(whole / norm), rel=1e-4)


def test_strangers_are_warned_of(make_checkpoint, make_adapter, tmp_path):
    base, instruct = make_checkpoint("base", seed=5), make_checkpoint()
    recipe = MergeRecipe(str(instruct), [str(make_adapter(base))], base_model=str(base))
    with pytest.warns(UserWarning, match="does not descend from this base model"):
        report = merge_recipe(recipe, tmp_path / "merged")
    assert len(report.warnings) == 1


def raise_tensors(folder, part, amount):
    file = folder / "model.safetensors"
    tensors = {name: tensor + amount * (part in name) for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def test_few_large_tensors_do_not_hide_strangers(make_checkpoint, make_adapter, tmp_path):
    base, instruct = make_checkpoint("base", "qwen2", seed=5), make_checkpoint("instruct", "qwen2")
    adapter = make_adapter(base)
    for folder in (base, instruct):
        raise_tensors(folder, "k_proj.bias", 20)
        raise_tensors(folder, "norm", 3)
    recipe = MergeRecipe(str(instruct), [str(adapter)], base_model=str(base))
    with pytest.warns(UserWarning, match=r"matrices of the instruct model are 1\.\d+ times"):
        report = merge_recipe(recipe, tmp_path / "merged")
    assert report.kinship["all"]["relative_change"] < 0.25
    assert report.kinship["k_proj.bias"]["relative_change"] < 0.1 < 1 < report.kinship["k_proj"]["relative_change"]


def test_large_changes_of_few_tensors_do_not_make_strangers(make_checkpoint, make_adapter, tmp_path):
    base = make_checkpoint("base", "qwen2", seed=5)
    instruct = descend(base, make_checkpoint, 0.01, architecture="qwen2")
    raise_tensors(instruct, "k_proj.bias", 20)
    raise_tensors(instruct, "norm", 3)
    recipe = MergeRecipe(str(instruct), [str(make_adapter(base))], base_model=str(base))
    report = merge_recipe(recipe, tmp_path / "merged")
    assert report.kinship["all"]["relative_change"] > 0.5 and not report.warnings


def test_another_version_of_the_family_is_warned_of(make_checkpoint, make_adapter, tmp_path):
    base = make_checkpoint("base")
    recipe = MergeRecipe(str(descend(base, make_checkpoint, 0.035)), [str(make_adapter(base))], base_model=str(base))
    with pytest.warns(UserWarning, match="another version"):
        merge_recipe(recipe, tmp_path / "merged")


def test_full_delta(make_checkpoint, tmp_path):
    base, tuned = make_checkpoint("base"), make_checkpoint("tuned", seed=6)
    instruct = descend(base, make_checkpoint, 0.01)
    recipe = MergeRecipe(str(instruct), method="full_delta", base_model=str(base), tuned_model=str(tuned), scale=-0.5)
    report = merge_recipe(recipe, tmp_path / "merged")
    b, i, t = (tensors_of(folder) for folder in (base, instruct, tuned))
    for kind, names in {"all": list(b), "q_proj": [name for name in b if kind_of(name) == "q_proj"]}.items():
        update = torch.cat([-0.5 * (t[name] - b[name]).reshape(-1) for name in names]).double()
        difference = torch.cat([(i[name] - b[name]).reshape(-1) for name in names]).double()
        numbers = report.kinship[kind]
        assert numbers["update_ratio"] == pytest.approx(float(update.norm() / difference.norm()), rel=1e-4)
        cosine = torch.nn.functional.cosine_similarity(update, difference, dim=0)
        assert numbers["cosine"] == pytest.approx(float(cosine), abs=1e-5)


def test_a_model_that_is_the_base_model_is_warned_of(make_checkpoint, make_adapter, tmp_path):
    base = make_checkpoint()
    recipe = MergeRecipe(str(base), [str(make_adapter(base))], base_model=str(base))
    with pytest.warns(UserWarning, match="has the very weights of the base model"):
        merge_recipe(recipe, tmp_path / "merged")


def test_kinds():
    assert kind_of("model.layers.3.self_attn.q_proj.weight") == "q_proj"
    assert kind_of("model.layers.3.self_attn.q_proj.bias") == "q_proj.bias"
    assert kind_of("model.layers.3.mlp.experts.7.up_proj.weight") == "experts.up_proj"
    assert kind_of("transformer.h.0.ln_1.weight") == "ln_1"
    assert kind_of("lm_head.weight") == "lm_head"
