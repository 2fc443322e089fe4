"""A whole run from models and data on a Hub to a model page there: what it says, that it loads, and that no token is left."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from hub_server import HubServer, client_process
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from gift_trl.scripts import annotate, evaluate, make_pair, merge, push, recipe, report, sweep, train
from gift_trl.scripts.cli import run


pytestmark = pytest.mark.slow
TOKEN = "hf_canaryThatMustBeReadNowhere"
IDS = [[1, 20, 30, 40], [1, 7, 300, 2]]
COMMANDS = {
    "annotate": annotate,
    "evaluate": evaluate,
    "make-pair": make_pair,
    "merge": merge,
    "push": push,
    "recipe": recipe,
    "report": report,
    "sweep": sweep,
    "train": train,
}


def run_command(name: str, *arguments: str) -> None:
    run(COMMANDS[name].main, list(arguments))


def push_data(repo_id: str, rows: list[dict], split: str) -> None:
    Dataset.from_list(rows).push_to_hub(repo_id, split=split)


def load(repo_id: str) -> tuple[str, list, str]:
    """Folder of a snapshot, logits of the model that is loaded by its id, and the chat template."""
    folder = snapshot_download(repo_id)
    model = AutoModelForCausalLM.from_pretrained(repo_id)
    with torch.no_grad():
        logits = model(torch.tensor(IDS)).logits.tolist()
    return folder, logits, AutoTokenizer.from_pretrained(repo_id).chat_template


def run_snippet(repo_id: str) -> str:
    card = ModelCard.load(repo_id)
    card.validate()
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    with redirect_stdout(io.StringIO()) as output:
        exec(snippet, {})
    return output.getvalue()


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("private_folder")


@pytest.fixture(scope="module")
def server(work):
    with HubServer(token=TOKEN, root=work / "hub") as server:
        yield server


@pytest.fixture(scope="module")
def client(server, work):
    with client_process(server.environment(work / "home"), work / "output.txt") as call:
        yield call


@pytest.fixture(scope="module")
def finished(server, client, work, pair, conversations) -> Path:
    """Every command, one after the other, with what the one before pushed."""
    base, instruct = map(Path, pair)
    for folder, name in ((base, "base"), (instruct, "instruct")):
        client(run_command, "push", str(folder), "--repo_id", f"user/{name}")
    licence = {"README.md": b"---\nlicense: apache-2.0\nbase_model: user/base\n---\n# Instruct\n", "LICENSE": b"text"}
    server.commit("model", "user/instruct", licence)
    rows = [{"question": q[0]["content"], "answer": a[0]["content"]} for q, a in map(dict.values, conversations)]
    client(push_data, "user/data", rows, "train")
    client(push_data, "user/questions", rows[:4], "test")
    settings = {
        "model_name_or_path": "user/base",
        "instruct_model_name_or_path": "user/instruct",
        "dataset_name": "user/data",
        "prompt_column": "question",
        "completion_column": "answer",
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": ["q_proj", "v_proj", "down_proj"],
        "output_dir": str(work / "adapter"),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(settings))
    config = ("--config", str(work / "recipe.yaml"))
    annotated, merged = str(work / "annotated"), str(work / "merged")
    client(run_command, "annotate", *config, "--annotation_output_dir", annotated, "--hub_dataset_id", "user/scored")
    client(run_command, "report", "annotation", annotated, "--output", str(work / "annotated.html"))
    client(run_command, "train", *config)
    adapter = ("--adapter", str(work / "adapter"), "--instruct_model", "user/instruct", "--base_model", "user/base")
    client(run_command, "merge", *adapter, "--output_dir", merged, "--verify", "--verify_max_new_tokens", "1")
    task = {"dataset": "user/questions", "split": "test", "sampling": {"max_new_tokens": 4}, "metric": "exact_match"}
    (work / "colours.yaml").write_text(yaml.safe_dump(task))
    evaluation = ("--tasks", str(work / "colours.yaml"), "--output_dir", str(work / "results"), "--use_cpu")
    client(run_command, "evaluate", "--models", f"merged={merged}", "instruct=user/instruct", *evaluation)
    client(
        run_command, "report", str(work / "results"), "--output", str(work / "report"), "--card", f"merged={merged}"
    )
    conversations.to_json(work / "rows.jsonl")
    rows_file = ("--dataset", str(work / "rows.jsonl"))
    client(run_command, "sweep", *adapter[:4], *rows_file, "--scales", "1", "--output_dir", str(work / "sweep"))
    Dataset.from_list(rows).to_json(work / "texts.jsonl")
    texts = ("--dataset", str(work / "texts.jsonl"), "--text_columns", "question", "answer")
    client(run_command, "make-pair", *texts, "--output_dir", str(work / "pair"), "--hidden_size", "32")
    written = ("--output", str(work / "written.yaml"))
    client(run_command, "recipe", "--base", "user/base", "--instruct", "user/instruct", *rows_file, *written)
    client(run_command, "push", str(work / "adapter"), "--repo_id", "user/adapter", "--private")
    client(run_command, "push", merged, "--repo_id", "user/merged", "--tag", "v1")
    return work


def test_it_loads_elsewhere(server, finished, tmp_path):
    """By other processes, with the Hub's cache empty: the very model that was merged."""
    with client_process(server.environment(tmp_path / "home"), finished / "elsewhere.txt") as elsewhere:
        folder, logits, template = elsewhere(load, "user/merged")
        local = AutoModelForCausalLM.from_pretrained(finished / "merged")
        with torch.no_grad():
            assert torch.equal(torch.tensor(logits), local(torch.tensor(IDS)).logits)
        assert template == AutoTokenizer.from_pretrained(finished / "merged").chat_template
        assert {path.name for path in Path(folder).iterdir()} >= {
            path.name for path in (finished / "merged").iterdir()
        }
        assert elsewhere(run_snippet, "user/merged").strip()


