"""Scores of the released scripts on our tokens."""

import pytest
from datasets import Dataset
from trl import SFTConfig

from gift_trl.annotation import annotate_dataset, read_provenance
from gift_trl.annotation.annotator import Annotator


@pytest.fixture
def scored(pair, conversations):
    """Rows with the scores that the instruct model gives, in the released format: none for the end of the turn."""
    annotated = annotate_dataset(conversations, pair[1])
    rows = []
    for row in annotated:
        targets = [i for i, label in enumerate(row["labels"]) if label != -100 and i > 0]
        end = max(i for i in targets if row["input_ids"][i] == 2)
        scores = [row["confidences"][i] for i in targets if i < end]
        rows.append({"prompt": row["prompt"], "completion": row["completion"], "scores": [[q, q] for q in scores]})
    return rows, annotated


def import_scores(rows, model, **args):
    with Annotator(model, args=SFTConfig(bf16=False, **args)) as annotator:
        return annotator.import_scores(Dataset.from_list(rows))


def test_scores_land_on_their_tokens(scored, pair):
    rows, annotated = scored
    imported = import_scores(rows, pair[1])
    assert imported["input_ids"][:] == annotated["input_ids"][:]
    assert imported["labels"][:] == annotated["labels"][:]
    assert "scores" not in imported.column_names
    assert imported.features["confidences"] == annotated.features["confidences"]
    for ours, theirs, ids in zip(
        imported["confidences"], annotated["confidences"], annotated["input_ids"], strict=True
    ):
        end = max(i for i, token in enumerate(ids) if token == 2)
        assert ours[:end] == theirs[:end]
        # What the released scripts leave unscored has the weight 1 there
        assert ours[end:] == [1.0] * (len(ids) - end)
    (provenance,) = read_provenance(imported)
    assert (provenance.engine, provenance.model, provenance.weights) == ("imported", "instruct", None)


def test_flat_scores_and_truncation(scored, pair):
    rows, _ = scored
    flat = [{**row, "scores": [q for q, _ in row["scores"]]} for row in rows]
    whole = import_scores(rows, pair[1])
    assert import_scores(flat, pair[1])["confidences"][:] == whole["confidences"][:]
    cut = import_scores(rows, pair[1], max_length=30)
    assert read_provenance(cut)[0].truncated > 0
    assert cut["confidences"][:] == [whole["confidences"][i][:30] for i in cut["original_index"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[:-1], r"Row 1 has (\d+) scores, and its response has (\d+) tokens here"),
        (lambda s: [*s, [0.5, 0.5]], r"Row 1 has (\d+) scores, and its response has (\d+) tokens here"),
        (lambda s: None, r"Row 1 has 0 scores"),
        (lambda s: [None, *s[1:]], r"Row 1 has scores that are no numbers"),
        (lambda s: [[]] * len(s), r"Row 1 has scores that are no numbers"),
        (lambda s: [[0.5, 0.25]] * len(s), r"Row 1 has scores of several different numbers"),
        (lambda s: [[1.5, 1.5]] * len(s), r"Row 1 has scores that are no probabilities"),
        (lambda s: [[float("nan")] * 2] * len(s), r"Row 1 has scores (of several different|that are no prob)"),
    ],
)
def test_scores_that_do_not_fit(scored, pair, change, message):
    rows = [dict(row) for row in scored[0]]
    rows[1]["scores"] = change(rows[1]["scores"])
    with pytest.raises(ValueError, match=message):
        import_scores(rows, pair[1])


def test_data_without_scores(pair, conversations):
    with Annotator(pair[1]) as annotator, pytest.raises(ValueError, match="no `scores`"):
        annotator.import_scores(conversations)
