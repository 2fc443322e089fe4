"""The generator of the recipes, data in the columns in which it is published, and recipes with a tiny pair in them."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Value

from gift_trl.scripts.recipes import recipes_folder


@pytest.fixture(scope="session")
def generator():
    """The module `recipes/generate.py`."""
    spec = importlib.util.spec_from_file_location("generate_recipes", recipes_folder() / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> dict[str, str]:
    """Two or three rows of each dataset of the recipes, as a local folder of the same columns, by its Hub id."""
    folder = tmp_path_factory.mktemp("published")
    problems = [
        {"source": "x", "problem": f"What is {n} + {n}?", "solution": f"It is $\\boxed{{{2 * n}}}$.", "messages": [{"role": "user"}]}
        for n in (1, 2)
    ]  # fmt: skip
    Dataset.from_list(problems).save_to_disk(folder / "math")
    texts = ("id", "question", "opa", "opb", "opc", "opd", "choice_type", "exp")
    features = Features({name: Value("string") for name in texts} | {"cop": ClassLabel(names=["a", "b", "c", "d"])})
    row = dict.fromkeys(texts, "Two.") | {"question": "How many?", "cop": 2}
    rows = [row, {**row, "cop": 0}, {**row, "opd": None}, {**row, "exp": None}]  # of which the first two are used
    Dataset.from_list(rows, features=features).save_to_disk(folder / "medical")
    task = {"task_name": "t", "id": "1", "definition": "Summarise it.", "inputs": "A long text.", "targets": "Text."}
    (folder / "summaries" / "train").mkdir(parents=True)
    for name in ("task1290_xsum_summarization", "task1572_samsum_summary", "task618_x_summary_text_generation"):
        (folder / "summaries" / "train" / f"{name}_train.jsonl").write_text(json.dumps(task) + "\n")
    (folder / "summaries" / "train" / "task1309_amazonreview_summary_classification_train.jsonl").write_text("{}\n")
    names = yaml.safe_load((recipes_folder() / "tasks.yaml").read_text())
    return {task["dataset"]: str(folder / name) for name, task in names.items()}


@pytest.fixture
def with_tiny_pair(tmp_path, pair, published):
    """Copies a shipped recipe to the same path below `tmp_path`, with the tiny pair and data in place of the names."""

    def copy(path: str, model: dict) -> Path:
        recipe = yaml.safe_load((recipes_folder() / path).read_text())
        changes = {model["base"]: pair[0], model["instruct"]: pair[1], **published}
        text = json.dumps(recipe)
        for name, replacement in changes.items():
            text = text.replace(f'"{name}"', f'"{replacement}"')
        recipe = {**json.loads(text), "use_cpu": True, "disable_tqdm": True}
        for key in ("model_revision", "instruct_model_revision"):
            recipe.pop(key, None)
        target = tmp_path / "recipes" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(yaml.safe_dump(recipe))
        return target

    return copy
