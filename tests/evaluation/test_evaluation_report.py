"""The report on evaluations: its numbers against numpy's, its sentences against the intervals, and the page in a browser."""

import csv
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from PIL import Image
from report_data import task_config, write_results
from transformers import LlamaForCausalLM

from gift_trl import merge_adapter
from gift_trl.checkpoints import weights_fingerprint
from gift_trl.evaluation import report, report_figures
from gift_trl.evaluation.card import add_to_card
from gift_trl.evaluation.comparison import compare_results, mean_interval
from gift_trl.evaluation.paper import RESULTS, place_beside_paper
from gift_trl.evaluation.report import write_evaluation_report
from gift_trl.evaluation.report_examples import choose_examples
from gift_trl.evaluation.report_text import describe_findings, describe_warnings
from gift_trl.evaluation.results import Skip
from gift_trl.evaluation.run import evaluate
from gift_trl.evaluation.statistics import Interval, paired_difference
from gift_trl.evaluation.training_logs import read_training_signals
from gift_trl.scripts import report as command


BROWSER = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
RETENTION = {"facts": task_config("retention")}
INJECTION = "</div></script><script>alert(1)</script> <b>& `x`\n```\n\u202e שלום 世界"


def solved(problems: int, right: int, samples: int = 1) -> np.ndarray:
    """All samples of the first problems right, of the others wrong."""
    return np.repeat((np.arange(problems) < right).astype(float)[:, None], samples, axis=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three models on two target tasks and one of retention; `merged` gains on sums, loses on facts, is cut off on all."""
    scores = {
        ("instruct", "sums"): solved(200, 100, 4),
        ("merged", "sums"): solved(200, 120, 4),
        ("other", "sums"): np.random.default_rng(3).integers(0, 2, (200, 4)).astype(float),
        ("instruct", "words"): np.linspace(0, 1, 50)[:, None],
        ("merged", "words"): np.linspace(0, 1, 50)[:, None] ** 2,
        ("instruct", "facts"): solved(300, 240),
        ("merged", "facts"): solved(300, 210),
        ("other", "facts"): solved(300, 240),
    }
    return write_results(
        tmp_path_factory.mktemp("data") / "results",
        scores,
        tasks=RETENTION,
        truncated={"merged": 0.4, "instruct": 0.02, "other": 0.02},
        text=lambda model, problem, sample: f"{model} {problem}/{sample} {INJECTION}",
        skipped=(Skip(7, "no answer | <i>"), Skip(9, "no answer | <i>")),
    )


class Page(HTMLParser):
    """Tags with their attributes, and the text of the document."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


# Numbers


def test_differences_are_paired_and_their_intervals_those_of_the_statistics(folder):
    comparison = compare_results([folder])
    assert comparison.reference == "instruct" and comparison.others == ("merged", "other")
    random = np.random.default_rng(3).integers(0, 2, (200, 4)).mean(axis=1)
    found = comparison.differences["other", "sums"]
    assert found.interval == paired_difference(random, solved(200, 100)[:, 0])
    assert comparison.differences["merged", "sums"].interval.mean == pytest.approx(0.1)
    verdicts = {pair: difference.verdict for pair, difference in comparison.differences.items()}
    assert verdicts == {
        ("merged", "sums"): "above",
        ("other", "sums"): "undecided",
        ("merged", "words"): "below",
        ("merged", "facts"): "below",
        ("other", "facts"): "undecided",
    }
    assert comparison.roles == {"sums": "target", "words": "target", "facts": "retention"}
    interval, verdict = comparison.mean_difference("merged", ("facts",))
    assert (interval.mean, verdict) == (pytest.approx(-0.1), "below")
    assert comparison.mean_difference("other", ("sums", "words")) is None


def test_differences_are_over_the_problems_that_both_were_asked(tmp_path):
    write_results(tmp_path / "a", {("instruct", "sums"): solved(100, 50)})
    write_results(tmp_path / "b", {("merged", "sums"): solved(100, 100)}, first=40)
    comparison = compare_results([tmp_path / "a", tmp_path / "b"])
    difference = comparison.differences["merged", "sums"]
    assert difference.problems.tolist() == list(range(40, 100))
    assert difference.interval.mean == pytest.approx(50 / 60)
    assert "Only 60 of 100 problems of sums" in " ".join(describe_warnings(comparison))


def test_mean_of_tasks_adds_the_squares_of_the_intervals():
    found = mean_interval([Interval(0.5, 0.4, 0.7), Interval(0.3, 0.3, 0.3)])
    assert found == pytest.approx((0.4, 0.35, 0.5))
    assert mean_interval([Interval(0.5, 0.4, 0.7), None]) is None


def test_equal_scores_are_no_difference_whatever_the_order_of_their_sum(tmp_path):
    scores = np.tile([0.1, 0.1, 0.1, 0.3], (40, 1))
    assert sum(scores[0]) != sum(scores[0, ::-1])
    write_results(tmp_path / "a", {("instruct", "words"): scores, ("merged", "words"): scores[:, ::-1]})
    difference = compare_results([tmp_path / "a"]).differences["merged", "words"]
    assert difference.interval == (0, 0, 0) and difference.verdict == "undecided"


# Several folders


def test_folders_are_joined_and_names_have_to_mean_the_same(tmp_path):
    one = write_results(tmp_path / "one", {("instruct", "sums"): solved(40, 20), ("merged", "sums"): solved(40, 30)})
    facts = {("instruct", "facts"): solved(40, 20), ("third", "facts"): solved(40, 20)}
    two = write_results(tmp_path / "two", facts, tasks=RETENTION)
    comparison = compare_results([one, two, one])
    assert comparison.models == ("instruct", "merged", "third") and comparison.tasks == ("sums", "facts")

    settings = {"sums": task_config(sampling={"temperature": 0.5})}
    other = write_results(tmp_path / "other", {("merged", "sums"): solved(40, 30)}, tasks=settings)
    with pytest.raises(ValueError, match=r"the task `sums`: `sampling` is .*'temperature': 1.0.* and .*0.5"):
        compare_results([one, other])
    other = write_results(
        tmp_path / "model", {("merged", "facts"): solved(40, 30)}, models={"merged": {"model": "org/x"}}
    )
    with pytest.raises(ValueError, match="the model `merged`: `model` is 'org/merged' and 'org/x'"):
        compare_results([one, other])
    other = write_results(tmp_path / "fourth", {("fourth", "sums"): solved(40, 30)}, seeds=[1])
    assert "different seeds ([0] and [1])" in " ".join(describe_warnings(compare_results([one, other])))
    other = write_results(tmp_path / "seed", {("merged", "sums"): solved(40, 31)}, seeds=[1])
    with pytest.raises(ValueError, match="different results of the model `merged` on the task `sums`"):
        compare_results([one, other])


def test_reference_is_the_instruct_model_unless_another_is_named(tmp_path):
    scores = {("base", "sums"): solved(40, 10), ("instruct", "sums"): solved(40, 20)}
    one = write_results(tmp_path / "one", scores)
    two = write_results(tmp_path / "two", {("gift", "sums"): solved(40, 30)})
    assert compare_results([one]).reference == "instruct"
    assert compare_results([one, two], reference="base").reference == "base"
    assert compare_results([two]).reference == "gift"
    with pytest.raises(ValueError, match="no model `instuct` to compare with: the models are base, instruct"):
        compare_results([one], reference="instuct")
    three = write_results(tmp_path / "three", {("merged", "sums"): solved(40, 30)})
    with pytest.raises(ValueError, match=r"different baselines \(gift, merged\).*--reference"):
        compare_results([two, three])
    with pytest.raises(ValueError, match="no task `summs`"):
        compare_results([one], retention=["summs"])
    assert compare_results([one], retention=["sums"]).roles == {"sums": "retention"}


def test_incomplete_results_are_named_and_none_at_all_refused(tmp_path):
    scores = {("instruct", "sums"): solved(40, 20), ("merged", "sums"): solved(40, 20)}
    one = write_results(tmp_path / "one", scores)
    os.remove(one / "merged" / "sums" / "summary.json")
    assert "left out: merged on sums" in " ".join(describe_warnings(compare_results([one])))
    os.remove(one / "instruct" / "sums" / "summary.json")
    with pytest.raises(ValueError, match=r"No evaluation in .* is complete"):
        compare_results([one])


# Sentences


def test_sentences_follow_the_intervals(folder):
    comparison = compare_results([folder])
    text = " ".join(describe_findings(comparison))
    assert "merged is above instruct on the target task sums (+10.0 [" in text
    assert "merged is below instruct on the target task words (−" in text
    assert "merged is below instruct on the retention task facts (−10.0 [" in text
    assert "No difference between other and instruct is shown on the target task sums (" in text
    assert "No loss of other against instruct is shown on the retention task facts (0.0 [0.0, 0.0])." in text
    assert "5 differences are looked at" in text
    for better, worse in re.findall(r"(\w+) is above (\w+)", text):
        assert (better, worse) == ("merged", "instruct")


def test_nothing_is_concluded_from_few_problems(tmp_path):
    scores = {("instruct", "sums"): solved(29, 0), ("merged", "sums"): solved(29, 29)}
    comparison = compare_results([write_results(tmp_path / "few", scores)])
    assert comparison.differences["merged", "sums"].interval.low == 1
    assert [sentence.partition(":")[0] for sentence in describe_findings(comparison)] == [
        "Nothing is concluded from sums (29 problems)"
    ]


def test_a_merged_model_that_does_not_end_is_warned_of(folder, tmp_path):
    lost, missing = describe_warnings(compare_results([folder]))
    assert lost.startswith("merged is cut off clearly more often than instruct on sums (")
    assert "facts (" in lost and "end-of-turn token" in lost and "other" not in lost
    assert "left out: other on words." in missing
    alike = {(model, "sums"): solved(200, 100) for model in ("instruct", "merged")}
    both = write_results(tmp_path / "both", alike, truncated={"instruct": 0.5, "merged": 0.52})
    (cut,) = describe_warnings(compare_results([both]))
    assert cut.startswith("Even instruct is cut off often on sums") and "max_new_tokens" in cut


# Examples


def test_examples_show_both_directions_by_a_rule_that_the_order_of_the_data_does_not_change(folder):
    comparison = compare_results([folder])
    examples = choose_examples(comparison)
    assert len(examples) == 10
    signs = [np.sign(example.answers[0].mean - example.answers[1].mean) for example in examples]
    assert signs == [1] * 5 + [-1] * 5
    for example in examples:
        ours, theirs = example.answers
        assert theirs.model == "instruct" and example.reference == str(example.problem)
        assert example.prompt == f"<|user|>What is {example.problem}?<|assistant|>"
        matrices = {"instruct": solved(200, 100), "merged": solved(200, 120)}
        if example.task == "sums" and ours.model in matrices:
            assert (ours.score, theirs.score) == tuple(
                matrices[model][example.problem, 0] for model in (ours.model, theirs.model)
            )
        sample = re.match(rf"{ours.model} {example.problem}/(\d)", ours.text)[1]
        if ours.model == "other" and example.task == "sums":
            row = np.random.default_rng(3).integers(0, 2, (200, 4))[example.problem]
            assert ours.score == row[int(sample)] == (row.max() if ours.mean > theirs.mean else row.min())
    assert {example.answers[0].model for example in examples} == {"merged", "other"}
    assert choose_examples(comparison) == examples
    # Not simply the first problems: that would be 100 to 104 of sums for `merged`
    assert {e.problem for e in examples if e.task == "sums"} - set(range(100, 105))


def test_answers_that_are_gone_are_an_error(tmp_path):
    scores = {("instruct", "sums"): solved(40, 20), ("merged", "sums"): solved(40, 21)}
    folder = write_results(tmp_path / "results", scores)
    (folder / "merged" / "sums" / "generations.jsonl").write_text("")
    with pytest.raises(ValueError, match="a grade of problem 20 but not what was graded"):
        choose_examples(compare_results([folder]))


def test_one_direction_fills_what_the_other_lacks(tmp_path):
    scores = {("instruct", "sums"): solved(60, 20), ("merged", "sums"): solved(60, 50)}
    examples = choose_examples(compare_results([write_results(tmp_path / "up", scores)]))
    assert len({example.problem for example in examples}) == 10
    assert all(20 <= example.problem < 50 for example in examples)
    same = {(model, "sums"): solved(60, 20) for model in ("instruct", "merged")}
    assert choose_examples(compare_results([write_results(tmp_path / "same", same)])) == []


# Trainings


def _log(*rows: tuple[int, float, float, float]) -> list[dict]:
    keys = ("step", "gift/signal_low", "gift/signal_mid", "gift/signal_high")
    return [dict(zip(keys, row, strict=True)) for row in rows]


def test_learning_signal_is_the_mean_over_steps(tmp_path):
    entries = [*_log((10, 0.2, 0.3, 0.5)), {"step": 10, "eval_loss": 1.0}, *_log((15, 0.5, 0.3, 0.2)), {"step": 15}]
    for step in (2, 10):
        checkpoint = tmp_path / "a" / "adapter" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        log = entries if step == 10 else _log((2, 1.0, 0.0, 0.0))
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    facts = {"signal": {"step": [10, 15], "low": [0.2, 0.5], "mid": [0.3, 0.3], "high": [0.5, 0.2]}}
    (tmp_path / "b" / "adapter").mkdir(parents=True)
    (tmp_path / "b" / "adapter" / "gift_training.json").write_text(json.dumps(facts))
    first, second = read_training_signals([tmp_path / "a" / "adapter", tmp_path / "b" / "adapter"])
    assert (first.name, second.name, first.steps) == ("a/adapter", "b/adapter", 15)
    assert first.shares == second.shares == pytest.approx((30, 30, 40))

    with pytest.raises(FileNotFoundError, match=r"no trainer_state.json and no gift_training.json"):
        read_training_signals([tmp_path])
    plain = tmp_path / "trainer_state.json"
    plain.write_text(json.dumps({"log_history": [{"step": 1, "loss": 2.0}]}))
    with pytest.raises(ValueError, match="holds no learning signal"):
        read_training_signals([plain])
    plain.write_text("[]")
    with pytest.raises(ValueError, match="is not the log of a training"):
        read_training_signals([plain])


def test_learning_signal_in_the_report(folder, tmp_path):
    # A name that would be a broken formula, and markup
    training = tmp_path / "a $\\frac$ <b>"
    training.mkdir()
    (training / "trainer_state.json").write_text(json.dumps({"log_history": _log((10, 0.25, 0.25, 0.5))}))
    write_evaluation_report([folder], tmp_path / "report", training=[training])
    page = Page((tmp_path / "report" / "report.html").read_text(encoding="utf-8"))
    assert f"{training.name}1025.025.050.0" in page.text and "paper" not in page.text
    with Image.open(tmp_path / "report" / "learning_signal.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 100


# The paper


MATH = ("math500", "minerva_math", "olympiadbench", "aime24", "amc23")


def test_papers_numbers_stand_beside_the_same_models_and_tasks_only(tmp_path):
    sampling = {"max_new_tokens": 4096, "temperature": 1.0, "top_p": 1.0}
    scores = {(model, task): solved(40, 20, 16) for model in ("instruct", "gift", "alien") for task in (*MATH, "mmlu")}
    models = {
        "instruct": {"model": "Qwen/Qwen2.5-7B-Instruct"},
        "gift": {"model": "merged", "merge": {"instruct_model": "Qwen/Qwen2.5-7B-Instruct"}},
        "alien": {"model": "Qwen/Qwen2.5-7B-Instruct-1M"},
    }
    tasks = {task: task_config(sampling=sampling) for task in MATH}
    folder = write_results(tmp_path / "results", scores, models=models, tasks=tasks)
    math, mmlu = place_beside_paper(compare_results([folder]))
    assert math.paper.values["GIFT"] == 42.9 and mmlu.paper.values == {"instruct": 68.7, "GIFT": 68.8}
    assert list(math.figures) == ["instruct", "gift"] and math.figures["gift"].mean == pytest.approx(0.5)
    assert (math.missing, math.deviations) == ((), ())

    log = tmp_path / "trainer_state.json"
    log.write_text(json.dumps({"log_history": _log((10, 0.25, 0.25, 0.5))}))
    write_evaluation_report([folder], tmp_path / "report", training=[log])
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "| paper: plain cross-entropy | 79.7 | – | 6.9 |" in text
    assert "| paper: GIFT | 42.9 |" in text and re.search(r"\| yours: gift \| 50.0 \[", text)
    assert "42.9" not in text.replace("| paper: GIFT | 42.9 |", "")
    assert "42.9" not in (tmp_path / "report" / "results.csv").read_text() and "0.429" not in text


def test_papers_mean_needs_every_task_and_deviations_are_told(tmp_path):
    scores = {("instruct", "MATH-500"): solved(40, 20, 4)}
    tasks = {"MATH-500": task_config(limit=40)}
    models = {"instruct": {"model": "meta-llama/Meta-Llama-3.1-8B-Instruct"}}
    folder = write_results(tmp_path / "results", scores, models=models, tasks=tasks)
    (math,) = place_beside_paper(compare_results([folder]))
    assert math.paper.pair == "Llama-3.1-8B" and math.figures == {"instruct": None}
    assert math.missing == ("Minerva Math", "OlympiadBench", "AIME 2024", "AMC 2023")
    assert math.deviations == ("MATH-500: only the first 40 problems", "MATH-500: 4 samples, not 16")


def test_papers_summaries_stand_beside_any_pair(tmp_path):
    scores = {("instruct", task): solved(40, 20) for task in ("superni_summaries", "superni_summaries_em")}
    folder = write_results(tmp_path / "results", scores)
    em, rouge = place_beside_paper(compare_results([folder]))
    assert em.paper.values == {"instruct": 10.75, "GIFT": 12.0} and rouge.paper.values["GIFT"] == 40.28
    assert em.figures["instruct"].mean == rouge.figures["instruct"].mean == 0.5
    write_evaluation_report([folder], tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "| A pair of models that is not recorded here, exact match of Super-NI summaries | % |" in text
    assert "| paper: instruct | 10.75 |" in text and "| paper: GIFT | 12.00 |" in text


def test_papers_numbers_are_those_of_its_tables():
    table = {
        ("Llama-3.1-8B", 5): (16.8, 8.9, 18.0, None, 22.0),
        ("Llama-3.2-3B", 5): (16.5, None, 16.7, None, 19.5),
        ("Qwen2.5-7B", 5): (41.3, 21.2, 38.0, 41.0, 42.9),
        ("DeepSeek-Math-7B", 5): (16.8, None, 17.4, None, 19.7),
        ("Llama-3.1-8B", 3): (62.6, None, 65.1, None, 68.8),
    }
    methods = ("instruct", "Instruct-SFT", "Shadow-FT", "GIFT-BaseT", "GIFT")
    found = {(r.pair, len(r.benchmark.tasks)): tuple(map(r.values.get, methods)) for r in RESULTS}
    assert {key: found[key] for key in table} == table


# Files


def test_report_files(folder, tmp_path):
    before = sorted(folder.rglob("*"))
    write_evaluation_report([folder], tmp_path / "report")
    names = sorted(path.name for path in (tmp_path / "report").iterdir())
    pictures = ["pass_at_k_sums.png", "scores.png", "target_retention.png", "truncation.png"]
    assert names == sorted([*pictures, "report.html", "report.md", "results.csv"])
    assert sorted(folder.rglob("*")) == before
    for name in pictures:
        with Image.open(tmp_path / "report" / name) as picture:
            assert picture.width > 700

    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", text)) == set(pictures)
    head = "| model | sums<br>200 problems | words<br>50 problems | mean of the 2<br>target tasks | facts<br>retention, 300 problems |"
    assert head in text
    assert re.search(r"^\| instruct \| 50.0 \[[^<>|]*\] \|", text, flags=re.MULTILINE)
    assert re.search(r"^\| merged \| 60.0 \[[^|]*\]<br>▲ \+10.0 \[", text, flags=re.MULTILINE)
    assert "| sums | all | no answer \\| \\<i\\> | 2 | 7, 9 |" in text
    assert "versions:" in text and "torch: 2.13.0" in text

    page = Page((tmp_path / "report" / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert "60.0 [" in page.text and "▲ +10.0 [" in page.text and "no answer | <i>" in page.text


def test_table_for_other_programs_holds_every_figure(folder, tmp_path):
    comparison = write_evaluation_report([folder], tmp_path / "report")
    with open(tmp_path / "report" / "results.csv", encoding="utf-8", newline="") as file:
        rows = {(row["model"], row["task"]): row for row in csv.DictReader(file)}
    assert rows.keys() == comparison.runs.keys()
    for pair, row in rows.items():
        summary = comparison.runs[pair].summary
        assert [float(row[name]) for name in ("average", "average_low", "average_high")] == list(summary.average)
        assert row["pass@4_high"] == (str(summary.pass_at_k[4].high) if 4 in summary.pass_at_k else "")
        difference = comparison.differences.get(pair)
        assert row["difference_low"] == ("" if difference is None else str(difference.interval.low))
    assert rows["merged", "sums"]["excludes_zero"] == "True" and rows["other", "facts"]["excludes_zero"] == "False"


def test_page_refers_to_nothing_and_shows_markup_as_text(folder, tmp_path):
    write_evaluation_report([folder], tmp_path / "report")
    raw = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    page = Page(raw)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    sources = [a[name] for _, a in page.tags for name in ("src", "srcset", "href") if name in a]
    assert len(sources) == 8 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in raw and "@import" not in raw and "http:" not in raw and "https:" not in raw
    assert "</div></script><script>alert(1)</script> <b>& `x`" in page.text
    assert "⟨U+202E⟩ שלום 世界" in page.text and "\u202e" not in raw
    # The fence of a Markdown listing is longer than what it holds
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert re.search(r"````text\n(merged|other|instruct) [^`]*`x`\n```\n⟨U\+202E⟩", text)


def test_long_texts_are_cut_in_the_middle(tmp_path):
    scores = {("instruct", "sums"): solved(40, 20), ("merged", "sums"): solved(40, 21)}
    folder = write_results(
        tmp_path / "results", scores, text=lambda *_: "start" + "x" * 9000 + "end", prompt=lambda _: "p" * 3000
    )
    write_evaluation_report([folder], tmp_path / "report")
    page = Page((tmp_path / "report" / "report.html").read_text(encoding="utf-8"))
    assert page.text.count("\n… 7,608 characters …\n") == 2 and page.text.count("\n… 1,600 characters …\n") == 1
    assert "startx" in page.text and "xend" in page.text


def test_a_single_model_is_reported_without_comparison(tmp_path):
    folder = write_results(tmp_path / "results", {("instruct", "sums"): solved(40, 20)})
    write_evaluation_report([folder], tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# instruct\n") and "50.0 [" in text and "above" not in text and "▲" not in text


def test_report_is_written_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="lie in one another"):
        write_evaluation_report([folder], folder / "report")
    write_evaluation_report([folder], tmp_path / "report")
    shutil.copytree(folder, tmp_path / "report" / "results")
    with pytest.raises(ValueError, match="lie in one another"):
        write_evaluation_report([tmp_path / "report" / "results"], tmp_path / "report", overwrite=True)
    with pytest.raises(FileExistsError, match="overwrite"):
        write_evaluation_report([folder], tmp_path / "report")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"results\.csv"):
        write_evaluation_report([folder], tmp_path / "mine", overwrite=True)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(report, "render_html", fail)
    with pytest.raises(OSError, match="disk full"):
        write_evaluation_report([folder], tmp_path / "report", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "report"]
    assert (tmp_path / "report" / "report.html").is_file()


# Command


def test_command(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command.main([str(folder), "--retention", "words", "--reference", "other"])
    out, err = capsys.readouterr()
    assert "merged is above other on the target task sums" in out and "Written to evaluation_report" in out
    assert "warning: merged is cut off clearly more often than other" in err
    assert (tmp_path / "evaluation_report" / "report.html").is_file()
    with pytest.raises(FileNotFoundError, match="There is no folder 'nowhere'"):
        command.main(["nowhere"])
    with pytest.raises(FileNotFoundError, match=r"holds no evaluation\.yaml"):
        command.main(["evaluation_report", "--output", "elsewhere"])
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation_report"]


# Card


@pytest.fixture(scope="module")
def merged(pair, tmp_path_factory):
    """A checkpoint that a merge wrote."""
    folder = tmp_path_factory.mktemp("merge")
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(pair[0]), lora).save_pretrained(folder / "adapter")
    merge_adapter(folder / "adapter", pair[1], folder / "merged")
    return folder / "merged"


def test_what_is_evaluated_can_be_reported_and_put_on_the_card(configure, pair, merged, tmp_path, monkeypatch, capsys):
    shutil.copytree(merged, tmp_path / "merged")
    evaluate(configure(models={"chat": pair[1], "merged": str(tmp_path / "merged")}))
    monkeypatch.chdir(tmp_path)
    command.main(["results", "--card", "merged=merged"])
    assert "The figures of merged are on the card" in capsys.readouterr().out
    comparison = compare_results(["results"])
    assert comparison.reference == "chat" and comparison.differences["merged", "sums"].problems.tolist() == list(
        range(6)
    )
    assert comparison.model_config("merged")["merge"] == {
        "instruct_model": "instruct",
        "adapter_base_model": "base",
        "adapter": "adapter",
        "scale": 1.0,
    }
    assert "merge" not in comparison.model_config("chat")
    text = (tmp_path / "evaluation_report" / "report.md").read_text(encoding="utf-8")
    assert "# merged beside chat" in text and "| model | sums<br>6 problems |" in text and str(tmp_path) not in text
    (row,) = json.loads((tmp_path / "merged" / "evaluation.json").read_text())
    assert (row["task"], row["instruct_value"]) == ("sums", comparison.summary("chat", "sums").average.mean)


def test_figures_go_on_the_card_of_the_weights_they_are_of(pair, merged, tmp_path, monkeypatch, capsys):
    base, instruct = pair
    shutil.copytree(merged, tmp_path / "merged")
    shutil.copytree(merged.parent / "adapter", tmp_path / "adapter")
    models = {
        name: {"model": name, "weights": weights_fingerprint(path)}
        for name, path in (("chat", instruct), ("merged", tmp_path / "merged"), ("base", base))
    } | {"served": {"model": "served"}}
    scores = {(name, task): solved(40, 20 + i, 4) for i, name in enumerate(models) for task in ("sums", "words")}
    tasks = {"words": task_config(dataset="words.jsonl", revision=None)}
    folder = write_results(tmp_path / "results", scores, models=models, tasks=tasks)
    monkeypatch.chdir(tmp_path)
    command.main([str(folder), "--card", "merged=merged"])
    assert "The figures of merged are on the card in merged" in capsys.readouterr().out
    sums, words = json.loads((tmp_path / "merged" / "evaluation.json").read_text())
    comparison = compare_results([folder])
    assert [sums[name] for name in ("value", "low", "high")] == list(comparison.summary("merged", "sums").average)
    assert (sums["instruct_value"], sums["num_problems"], sums["metric"]) == (0.5, 40, "exact_match (average@4)")
    assert [sums[f"dataset{part}"] for part in ("", "_split", "_revision")] == ["org/data", "test", "abc"]
    assert words["dataset"] is None
    assert "| sums | exact_match (average@4) | 52.5" in (tmp_path / "merged" / "README.md").read_text()

    for model, target, cause in (
        ("base", "merged", "not those that were evaluated as `base`"),
        ("served", "merged", "do not tell which weights `served` had"),
        ("gone", "merged", "no model `gone`"),
    ):
        with pytest.raises(ValueError, match=cause):
            add_to_card(comparison, model, target)
    with pytest.raises(FileNotFoundError, match=r"no merge_report\.json"):
        add_to_card(comparison, "merged", "adapter")
    with pytest.raises(ValueError, match="MODEL=DIR"):
        command.main([str(folder), "--card", "merged", "--overwrite"])


def test_no_two_of_many_models_look_alike(tmp_path):
    names = ["instruct", *(f"model{number}" for number in range(20))]
    write_results(tmp_path / "results", {(name, "sums"): solved(30, 10) for name in names})
    comparison = compare_results([tmp_path / "results"])
    looks = {(look["color"], look["marker"]) for look in (report_figures._look(comparison, name) for name in names)}
    assert len(looks) == 21


# Browser


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
def test_page_in_a_browser(folder, tmp_path):
    write_evaluation_report([folder], tmp_path / "report")
    quiet = ["gpu", "quic", "background-networking", "component-update", "sync"]
    pictures = {}
    for name, width, scheme in (("light", 1400, 1), ("dark", 1400, 0), ("narrow", 500, 1)):
        file = tmp_path / f"{name}.png"
        subprocess.run(
            [
                *(BROWSER, "--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars"),
                *(f"--disable-{part}" for part in quiet),
                *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},3000"),
                *(f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={file}"),
                f"file://{tmp_path / 'report' / 'report.html'}",
            ],
            capture_output=True,
            timeout=120,
            check=True,
        )
        with Image.open(file) as picture:
            pictures[name] = picture.convert("RGB")
    assert pictures["light"].getpixel((2, 2)) == (255, 255, 255) and max(pictures["dark"].getpixel((2, 2))) < 50
    # The plots are drawn for the look of the page: its background is the commonest color in either
    for name in ("light", "dark"):
        colors = sorted(pictures[name].getcolors(2**24), reverse=True)
        assert colors[0][1] == pictures[name].getpixel((2, 2)) and colors[0][0] > 0.7 * 1400 * 3000
    narrow = pictures["narrow"]
    assert {narrow.getpixel((499, y)) for y in range(narrow.height)} == {(255, 255, 255)}
