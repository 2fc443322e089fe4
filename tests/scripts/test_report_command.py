"""`gift-trl report`, on what `gift-trl annotate` wrote."""

import os
import re
import shutil

import pytest

from gift_trl.annotation import annotate_dataset, save_annotated_dataset
from gift_trl.scripts import report
from gift_trl.scripts.cli import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pair, conversations, tokenizer):
    """An annotated folder of two splits with its tokenizer."""
    annotated = annotate_dataset(conversations, pair[1])
    splits = {"train": annotated.select(range(5)), "test": annotated.select(range(5, 8))}
    output_dir = tmp_path_factory.mktemp("data") / "annotated"
    save_annotated_dataset(splits, output_dir, processing_class=tokenizer)
    return output_dir


def files(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def text_of(page) -> str:
    return re.sub("<.*?>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_report_on_an_annotated_folder(folder, tmp_path, monkeypatch, capsys, fails):
    monkeypatch.chdir(tmp_path)
    before = files(folder)
    run(report.main, ["annotation", str(folder)])
    out = capsys.readouterr().out
    assert "train: " in out and "test: " in out and "target tokens in 5 rows: mean confidence" in out
    assert "Written to annotation_report.html" in out
    page = (tmp_path / "annotation_report.html").read_text(encoding="utf-8")
    assert "<h1>annotated</h1>" in page and str(folder.parent) not in page
    assert files(folder) == before and files(tmp_path) == ["annotation_report.html"]

    assert "exists" in fails(report.main, "annotation", str(folder))
    run(report.main, ["annotation", str(folder), "--overwrite", "--split", "test"])
    out = capsys.readouterr().out
    assert "test: " in out and "train: " not in out
    run(report.main, ["annotation", str(folder), "--output", "pages/one.html"])
    assert (tmp_path / "pages" / "one.html").is_file()


def test_what_annotate_writes_can_be_reported(recipe, pair, tmp_path, monkeypatch):
    from gift_trl.scripts import annotate

    monkeypatch.chdir(tmp_path)
    run(annotate.main, ["--config", recipe(), "--annotation_output_dir", "annotated"])
    run(report.main, ["annotation", "annotated", "--tokenizer", pair[1], "--output", "page.html"])
    assert "Two plus two is four" in text_of(tmp_path / "page.html")


def test_tokenizer_of_the_scoring_model_is_found(folder, pair, tmp_path, monkeypatch, fails):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    shutil.rmtree(bare / "tokenizer")
    monkeypatch.chdir(tmp_path)
    error = fails(report.main, "annotation", "bare")
    assert "`--tokenizer`" in error
    # The provenance knows a local model by the name of its folder
    monkeypatch.chdir(os.path.dirname(pair[1]))
    run(report.main, ["annotation", str(bare), "--output", str(tmp_path / "page.html")])
    assert "Two plus two is four" in text_of(tmp_path / "page.html")


def test_tokenizer_of_another_vocabulary_is_refused(folder, tmp_path, tokenizer, fails):
    other = tmp_path / "other"
    tokenizer.save_pretrained(other)
    description = other / "tokenizer.json"
    description.write_text(description.read_text().replace('"<|start|>"', '"<|begin|>"'))
    error = fails(report.main, "annotation", str(folder), "--tokenizer", str(other), "--output", str(tmp_path / "a"))
    assert "another vocabulary" in error and "instruct" in error


def test_wrong_inputs(folder, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    assert "There is no folder 'missing'" in fails(report.main, "annotation", "missing")
    (tmp_path / "other").mkdir()
    assert "gift_provenance.json" in fails(report.main, "annotation", "other")
    error = fails(report.main, "annotation", str(folder), "--split", "validation")
    assert "['test', 'train']" in error and "`validation`" in error
    before = files(folder)
    monkeypatch.chdir(folder)
    assert "`--output`" in fails(report.main, "annotation", ".")
    assert files(folder) == before


def test_help_of_both_reports(capsys):
    with pytest.raises(SystemExit) as status:
        report.main([])
    assert status.value.code == 2
    assert "RESULTS" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.main(["--help"])
    assert "gift-trl report annotation DIR" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        report.main(["annotation", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: gift-trl report annotation") and "example" in text and "--split" in text
