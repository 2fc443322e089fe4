"""Shipped recipes: what is written of them is so, and they run."""

import copy
import json
import re
from importlib import resources
from pathlib import Path

import pytest
import yaml
from datasets import load_from_disk
from safetensors.torch import load_file
from trl import SFTConfig, get_peft_config

from gift_trl.annotation.tokenization import tokenize_dataset
from gift_trl.scripts import train
from gift_trl.scripts.columns import map_columns
from gift_trl.scripts.recipe_writer import accumulation_steps
from gift_trl.scripts.recipes import recipes_folder


FOLDER = recipes_folder()
SHIPPED = yaml.safe_load((FOLDER / "models.yaml").read_text())["models"]
TASKS = list(yaml.safe_load((FOLDER / "tasks.yaml").read_text()))
RECIPES = sorted(
    path.relative_to(FOLDER).as_posix()
    for name in SHIPPED
    for path in (FOLDER / name).glob("*.yaml")
    if not path.stem.endswith("_evaluation")
)
SECTIONS = ["Model", "Data", "GIFT", "LoRA", "Trainer", "Merge"]


def parse(path: str, *argv: str) -> tuple:
    return train.make_parser().parse_args_and_config(["--config", str(FOLDER / path), "--use_cpu", *argv])


@pytest.fixture(scope="module")
def models(generator) -> dict:
    return generator.load_models()


@pytest.fixture(scope="module")
def skeletons(generator, models) -> dict:
    return {name: generator.make_skeleton(model) for name, model in models.items()}


@pytest.mark.slow  # every size of every model is estimated
def test_every_file_is_as_it_is_generated(generator):
    generated = generator.generate()
    for path, text in generated.items():
        assert (FOLDER / path).read_text() == text, f"{path}: run `python recipes/generate.py`"
    kept = {path.relative_to(FOLDER).as_posix() for name in SHIPPED for path in (FOLDER / name).iterdir()}
    assert kept == generated.keys()
    assert all(f"{name}/{task}.yaml" in generated for name in SHIPPED for task in TASKS)
    assert len(SHIPPED) == 10


@pytest.mark.parametrize("name", SHIPPED)
def test_figures_give_the_published_number_of_parameters(name, models, skeletons):
    published = models[name]["parameters"]
    digits = len(published.partition(".")[2]) - 1
    assert f"{skeletons[name].num_parameters() / 1e9:.{digits}f}B" == published


@pytest.mark.parametrize("path", RECIPES)
def test_recipe(path, models, skeletons):
    name, model = path.split("/")[0], models[path.split("/")[0]]
    text = (FOLDER / path).read_text()
    data, args, base, mixture, merge = parse(path)  # an unknown key is an error
    assert re.findall(r"^# (\w+)$", text, re.MULTILINE) == SECTIONS
    assert (base.model_name_or_path, args.instruct_model_name_or_path) == (model["base"], model["instruct"])
    # The paper's settings
    assert (args.learning_rate, args.lr_scheduler_type, args.warmup_steps, args.num_train_epochs) == (
        2e-4,
        "linear",
        0.1,
        1,
    )
    assert (args.max_length, args.bf16, args.optim, args.weight_decay) == (2048, True, "adamw_torch", 0)
    assert (args.confidence_exponent, args.annotator) == (1, "instruct")
    assert data.system_prompt == "You are a helpful assistant."
    assert data.max_samples == (2000 if "math" in Path(path).stem else 10000)
    lora = get_peft_config(base)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.bias) == (64, 128, 0.05, "none")
    # What is adapted exists, in every layer
    found = [n for n, _ in skeletons[name].named_modules() if n.rpartition(".")[2] in lora.target_modules]
    assert len(found) == 7 * model["config"]["num_hidden_layers"]
    # The header
    header = text.partition("\n\n")[0]
    assert f"gift-trl train --config recipes/{path}\n" in header
    batches = re.findall(r"(\d+) GPUs? × (\d+)(?: rows?)? × (\d+)", header)
    assert batches and all(int(gpus) * int(rows) * int(steps) == 256 for gpus, rows, steps in batches)
    for gpus, rows, steps in batches:
        assert int(rows) == args.per_device_train_batch_size
        assert accumulation_steps(int(gpus), int(rows)) == int(steps)
    assert data.global_batch_size == 256
    train.set_accumulation_steps(data, args)
    assert args.gradient_accumulation_steps == int(batches[0][2])
    # Nothing of two recipes lands in one folder
    output = f"outputs/{name}/{Path(path).stem}/gift"
    assert (args.output_dir, merge.merge_output_dir) == (f"{output}/adapter", f"{output}/merged")
    assert bool(mixture.datasets) != bool(data.dataset_name)
    assert base.load_in_4bit == path.endswith("_qlora.yaml")


@pytest.mark.parametrize("name", SHIPPED)
def test_page_of_a_model(name):
    """Every row of its table makes 256 rows a step, with the GPUs of a launch line that stands there."""
    page = (FOLDER / name / "README.md").read_text()
    table = re.findall(r"^\| (\d+) \| ([^|]+) \| (\d+) × (\d+) × (\d+) \|", page, re.MULTILINE)
    assert [(int(gpus), kind) for gpus, kind, *_ in table] == [
        (1, "none"),
        (8, "ZeRO-2"),
        (8, "ZeRO-3"),
        (16, "ZeRO-3, two machines"),
    ]
    lines = {
        "none": f"gift-trl train --config recipes/{name}/math.yaml\n",
        "ZeRO-2": f"gift-trl train --accelerate_config zero2 --num_processes 8 --config recipes/{name}/math.yaml\n",
        "ZeRO-3": f"gift-trl train --accelerate_config zero3 --num_processes 8 --config recipes/{name}/math.yaml\n",
        "ZeRO-3, two machines": "gift-trl train --accelerate_config two_nodes --machine_rank 1 ",
    }
    args = parse(f"{name}/math.yaml")[1]
    for gpus, kind, processes, rows, steps in table:
        assert gpus == processes and int(processes) * int(rows) * int(steps) == 256
        assert int(rows) == args.per_device_train_batch_size
        assert lines[kind] in page
    two_nodes = yaml.safe_load((FOLDER / "accelerate_configs" / "two_nodes.yaml").read_text())
    assert (two_nodes["num_processes"], two_nodes["num_machines"]) == (16, 2)
    # The first line of a recipe's header is the one of the page
    header = (FOLDER / name / "math.yaml").read_text().partition("\n\n")[0]
    assert {line.strip("# ") + "\n" for line in header.splitlines() if "gift-trl" in line} == {
        lines["none"],
        lines["ZeRO-2"],
    }


