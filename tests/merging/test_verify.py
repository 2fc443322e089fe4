import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from gift_trl.merging import MergeRecipe, merge_adapter, merge_recipe, verify_merge
from gift_trl.merging import verify as verify_module
from gift_trl.merging.runtime import Answer, part_at_a_tie
from gift_trl.merging.verify import verify_recipe
from gift_trl.scripts import merge as merge_script
from gift_trl.scripts.cli import run


TARGET = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(params=["float32", "bfloat16"])
def merged(request, pair, tokenizer, tmp_path) -> tuple[Path, Path, Path]:
    """The merge of an adapter whose update is small, the adapter, and an instruct model of some dtype."""
    model = AutoModelForCausalLM.from_pretrained(pair[1], dtype=getattr(torch, request.param))
    model.save_pretrained(tmp_path / "instruct")
    tokenizer.save_pretrained(tmp_path / "instruct")
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.03
    peft_model.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "instruct", tmp_path / "merged", scale=0.5)
    return tmp_path / "merged", tmp_path / "adapter", tmp_path / "instruct"


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_json(file: Path, change) -> None:
    facts = json.loads(file.read_text())
    change(facts)
    file.write_text(json.dumps(facts))


def test_a_right_merge_is_proven(merged):
    folder, adapter, instruct = merged
    result = verify_merge(folder, adapter, instruct, scale=0.5)
    assert result.problems() == []
    assert result.mean_kl < 0.1 * result.mean_kl_instruct and result.top1_agreement > 0.9
    assert result.max_logit_difference < 0.1 and result.num_prompts == 8 and result.num_positions > 8
    assert len(result.changed) == result.num_targets == 4
    assert not result.unexpected_changes and not result.unchanged_targets and not result.wrong_tensors
    facts = json.loads((folder / "merge_verification.json").read_text())
    assert facts["mean_kl"] == result.mean_kl and facts["problems"] == []
    assert "within the bounds" in result.summary()


def test_nothing_is_taken_from_the_report(merged):
    folder, adapter, instruct = merged
    (folder / "merge_report.json").unlink()
    assert not verify_merge(folder, adapter, instruct, scale=0.5, max_new_tokens=0).problems()


@pytest.mark.filterwarnings("ignore:.*depends on the weights:UserWarning")
def test_another_adapter_type(pair, make_adapter, tmp_path):
    config = IA3Config(
        task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    adapter = make_adapter(pair[1], config=config, spread=0.1)
    merge_adapter(adapter, pair[1], tmp_path / "merged")
    assert not verify_merge(tmp_path / "merged", adapter, pair[1]).problems()
    change_tensors(tmp_path / "merged", lambda tensors: tensors[TARGET][3].neg_())
    assert list(verify_merge(tmp_path / "merged", adapter, pair[1]).wrong_tensors) == [TARGET]


@pytest.mark.parametrize("peft_type", ["GRALORA", "PEANUT"])
def test_types_whose_factor_cannot_be_set(pair, make_adapter, tmp_path, peft_type):
    settings = {"r": 4, "gralora_k": 2} if peft_type == "GRALORA" else {}
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](
        task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], **settings
    )
    adapter = make_adapter(pair[1], config=config, spread=0.03)
    merge_adapter(adapter, pair[1], tmp_path / "merged")
    result = verify_merge(tmp_path / "merged", adapter, pair[1], max_new_tokens=0)
    assert not result.problems() and result.mean_kl < 0.1 * result.mean_kl_instruct


@pytest.mark.parametrize("choice", ["ignore", "replace"])
def test_what_the_adapter_holds_whole(pair, make_adapter, tmp_path, choice):
    adapter = make_adapter(pair[1], modules_to_save=["input_layernorm"], spread=0.03)
    merge_adapter(adapter, pair[1], tmp_path / "merged", saved_modules=choice)
    result = verify_merge(tmp_path / "merged", adapter, pair[1], saved_modules=choice, max_new_tokens=0)
    assert not result.problems() and result.mean_kl < 0.1 * result.mean_kl_instruct
    # The other model is found out by its logits as well
    shutil.copytree(tmp_path / "merged", tmp_path / "other")
    change_tensors(tmp_path / "other", lambda tensors: tensors["model.layers.0.input_layernorm.weight"].mul_(0.5))
    other = verify_merge(tmp_path / "other", adapter, pair[1], saved_modules=choice, max_new_tokens=0)
    assert any("above the bound" in problem for problem in other.problems())


def test_a_merge_that_merged_nothing(merged):
    folder, adapter, instruct = merged
    shutil.copy(instruct / "model.safetensors", folder)
    result = verify_merge(folder, adapter, instruct, scale=0.5, max_new_tokens=0)
    assert len(result.wrong_tensors) == len(result.unchanged_targets) == 4 and not result.changed
    problems = result.problems()
    assert "4 of 4 targeted tensors are not what the merge gives" in problems[0]
    assert "part of the update is missing or wrong" in problems[-1]
    # In bfloat16, the absolute bound alone would let it pass.
    assert any("above the bound" in problem for problem in problems) == (result.max_kl < 1e-3)


