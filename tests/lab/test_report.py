"""What a comparison is told as: the sentences follow its numbers, the files hold them."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image
from rich.console import Console

from gift_trl.lab.comparison import METHODS
from gift_trl.lab.evaluation import Scores
from gift_trl.lab.findings import accuracy_margin, describe_findings, paired_difference
from gift_trl.lab.report import make_table, write_report
from gift_trl.lab.results import Comparison, MethodResult, ScoredExample, Setting, SettingResult


NUM_TARGET = 200


def _scores(right: int) -> Scores:
    """`right` of 200 target problems solved, the first ones."""
    return Scores(tuple(index < right for index in range(NUM_TARGET)), (True, False), (True, True, False, False))


def _comparison(*rights: tuple[int, int, int, int]) -> Comparison:
    """A comparison whose instruct model solves 160; each setting is what the four methods solve."""
    settings = []
    for number, numbers in enumerate(rights):
        results = tuple(
            MethodResult(method.name, _scores(right), (60.0 - 10 * place, 30.0, 10.0 + 10 * place), 1.0, 2.0)
            for place, (method, right) in enumerate(zip(METHODS, numbers, strict=True))
        )
        settings.append(SettingResult(Setting("AZ"[number], 3e-3), (12.0, 13.0, 75.0), results))
    tokens = (("7", 0.0123), ("<eos>", 0.987))
    return Comparison(3, _scores(100), _scores(160), tuple(settings), ScoredExample("A", "7 & 5 ?", tokens))


def test_paired_difference_counts_only_questions_that_differ():
    first = [True] * 6 + [False] * 4
    second = [False] * 2 + [True] * 5 + [False] * 3
    difference = paired_difference(first, second)
    assert difference.points == pytest.approx(10 * (2 - 1))
    variance = (2 * (1 - 0.1) ** 2 + 1 * (-1 - 0.1) ** 2 + 7 * 0.1**2) / 10
    assert difference.margin == pytest.approx(200 * math.sqrt(variance / 10))
    assert paired_difference(first, first).verdict == "within error"
    assert accuracy_margin(80, 600) == pytest.approx(3.27, abs=0.01)


def test_findings_follow_the_numbers():
    worse, better = (describe_findings(_comparison(row)) for row in ((40, 90, 130, 130), (160, 160, 160, 190)))
    assert worse.shows[0] == (
        "Mix A, learning rate 3e-3: GIFT solves 65.0% of the target problems. In points: -15.0 ± 5.0 against the "
        "instruct model (below), +45.0 ± 7.0 against Instruct-SFT (above), +20.0 ± 5.7 against Shadow-FT (above), "
        "+0.0 ± 0.0 against GIFT-BaseT (within error)."
    )
    limits = " ".join(worse.does_not_show)
    assert "GIFT is above the instruct model in no setting: this run does not show that fine-tuning" in limits
    assert "GIFT is above GIFT-BaseT in no setting: this run does not show that the instruct model" in limits
    assert "above Shadow-FT" not in limits

    assert "GIFT solves 95.0%" in better.shows[0] and "against the instruct model (above)" in better.shows[0]
    assert "in no setting" not in " ".join(better.does_not_show)


def test_findings_name_the_settings_where_an_edge_is_missing():
    findings = describe_findings(_comparison((40, 90, 130, 130), (160, 160, 160, 160)))
    assert "GIFT is above Shadow-FT only at mix A, learning rate 3e-3: elsewhere" in " ".join(findings.does_not_show)
    assert sum("Learning signal on mix" in sentence for sentence in findings.shows) == 2


def test_table_has_every_model_and_setting():
    console = Console(width=140, record=True, file=open("/dev/null", "w"))
    console.print(make_table(_comparison((40, 90, 130, 131), (160, 160, 160, 190))))
    lines = [re.findall(r"[^\s│┃]+(?: [^\s│┃]+)*", line) for line in console.export_text().splitlines()]
    rows = [line for line in lines if line]
    assert ["GIFT", "65.5", "50.0", "50.0", "-14.5 ± 5.0", "30 / 30 / 40"] in rows
    assert ["instruct model", "80.0", "50.0", "50.0"] in rows
    assert ["base model", "50.0", "50.0", "50.0", "-30.0 ± 6.5"] in rows
    assert sum(row[0] in {method.name for method in METHODS} for row in rows) == 8


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.titles, self.text, self.open = [], [], [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.sources += [value for name, value in attributes.items() if name in ("src", "srcset", "href")]
        self.titles += [value for name, value in attributes.items() if name == "title"]
        if tag not in ("meta", "img", "br", "link", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_report_files(tmp_path):
    comparison = _comparison((40, 90, 130, 130), (160, 160, 160, 190))
    write_report(comparison, tmp_path, seconds=12.34)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.png", "report.html", "results.json"]

    page = _Page()
    page.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    text = " ".join(page.text)
    assert page.open == []
    # Self-contained: nothing but the embedded picture, light and dark, is referred to.
    assert [source[:22] for source in page.sources] == ["data:image/png;base64,"] * 2
    assert page.titles == ["q = 0.0123", "q = 0.9870"]
    assert "7 & 5 ?" in text and "<eos>" in text
    assert "65.0" in text and "GIFT solves 95.0%" in text
    assert "$" not in text

    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.width >= 1000

    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    gift = results["settings"][1]["methods"]["GIFT"]
    assert gift["accuracies"]["target"] == 95.0
    assert gift["correct"]["target"] == "1" * 190 + "0" * 10
    assert gift["signal"]["q < 0.2"] == 30.0
    assert results["seconds"] == 12.3
