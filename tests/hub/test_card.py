"""The card of a merged model: what it says, that it says it of any merge, and that it shows on the Hub."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file

from gift_trl import GIFTConfig, GIFTSFTTrainer
from gift_trl.cards import may_be_replaced
from gift_trl.hub import EvaluationResult, write_merged_card
from gift_trl.merging import MergeRecipe, merge_recipe, verify_recipe
from gift_trl.scripts.merge import main as merge_command
from gift_trl.scripts.push import main as push_command


TOKEN = "hf_canaryThatMustBeReadNowhere"
LICENCE = (
    "---\nlicense: llama3.1\nlicense_link: LICENSE\nbase_model: org/Tiny\n---\n# Instruct\n\nThe instruct card.\n"
)
EVALUATION = [
    EvaluationResult(
        "MATH-500", "math_accuracy", 0.4321, 0.41, 0.46, 0.4, 500, "HuggingFaceH4/MATH-500", None, "test"
    ),
    EvaluationResult("ours", "exact_match", 0.5),
]


@pytest.fixture(scope="module")
def canary(tmp_path_factory) -> Path:
    """A folder whose name, like the token, may be read nowhere."""
    return tmp_path_factory.mktemp("canary_path")


@pytest.fixture(scope="module")
def sources(canary, pair, conversations) -> dict[str, Path]:
    """Base model, instruct model with a licence, and adapter trained with both."""
    instruct = canary / "instruct"
    shutil.copytree(pair[1], instruct)
    (instruct / "README.md").write_text(LICENCE)
    (instruct / "LICENSE").write_text("the licence")
    args = GIFTConfig(
        output_dir=str(canary / "adapter"),
        instruct_model_name_or_path=str(instruct),
        annotation_cache_dir=str(canary / "annotations"),
        per_device_train_batch_size=4,
        num_train_epochs=4,
        learning_rate=0.01,
        logging_steps=1,
        save_strategy="no",
        hub_token=TOKEN,
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    trainer = GIFTSFTTrainer(pair[0], args, train_dataset=conversations, peft_config=lora)
    trainer.train()
    trainer.save_model()
    return {"base": Path(pair[0]), "instruct": instruct, "adapter": canary / "adapter"}


@pytest.fixture(scope="module")
def merged(canary, sources) -> Path:
    recipe = MergeRecipe(str(sources["instruct"]), [str(sources["adapter"])], base_model=str(sources["base"]))
    merge_recipe(recipe, canary / "merged")
    verify_recipe(canary / "merged", recipe)
    return canary / "merged"


@pytest.fixture
def folder(merged, tmp_path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "merged"))


@pytest.fixture
def on_hub(folder) -> Path:
    """The same merge, as if everything had come from the Hub."""
    report = json.loads((folder / "merge_report.json").read_text())
    report |= {"instruct_model": "org/Tiny-Instruct", "instruct_model_commit": "1" * 40}
    report["recipe"] |= {"instruct_model": "org/Tiny-Instruct", "base_model": "org/Tiny"}
    adapter, base = report["updates"]
    adapter |= {"name": "me/adapter", "commit": "2" * 40}
    base["commit"] = "3" * 40
    adapter["training"]["datasets"] = [{"name": "AI-MO/NuminaMath-CoT", "commit": "4" * 40, "on_hub": True}]
    (folder / "merge_report.json").write_text(json.dumps(report))
    return folder


def read_card(folder: Path, **kwargs) -> ModelCard:
    assert write_merged_card(folder, **kwargs)
    return ModelCard.load(folder / "README.md")


def check_metadata(data: dict) -> None:
    """The rules of the Hub for the metadata of a card (hub-docs, modelcard.md)."""
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert data.get("base_model_relation", "merge") == "merge"
    for name in [*data.get("base_model", []), *data.get("datasets", [])]:
        validate_repo_id(name)
    assert all(isinstance(tag, str) for tag in data["tags"])
    assert data.get("license_link", "LICENSE") in ("LICENSE", "LICENSE.md") or "://" in data["license_link"]
    for model in data.get("model-index", []):
        for result in model["results"]:
            assert result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]
            assert all(metric["type"] and isinstance(metric["value"], float) for metric in result["metrics"])


def check_text(card: ModelCard, folder: Path, *canaries: str) -> None:
    """Every picture is there, no address is empty, no placeholder and nothing private is left."""
    for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", card.text):
        with Image.open(folder / picture) as image:
            assert image.format == "PNG" and image.size[0] > 300
    text = card.content
    for left in ("More Information Needed", "None", "nan", "]()", "{", "TODO"):
        assert left not in re.sub(r"```.*?```", "", text, flags=re.DOTALL), left
    assert not [word for word in (TOKEN, *canaries) if word in text]
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_card_of_models_on_the_hub(on_hub, canary):
    card = read_card(on_hub, repo_id="me/merged", evaluation=EVALUATION)
    data = card.data.to_dict()
    check_metadata(data)
    check_text(card, on_hub, str(canary), canary.name)
    assert data["base_model"] == ["org/Tiny-Instruct", "org/Tiny"]
    assert data["tags"] == ["trl", "gift", "lora", "merge"] and data["datasets"] == ["AI-MO/NuminaMath-CoT"]
    assert (data["license"], data["license_link"]) == ("llama3.1", "LICENSE")
    assert ModelCardData(**data).to_dict() == data
    (result,) = card.data.eval_results  # the other one has no data on the Hub
    assert (result.dataset_type, result.dataset_split, result.metric_value) == (
        "HuggingFaceH4/MATH-500",
        "test",
        43.21,
    )
    text = card.text
    assert "| MATH-500 | math_accuracy | 43.2 (41.0–46.0) | 40.0 | 500 |" in text
    assert "| ours | exact_match | 50.0 |  |  |" in text
    assert (
        "merged is [org/Tiny-Instruct](https://huggingface.co/org/Tiny-Instruct), adapted to "
        "[AI-MO/NuminaMath-CoT](https://huggingface.co/datasets/AI-MO/NuminaMath-CoT) with GIFT" in text
    )
    assert f"[`{'2' * 12}`](https://huggingface.co/me/adapter/tree/{'2' * 40})" in text
    assert f"https://huggingface.co/datasets/AI-MO/NuminaMath-CoT/tree/{'4' * 40}" in text
    for setting in ("| confidence_exponent | 1.0 |", "| eos_confidence | 1.0 |", "| r | 4 |", "| scale λ | 1 |"):
        assert setting in text
    assert "learning_signal.png" in text and "kinship.png" in text and "| same likeliest token | 100.0 % |" in text
    assert "eprint        = {2605.01256}" in text and "@software{trl" in text and "The instruct card" not in text
    # The next card of this folder keeps the figures
    assert read_card(on_hub, repo_id="me/merged").content == card.content


def test_card_of_local_models(folder, canary):
    card = read_card(folder)
    data = card.data.to_dict()
    check_metadata(data)
    check_text(card, folder, str(canary), canary.name)
    assert not data.keys() & {"base_model", "base_model_relation", "datasets", "model-index"}
    assert "merged is `instruct`, adapted with GIFT" in card.text
    fingerprint = json.loads((folder / "merge_report.json").read_text())["instruct_model_fingerprint"]
    assert f"| instruct model | `instruct` | weights `{fingerprint[:12]}` |" in card.text


def test_the_snippet_runs(folder, capsys):
    card = read_card(folder, repo_id="me/merged", revision="step-000100")
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert 'model="me/merged", revision="step-000100"' in snippet
    code = snippet.replace('"me/merged"', repr(str(folder))).replace("max_new_tokens=256", "max_new_tokens=4")
    exec(code, {})
    assert capsys.readouterr().out.strip()
    (folder / "chat_template.jinja").unlink()
    card = read_card(folder, repo_id="me/merged")
    assert "messages" not in card.text
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    exec(snippet.replace('"me/merged"', repr(str(folder))).replace("max_new_tokens=64", "max_new_tokens=4"), {})
    assert "The capital of France is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"README.md": LICENCE, "LICENSE": "x"}, {"license": "llama3.1", "license_link": "LICENSE"}),
        ({"README.md": LICENCE}, {"license": "llama3.1"}),
        (
            {
                "README.md": "---\nlicense: other\nlicense_name: own-1\nlicense_link: ./LICENSE.md\n---\n",
                "LICENSE.md": "x",
            },
            {"license": "other", "license_name": "own-1", "license_link": "LICENSE.md"},
        ),
        (
            {"README.md": "---\nlicense: other\nlicense_link: https://example.org/a\n---\n"},
            {"license": "other", "license_link": "https://example.org/a"},
        ),
        (
            {"LICENSE.txt": "x"},
            {"license": "other", "license_link": "https://huggingface.co/me/merged/blob/main/LICENSE.txt"},
        ),
        ({"README.md": "---\n: [\n---\n"}, {}),
        ({"README.md": "no metadata"}, {}),
    ],
)
def test_the_licence_is_the_instruct_models(sources, tmp_path, files, expected):
    instruct = Path(shutil.copytree(sources["instruct"], tmp_path / "instruct"))
    for name in ("README.md", "LICENSE"):
        (instruct / name).unlink()
    for name, text in files.items():
        (instruct / name).write_text(text)
    merge_recipe(MergeRecipe(str(instruct), [str(sources["adapter"])]), tmp_path / "merged")
    card = read_card(tmp_path / "merged", repo_id="me/merged")
    check_metadata(card.data.to_dict())
    check_text(card, tmp_path / "merged", str(tmp_path))
    assert {name: value for name, value in card.data.to_dict().items() if name.startswith("license")} == expected
    assert ("## Licence" in card.text) == bool(expected)


def test_cards_of_other_merges(sources, tmp_path):
    """Several adapters, methods that read the base model, a tuned model, and an adapter of another library."""
    foreign = Path(shutil.copytree(sources["adapter"], tmp_path / "foreign"))
    for name in ("gift_training.json", "README.md"):
        (foreign / name).unlink()
    factors = load_file(foreign / "adapter_model.safetensors")
    save_file({name: -value for name, value in factors.items()}, foreign / "adapter_model.safetensors")
    names = {name: str(path) for name, path in sources.items()}
    instruct, adapter, base = names["instruct"], names["adapter"], names["base"]
    recipes = {
        "foreign": MergeRecipe(instruct, [str(foreign)], scale=0.5),
        "ties": MergeRecipe(instruct, [adapter, str(foreign)], adapter_weight=[0.7, 0.3], method="ties", density=0.5),
        "re_adapt": MergeRecipe(instruct, [adapter], method="re_adapt", base_model=base, instruct_weight=0.9),
        "full_delta": MergeRecipe(instruct, method="full_delta", base_model=base, tuned_model=instruct),
    }
    cards = {}
    for name, recipe in recipes.items():
        merged = tmp_path / "merged" / name
        merge_recipe(recipe, merged)
        cards[name] = read_card(merged, repo_id=f"me/{name}")
        check_metadata(cards[name].data.to_dict())
        check_text(cards[name], merged, str(tmp_path), *names.values())
    foreign_card = cards["foreign"]
    assert "foreign is `instruct`, merged with the update of the adapter `foreign`, trained on" in foreign_card.text
    assert foreign_card.data.tags == ["gift", "lora", "merge"] and "## Training" not in foreign_card.text
    assert "| scale λ | 0.5 |" in foreign_card.text
    assert "| weight of `foreign` | 0.3 |" in cards["ties"].text and "| density | 0.5 |" in cards["ties"].text
    assert "| instruct_weight | 0.9 |" in cards["re_adapt"].text
    assert "plus the difference between `instruct` and the base model `base`" in cards["full_delta"].text
    assert cards["full_delta"].data.tags == ["gift", "merge"]


def test_the_loss_is_named_as_it_was(folder):
    report = json.loads((folder / "merge_report.json").read_text())
    for settings, words in (
        ({"confidence_exponent": 0.0}, "with plain cross-entropy"),
        ({"annotator": "base"}, "weighted by the probability that the base model gave to it"),
        ({}, "weighted by the probability that the instruct model gives to it"),
    ):
        training = report["updates"][0]["training"]
        training["settings"] |= {"confidence_exponent": 1.0, "annotator": "instruct", **settings}
        training["signal"] = {name: values[:1] for name, values in training["signal"].items()}  # a single log
        (folder / "merge_report.json").write_text(json.dumps(report))
        card = read_card(folder)
        assert words in card.text
        check_text(card, folder)


def test_the_command_writes_a_card(sources, tmp_path):
    models = ["--adapter", str(sources["adapter"]), "--instruct_model", str(sources["instruct"])]
    merge_command([*models, "--output_dir", str(tmp_path / "merged"), "--verify", "--verify_max_new_tokens", "1"])
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    check_text(card, tmp_path / "merged", str(tmp_path))
    assert card.data.license == "llama3.1" and "### Verification" in card.text


def validate(card: str) -> None:
    ModelCard.load(card).validate()


def test_a_push_writes_the_card_that_is_missing(server, client, folder, canary):
    client(push_command, [str(folder), "--repo_id", "pushed", "--revision", "step-000100"])
    branch = server.files("model", "user/pushed", "step-000100")
    assert b'model="user/pushed", revision="step-000100"' in branch["README.md"]
    assert {"learning_signal.png", "kinship.png", "merge_report.json", "LICENSE"} <= branch.keys()
    assert not [
        name for name, content in branch.items() if TOKEN.encode() in content or str(canary).encode() in content
    ]
    client(validate, folder / "README.md")
    # Again, the card stays as it is; for another repository it is made again
    for _ in range(2):
        client(push_command, [str(folder), "--repo_id", "user/other"])
    assert len(server.repositories["model", "user/other"].commits) == 2
    assert b'model="user/other", dtype' in server.files("model", "user/other")["README.md"]
    # What its writer said elsewhere is known no more, and stays
    write_merged_card(folder, repo_id="user/third", adapter_id="user/adapter")
    client(push_command, [str(folder), "--repo_id", "user/third"])
    assert b"[user/adapter](" in server.files("model", "user/third")["README.md"]


def test_a_card_that_a_person_changed_stays(folder, caplog):
    card = folder / "README.md"
    read_card(folder)
    assert may_be_replaced(card)
    card.write_text(card.read_text().replace("## Use", "## What we found\n\nMuch.\n\n## Use"))
    assert not write_merged_card(folder, repo_id="me/merged")
    assert "Much." in card.read_text() and "was written or changed by a person" in caplog.text


def test_a_card_never_costs_a_merge(folder, caplog):
    (folder / "merge_report.json").write_text("{")
    assert not write_merged_card(folder)
    assert "The model card was not written" in caplog.text
    os.unlink(folder / "merge_report.json")
    with pytest.raises(FileNotFoundError, match=r"its card is yours to write \(README.md\)"):
        write_merged_card(folder)
