"""What a comparison shows and what it does not, said from its numbers and their evaluation error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gift_trl.lab.results import Comparison, SettingResult


_REFERENCES = ("the instruct model", "Instruct-SFT", "Shadow-FT", "GIFT-BaseT")
# What GIFT above a reference would speak for.
_CLAIMS = {
    "the instruct model": "fine-tuning on these references makes the instruct model better at the task",
    "Shadow-FT": "weighing tokens by confidence helps",
    "GIFT-BaseT": "the instruct model is a better annotator than the base model",
}


@dataclass(frozen=True)
class Difference:
    """
    Difference between two models that answered the same questions.

    Parameters:
        points (`float`):
            Difference of the accuracies in percentage points.
        margin (`float`):
            Twice its standard error over the questions. Smaller than for models asked different questions, because
            questions that both get right or both get wrong say nothing about the difference.
    """

    points: float
    margin: float

    @property
    def verdict(self) -> str:
        """`"above"`, `"below"` or `"within error"`."""
        if abs(self.points) <= self.margin:
            return "within error"
        return "above" if self.points > 0 else "below"

    def __str__(self) -> str:
        return f"{self.points:+.1f} ± {self.margin:.1f}"


@dataclass(frozen=True)
class Findings:
    """
    The text under the table.

    Parameters:
        shows (`tuple[str, ...]`):
            What the run shows.
        does_not_show (`tuple[str, ...]`):
            What it does not show.
    """

    shows: tuple[str, ...]
    does_not_show: tuple[str, ...]


def paired_difference(correct: Sequence[bool], other: Sequence[bool]) -> Difference:
    """
    Compares two models question by question.

    Args:
        correct (`Sequence[bool]`):
            What one model got right.
        other (`Sequence[bool]`):
            What the other got right, in the same order.

    Returns:
        [`Difference`]: The first minus the second.
    """
    differences = [int(a) - int(b) for a, b in zip(correct, other, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    variance = sum((difference - mean) ** 2 for difference in differences) / count
    return Difference(100 * mean, 200 * math.sqrt(variance / count))


def accuracy_margin(accuracy: float, num_questions: int) -> float:
    """
    Evaluation error of one accuracy.

    Args:
        accuracy (`float`):
            Accuracy in percent.
        num_questions (`int`):
            Number of questions.

    Returns:
        `float`: Twice the binomial standard error, in percentage points.
    """
    share = accuracy / 100
    return 200 * math.sqrt(share * (1 - share) / num_questions)


def describe_findings(comparison: Comparison) -> Findings:
    """
    Says what a comparison shows and what it does not.

    Args:
        comparison ([`Comparison`]):
            The comparison.

    Returns:
        [`Findings`]: The sentences.
    """
    shows = [_describe_setting(comparison, result) for result in comparison.settings]
    shows.extend(_describe_signal(comparison))
    return Findings(tuple(shows), tuple(_describe_limits(comparison)))


def _against(comparison: Comparison, result: SettingResult, other: str) -> Difference:
    """GIFT against another method or the instruct model, on the target problems."""
    reference = comparison.instruct if other == "the instruct model" else result.by_method[other].scores
    return paired_difference(result.by_method["GIFT"].scores.target, reference.target)


def _describe_setting(comparison: Comparison, result: SettingResult) -> str:
    differences = {other: _against(comparison, result, other) for other in _REFERENCES}
    clauses = ", ".join(f"{d} against {other} ({d.verdict})" for other, d in differences.items())
    accuracy = result.by_method["GIFT"].scores.accuracies["target"]
    return f"{_capitalise(str(result.setting))}: GIFT solves {accuracy:.1f}% of the target problems. In points: {clauses}."


def _describe_signal(comparison: Comparison) -> list[str]:
    sentences, seen = [], set()
    for result in comparison.settings:
        mix = result.setting.mix
        if mix in seen:
            continue
        seen.add(mix)
        low = {outcome.method: outcome.signal[0] for outcome in result.results}
        sentences.append(
            f"Learning signal on mix {mix}: tokens the instruct model gives less than 0.2 are {_percent(result.tokens[0])} of "
            f"the answers' tokens; before training they make up {_percent(low['Instruct-SFT'])} of Instruct-SFT's loss, "
            f"{_percent(low['Shadow-FT'])} of Shadow-FT's, {_percent(low['GIFT-BaseT'])} of GIFT-BaseT's and {_percent(low['GIFT'])} of "
            "GIFT's."
        )
    return sentences


def _describe_limits(comparison: Comparison) -> list[str]:
    limits = []
    for other, claim in _CLAIMS.items():
        names = [
            str(result.setting)
            for result in comparison.settings
            if _against(comparison, result, other).verdict == "above"
        ]
        if not names:
            limits.append(f"GIFT is above {other} in no setting: this run does not show that {claim}.")
        elif len(names) < len(comparison.settings):
            limits.append(
                f"GIFT is above {other} only at {_join(names)}: elsewhere, this run does not show that {claim}."
            )
    count = len(comparison.instruct.target)
    limits.append(
        f"The ± of a difference is twice its standard error over the same {count} problems. It leaves out what another "
        f"seed would change, which makes another model pair and other data: this is seed {comparison.seed} alone, try "
        "more with --seed."
    )
    limits.append(
        "These are models of less than half a million parameters, on made-up problems: how large any effect is on a real "
        "model and task, they do not say."
    )
    rates = [result.setting.learning_rate for result in comparison.settings if result.setting.mix == "A"]
    if rates:
        limits.append(
            f"Mix A at the learning rate {max(rates):g} is a stress case: it was chosen because it strains the methods."
        )
    return limits


def _percent(share: float) -> str:
    return f"{share:.0f}%" if share >= 1 else f"{share:.1f}%"


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
