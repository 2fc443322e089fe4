"""The lab's pair: real checkpoints, the same for the same seed, made once."""

import dataclasses

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl import SFTConfig, SFTTrainer

from gift_trl.lab import pair as pair_module
from gift_trl.lab.pair import make_pair, make_tokenizer
from gift_trl.lab.problems import VOCABULARY


QUESTION, ANSWER = "copy a b", "a b"


def _ids(text: str) -> list[int]:
    return [VOCABULARY.index(word) for word in text.split()]


def test_chat_template_gives_the_layout_of_the_corpora():
    tokenizer = make_tokenizer()
    conversation = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    prompt = tokenizer.apply_chat_template(conversation[:1], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    assert prompt == _ids("<user> copy a b <bot>")
    assert whole["input_ids"] == _ids("<user> copy a b <bot> a b <eos>")
    assert whole["assistant_masks"] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert tokenizer.decode(whole["input_ids"], skip_special_tokens=True) == f"{QUESTION} {ANSWER}"
    with pytest.raises(Exception, match="roles user and assistant only, got: system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "copy"}])


def test_trl_learns_the_answer_and_the_end_of_turn(lab_pair, tmp_path):
    row = {
        "prompt": [{"role": "user", "content": QUESTION}],
        "completion": [{"role": "assistant", "content": ANSWER}],
    }
    args = SFTConfig(tmp_path, bf16=False, use_cpu=True, report_to="none")
    trainer = SFTTrainer(str(lab_pair[1]), args, train_dataset=Dataset.from_list([row]))
    (prepared,) = trainer.train_dataset
    assert prepared["input_ids"] == _ids("<user> copy a b <bot> a b <eos>")
    assert [label for label in prepared["labels"] if label != -100] == _ids("a b <eos>")


def test_both_folders_are_complete_checkpoints(lab_pair):
    states = []
    for folder in lab_pair:
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert model.dtype == torch.float32
        assert len(tokenizer) == model.config.vocab_size == len(VOCABULARY)
        assert tokenizer.pad_token_id != tokenizer.eos_token_id
        assert GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id
        assert (folder / "model.safetensors").is_file()
        states.append(model.state_dict())
    base, instruct = states
    distances = {name: (instruct[name] - base[name]).norm() / base[name].norm() for name in base}
    assert all(0 < distance < 0.05 for distance in distances.values()), distances


def test_same_seed_gives_the_same_pair(lab_pair, short_training, tmp_path):
    again = make_pair(0, tmp_path, settings=short_training)
    other = make_pair(1, tmp_path, settings=short_training)
    for folder, same, different in zip(lab_pair, again, other, strict=True):
        weights = (folder / "model.safetensors").read_bytes()
        assert weights == (same / "model.safetensors").read_bytes()
        assert weights != (different / "model.safetensors").read_bytes()


def test_pair_leaves_the_random_state_and_threads_alone(short_training, tmp_path):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    make_pair(0, tmp_path, settings=dataclasses.replace(short_training, base_steps=1, instruct_steps=1))
    assert torch.equal(state, torch.get_rng_state())
    assert threads == torch.get_num_threads()


def test_pair_is_found_again_without_loading_anything(lab_pair, short_training, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a cached pair was trained or loaded")

    monkeypatch.setattr(pair_module, "LlamaForCausalLM", fail)
    monkeypatch.setattr(pair_module, "make_tokenizer", fail)
    assert make_pair(0, lab_pair[0].parent.parent, settings=short_training) == lab_pair


def test_other_settings_are_another_pair(short_training):
    fingerprints = {
        dataclasses.replace(short_training, **change).fingerprint()
        for change in ({}, {"base_steps": 13}, {"instruct_learning_rate": 1e-4}, {"num_threads": 2})
    }
    assert len(fingerprints) == 4


def test_interrupted_training_resumes_with_the_instruct_model(lab_pair, short_training, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pair_module, "_post_train", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_pair(0, tmp_path, settings=short_training)
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in folder.iterdir()] == ["base"]
    monkeypatch.setattr(pair_module, "_pretrain", interrupt)
    _, instruct = make_pair(0, tmp_path, settings=short_training)
    assert (instruct / "model.safetensors").read_bytes() == (lab_pair[1] / "model.safetensors").read_bytes()
