import json
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gift_trl.merging import merge_adapter, sweep_scales
from gift_trl.merging.sweep import ScaleScore, Sweep
from gift_trl.scripts.sweep import main, negative_log_likelihood


@pytest.fixture
def adapter(pair, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_scores_are_those_of_merged_checkpoints(pair, adapter, tmp_path, conversations):
    tokenizer = AutoTokenizer.from_pretrained(pair[1])

    def score(model):
        return negative_log_likelihood(model, tokenizer, conversations, 512)

    sweep = sweep_scales(adapter, pair[1], [1.0, 0.0, 0.5, 0.5], score, metric="nll", higher_is_better=False)
    assert [entry.scale for entry in sweep.scores] == [0.0, 0.5, 1.0]
    for entry in sweep.scores[1:]:
        merge_adapter(adapter, pair[1], tmp_path / f"merged-{entry.scale}", scale=entry.scale)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"merged-{entry.scale}")
        assert score(merged)[0] == pytest.approx(entry.score, rel=1e-4)
    assert score(AutoModelForCausalLM.from_pretrained(pair[1]))[0] == pytest.approx(sweep.scores[0].score, rel=1e-6)
    assert sweep.best.score == min(entry.score for entry in sweep.scores)
    (line,) = [line for line in sweep.table().splitlines() if "best" in line]
    assert line.split()[0] == f"{sweep.best.scale:g}"
    value, error = score(AutoModelForCausalLM.from_pretrained(pair[1]))
    assert sweep.scores[0].interval == pytest.approx((value - 1.96 * error, value + 1.96 * error), rel=1e-4)


def test_likelihood_is_the_mean_of_the_target_tokens(pair, conversations):
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    total, tokens = 0.0, 0
    for row in conversations:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        with torch.no_grad():
            log_probs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        total -= sum(float(log_probs[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))
        tokens += len(whole) - len(prompt)
    value, error = negative_log_likelihood(model, tokenizer, conversations, 512)
    assert value == pytest.approx(total / tokens, rel=1e-5) and 0 < error < value


def test_targets_are_those_of_the_training(pair, conversations):
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    messages = Dataset.from_list([{"messages": row["prompt"] + row["completion"]} for row in conversations])

    def score(rows, **settings):
        return negative_log_likelihood(model, tokenizer, rows, 512, **settings)[0]

    total, tokens = 0.0, 0
    for row in messages:
        encoding = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        with torch.no_grad():
            log_probs = model(torch.tensor([encoding["input_ids"]])).logits[0].double().log_softmax(-1)
        targets = [i for i, mask in enumerate(encoding["assistant_masks"]) if mask]
        total -= sum(float(log_probs[i - 1, encoding["input_ids"][i]]) for i in targets)
        tokens += len(targets)
    everything = score(messages)
    assert 0 < tokens and score(messages, assistant_only_loss=True) == pytest.approx(total / tokens, rel=1e-5)
    assert score(conversations, completion_only_loss=False) == pytest.approx(everything, rel=1e-5)
    assert everything != pytest.approx(total / tokens, rel=0.01)


def test_layers_that_the_adapter_holds_whole(pair, tmp_path, conversations):
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    model.base_model.model.lm_head.modules_to_save["default"].weight.data *= 1.5
    model.save_pretrained(tmp_path / "adapter")

    def score(model):
        return negative_log_likelihood(model, tokenizer, conversations, 512)

    common = {"metric": "nll", "higher_is_better": False}
    with pytest.raises(ValueError, match="--saved_modules"):
        sweep_scales(tmp_path / "adapter", pair[1], [0.0], score, **common)
    found = {}
    for choice in ("replace", "ignore"):
        merge_adapter(tmp_path / "adapter", pair[1], tmp_path / choice, saved_modules=choice)
        sweep = sweep_scales(tmp_path / "adapter", pair[1], [0.0, 1.0], score, saved_modules=choice, **common)
        found[choice] = sweep.scores
        merged = score(AutoModelForCausalLM.from_pretrained(tmp_path / choice))
        assert sweep.scores[1].score == pytest.approx(merged[0], rel=1e-4)
    assert found["replace"][1].score != pytest.approx(found["ignore"][1].score, rel=1e-3)
    instruct = score(AutoModelForCausalLM.from_pretrained(pair[1]))[0]
    assert found["ignore"][0].score == pytest.approx(instruct, rel=1e-6)


def test_command(pair, adapter, tmp_path, conversations, capsys):
    conversations.to_json(tmp_path / "validation.jsonl")
    options = ["--completion_only_loss", "True", "--saved_modules", "ignore"]
    arguments = [
        "--adapter",
        str(adapter),
        "--instruct_model",
        pair[1],
        "--dataset",
        str(tmp_path / "validation.jsonl"),
    ]
    main([*arguments, "--output_dir", str(tmp_path / "sweep"), "--scales", "0", "1", "--max_length", "512", *options])
    facts = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [entry["scale"] for entry in facts["scores"]] == [0.0, 1.0] and facts["best_scale"] in (0.0, 1.0)
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "The best scale on this data is" in said
    assert ("the largest that was tried" in said) == (facts["best_scale"] == 1.0)
    again = [*arguments, "--output_dir", str(tmp_path / "sweep"), "--scales", "1", "--max_length", "512", *options]
    with pytest.raises(FileExistsError, match="--overwrite"):
        main(again)
    main([*again, "--overwrite"])
    assert len(json.loads((tmp_path / "sweep" / "sweep.json").read_text())["scores"]) == 1
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=f"{other}' does not look like .* no sweep.json"):
        main([*arguments, "--output_dir", str(other), "--overwrite"])
    assert (other / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("scales", [[], [math.nan]])
def test_scales_that_make_no_sense(pair, adapter, scales):
    with pytest.raises(ValueError, match="at least one finite scale"):
        sweep_scales(adapter, pair[1], scales, lambda model: (0.0, None), metric="x", higher_is_better=True)


def test_a_score_that_is_not_finite(pair, adapter):
    with pytest.raises(ValueError, match="score at scale 1 is nan"):
        sweep_scales(adapter, pair[1], [1.0], lambda model: (math.nan, None), metric="x", higher_is_better=True)


def test_the_smallest_of_equal_scales_is_the_best():
    scores = tuple(ScaleScore(scale, 0.5) for scale in (-1.0, 0.5, 2.0))
    assert Sweep(scores, "x", True).best.scale == Sweep(scores, "x", False).best.scale == 0.5
    assert Sweep((*scores, ScaleScore(3.0, 0.6)), "x", True).best.scale == 3.0
