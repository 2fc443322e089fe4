"""The report on an annotated dataset: its numbers against numpy's, its text, and the page in a real browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from datasets import Dataset, List, Value, concatenate_datasets
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gift_trl.annotation import Provenance, report, summary
from gift_trl.annotation.excerpts import decode_tokens
from gift_trl.annotation.provenance import add_provenance
from gift_trl.annotation.report import summarize_confidences, write_annotation_report


BROWSER = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
FAMILY = "👩‍👩‍👧"
ODD = ("Show <b>bold</b>.", f"<script>alert('1 & 2')</script>\n\tnaïve 世界 {FAMILY}\u200b!")


def provenance(**overrides) -> Provenance:
    settings = {
        "model": "org/instruct <i>",
        "commit": None,
        "weights": "0123456789abcdef" * 4,
        "dtype": "bfloat16",
        "vocabulary": "v",
        "chat_template": "c",
        "assistant_only_loss": False,
        "completion_only_loss": None,
        "max_length": 2048,
        "end_of_turn_token_ids": [2],
        "rows": 9,
        "truncated": 4,
        "dropped": {"no target token": [3, 5]},
        "versions": {"torch": "2.13.0"},
    }
    return Provenance(**{**settings, **overrides})


@pytest.fixture(scope="module")
def annotated(tokenizer, conversations) -> Dataset:
    """The answers of the tiny pair's conversations and an odd one, with confidences that are mostly near 0 or 1."""
    rows = {"input_ids": [], "labels": [], "confidences": [], "original_index": []}
    rng = np.random.default_rng(0)
    texts = [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in conversations]
    for index, (question, answer) in enumerate([*texts, ODD]):
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        answer_ids = tokenizer(answer + "<|end|>").input_ids
        rows["input_ids"].append(prompt + answer_ids)
        rows["labels"].append([-100] * len(prompt) + answer_ids)
        q = rng.beta(0.3, 0.3, len(answer_ids)).clip(1e-9, 1)
        rows["confidences"].append([0.0] * len(prompt) + q.astype(np.float32).tolist())
        rows["original_index"].append(100 + index)
    return add_provenance(Dataset.from_dict(rows), provenance())