def test_unknown_keys_are_refused(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((FOLDER / RECIPES[0]).read_text() + "learning_rte: 1.0\n")
    with pytest.raises(ValueError, match=r"Unknown arguments from config file: .*learning_rte"):
        parse(str(recipe))


@pytest.mark.parametrize("task", TASKS)
def test_recipe_runs(task, models, with_tiny_pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = with_tiny_pair(f"deepseek-math-7b/{task}.yaml", models["deepseek-math-7b"])
    train.main(["--config", str(recipe), "--num_train_epochs", "3"])  # warm-up begins with a rate of 0
    output = tmp_path / "outputs" / "deepseek-math-7b" / task / "gift"
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * 7 and any(value.any() for name, value in adapter.items() if "lora_B" in name)
    assert (output / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("task, rows", [("math", 2), ("medical", 2), ("summaries", 3)])
def test_data_is_mapped(task, rows, models, with_tiny_pair):
    from gift_trl.scripts.data import load_recipe_datasets

    path = with_tiny_pair(f"qwen3-8b/{task}.yaml", models["qwen3-8b"])
    data, _, _, mixture, _ = train.make_parser().parse_args_and_config(["--config", str(path)])
    found, _ = load_recipe_datasets(data, mixture, evaluate=False, seed=0)
    assert len(found) == rows
    row = sorted(found, key=lambda row: row["prompt"][1]["content"])[0]
    asked = {
        "math": (
            "What is 1 + 1?\nPlease reason step by step, and put your final answer within \\boxed{}.",
            "It is $\\boxed{2}$.",
        ),
        "medical": (
            'How many?\n\nA. Two.\nB. Two.\nC. Two.\nD. Two.\n\nPlease reason step by step, and end with "The answer is X.", '
            "where X is the letter of the right choice.",
            "Two.\n\nThe answer is C.",
        ),
        "summaries": ("Summarise it.\n\nA long text.", "Text."),
    }[task]
    assert row["prompt"][0] == {"role": "system", "content": "You are a helpful assistant."}
    assert row["prompt"][1] == {"role": "user", "content": asked[0]}
    assert asked[1] in [row["completion"][0]["content"] for row in found]


@pytest.mark.parametrize("name", [name for name, model in SHIPPED.items() if "template" in model])
def test_targets_begin_with_the_answer_and_end_the_turn(name, models, tokenizer, published):
    """The chat templates as TRL keeps them, with the variables that the recipes give them."""
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (resources.files("trl") / "chat_templates" / f"{models[name]['template']}.jinja").read_text()
    chat.bos_token = "<|pad|>"
    data = parse(f"{name}/math.yaml")[0]
    rows = map_columns(load_from_disk(published[data.dataset_name]), data)
    row = tokenize_dataset(rows, chat, SFTConfig("unused", bf16=False, use_cpu=True))[0]
    first = next(position for position, label in enumerate(row["labels"]) if label >= 0)
    end = "<|eot_id|>" if name.startswith("llama") else "<|im_end|>\n"
    assert chat.decode(row["input_ids"][first:]) == f"It is $\\boxed{{2}}$.{end}"
    prompt = chat.decode(row["input_ids"][:first])
    assert prompt.count("You are a helpful assistant.") == 1 and "You are Qwen" not in prompt
    assert ("Today Date: 26 Jul 2024" in prompt) == name.startswith("llama")
    assert prompt.endswith("<think>\n\n</think>\n\n") == (name == "qwen3-8b")


@pytest.mark.slow
def test_qlora_recipe_runs(models, make_model, with_tiny_pair, tmp_path, monkeypatch):
    """NF4 for the base model and, where it is too large, for the instruct model; the merge is into the whole weights."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    recipe = with_tiny_pair("qwen2.5-14b/math_qlora.yaml", models["qwen2.5-14b"])
    settings = yaml.safe_load(recipe.read_text())
    for key in ("model_name_or_path", "instruct_model_name_or_path"):
        settings[key] = str(make_model(tmp_path / key, hidden_size=64, intermediate_size=128))
    recipe.write_text(yaml.safe_dump(settings))
    train.main(["--config", str(recipe), "--num_train_epochs", "3"])  # warm-up begins with a rate of 0
    output = tmp_path / "outputs" / "qwen2.5-14b" / "math_qlora" / "gift"
    merged = load_file(output / "merged" / "model.safetensors")
    whole = load_file(tmp_path / "instruct_model_name_or_path" / "model.safetensors")
    assert {name: value.dtype for name, value in merged.items()} == {
        name: value.dtype for name, value in whole.items()
    }
    changed = {
        name.rpartition(".weight")[0].rpartition(".")[2] for name in whole if not merged[name].equal(whole[name])
    }
    assert changed == set(json.loads((output / "adapter" / "adapter_config.json").read_text())["target_modules"])
