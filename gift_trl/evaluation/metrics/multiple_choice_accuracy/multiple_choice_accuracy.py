"""Multiple-choice accuracy of free text as an `evaluate.Metric`."""

import re
import string
from collections.abc import Sequence

import evaluate
import numpy as np

from gift_trl.evaluation.metrics.pairs import TextPairs, text_features


_DESCRIPTION = "Share of predictions that choose the right letter. A prediction without a clear choice is wrong."
_INPUTS = """
Args:
    predictions (`list[str]`):
        Generated texts. The last 4,000 characters of each are read.
    references (`list[str]`):
        Right letters, from "A" on.
    choices (`list[list[str]]`, *optional*):
        The texts of each question's choices, in the order of the letters. With them a prediction may name a text instead of
        its letter, and a letter beyond the last choice is no answer. Without them all letters are.

Returns:
    `dict`: `"multiple_choice_accuracy"`, the mean; `"scores"`, 0.0 or 1.0 for each pair; `"answers"`, the chosen letter or
    `None`; `"unanswered"`, the number of predictions without a choice.

The last statement of a choice counts: `\\boxed{B}`; "the answer is (B)", "Answer: B"; "option B is correct", "I choose B"; a
last line that is the letter alone. Without any, the text may begin with its choice, as in "B. Paris" or "(B) Paris", if no
other line begins so with another letter, or be nothing but the text of a choice. A statement of two letters ("A or B") is
no choice, and a letter that is only mentioned is none.
"""
_EXAMINED_CHARACTERS = 4_000

_BOXED = re.compile(r"\\boxed\s*\{([^\n]{1,300})")
_ADVERB = r"(?:(?:therefore|thus|clearly|most likely|likely|probably|definitely|indeed|simply)\b[\s,]*)?"
_STATED = re.compile(
    r"\b(?:answer|choice|option)[*_]*(?:\s+(?:here|to (?:this|the) question))?[*_]*\s*(?:[:=]|\b(?:is|would be|should be|must be)\b)"
    rf"[\s*_:]*{_ADVERB}(?:(?:the\s+)?(?:option|choice|letter|answer)\b)?[\s*_:]*(?=(\S[^\n]{{0,300}}))",
    re.IGNORECASE,
)
_CHOSEN = re.compile(
    r"\b(?i:option|choice|answer)[\s*_]+([(\[]?[A-Z]\b[)\]]?)[*_]*\s+is\s+(?:the\s+)?(?:correct|right|best)\b"
    r"|([(\[]?\b[A-Z]\b[)\]]?)[*_]*\s+is\s+the\s+(?:correct|right|best)\s+(?:option|choice|answer)\b"
    r"|\b(?i:choose|select|pick)[\s*_]+(?:(?i:option|choice|answer)[\s*_]+)?(?=([(\[]?[A-Z]\b[^\n]{0,300}))"
)
_LAST_LINE = re.compile(r"(?:^|\n)[\s*_\"'`$]*([(\[]?[A-Za-z][)\]]?[\s.*_\"'`$]*)$")
_LEADING = re.compile(r"^[\s*_\"'`$]*(?:[(\[]([A-Za-z])[)\]]|([A-Z])\s*(?:[.:)\]]|[*_]+|$))", re.MULTILINE)

# What may stand between a command or a quote and the letter, and what shows that a letter is no word: "A cat" is no choice
_DECORATION = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf)\b|[*_\"'`${}\\]")
_LETTER = re.compile(r"\s*(?:[(\[]\s*([A-Za-z])\s*[)\]]|([A-Za-z])(?![\w'’]))")
_ANOTHER = re.compile(
    r"\s*(?:,|/|&|\b(?:or|and)\b)+\s*(?:(?:option|choice)\s+)?(?:[(\[]\s*[A-Za-z]\s*[)\]]|[A-Z](?![\w'’]))"
)
_REASON = re.compile(r"\s*(?:$|[.,;:)\]–—-]|\b(?:because|since|as|for|which|due)\b)")


