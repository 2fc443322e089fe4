"""
The math grader on the answers of real problems: each against itself and against another problem's.

    python tests/evaluation/grade_math500.py math500.jsonl --answer answer
    python tests/evaluation/grade_math500.py numina.jsonl --answer response --processes 1

prints how many references are found equal to themselves (bare, in a sentence with a box as models write it, and rewritten in
other LaTeX), how many of another problem's answers are taken for right, and the time for an answer. An answer that another
problem has too, written in the same way, is no mistake: those pairs are counted apart. Every other pair that is judged
against expectation is printed, to be looked at.
"""

import argparse
import json
import random
import time
from pathlib import Path

from gift_trl.evaluation.metrics import load_metric
from gift_trl.evaluation.metrics.math_accuracy.extraction import reference_answer


SENTENCE = "Adding the two cases gives the result.\n\nTherefore, the final answer is $\\boxed{{{}}}$."
_REWRITES = (
    *((r"\frac", r"\dfrac"), (r"\left", ""), (r"\right", ""), (r"\pi", "π"), (r"^\circ", "°"), (r"\infty", "∞")),
    *((r"\text{", r"\mbox{"), ("{pmatrix}", "{bmatrix}"), (r"\cup", "∪"), (r"\le ", "≤"), ("-", "−"), (", ", r",\;")),
)


def read_answers(path: Path, column: str) -> tuple[list[str], int]:
    r"""
    Reads answers.

    Args:
        path (`Path`):
            JSON-lines file.
        column (`str`):
            Column with an answer, or with a solution that has it in a `\boxed{}`.

    Returns:
        `tuple[list[str], int]`: The answers, and the number of rows that have none.
    """
    with open(path, encoding="utf-8") as lines:
        texts = [str(json.loads(line)[column]) for line in lines]
    solutions = sum("\\boxed" in text for text in texts) > len(texts) / 2
    answers = [reference_answer(text) if "\\boxed" in text or not solutions else None for text in texts]
    return [answer for answer in answers if answer], sum(answer is None for answer in answers)


def shuffled(answers: list[str], seed: int = 0) -> list[str]:
    """The answers in another order, in which none is at its place."""
    order = list(range(len(answers)))
    random.Random(seed).shuffle(order)
    moved = [""] * len(answers)
    for place, index in enumerate(order):
        moved[index] = answers[order[place - 1]]
    return moved


def rewritten(answer: str) -> str:
    """An answer in other LaTeX and Unicode that means the same."""
    for old, new in _REWRITES:
        answer = answer.replace(old, new)
    return answer


def compare(
    predictions: list[str], references: list[str], processes: int | None = None
) -> tuple[list[bool], float, int]:
    """Verdicts of the grader, its seconds for an answer, and the number of checks that were cut off."""
    metric = load_metric("math_accuracy")
    started = time.monotonic()
    result = metric.compute(predictions=predictions, references=references, num_processes=processes)
    seconds = time.monotonic() - started
    return [score == 1.0 for score in result["scores"]], seconds / len(predictions), result["timeouts"]


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON-lines file.")
    parser.add_argument("--answer", default="answer", help="Column with the answer or a boxed solution (answer).")
    parser.add_argument("--processes", type=int, help="Processes that compare.")
    arguments = parser.parse_args()
    references, without = read_answers(arguments.file, arguments.answer)
    print(f"{len(references)} answers; {without} rows without one")
    others = shuffled(references)
    for kind, expected, given in (("itself", True, references), ("another problem's", False, others)):
        in_other_words = [SENTENCE.format(rewritten(text)) for text in given]
        forms = {
            "bare": given,
            "in a sentence": [SENTENCE.format(text) for text in given],
            "rewritten": in_other_words,
        }
        for form, texts in forms.items():
            verdicts, seconds, timeouts = compare(texts, references, arguments.processes)
            same = sum(other == reference for other, reference in zip(given, references, strict=True))
            right = sum(verdicts) - (0 if expected else same)
            total = len(verdicts) - (0 if expected else same)
            coincidences = "" if expected else f", {same} more are the same text"
            print(
                f"{kind}, {form}: {right} of {total} ({right / total:.2%}) taken for right{coincidences}; "
                f"{1000 * seconds:.1f} ms an answer, {timeouts} cut off"
            )
            for verdict, other, reference in zip(verdicts, given, references, strict=True):
                if verdict != expected and (expected or other != reference):
                    print(f"    {other!r:.150} for {reference!r:.150}")


if __name__ == "__main__":
    main()
