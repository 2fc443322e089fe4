"""
The math grader against answers that were judged by hand.

    python tests/evaluation/grader_table.py

prints the confusion table by category, every pair that the grader judges otherwise, and the time; with `--math_verify` the table
of math-verify by itself. `grader_pairs.jsonl` has a pair a line: an answer as a model may write it, a reference, and whether the
answer is right. In an answer `@7*1000000@` stands for a million sevens.
"""

import argparse
import json
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from gift_trl.evaluation.metrics import load_metric


PAIRS_FILE = Path(__file__).with_name("grader_pairs.jsonl")
_REPEATED = re.compile(r"@([^@]*)\*(\d+)@")


@dataclass(frozen=True)
class Pair:
    """
    An answer that was judged by hand.

    Args:
        category, reference, answer (`str`):
            What it is about, the right answer, and what a model wrote.
        right (`bool`):
            Whether that is right.
        why (`str`, *optional*):
            The reason, where it is not plain.
    """

    category: str
    reference: str
    answer: str
    right: bool
    why: str = ""

    @property
    def written_out(self) -> str:
        """The answer with its repetitions."""
        return _REPEATED.sub(lambda match: match[1] * int(match[2]), self.answer)


def read_pairs(path: Path = PAIRS_FILE) -> list[Pair]:
    """Reads the pairs."""
    with open(path, encoding="utf-8") as lines:
        return [Pair(**json.loads(line)) for line in lines]


def judge(pairs: list[Pair], **options) -> tuple[list[bool], dict]:
    """What the grader says of each pair, and all that the metric returns."""
    result = load_metric("math_accuracy").compute(
        predictions=[pair.written_out for pair in pairs], references=[pair.reference for pair in pairs], **options
    )
    return [score == 1.0 for score in result["scores"]], result


def judge_with_math_verify(pairs: list[Pair]) -> list[bool]:
    """What math-verify says by itself, with its own limits of time. On a tower of powers it may never come back."""
    from math_verify import parse, verify

    verdicts = []
    for pair in pairs:
        try:
            answer = pair.written_out
            if pair.category not in ("box", "hash", "no mark") and "boxed" not in answer:
                answer = rf"$\boxed{{{answer}}}$"  # it looks for LaTeX in what a model wrote
            verdicts.append(verify(parse(f"${pair.reference}$"), parse(answer)))
        except Exception:  # it raises what sympy raises
            verdicts.append(False)
    return verdicts


def confusion_table(pairs: list[Pair], verdicts: list[bool]) -> str:
    """Right and wrong answers by category, and how many of each the grader takes for right and for wrong."""
    counts = Counter((name, p.right, v) for p, v in zip(pairs, verdicts, strict=True) for name in (p.category, "all"))
    names = [*dict.fromkeys(pair.category for pair in pairs), "all"]
    width = max(map(len, names))
    lines = [
        f"{'':{width}}   right answers        wrong answers",
        f"{'':{width}}  taken  refused      taken  refused",
    ]
    for name in names:
        cells = [counts[name, right, verdict] for right in (True, False) for verdict in (True, False)]
        lines.append("{:{}}  {:5}  {:7}      {:5}  {:7}".format(name, width, *cells))
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, default=PAIRS_FILE, help="File of pairs; the shipped one by default.")
    parser.add_argument("--without", nargs="*", default=[], help="Categories to leave out.")
    parser.add_argument("--math_verify", action="store_true", help="Judge with math-verify by itself, without `huge`.")
    arguments = parser.parse_args()
    if arguments.math_verify:
        pairs = [pair for pair in read_pairs(arguments.pairs) if pair.category not in ("huge", *arguments.without)]
        _print_verdicts(pairs, judge_with_math_verify(pairs))
        return
    pairs = [pair for pair in read_pairs(arguments.pairs) if pair.category not in arguments.without]
    started = time.monotonic()
    verdicts, result = judge(pairs)
    seconds = time.monotonic() - started
    _print_verdicts(pairs, verdicts)
    print(f"\n{len(pairs)} pairs in {seconds:.1f} s; {result['timeouts']} checks were cut off")


def _print_verdicts(pairs: list[Pair], verdicts: list[bool]) -> None:
    print(confusion_table(pairs, verdicts), end="\n\n")
    for pair, verdict in zip(pairs, verdicts, strict=True):
        if verdict != pair.right:
            said = "taken for right" if verdict else "taken for wrong"
            print(f"{said}: {pair.answer[:100]!r} for {pair.reference[:100]!r} ({pair.category}) {pair.why}")


if __name__ == "__main__":
    main()