def lose_a_target(tensors, before):
    tensors[TARGET] = before[TARGET]


def shift_a_value(tensors, before):
    tensors[TARGET][5, 7] += 0.5


def flip_a_bit(tensors, before):
    tensors[TARGET].view(-1)[:1].view(torch.uint8)[0] ^= 1


@pytest.mark.parametrize("damage", [lose_a_target, shift_a_value, flip_a_bit])
def test_a_wrong_target(merged, damage):
    folder, adapter, instruct = merged
    before = load_file(instruct / "model.safetensors")
    change_tensors(folder, lambda tensors: damage(tensors, before))
    result = verify_merge(folder, adapter, instruct, scale=0.5, max_new_tokens=0)
    assert list(result.wrong_tensors) == [TARGET] and result.wrong_tensors[TARGET] > 0
    assert result.unchanged_targets == ([TARGET] if damage is lose_a_target else [])
    assert "1 of 4 targeted tensors are not what the merge gives" in result.problems()[0]
    assert "OUTSIDE the bounds" in result.summary()


def test_changes_outside_the_targets_are_found(merged):
    folder, adapter, instruct = merged
    change_tensors(folder, lambda tensors: tensors["model.norm.weight"][:1].mul_(1.5))
    # Nor does it help to name the tensor in the report
    change_json(folder / "merge_report.json", lambda facts: facts["merged_tensors"].update({"model.norm.weight": "x"}))
    result = verify_merge(folder, adapter, instruct, scale=0.5, max_new_tokens=0)
    assert result.unexpected_changes == ["model.norm.weight"]
    assert "does not target" in result.problems()[0]


def test_another_scale_is_found(merged):
    folder, adapter, instruct = merged
    result = verify_merge(folder, adapter, instruct, scale=2.0, max_new_tokens=0, prompts=["Name a colour."])
    assert len(result.wrong_tensors) == 4 and len(result.problems()) >= 2


def test_a_lost_target_is_found_at_run_time_alone(merged, monkeypatch):
    """What the merge and the proof of its tensors might both overlook."""
    folder, adapter, instruct = merged
    prove = verify_module.prove_tensors

    def blind(*arguments):
        proof = prove(*arguments)
        proof.wrong.clear()
        return proof

    monkeypatch.setattr(verify_module, "prove_tensors", blind)
    before = load_file(instruct / "model.safetensors")
    change_tensors(folder, lambda tensors: tensors.update({n: before[n] for n in before if "layers.1" in n}))
    problems = verify_merge(folder, adapter, instruct, scale=0.5, max_new_tokens=0).problems()
    assert "part of the update is missing or wrong" in problems[-1]


def test_another_set_of_tensors_is_refused(merged):
    folder, adapter, instruct = merged
    change_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"1 are missing.*model.norm.weight. Merge again"):
        verify_merge(folder, adapter, instruct, scale=0.5)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        verify_merge(folder, adapter, instruct, scale=0.5)


def other_end(folder):
    for name in ("config.json", "generation_config.json"):
        change_json(folder / name, lambda facts: facts.update(eos_token_id=7))


def no_generation_config(folder):
    (folder / "generation_config.json").unlink()


