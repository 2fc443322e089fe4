import evaluate
import pytest

import gift_trl.evaluation.metrics
from gift_trl.evaluation.metrics import METRICS, load_metric
from gift_trl.evaluation.metrics.multiple_choice_accuracy.multiple_choice_accuracy import chosen_letter


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_loads_by_its_name_and_by_its_path(name):
    by_path = evaluate.load(f"{gift_trl.evaluation.metrics.__path__[0]}/{name}")
    pairs = {"predictions": ["A", "The answer is C"], "references": ["A", "B"]}
    result = load_metric(name).compute(**pairs)
    assert by_path.compute(**pairs) == result
    assert result[name] == sum(result["scores"]) / 2 == 0.5 or name == "rouge"
    assert len(result["answers"]) == 2
    assert all(isinstance(score, float) for score in [result[name], *result["scores"]])


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="no metric 'bleu' here: use one of exact_match"):
        load_metric("bleu")


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "given no predictions"),
        (["A"], ["A", "B"], "(?i)mismatch"),
        (["A", None], ["A", "B"], "prediction 1 is None"),
        (["A"], [3], "reference 0 is 3"),
    ],
)
def test_what_is_no_text_is_refused(name, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        load_metric(name).compute(predictions=predictions, references=references)


def test_half_a_surrogate_pair_is_scored():
    assert load_metric("exact_match").compute(predictions=["\ud800"], references=["x"])["scores"] == [0.0]


def test_exact_match():
    metric = load_metric("exact_match")
    pairs = {"predictions": [" the  cat\n", "The cat.", "the cat"], "references": ["the cat", "the cat", "cat"]}
    assert metric.compute(**pairs)["scores"] == [1.0, 0.0, 0.0]
    result = metric.compute(**pairs, ignore_case=True, ignore_punctuation=True)
    assert result["scores"] == [1.0, 1.0, 0.0] and set(result["answers"]) == {"the cat"}
    assert metric.compute(predictions=["b", "c"], references=[["a", "b"], ["a", "b"]])["scores"] == [1.0, 0.0]


def test_rouge():
    metric = load_metric("rouge")
    # Of "the cat sat" two words are in "the dog sat", in this order, and no two that follow each other
    result = metric.compute(predictions=["The cat sat."], references=["the dog sat"])
    assert (result["rouge1"], result["rouge2"], result["rougeL"]) == (pytest.approx(2 / 3), 0.0, pytest.approx(2 / 3))
    assert result["rouge"] == result["rougeL"] == result["scores"][0]
    assert metric.compute(predictions=["cats running"], references=["cat runs"])["rouge"] == 1.0
    assert metric.compute(predictions=["cats running"], references=["cat runs"], use_stemmer=False)["rouge"] == 0.0
    assert metric.compute(predictions=["sat the cat"], references=[["the cat sat", "no"]])["rouge"] == pytest.approx(
        2 / 3
    )
    assert metric.compute(predictions=["", "x " * 5_000_000], references=["a", "a"])["scores"] == [0.0, 0.0]


CITIES = ["Paris", "London", "London Bridge", "Berlin"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("**B**", "B"),
        ("The answer is (B).", "B"),
        ("The correct answer is **B. London**", "B"),
        ("**Answer:** B) London\n\nA is the capital of France.", "B"),
        ("The best answer is\n\n(B)", "B"),
        ("The answer should be B because A is in France.", "B"),
        (r"The final answer is $\boxed{\text{B}}$.", "B"),
        (r"\boxed{London}", "B"),
        ("London.", "B"),
        ("The answer is London Bridge.", "C"),
        ("B. London is the capital.", "B"),
        ("Option B is correct.", "B"),
        ("So B is the right choice", "B"),
        ("I would choose option B", "B"),
        ("A. Paris\nB. London\nC. London Bridge\n\nB", "B"),
        ("First I thought the answer is A. But the answer is D, not A.", "D"),
        ("Answer: A\nNo, wait.\nAnswer: D", "D"),
        ("The answer is A or B.", None),
        ("Answer: A, B", None),
        (r"\boxed{A, C}", None),
        ("The answer is not B.", None),
        ("The answer is a city.", None),
        ("The answer is: A lot of cities.", None),
        ("The answer is E.", None),
        ("A cat sat on B", None),
        ("A. Paris is in France.\nB. London is", None),
        ("Statement A is correct, statement B is not", None),
        ("I do not know.", None),
        ("London and Paris", None),
        ("", None),
    ],
)
def test_chosen_letter(text, letter):
    assert chosen_letter(text, CITIES) == letter


def test_multiple_choice_accuracy():
    metric = load_metric("multiple_choice_accuracy")
    result = metric.compute(predictions=["Answer: J", "the answer is clear", "B"], references=["J", "A", "(c)"])
    assert result["scores"] == [1.0, 0.0, 0.0] and result["answers"] == ["J", None, "B"]
    assert result["multiple_choice_accuracy"] == pytest.approx(1 / 3) and result["unanswered"] == 1
    # A long text is read at its end, in linear time
    long = "the answer is A " * 1_000_000 + "\nthe answer is B"
    assert metric.compute(predictions=[long], references=["B"])["scores"] == [1.0]


@pytest.mark.parametrize(
    ("reference", "choices", "message"),
    [
        ("Paris", None, "a letter from A to Z"),
        ("C", [["x", "y"]], "a letter from A to B"),
        ("A", [], "all 1 questions"),
    ],
)
def test_multiple_choice_accuracy_refuses(reference, choices, message):
    with pytest.raises(ValueError, match=message):
        load_metric("multiple_choice_accuracy").compute(predictions=["A"], references=[reference], choices=choices)
