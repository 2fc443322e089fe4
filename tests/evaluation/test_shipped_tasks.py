"""The shipped tasks: each is asked as it should be on rows with the columns that its dataset is published with."""

import json
from fnmatch import fnmatch

import pytest
import yaml

from gift_trl.evaluation.tasks import load_task, load_task_data
from gift_trl.scripts.recipes import recipes_folder


FOLDER = recipes_folder() / "evaluation"
OPTIONS = ["red", "blue", "green", "grey"]
LETTERED = "Which?\n\nA. red\nB. blue\nC. green\nD. grey\n\nPlease reason step by step, and end with"
# A row as published, the reference, and the columns that are kept
ROWS = {
    "math500": (
        {"problem": "Q", "solution": "S", "answer": "\\frac12", "subject": "Algebra", "level": 2, "unique_id": "u"},
        "\\frac12",
        {"unique_id": "u", "subject": "Algebra", "level": 2},
    ),
    "minerva_math": ({"question": "Q", "answer": "7.5e6"}, "7.5e6", {}),
    "olympiadbench": ({"id": 1, "question": "Q", "solution": ["S"], "final_answer": ["2", "3"]}, "2, 3", {}),
    "aime24": (
        {"id": 60, "problem": "Q", "solution": "S", "answer": "204", "url": "-", "year": "2024"},
        "204",
        {"id": 60},
    ),
    "amc23": ({"id": 0, "question": "Q", "answer": "27.0", "url": "-"}, "27.0", {"id": 0}),
    "gsm8k": ({"question": "Q", "answer": "6 + 6 = <<6+6=12>>12\n#### 1,200"}, "1,200", {}),
    "medqa": (
        {
            "question": "Which?",
            "answer": "green",
            "options": dict(zip("ABCD", OPTIONS, strict=True)),
            "meta_info": "step1",
            "answer_idx": "C",
            "metamap_phrases": [],
        },
        "C",
        {"choices": OPTIONS},
    ),
    "medmcqa": (
        {
            "id": "i",
            "question": "Which?",
            **dict(zip(("opa", "opb", "opc", "opd"), OPTIONS, strict=True)),
            "cop": 1,
            "choice_type": "single",
            "exp": None,
            "subject_name": "Anatomy",
            "topic_name": None,
        },
        "B",
        {"id": "i", "choice_type": "single", "subject_name": "Anatomy", "choices": OPTIONS},
    ),
    "mmlu_medical": (
        {"question": "Which?", "subject": "anatomy", "choices": OPTIONS, "answer": 0},
        "A",
        {"subject": "anatomy", "choices": OPTIONS},
    ),
    "superni_summaries": (
        {"task_name": "task288_gigaword_summarization", "id": "i", "definition": "D", "inputs": "Q", "targets": "A"},
        "A",
        {"id": "i", "task_name": "task288_gigaword_summarization"},
    ),
}
ROWS["superni_summaries_em"] = ROWS["superni_summaries"]


def test_every_shipped_task_is_tried_here():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(ROWS)


@pytest.mark.parametrize("name", list(ROWS))
def test_shipped_task(name, tmp_path):
    row, reference, fields = ROWS[name]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    task = load_task(name, FOLDER)
    assert task.name == name and task.role == "target" and "/" in task.dataset
    local = {"task": name, "dataset": str(tmp_path / "rows.jsonl"), "data_files": None}
    (problem,) = load_task_data(load_task(local, FOLDER)).problems
    assert (problem.reference, problem.fields) == (reference, fields)
    system, user = problem.messages
    assert system == {"role": "system", "content": "You are a helpful assistant."}
    if name.startswith("superni"):
        assert user["content"] == "D\n\nQ"
        assert (task.sampling.temperature, task.sampling.max_new_tokens, task.sampling.n) == (0, 128, 1)
        assert task.metric["name"] == ("exact_match" if name.endswith("_em") else "rouge")
    elif "choices" in fields:
        assert user["content"].startswith(LETTERED)
        assert (task.metric["name"], task.sampling.temperature, task.sampling.n) == ("multiple_choice_accuracy", 0, 1)
    else:
        # The paper's protocol
        assert user["content"] == "Q\nPlease reason step by step, and put your final answer within \\boxed{}."
        sampling = task.sampling
        assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.n) == (1.0, 1.0, 4096, 16)
        assert task.metric == {"name": "math_accuracy"}


def test_summaries_are_the_first_of_every_file(tmp_path):
    row, _, _ = ROWS["superni_summaries"]
    task = load_task("superni_summaries", FOLDER)
    for file in task.data_files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        lines = (json.dumps({**row, "inputs": f"{file} {number}"}) + "\n" for number in range(102))
        (tmp_path / file).write_text("".join(lines))
    data = load_task_data(load_task({"task": "superni_summaries_em", "dataset": str(tmp_path)}, FOLDER))
    assert len(data.problems) == 600 and len(task.data_files) == 6
    asked = [problem.messages[1]["content"] for problem in data.problems]
    assert asked[:100] == [f"D\n\n{task.data_files[0]} {number}" for number in range(100)]
    # What the recipes train on is none of them
    recipes = yaml.safe_load((FOLDER.parent / "tasks.yaml").read_text())
    (trained,) = recipes["summaries"]["data"]["datasets"]
    assert not any(fnmatch(file, pattern) for file in task.data_files for pattern in trained["data_files"])


def test_the_hidden_answers_of_medmcqas_test_split_are_no_answers(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({**ROWS["medmcqa"][0], "cop": -1}) + "\n")
    with pytest.raises(ValueError, match="the answer '-1' is none of the 4 choices"):
        load_task_data(load_task({"task": "medmcqa", "dataset": str(tmp_path / "rows.jsonl")}, FOLDER))