def test_the_card_says_all(server, finished):
    card = ModelCard(server.files("model", "user/merged", "v1")["README.md"].decode())
    data, text = card.data.to_dict(), card.text
    assert data["base_model"] == ["user/instruct", "user/base"] and data["base_model_relation"] == "merge"
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == (
        "transformers",
        "text-generation",
        "apache-2.0",
    )
    assert data["tags"] == ["trl", "gift", "lora", "merge"] and data["datasets"] == ["user/data"]
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_split, result.metric_type) == ("user/questions", "test", "exact_match")
    introduction = text.split("\n\n")[1]
    assert len(re.findall(r"\.(?: |$)", introduction)) == 2, introduction
    for kind, name in (("model", "instruct"), ("model", "base"), ("dataset", "data")):
        sha = server.repositories[kind, f"user/{name}"].branches["main"].sha
        part = "datasets/" if kind == "dataset" else ""
        assert f"[user/{name}](https://huggingface.co/{part}user/{name}) | [`{sha[:12]}`](" in text, name
    assert re.search(r"\| adapter \| `adapter` \| weights `[0-9a-f]{12}` \|", text)
    for words in (
        "| confidence_exponent | 1.0 |",
        "| r | 4 |",
        "| scale λ | 1 |",
        "### Kinship",
        "| ‖M‖ / ‖θ_I − θ_B‖ | 0.",
        "### Verification",
        "| same likeliest token |",
        "| colours | exact_match | ",
        "![Shares of the training loss",
        "eprint        = {2605.01256}",
        "@software{trl",
        "- transformers ",
        "The licence of the instruct model [user/instruct]",
    ):
        assert words in text, words
    pushed = server.files("model", "user/merged", "v1")
    assert {"learning_signal.png", "kinship.png", "evaluation.json", "merge_recipe.yaml", "LICENSE"} <= pushed.keys()


def test_nothing_private_is_left(server, finished):
    """Neither the token, in any file of any command, on the Hub or in what was printed, nor a path of this machine there."""
    written = [path for path in finished.rglob("*") if path.is_file()]
    assert len(written) > 50 and (finished / "output.txt").stat().st_size > 1000
    assert not [str(path) for path in written if TOKEN.encode() in path.read_bytes()]
    for (kind, name), repository in server.repositories.items():
        for path, content in server.files(kind, name).items():
            assert finished.name.encode() not in content, (name, path)
        assert repository.private == (name == "user/adapter")
