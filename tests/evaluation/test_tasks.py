"""Tasks: what YAML says is what is asked, and what cannot be asked is refused or listed."""

import json

import pytest
from datasets import Dataset, DatasetDict

from gift_trl.evaluation.tasks import find_answer, load_task, load_task_data
from gift_trl.scripts.recipes import recipes_folder


@pytest.fixture
def write_rows(tmp_path, sums):
    """Fields of a task on the given rows."""

    def write(*rows, **changes):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_task({**sums, "dataset": str(tmp_path / "rows.jsonl"), **changes})

    return write


def test_a_task_by_path_is_the_task_inline_and_changes_win_field_by_field(tmp_path, sums):
    path = tmp_path / "added.yaml"
    path.write_text(json.dumps({key: value for key, value in sums.items() if key != "name"}))
    assert load_task(str(path)).name == "added"
    changed = load_task({"task": str(path), "name": "sums", "sampling": {"n": 5}, "prompt": {"system": "Add."}})
    assert (changed.sampling.n, changed.sampling.max_new_tokens) == (5, 12)
    assert load_task({"task": str(path), "name": "sums"}) == load_task(sums)
    assert load_task(str(path), limit=2, sampling={"max_new_tokens": 3}).sampling.max_new_tokens == 3


def test_questions_answers_and_kept_columns(sums):
    sums |= {"prompt": {"system": "Add {uid}.", "user": "{question} Write \\boxed{{}}."}, "limit": 3}
    data = load_task_data(load_task(sums))
    assert data.skipped == () and [problem.index for problem in data.problems] == [0, 1, 2]
    assert data.problems[1].messages == (
        {"role": "system", "content": "Add row-0-1."},
        {"role": "user", "content": "What is 0 plus 1? Write \\boxed{}."},
    )
    assert data.problems[1].reference == "1" and data.problems[1].fields == {"uid": "row-0-1"}
    assert data.digest != load_task_data(load_task({**sums, "limit": 2})).digest


@pytest.mark.parametrize(
    ("answer", "form", "letter"),
    [
        (1, None, "B"),
        ("C", None, "C"),
        ("(c)", None, "C"),
        ("red", None, "A"),
        (" red ", "text", "A"),
        ("2", "index", "C"),
        ("0", None, "D"),  # a text is never taken for an index unless it is said to be one
        ("0", "index", "A"),
        ("A", "text", "B"),
        ("A", "letter", "A"),
    ],
)
def test_the_right_choice(write_rows, answer, form, letter):
    row = {"ask": "?", "right": answer, "options": ["red", "A", "blue", "0"]}
    names = {"question": "ask", "answer": "right", "choices": "options", "answer_form": form}
    task = write_rows(row, fields=names, prompt={"user": "{question}\n{choices}"})
    (problem,) = load_task_data(task).problems
    assert problem.reference == letter
    assert problem.messages[0]["content"] == "?\nA. red\nB. A\nC. blue\nD. 0"
    assert problem.fields["choices"] == ["red", "A", "blue", "0"]


def test_choices_from_columns_and_from_a_dictionary(write_rows):
    fields = {"question": "ask", "answer": "right", "choices": ["one", "two"]}
    task = write_rows({"ask": "?", "right": 1, "one": "x", "two": 3.0}, fields=fields)
    assert load_task_data(task).problems[0].fields["choices"] == ["x", "3"]
    fields = {"question": "ask", "answer": "right", "choices": "options"}
    task = write_rows({"ask": "?", "right": "B", "options": {"B": "y", "A": "x"}}, fields=fields)
    assert load_task_data(task).problems[0].fields["choices"] == ["x", "y"]
    assert load_task_data(task).problems[0].reference == "B"


@pytest.mark.parametrize(
    ("right", "names", "reference"),
    [
        (["4"], {}, "4"),
        (["4", "four"], {}, ["4", "four"]),
        (["4", "5"], {"answer_list": "all"}, "4, 5"),
        ("2 + 2 = 4\n#### 4", {"answer_pattern": r"#### (.*)"}, "4"),
        (4.0, {}, "4"),
        (True, {}, "True"),
    ],
)
def test_references(write_rows, right, names, reference):
    task = write_rows({"ask": "?", "right": right}, fields={"question": "ask", "answer": "right", **names})
    assert load_task_data(task).problems[0].reference == reference


def test_rows_that_cannot_be_asked_are_listed(write_rows):
    fields = {"question": "ask", "answer": "right", "choices": "options"}
    good = {"ask": "?", "right": "a", "options": ["a", "b"]}
    changes = [{}, {"right": None}, {"ask": " "}, {"options": []}, {"right": "c"}]
    data = load_task_data(write_rows(*({**good, **change} for change in changes), fields=fields))
    assert [problem.index for problem in data.problems] == [0]
    assert [(skip.problem, skip.reason) for skip in data.skipped] == [
        (1, "no answer in the column `right`"),
        (2, "no question in the column `ask`"),
        (3, "no choices in `options`"),
        (4, "the answer 'c' is none of the 2 choices"),
    ]