def other_template(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def swapped_ids(folder):
    def swap(facts):
        vocabulary = facts["model"]["vocab"]
        vocabulary["W"], vocabulary["a"] = vocabulary["a"], vocabulary["W"]

    change_json(folder / "tokenizer.json", swap)


def no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def additional_file(folder):
    (folder / "added_tokens.json").write_text("{}")


DAMAGES = {
    other_end: (["config.json", "generation_config.json"], False, True),
    no_generation_config: (["generation_config.json"], False, True),
    other_template: (["chat_template.jinja"], True, False),
    swapped_ids: (["tokenizer.json"], True, False),
    no_tokenizer: (["tokenizer.json", "tokenizer_config.json"], True, True),
    additional_file: (["added_tokens.json"], False, False),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("merged", ["float32"], indirect=True)
def test_other_files_beside_the_weights(merged, damage):
    folder, adapter, instruct = merged
    damage(folder)
    result = verify_merge(folder, adapter, instruct, scale=0.5, max_new_tokens=0)
    files, other_prompts, other_stops = DAMAGES[damage]
    assert [name.split()[0] for name in result.different_files] == files
    assert bool(result.different_prompts) == other_prompts
    assert (result.stop_ids_merged != result.stop_ids_instruct) == other_stops
    assert len(result.problems()) == 1 + other_prompts + other_stops


@pytest.mark.parametrize("merged", ["float32"], indirect=True)
def test_answers_that_stop_are_counted(merged):
    folder, adapter, instruct = merged
    prompts = ["What is two plus two?", "Is water wet?"]
    settings = {"scale": 0.5, "prompts": prompts, "max_new_tokens": 64}
    result = verify_merge(folder, adapter, instruct, **settings)
    assert result.stopped_at_run_time == result.stopped_merged == result.same_stop == 2 and not result.problems()
    other_end(folder)
    (folder / "tokenizer_config.json").unlink()
    result = verify_merge(folder, adapter, instruct, **settings)
    assert (result.stopped_at_run_time, result.stopped_merged) == (2, 0)
    assert result.same_stop == result.tied_stops == 0
    assert "answers to 2 of 2 prompts end by themselves in one of the two models only" in result.problems()[-1]
    none = verify_merge(folder, adapter, instruct, **{**settings, "max_new_tokens": 0})
    assert (none.stopped_at_run_time, none.stopped_merged, none.same_stop) == (0, 0, 2)


def test_only_a_tie_excuses_another_stop():
    logits = [torch.tensor([0.0, 5.0, 1.0]), torch.tensor([3.0, 0.0, 2.99])]
    expected = Answer([1, 0], logits, False)
    assert part_at_a_tie(expected, Answer([1, 2], logits, True), noise=0.01)
    assert not part_at_a_tie(expected, Answer([1, 2], logits, True), noise=0.001)
    assert not part_at_a_tie(expected, Answer([2, 2], logits, True), noise=0.01)
    assert not part_at_a_tie(expected, Answer([1], logits, True), noise=0.01)


@pytest.mark.filterwarnings("error:.*random token ids")
def test_prompts_need_a_tokenizer(make_checkpoint, make_adapter, tmp_path):
    instruct = make_checkpoint(dtype=torch.bfloat16)
    (instruct / "tokenizer_config.json").unlink()
    adapter = make_adapter(instruct, spread=0.05)
    merge_adapter(adapter, instruct, tmp_path / "merged")
    with pytest.raises(ValueError, match=r"has no tokenizer.*add its tokenizer files"):
        verify_merge(tmp_path / "merged", adapter, instruct, prompts=["Name a colour."])
    with pytest.raises(ValueError, match="no prompt"):
        verify_merge(tmp_path / "merged", adapter, instruct, prompts=[])
    with pytest.warns(UserWarning, match="verified on random token ids") as caught:
        result = verify_merge(tmp_path / "merged", adapter, instruct)
    assert not result.problems() and result.num_positions == 8 * 24
    assert sum("random token ids" in str(warning.message) for warning in caught) == 1


def test_the_tensors_of_other_recipes_are_computed_once_more(make_checkpoint, make_adapter, tmp_path):
    instruct = make_checkpoint()
    (instruct / "tokenizer_config.json").unlink()
    adapters = [str(make_adapter(instruct, name=name, seed=seed)) for seed, name in enumerate(("a", "b"))]
    recipe = MergeRecipe(instruct_model=str(instruct), adapter=adapters, method="dare_ties", density=0.5)
    merge_recipe(recipe, tmp_path / "merged")
    result = verify_recipe(tmp_path / "merged", recipe)
    assert not result.problems() and result.num_targets == len(result.changed) == 6 and result.mean_kl is None
    assert "without the run-time comparison" in result.summary()
    change_tensors(tmp_path / "merged", lambda tensors: tensors[TARGET][0].mul_(2))
    assert list(verify_recipe(tmp_path / "merged", recipe).wrong_tensors) == [TARGET]


@pytest.mark.parametrize("merged", ["float32"], indirect=True)
def test_the_command_exits_with_1(merged, tmp_path, monkeypatch, capsys):
    _, adapter, instruct = merged
    arguments = ["--adapter", str(adapter), "--instruct_model", str(instruct), "--verify"]
    run(merge_script.main, [*arguments, "--output_dir", str(tmp_path / "right")])
    assert "within the bounds" in capsys.readouterr().out
    original = verify_module.verify_recipe

    def damaged(folder, *args, **settings):
        swapped_ids(Path(folder))
        shutil.copy(instruct / "model.safetensors", folder)
        return original(folder, *args, **settings)

    monkeypatch.setattr("gift_trl.merging.verify_recipe", damaged)
    with pytest.raises(SystemExit) as exit_info:
        run(merge_script.main, [*arguments, "--output_dir", str(tmp_path / "wrong")])
    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    assert "targeted tensors are not what the merge gives" in error and "tokenizer.json (different)" in error


def test_a_vocabulary_of_words_cannot_write_the_built_in_prompts(make_checkpoint, make_adapter, tmp_path):
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "one", "two", "plus"])}
    instruct = make_checkpoint(dtype=torch.bfloat16)
    for file in [*instruct.glob("*token*"), *instruct.glob("*.jinja")]:
        file.unlink()
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(instruct)
    adapter = make_adapter(instruct, spread=0.05)
    merge_adapter(adapter, instruct, tmp_path / "merged")
    with pytest.warns(UserWarning, match="cannot write the built-in prompts .* random token ids"):
        assert not verify_merge(tmp_path / "merged", adapter, instruct).problems()
    assert not verify_merge(tmp_path / "merged", adapter, instruct, prompts=["one", "two"]).problems()
    with pytest.raises(ValueError, match="cannot write 'three'"):
        verify_merge(tmp_path / "merged", adapter, instruct, prompts=["three"])
