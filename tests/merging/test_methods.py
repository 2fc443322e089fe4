import zlib

import pytest
import torch
import yaml
from merge_helpers import same_bits, tensors_of
from peft import PeftModel
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gift_trl.merging import MergeRecipe, merge_adapter, merge_recipe, methods
from gift_trl.merging.methods import truncate


NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def models(make_checkpoint, make_adapter):
    """A base model, its instruct model, and two adapters of which only the first targets q_proj."""
    base = make_checkpoint("base", dtype=torch.bfloat16, seed=5)
    instruct = make_checkpoint(dtype=torch.bfloat16, max_shard_size="20KB")
    first = make_adapter(base, "first", target_modules=["q_proj", "down_proj"])
    return base, instruct, first, make_adapter(base, "second", seed=4, r=2, target_modules=["down_proj"])


def deltas(model, adapter) -> dict[str, torch.Tensor]:
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter)
    return {
        name.removeprefix("base_model.model.") + ".weight": module.get_delta_weight("default").detach()
        for name, module in peft_model.named_modules()
        if "lora_A" in dict(module.named_children())
    }


@pytest.mark.parametrize("method", ["linear", "ties", "magnitude_prune", "dare_linear", "dare_ties"])
def test_several_adapters(models, tmp_path, method):
    _, instruct, first, second = models
    settings = {} if method == "linear" else {"density": 0.6}
    recipe = MergeRecipe(str(instruct), [str(first), str(second)], [], [0.7, -0.4], method, scale=0.9, **settings)
    report = merge_recipe(recipe, tmp_path / "merged")
    written, before = tensors_of(tmp_path / "merged"), tensors_of(instruct)
    one, two = deltas(instruct, first), deltas(instruct, second)
    assert set(report.merged_tensors) == set(one) and len(report.updates) == 2
    weights, function = torch.tensor([0.7, -0.4]), getattr(merge_utils, method, merge_utils.task_arithmetic)
    for name, tensor in written.items():
        if name not in one:
            assert same_bits(tensor, before[name])
        else:
            parts = [delta[name] for delta in (one, two) if name in delta]
            torch.manual_seed(zlib.crc32(f"0 {name}".encode()))
            update = function(parts, weights[: len(parts)], *settings.values())
            assert same_bits(tensor, (before[name].float() + 0.9 * update).bfloat16()), name
    # Drawn by the seed: the same again, and another with another
    merge_recipe(recipe, tmp_path / "again")
    assert all(same_bits(tensor, written[name]) for name, tensor in tensors_of(tmp_path / "again").items())
    if method.startswith("dare"):
        recipe.seed = 1
        merge_recipe(recipe, tmp_path / "other")
        assert not same_bits(tensors_of(tmp_path / "other")[NAME], written[NAME])