class Page(HTMLParser):
    """Tags with their attributes, and the text of the document."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data

    def having(self, name: str) -> list[dict]:
        return [attributes for _, attributes in self.tags if name in (attributes.get("class") or "").split()]


def write(splits, tokenizer, folder, **options) -> Page:
    write_annotation_report(splits, tokenizer, folder / "page.html", title="some <data>", **options)
    assert [path.name for path in folder.iterdir()] == ["page.html"]
    page = Page((folder / "page.html").read_text(encoding="utf-8"))
    assert page.open == []
    return page


# Numbers


def test_summary_is_numpy_s_on_the_whole_data(monkeypatch):
    monkeypatch.setattr(summary, "CHUNK_ROWS", 7)
    rng = np.random.default_rng(1)
    rows = []
    for length in [0, 1, *rng.integers(2, 30, 60)]:
        labels = rng.integers(0, 9, length)
        labels[rng.random(length) < 0.4] = -100
        # Values that repeat, so that equal ones have to keep their order, and the ends of the bands
        q = rng.choice(np.float32([0, 1e-8, 0.03, 0.2, 0.5, 0.8, 0.97, 1]), length)
        rows.append({"labels": labels.tolist(), "confidences": q.tolist()})
    rows.append({"labels": [5, -100, -100], "confidences": [0.0, 0.0, 0.0]})
    dataset = Dataset.from_list(rows).cast_column("confidences", List(Value("float32"))).shuffle(seed=2)

    tokens = [
        (np.float32(q), row, position)
        for row, entry in enumerate(dataset)
        for position, (q, label) in enumerate(zip(entry["confidences"], entry["labels"], strict=True))
        if position > 0 and label != -100
    ]
    q = np.array([token[0] for token in tokens])
    found = summarize_confidences(dataset)
    assert (found.rows, found.targets) == (len(rows), len(q))
    assert found.mean == pytest.approx(q.mean(dtype=np.float64))
    np.testing.assert_array_equal(found.histogram, np.histogram(q, 50, (0, 1))[0])
    bands = [q < np.float32(0.2), (q >= np.float32(0.2)) & (q <= np.float32(0.8)), q > np.float32(0.8)]
    np.testing.assert_allclose(found.token_shares, [band.mean() for band in bands])
    np.testing.assert_allclose(found.weight_shares, [q[band].sum() / q.sum() for band in bands], rtol=1e-6)
    means = [
        np.mean([t[0] for t in tokens if t[1] == row]) if row in {t[1] for t in tokens} else np.nan
        for row in range(len(rows))
    ]
    np.testing.assert_allclose(found.row_means, means, rtol=1e-6)
    assert found.suspicious_rows == np.sum(np.array(means) < 0.1)
    assert found.row_histogram.sum() == np.sum(~np.isnan(means))
    assert list(found.lowest) == [(row, position, value) for value, row, position in sorted(tokens)[:50]]


def test_summary_in_words():
    dataset = Dataset.from_dict({"labels": [[1, 1, 1, 1, 1]], "confidences": [[0.0, 0.1, 0.1, 0.5, 0.9]]})
    assert summarize_confidences(dataset).describe() == (
        "4 target tokens in 1 rows: mean confidence 0.4; 50.0% below 0.2, 25.0% from 0.2 to 0.8, 25.0% above 0.8; mean "
        "confidence below 0.1 in 0 rows"
    )


@pytest.mark.parametrize(
    "labels, confidences, cause",
    [
        ([[1, 1]], None, "no column `confidences`"),
        ([[1, 1], [1, 1]], [[0.0, 0.5], [0.0]], "Row 1 does not have one confidence"),
        ([[1, 1], [1, 1]], [[0.0, 0.5], [0.0, float("nan")]], "Row 1 does not have one confidence"),
        ([[1, 1, 1]], [[0.0, 0.5, 1.5]], "Row 0 does not have one confidence"),
        ([[1, -100]], [[0.0, 0.0]], "no target token"),
    ],
)
def test_data_that_is_not_annotated_is_refused(labels, confidences, cause):
    columns = {"labels": labels} | ({} if confidences is None else {"confidences": confidences})
    with pytest.raises(ValueError, match=cause):
        summarize_confidences(Dataset.from_dict(columns))


# Text


def test_tokens_that_share_a_character_show_it_once(tokenizer):
    text = f"naïve 世界 {FAMILY} plain end"
    ids = tokenizer(text).input_ids
    texts = decode_tokens(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    whole = [part for part in texts if part]
    assert {"ï", "世", "界", "👩", "👧"} <= {part.strip() for part in whole}


def test_broken_characters_do_not_spread(tokenizer):
    world = tokenizer("世").input_ids
    assert len(world) == 3
    texts = decode_tokens(tokenizer, [*world[:1], *tokenizer("cat 世").input_ids, *world[1:]])
    assert texts[0] == "�"
    assert "".join(texts).strip("�") == "cat 世"


def test_spaces_that_a_decoder_strips_are_kept():
    vocabulary = {"▁two": 0, "▁words": 1, "s": 2}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="s"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert decode_tokens(tokenizer, [0, 1, 2, 0]) == ["two", " words", "s", " two"]


# Page


def test_page_refers_to_nothing_and_shows_markup_as_text(annotated, tokenizer, tmp_path):
    page = write({"train": annotated}, tokenizer, tmp_path)
    assert not [a for _, a in page.tags if {"src", "href", "srcset", "data", "action"} & a.keys()]
    assert not {"script", "b>", "i>"} & {tag for tag, _ in page.tags}
    raw = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "url(" not in raw and "@import" not in raw and "http:" not in raw and "https:" not in raw and "$" not in raw
    assert "some <data>" in page.text and "org/instruct <i>" in page.text
    assert "<script>alert('1 & 2')</script>⏎\n⇥\tnaïve 世界" in page.text
    assert "⟨U+200B⟩" in page.text
    assert "�" not in page.text


def test_every_target_token_of_the_examples_is_shaded(annotated, tokenizer, tmp_path):
    page = write({"train": annotated}, tokenizer, tmp_path)
    found = summarize_confidences(annotated)
    # Nine rows, so all of them are shown; the 50 lowest follow with what surrounds them
    titles = [a["title"] for a in page.having("t") if "title" in a]
    expected = [
        (token, q)
        for row in np.argsort(found.row_means, kind="stable")
        for token, label, q in zip(
            *(annotated[int(row)][c] for c in ("input_ids", "labels", "confidences")), strict=True
        )
        if label != -100
    ]
    shown = [re.fullmatch(r".* · id (\d+) · q = (\S+)", title, re.DOTALL).groups() for title in titles]
    for (token, q), (shown_token, shown_q) in zip(expected, shown[: len(expected)], strict=True):
        assert int(shown_token) == token
        assert float(shown_q) == pytest.approx(q, abs=5e-4, rel=0.05)
    shade = {a["title"]: a["class"].split()[1] for a in page.having("t") if "title" in a}
    assert {shade[t] for t in shade if t.endswith("q = 0.999")} <= {"q19"}
    assert page.having("very-low") and page.having("part")
    names = re.findall(r"(Lowest|Highest|Median|\d+\w\w percentile)", page.text)
    assert names[0] == "Lowest" and names[-1] == "Highest" and "Median" in names


def test_lowest_tokens_of_all_splits_in_context(annotated, tokenizer, tmp_path):
    test = annotated.select(range(3)).remove_columns("original_index")
    page = write({"train": annotated, "test": test}, tokenizer, tmp_path)
    low = [
        (q, split, dataset[row].get("original_index", row), position, dataset[row]["input_ids"][position])
        for split, dataset in (("train", annotated), ("test", test))
        for row, position, q in summarize_confidences(dataset).lowest
    ]
    low = sorted(low, key=lambda entry: entry[0])[:50]
    rows = re.findall(
        r'"q">(.*?)</td><td[^>]*>(.*?)</td><td[^>]*>(.*?)</td><td[^>]*>(.*?)</td><td[^>]*>(.*?)</td>',
        (tmp_path / "page.html").read_text(encoding="utf-8"),
    )
    assert len(rows) == len(page.having("focus")) == 50
    assert [row[1:] for row in rows] == [tuple(map(str, entry[1:])) for entry in low]
    assert [float(row[0]) for row in rows] == pytest.approx([entry[0] for entry in low], rel=0.01)


def test_long_rows_are_shortened_in_the_middle(tokenizer, tmp_path):
    ids = tokenizer("word " * 1500).input_ids[:3000]
    labels = [-100] * 500 + ids[500:]
    dataset = Dataset.from_dict({"input_ids": [ids], "labels": [labels], "confidences": [[0.5] * len(ids)]})
    page = write({"train": dataset}, tokenizer, tmp_path)
    assert f"… {500 - 70} tokens …" in page.text
    shown = 900 - 70 + 300
    assert f"… {len(ids) - 500 - shown:,} tokens …" in page.text
    low = sum("focus" in a["class"] for a in page.having("t"))
    assert low == 50
    assert "no provenance" in page.text


def test_provenance_is_told_once_for_splits_that_share_it(annotated, tokenizer, tmp_path):
    other = add_provenance(annotated.select(range(2)), provenance(rows=2, truncated=1, dropped={}))
    both = concatenate_datasets([annotated, annotated])
    add_provenance(both, provenance(), provenance(model="org/second", engine="vllm"))
    page = write({"train": annotated, "test": other}, tokenizer, tmp_path)
    assert page.text.count("Scoring model") == 1 and "train, test" in page.text
    assert "Rows left out: no target token20" in page.text and "Rows truncated41" in page.text
    page = write({"train": both}, tokenizer, tmp_path, overwrite=True)
    assert page.text.count("Scoring model") == 2 and "org/second" in page.text and "vllm" in page.text
    assert "Rows left out: no target token4" in page.text


def test_file_is_written_whole_or_not_at_all(annotated, tokenizer, tmp_path, monkeypatch):
    write({"train": annotated}, tokenizer, tmp_path)
    path = tmp_path / "page.html"
    with pytest.raises(FileExistsError, match="overwrite"):
        write_annotation_report({"train": annotated}, tokenizer, path, title="")
    with pytest.raises(FileExistsError, match="is a folder"):
        write_annotation_report({"train": annotated}, tokenizer, tmp_path, title="")

    def fail(*_):
        raise OSError("disk full")

    before = path.read_bytes()
    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_annotation_report({"train": annotated}, tokenizer, path, title="other", overwrite=True)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]


# Browser


def browse(folder, page, *options: str, width: int = 1400) -> subprocess.CompletedProcess:
    quiet = ["gpu", "quic", "background-networking", "component-update", "sync"]
    return subprocess.run(
        [
            *(
                BROWSER,
                "--headless",
                "--no-sandbox",
                "--no-first-run",
                "--hide-scrollbars",
                *(f"--disable-{name}" for name in quiet),
            ),
            *(f"--user-data-dir={folder / 'profile'}", f"--window-size={width},3000", *options, f"file://{page}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
def test_page_in_a_browser(annotated, tokenizer, tmp_path):
    page = tmp_path / "page.html"
    write_annotation_report({"train": annotated}, tokenizer, page, title="some <data>")
    written = Page(page.read_text(encoding="utf-8"))
    rendered = browse(tmp_path, page, "--dump-dom").stdout
    parsed = Page(rendered)
    assert len(parsed.having("t")) == len(written.having("t")) > 200
    assert len(parsed.having("column")) == 100
    assert not {"script", "img", "iframe", "link"} & {tag for tag, _ in parsed.tags}
    assert "http:" not in rendered and "https:" not in rendered

    pictures = {}
    for name, width, options in (
        ("light", 1400, ["--blink-settings=preferredColorScheme=1"]),
        ("dark", 1400, ["--blink-settings=preferredColorScheme=0"]),
        ("narrow", 500, ["--blink-settings=preferredColorScheme=1"]),
    ):
        file = tmp_path / f"{name}.png"
        browse(tmp_path, page, f"--screenshot={file}", *options, width=width)
        with Image.open(file) as picture:
            assert picture.width == width
            pictures[name] = picture.convert("RGB")
        colors = pictures[name].getcolors(2**24)
        assert len(colors) > 100
    assert pictures["light"].getpixel((2, 2)) == (255, 255, 255)
    assert max(pictures["dark"].getpixel((2, 2))) < 50
    # Nothing is cut off at the right of a narrow window
    narrow = pictures["narrow"]
    assert {narrow.getpixel((499, y)) for y in range(narrow.height)} == {(255, 255, 255)}