class MultipleChoiceAccuracy(TextPairs, evaluate.Metric):
    """Share of predictions that choose the right letter. The options stand at `compute`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=text_features(several_references=False),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        choices: Sequence[Sequence[str]] | None = None,
    ) -> dict:
        choices = [()] * len(predictions) if choices is None else choices
        if len(choices) != len(predictions):
            raise ValueError(f"There must be the choices of all {len(predictions)} questions, not of {len(choices)}.")
        references = [reference.strip().strip("().").upper() for reference in references]
        for index, (reference, texts) in enumerate(zip(references, choices, strict=True)):
            letters = string.ascii_uppercase[: len(texts) or None]
            if len(reference) != 1 or reference not in letters:
                raise ValueError(f"Reference {index} is {reference!r}: it must be a letter from A to {letters[-1]}.")
        answers = [chosen_letter(text, texts) for text, texts in zip(predictions, choices, strict=True)]
        scores = [float(answer == reference) for answer, reference in zip(answers, references, strict=True)]
        return {
            "multiple_choice_accuracy": float(np.mean(scores)),
            "scores": scores,
            "answers": answers,
            "unanswered": answers.count(None),
        }


def chosen_letter(text: str, choices: Sequence[str] = ()) -> str | None:
    """
    Reads which choice a text makes, by the rules that stand at the metric.

    Args:
        text (`str`):
            A generated text.
        choices (`Sequence[str]`, *optional*):
            The texts of the choices, in the order of the letters.

    Returns:
        `str` or `None`: The letter in upper case, `None` if the text makes no clear choice.
    """
    text = text[-_EXAMINED_CHARACTERS:].strip()
    statements = [
        (match.start(), next(filter(None, match.groups())))
        for pattern in (_BOXED, _STATED, _CHOSEN, _LAST_LINE)
        for match in pattern.finditer(text)
    ]
    for _, statement in sorted(statements, reverse=True):
        letters = _letters_of(statement, choices)
        if letters:
            return letters if len(letters) == 1 else None
    leading = {(bracketed or bare).upper() for bracketed, bare in _LEADING.findall(text)}
    if leading and _LEADING.match(text):
        return _possible(leading.pop(), choices) if len(leading) == 1 else None
    named = _named_choice(text, choices)
    return named if len(named) == 1 and _words(text) == _words(choices[ord(named) - ord("A")]) else None


def _letters_of(statement: str, choices: Sequence[str]) -> str:
    """The letter that a statement names, several if it names several, none if it names none."""
    statement = _DECORATION.sub("", statement)
    letter = _LETTER.match(statement)
    if letter is None:
        return _named_choice(statement, choices)
    rest = statement[letter.end() :]
    name = letter[1] or letter[2]
    if letter[1] is None and not _REASON.match(rest) and (name.islower() or name in "AI"):
        return _named_choice(statement, choices)
    if _ANOTHER.match(rest):
        return "several"
    return _possible(name.upper(), choices) or ""


def _possible(letter: str, choices: Sequence[str]) -> str | None:
    """The letter, if there is such a choice."""
    return letter if not choices or ord(letter) - ord("A") < len(choices) else None


def _named_choice(statement: str, choices: Sequence[str]) -> str:
    """The letters of the choice whose text a statement begins with, the longest one's where one text begins another."""
    words = _words(statement)
    named = [(len(_words(text)), chr(ord("A") + index)) for index, text in enumerate(choices) if _begins(words, text)]
    return "".join(letter for length, letter in named if length == max(named)[0])


def _begins(words: str, choice: str) -> bool:
    """Whether a statement gives a choice's text and then ends or gives its reason."""
    choice = _words(choice)
    rest = words[len(choice) :]
    return bool(choice) and words.startswith(choice) and (not rest or rest.startswith((" because ", " since ")))


def _words(text: str) -> str:
    """Lower-case words of a text, to compare two texts."""
    return " ".join(_DECORATION.sub("", text).casefold().split()).rstrip(" .")