def test_dare_keeps_the_share_and_rescales(models, tmp_path):
    _, instruct, first, _ = models
    merge_recipe(MergeRecipe(str(instruct), [str(first)], method="dare_linear", density=0.5), tmp_path / "merged")
    update = tensors_of(tmp_path / "merged")[NAME].float() - tensors_of(instruct)[NAME].float()
    whole = deltas(instruct, first)[NAME]
    kept = update != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(update[kept], 2 * whole[kept], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("method", ["task_arithmetic", "re_adapt"])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_task_arithmetic(models, tmp_path, method, beta):
    base, instruct, first, _ = models
    recipe = MergeRecipe(
        str(instruct), [str(first)], method=method, base_model=str(base), instruct_weight=beta, scale=0.5
    )
    merge_recipe(recipe, tmp_path / "merged")
    one, theta_b, theta_i = deltas(instruct, first), tensors_of(base), tensors_of(instruct)
    for name, tensor in tensors_of(tmp_path / "merged").items():
        expected = theta_b[name].double() + beta * (theta_i[name].double() - theta_b[name].double())
        expected = expected + 0.5 * one.get(name, torch.zeros(1)).double()
        torch.testing.assert_close(tensor.double(), expected, rtol=2**-8, atol=1e-6)
        assert beta != 1.0 or name in one or same_bits(tensor, theta_i[name])


@pytest.mark.parametrize("truncation", [{"rank": 3}, {"explained_variance": 0.8}], ids=str)
def test_lore_adapt(models, tmp_path, truncation):
    base, instruct, first, _ = models
    recipe = MergeRecipe(str(instruct), [str(first)], method="lore_adapt", base_model=str(base), **truncation)
    merge_recipe(recipe, tmp_path / "merged")
    one, theta_b, theta_i = deltas(instruct, first), tensors_of(base), tensors_of(instruct)
    for name, tensor in tensors_of(tmp_path / "merged").items():
        difference = theta_i[name].double() - theta_b[name].double()
        if difference.dim() == 2:
            u, s, v = torch.linalg.svd(difference, full_matrices=False)
            share = (s**2).cumsum(0) / (s**2).sum()
            rank = truncation.get("rank") or int((share < 0.8).sum()) + 1
            difference = u[:, :rank] * s[:rank] @ v[:rank]
        expected = theta_b[name].double() + difference + one.get(name, torch.zeros(1)).double()
        torch.testing.assert_close(tensor.double(), expected, rtol=2**-8, atol=1e-6)


def test_truncation_is_the_closest_matrix_of_its_rank():
    torch.manual_seed(0)
    for shape in ((40, 30), (30, 40), (2, 8, 12)):
        matrix = torch.randn(shape)
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        expected = (u[..., :5] * s[..., None, :5]) @ v[..., :5, :]
        torch.testing.assert_close(truncate(matrix, 5, None).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(truncate(torch.zeros(4, 4), None, 0.9), torch.zeros(4, 4))


def test_truncation_reads_blocks_of_rows(make_checkpoint, make_adapter, tmp_path, monkeypatch):
    base, instruct = make_checkpoint("base", seed=5, vocab_size=1200), make_checkpoint(vocab_size=1200)
    adapter = make_adapter(base, target_modules=["embed_tokens", "q_proj"], saving={"save_embedding_layers": False})
    counts, read = [], methods.elements_of
    monkeypatch.setattr(methods, "_CHUNK_ELEMENTS", 2048)
    monkeypatch.setattr(methods, "elements_of", lambda *args: counts.append(args[-1]) or read(*args))
    settings = {"method": "lore_adapt", "base_model": str(base), "rank": 3}
    merge_recipe(MergeRecipe(str(instruct), [str(adapter)], scale=0.0, **settings), tmp_path / "merged")
    assert max(counts) <= 256 * 32
    written, theta_b, theta_i = tensors_of(tmp_path / "merged"), tensors_of(base), tensors_of(instruct)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # one with an update, one without
        u, s, v = torch.linalg.svd(theta_i[name].double() - theta_b[name].double(), full_matrices=False)
        expected = theta_b[name].double() + u[:, :3] * s[:3] @ v[:3]
        torch.testing.assert_close(written[name].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", [None, "gate_up_proj", "down_proj"])
def test_truncation_does_not_depend_on_what_is_adapted(make_checkpoint, make_adapter, tmp_path, part):
    base, instruct = make_checkpoint("base", "qwen3_moe", seed=5), make_checkpoint("instruct", "qwen3_moe")
    parameters = {"target_parameters": [f"mlp.experts.{part}"]} if part else {}
    adapter = make_adapter(base, target_modules=["q_proj"], spread=0.0, **parameters)
    recipe = MergeRecipe(str(instruct), [str(adapter)], method="lore_adapt", base_model=str(base), rank=2)
    with pytest.warns(UserWarning, match="exactly zero"):
        merge_recipe(recipe, tmp_path / "merged")
    theta_b, theta_i = tensors_of(base), tensors_of(instruct)
    for name, tensor in tensors_of(tmp_path / "merged").items():
        difference = theta_i[name] - theta_b[name]
        expected = theta_b[name] + (truncate(difference, 2, None) if difference.dim() > 1 else difference)
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


def test_full_delta(models, make_checkpoint, tmp_path):
    base, instruct, _, _ = models
    tuned = make_checkpoint("tuned", dtype=torch.bfloat16, seed=6)
    recipe = MergeRecipe(str(instruct), method="full_delta", base_model=str(base), tuned_model=str(tuned), scale=0.3)
    report = merge_recipe(recipe, tmp_path / "merged")
    theta_b, theta_i, theta_t = tensors_of(base), tensors_of(instruct), tensors_of(tuned)
    for name, tensor in tensors_of(tmp_path / "merged").items():
        expected = theta_i[name].float() + 0.3 * (theta_t[name].float() - theta_b[name].float())
        assert same_bits(tensor, expected.bfloat16()), name
    assert report.adapter == "tuned" and "full_delta" in report.summary()


def test_types_without_a_scale_of_their_own(make_checkpoint, make_adapter, tmp_path):
    instruct = make_checkpoint()
    adapter = make_adapter(instruct, use_dora=True)
    with pytest.warns(UserWarning, match="depends on the weights"):
        merge_adapter(adapter, instruct, tmp_path / "whole")
        recipe = MergeRecipe(str(instruct), [str(adapter)], method="magnitude_prune", density=1.0, scale=0.5)
        merge_recipe(recipe, tmp_path / "half")
    whole, half, before = (tensors_of(folder)[NAME] for folder in (tmp_path / "whole", tmp_path / "half", instruct))
    torch.testing.assert_close(half, (whole + before) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_experts(make_checkpoint, make_adapter, tmp_path, dtype):
    instruct = make_checkpoint(architecture="qwen3_moe", dtype=dtype)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = make_adapter(instruct, target_modules=["q_proj"], target_parameters=parameters)
    merge_adapter(adapter, instruct, tmp_path / "one")
    merge_recipe(MergeRecipe(str(instruct), [str(adapter)] * 2, adapter_weight=[0.5, 0.5]), tmp_path / "two")
    for name, tensor in tensors_of(tmp_path / "one").items():
        torch.testing.assert_close(tensors_of(tmp_path / "two")[name], tensor, rtol=2**-7, atol=1e-3)


def test_recipe_is_written_beside_the_weights(models, tmp_path):
    _, instruct, first, second = models
    recipe = MergeRecipe(str(instruct), [str(first), str(second)], adapter_weight=[1.0, 0.5], scale=0.5)
    merge_recipe(recipe, tmp_path / "merged")
    assert str(tmp_path) not in (tmp_path / "merged" / "merge_recipe.yaml").read_text()
    written = yaml.safe_load((tmp_path / "merged" / "merge_recipe.yaml").read_text())
    assert MergeRecipe(**written).adapter_weight == [1.0, 0.5] and written["method"] == "linear"
    config = yaml.safe_load((tmp_path / "merged" / "mergekit_config.yml").read_text())
    assert config["base_model"] == "instruct"
    assert [m["model"] for m in config["models"]] == ["instruct+first", "instruct+second"]
    assert [m["parameters"]["weight"] for m in config["models"]] == [0.5, 0.25]
    merge_recipe(MergeRecipe(str(instruct), [str(first)], method="ties", density=0.5), tmp_path / "ties")
    assert not (tmp_path / "ties" / "mergekit_config.yml").exists()


def test_mergekit_takes_everything_as_a_difference_from_the_instruct_model():
    common = {
        "instruct_model": "org/i",
        "base_model": "org/b",
        "instruct_model_revision": "c1",
        "base_model_revision": "c2",
    }
    recipe = MergeRecipe(
        adapter=["org/a"] * 2,
        adapter_revision=["c3"] * 2,
        adapter_weight=[0.5, 0.25],
        method="re_adapt",
        instruct_weight=0.75,
        scale=2.0,
        **common,
    )
    config = recipe.mergekit_config()
    assert config["base_model"] == "org/i@c1"  # where mergekit takes configuration and tokenizer from
    assert {m["model"]: m["parameters"]["weight"] for m in config["models"]} == {
        "org/i@c1+org/a@c3": 1.5,
        "org/b@c2": 0.25,
    }
    recipe = MergeRecipe(method="full_delta", tuned_model="org/t", scale=0.5, **common)
    weights = {m["model"]: m["parameters"]["weight"] for m in recipe.mergekit_config()["models"]}
    assert weights == {"org/t": 0.5, "org/b@c2": -0.5}


def test_no_mergekit_configuration_of_another_merge(models, make_adapter, tmp_path):
    base, instruct, first, _ = models
    assert MergeRecipe("i", ["a"], saved_modules="ignore").mergekit_config() is None
    assert MergeRecipe("i", ["a+b"]).mergekit_config() is None
    dora = make_adapter(base, "dora", use_dora=True)
    recipe = MergeRecipe(str(instruct), [str(first), str(dora)])
    with pytest.warns(UserWarning, match="depends on the weights"):
        merge_recipe(recipe, tmp_path / "merged")
    assert not (tmp_path / "merged" / "mergekit_config.yml").exists()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"adapter_weight": ["a tenth"]}, r"`adapter_weight` is \['a tenth'\]: pass a number"),
        ({"adapter": [3]}, r"`adapter` is \[3\]: pass text"),
        ({"scale": None}, "`scale` is None: pass a number"),
        ({"scale": True}, "`scale` is True: pass a number"),
        ({"method": "lore_adapt", "base_model": "b", "rank": 2.5}, "`rank` is 2.5: pass a whole number"),
        ({"method": "lore_adapt", "base_model": "b", "rank": "2.5"}, "`rank` is '2.5': pass a whole number"),
        ({"seed": 1.5}, "`seed` is 1.5: pass a whole number"),
        ({"method": ["ties"]}, r"`method` is \['ties'\]: pass text"),
        ({"adapter_weight": [1, 2]}, "give `--adapter_weight` there too, or remove"),
        ({"method": "slerp"}, "no merge method 'slerp': choose linear, ties"),
        ({"adapter": []}, "nothing to merge"),
        ({"adapter_weight": [1.0, 2.0]}, "1 adapters and 2 values of `adapter_weight`"),
        ({"adapter_weight": [float("nan")]}, "pass a finite number"),
        ({"method": "ties"}, "set `density`"),
        ({"method": "ties", "density": 1.5}, "up to 1"),
        ({"density": 0.5}, "`density` is not read by `linear`"),
        ({"method": "task_arithmetic"}, "set `base_model`"),
        ({"instruct_weight": 0.5}, "`instruct_weight` is not read"),
        ({"method": "lore_adapt", "base_model": "b"}, "set `rank` or `explained_variance`"),
        ({"method": "lore_adapt", "base_model": "b", "rank": 0}, "at least 1"),
        ({"rank": 3}, "not read by `linear`"),
        ({"method": "full_delta", "base_model": "b"}, "takes a `tuned_model` in place of adapters"),
        ({"tuned_model": "t"}, "read by `full_delta` only"),
        ({"majority_sign": "most"}, "choose total or frequency"),
    ],
    ids=str,
)
def test_recipes_that_make_no_sense(settings, match):
    with pytest.raises(ValueError, match=match):
        MergeRecipe(**{"instruct_model": "i", "adapter": ["a"], **settings})


