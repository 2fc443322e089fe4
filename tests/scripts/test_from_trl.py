"""What a user of TRL changes, as the README shows it: both sides run, and without weights they are the same training."""

import json

import pytest
import torch
import yaml
from docs_commands import ROOT, blocks_of, changed
from peft import LoraConfig
from safetensors.torch import load_file
from trl import SFTTrainer
from trl.scripts import sft

from gift_trl import GIFTSFTTrainer
from gift_trl.scripts import train


CHANGES = [changed(block) for block in blocks_of(ROOT / "README.md") if block.language == "diff"]
BASE, INSTRUCT = "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"
# Of a CPU, and of a few rows
SETTINGS = {"use_cpu": True, "bf16": False, "learning_rate": 1e-2, "report_to": "none", "disable_tqdm": True}


def adapter(folder) -> dict[str, torch.Tensor]:
    weights = load_file(folder / "adapter_model.safetensors")
    assert any(value.any() for name, value in weights.items() if "lora_B" in name)
    return weights


def test_python(pair, conversations, tmp_path, monkeypatch):
    before, after = next(change for change in CHANGES if "Trainer(" in change[1])
    monkeypatch.chdir(tmp_path)

    def run(source: str, name: str, **settings):
        source = source.replace(INSTRUCT, pair[1]).replace(BASE, pair[0])
        assert 'output_dir="adapter"' in source
        source = source.replace('output_dir="adapter"', "**settings")
        settings = {"output_dir": name, **SETTINGS, **settings}
        peft_config = LoraConfig(target_modules=["q_proj", "v_proj"])
        scope = {"dataset": conversations, "peft_config": peft_config, "settings": settings}
        exec(source, scope)
        scope["trainer"].save_model()
        return scope["trainer"], adapter(tmp_path / name)

    trainer, plain = run(before, "sft")
    assert type(trainer) is SFTTrainer
    trainer, weighted = run(after, "gift")
    assert type(trainer) is GIFTSFTTrainer and trainer.state.log_history[-1]["gift/confidence_mean"] < 1
    _, unweighted = run(after, "shadow", confidence_exponent=0.0)
    assert plain.keys() == weighted.keys() == unweighted.keys()
    for name, value in plain.items():
        torch.testing.assert_close(unweighted[name], value, rtol=0, atol=1e-6)
    assert any((weighted[name] - value).abs().max() > 1e-4 for name, value in plain.items())


def test_recipe(pair, conversations, tmp_path, monkeypatch):
    """`trl sft --config` before, `gift-trl train --config` after; TRL's command reads the one, and ours both."""
    before, after = (yaml.safe_load(side) for side in next(change for change in CHANGES if "lora_r:" in change[1]))
    assert {**before, "instruct_model_name_or_path": INSTRUCT} == after
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations))

    def write(recipe: dict, name: str, **settings) -> str:
        stand_ins = {BASE: pair[0], INSTRUCT: pair[1], recipe["dataset_name"]: "data"}
        recipe = {
            key: stand_ins.get(value, value) if isinstance(value, str) else value for key, value in recipe.items()
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**recipe, **SETTINGS, **settings, "output_dir": name}))
        return str(tmp_path / f"{name}.yaml")

    sft.main(*sft.make_parser().parse_args_and_config(["--config", write(before, "sft")]))
    train.main(["--config", write(after, "gift")])
    train.main(["--config", write(after, "shadow", confidence_exponent=0)])
    plain, weighted, unweighted = (adapter(tmp_path / name) for name in ("sft", "gift", "shadow"))
    assert plain.keys() == weighted.keys() == unweighted.keys()
    for name, value in plain.items():
        torch.testing.assert_close(unweighted[name], value, rtol=0, atol=1e-6)
    assert any((weighted[name] - value).abs().max() > 1e-4 for name, value in plain.items())
    with pytest.raises(ValueError, match="instruct_model_name_or_path"):
        train.main(["--config", write(before, "neither")])