def test_an_ambiguous_answer_is_listed(write_rows):
    fields = {"question": "ask", "answer": "right", "choices": "options"}
    rows = [{"ask": "?", "right": right, "options": ["B", "A"]} for right in ("x", "A", "a")]
    rows[0]["options"] = ["x", "y"]
    data = load_task_data(write_rows(*rows, fields=fields))
    assert [problem.reference for problem in data.problems] == ["A", "A"]
    assert "letter of one choice and the text of another: set `fields.answer_form`" in data.skipped[0].reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sampling": {"max_new_tokens": 8, "temprature": 1}},
            "`sampling` has no field `temprature`: its fields are max_new",
        ),
        ({"sampling": {"n": 2}}, "`sampling` needs `max_new_tokens`"),
        ({"sampling": {"max_new_tokens": "1e3"}}, "`max_new_tokens` is '1e3', and has to be int"),
        ({"sampling": {"max_new_tokens": True}}, "`max_new_tokens` is True"),
        ({"sampling": {"max_new_tokens": 8, "top_p": 0}}, "`sampling.top_p` is 0: it has to be above 0 and up to 1"),
        ({"sampling": {"max_new_tokens": 8, "temperature": 0, "n": 2}}, "all 2 answers are the same: set `n` to 1"),
        ({"sampling": 3}, "`sampling` is 3: write a mapping"),
        ({"metric": "accuracy"}, "there is no metric 'accuracy': use one of exact_match"),
        ({"role": "goal"}, "`role` is 'goal', and has to be Literal"),
        ({"limit": 0}, "`limit` is 0"),
        ({"name": "a/b"}, "'a/b' cannot be the name of a task"),
        ({"answer_pattern": "("}, "`answer_pattern` is no regular expression"),
        (
            {"prompt": {"user": "{question}\\boxed{}"}},
            "`prompt.user` cannot be filled in: `{}` names no column. Write `{{`",
        ),
        ({"prompt": {"user": "{question"}}, "`prompt.user` cannot be filled in"),
        ({"prompt": {"user": "{choices}"}}, "`{choices}` needs `fields.choices`"),
        ({"prompt": {"user": "{question.__class__}"}}, "names no column"),
        ({"metrics": "rouge"}, "Task `sums` has no field `metrics`"),
    ],
)
def test_what_a_task_cannot_say(sums, change, message):
    with pytest.raises(ValueError) as error:
        load_task({**sums, **change})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"fields": {"question": "asked", "answer": "right"}},
            "has the columns uid, ask, right, and no column `asked`",
        ),
        ({"prompt": {"user": "{level}"}}, "no column `level`"),
        (
            {"fields": {"question": "ask", "answer": "ask", "choices": "uid"}},
            "none of the 6 rows .* no choices in `uid`",
        ),
        ({"dataset": "nowhere.jsonl"}, "There is no file `nowhere.jsonl`"),
        ({"dataset": "nobody/nothing"}, "`nobody/nothing` .* cannot be loaded: .* name a local copy"),
    ],
)
def test_data_that_does_not_fit(sums, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_task_data(load_task({**sums, **change}))


@pytest.mark.parametrize("content", ["", "no json\n", "[]"])
def test_a_file_without_rows(tmp_path, sums, content):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"rows\.jsonl` cannot be read, or holds no rows: .*Check the data"):
        load_task_data(load_task({**sums, "dataset": str(tmp_path / "rows.jsonl")}))


def test_splits(tmp_path, sums):
    rows = Dataset.from_dict({"ask": ["?", "!"], "right": ["x", "y"]})
    DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "saved"))
    sums |= {"dataset": str(tmp_path / "saved"), "fields": {"question": "ask", "answer": "right"}}
    assert [problem.reference for problem in load_task_data(load_task(sums)).problems] == ["y"]
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\], and no split `dev`"):
        load_task_data(load_task({**sums, "split": "dev"}))
    DatasetDict({"train": rows, "test": rows.select([])}).save_to_disk(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"empty` cannot be read, or holds no rows: .*Check the data"):
        load_task_data(load_task({**sums, "dataset": str(tmp_path / "empty")}))


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (r"#### (\S+)", "so #### 3\n#### 4 x", "4"),
        (r"#### (\S+)", "3", None),
        (r"\d+", "1 2", "2"),
        (r"(#### \S+)(?!.*#### )|^((?:(?!#### ).)*)$", "a\nb", "a\nb"),
        (r"(#### \S+)(?!.*#### )|^((?:(?!#### ).)*)$", "a #### 1 #### 2 .", "#### 2"),
    ],
)
def test_find_answer(pattern, text, answer):
    assert find_answer(pattern, text) == answer


def test_a_task_that_is_nowhere():
    with pytest.raises(FileNotFoundError, match="There is no task 'math_500'"):
        load_task("math_500", recipes_folder() / "evaluation")