def test_numbers_as_yaml_reads_them():
    values = yaml.safe_load("{adapter_weight: [1e-1, 5e-1], scale: 2e-1, seed: '3', rank: 4.0, method: lore_adapt}")
    assert values["adapter_weight"] == ["1e-1", "5e-1"]
    recipe = MergeRecipe("i", ["a", "b"], base_model="b", **values)
    assert recipe.adapter_weight == [0.1, 0.5] and recipe.scale == 0.2
    assert (recipe.seed, recipe.rank) == (3, 4) and isinstance(recipe.rank, int)
    assert MergeRecipe("i", "a", adapter_weight=2).adapter_weight == [2.0]


def rewrite(folder, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    "settings", [{}, {"method": "re_adapt", "instruct_weight": 0.5}, {"method": "lore_adapt", "rank": 2}], ids=str
)
def test_base_model_that_does_not_store_its_tied_output_layer(make_checkpoint, make_adapter, tmp_path, settings):
    base = make_checkpoint("base", seed=5, tie_word_embeddings=True)
    instruct = make_checkpoint(tie_word_embeddings=True)
    rewrite(instruct, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    recipe = MergeRecipe(str(instruct), [str(make_adapter(base))], base_model=str(base), **settings)
    merge_recipe(recipe, tmp_path / "merged")
    written = tensors_of(tmp_path / "merged")
    assert same_bits(written["lm_head.weight"], written["model.embed_tokens.weight"])
    assert bool(settings) != same_bits(written["lm_head.weight"], tensors_of(instruct)["lm_head.weight"])


@pytest.mark.parametrize("holders", [("base", "instruct"), ("base",), ("instruct",)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"method": "re_adapt", "instruct_weight": 0.5}], ids=str)
def test_masks_are_no_weights(make_checkpoint, make_adapter, tmp_path, holders, settings):
    base, instruct = make_checkpoint("base", "gpt2", seed=5), make_checkpoint("instruct", "gpt2")
    mask = torch.ones(1, 1, 64, 64).tril().to(torch.uint8)
    for name in holders:
        rewrite(tmp_path / name, lambda t: t.update({"transformer.h.0.attn.bias": mask}))
    adapter = make_adapter(base, target_modules=["c_attn"], fan_in_fan_out=True)
    recipe = MergeRecipe(str(instruct), [str(adapter)], base_model=str(base), **settings)
    merge_recipe(recipe, tmp_path / "merged")
    written, theta_i, theta_b = (tensors_of(folder) for folder in (tmp_path / "merged", instruct, base))
    assert written.keys() == theta_i.keys()
    if "instruct" in holders:
        assert same_bits(written["transformer.h.0.attn.bias"], mask)
    name = "transformer.wte.weight"
    expected = theta_i[name] if not settings else (theta_i[name] + theta_b[name]) / 2
    torch.testing.assert_close(written[name], expected)


def test_quantised_base_model(models, tmp_path):
    base, instruct, first, _ = models
    rewrite(base, lambda t: t.update({NAME: t[NAME].to(torch.uint8)}))
    with pytest.raises(ValueError, match=f"{NAME} is of dtype U8.*unquantised"):
        merge_recipe(MergeRecipe(str(instruct), [str(first)], base_model=str(base)), tmp_path / "merged")


def test_base_model_of_another_shape(models, make_checkpoint, tmp_path):
    _, instruct, first, _ = models
    other = make_checkpoint("other", vocab_size=72)
    recipe = MergeRecipe(str(instruct), [str(first)], method="re_adapt", base_model=str(other))
    with pytest.raises(
        ValueError, match=r"`base_model` '.*other' differs .* in 2 tensors .*\[72, 32\], not \[64, 32\]"
    ):
        merge_recipe(recipe, tmp_path / "merged")
