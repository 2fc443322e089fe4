"""Whether two answers say the same."""

import re
from collections.abc import Callable, Iterable, Sequence

from gift_trl.evaluation.metrics.math_accuracy.parts import Answer
from gift_trl.evaluation.metrics.math_accuracy.quantities import Number, agree, read_number


_SYMBOL = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?")
_WORD = re.compile(r"[^\W\d_]{3,}")
_MATHEMATICAL_WORD = re.compile(r"\\|[\d^_=<>+*/{}()|]")
_RELATION = re.compile(r"[=<>]|\\(?:[lgn]e|in|equiv)(?![A-Za-z])")
# A time, a ratio or a number in another base means what its digits say, and nothing can be computed from it
_NOTATION = re.compile(r"\d\s*:\s*\d|\d\s*_")


def equivalent(reference: Answer, prediction: Answer, same_value: Callable[[str, str], bool]) -> bool:
    """
    Whether a prediction says what the reference says.

    - Numbers are compared as exact fractions, with the rule of [`agree`] for rounded decimals. With one percent sign among
      two numbers, 50% is 0.5, and also 50, since a question may ask for the percentage; 0.5% is not 0.5.
    - A list without brackets is in any order, as a set; next to a tuple its order counts. A tuple or an interval is equal to
      one with the same brackets, which are passed over from three parts on. A column is equal to a tuple.
    - Two known units must be the same; one alone, or one that is not known, does not count. Nor does what the answer is
      called (`x = 5` is 5), unless both have a name and the two are different symbols.
    - Words are compared without case and punctuation.

    Args:
        reference ([`Answer`]):
            The right answer.
        prediction ([`Answer`]):
            The answer to judge.
        same_value (`Callable[[str, str], bool]`):
            Compares the LaTeX of two expressions that are not both plain numbers, the reference first.

    Returns:
        `bool`: Whether they are equal.
    """
    names = {reference.name, prediction.name}
    if len(names) == 2 and all(_SYMBOL.fullmatch(name) for name in names):
        return False
    kinds = reference.kind, prediction.kind
    if kinds == ("scalar", "scalar"):
        return _same_scalar(reference, prediction, same_value)
    if "scalar" in kinds and "list" in kinds:  # the same value in several forms, as 1/2 = 0.5
        references, predictions = ((answer.items or [answer]) for answer in (reference, prediction))
        return all(equivalent(one, other, same_value) for one in references for other in predictions)
    for one, other, swapped in ((reference, prediction, False), (prediction, reference, True)):
        if one.kind == "set" and len(one.items) == 1 and other.kind == "scalar":
            pair = (other, one.items[0]) if swapped else (one.items[0], other)
            return equivalent(*pair, same_value)
        if one.kind == "matrix" and other.kind == "()" and all(len(row.items) == 1 for row in one.items):
            column = [row.items[0] for row in one.items]
            return _in_order(*((other.items, column) if swapped else (column, other.items)), same_value)
    if set(kinds) in ({"list"}, {"union"}, {"list", "union"}):
        return _in_any_order(reference.items, prediction.items, same_value)
    if set(kinds) in ({"set"}, {"list", "set"}):
        return _in_any_order(_distinct(reference.items), _distinct(prediction.items), same_value)
    same_brackets = kinds[0] == kinds[1] or (len(reference.items) > 2 and all(len(kind) == 2 for kind in kinds))
    if same_brackets or set(kinds) == {"list", "()"}:
        return _in_order(reference.items, prediction.items, same_value)
    return False


def canonical(answer: Answer, describe: Callable[[str], str]) -> str:
    """
    Writes an answer so that equal answers are mostly equal strings, to count votes.

    Args:
        answer ([`Answer`]):
            The answer.
        describe (`Callable[[str], str]`):
            Writes the LaTeX of an expression that is no plain number.

    Returns:
        `str`: The answer without name, unit and order of a list.
    """
    if answer.kind == "scalar":
        number = read_number(answer.text)
        sign = "%" if answer.percent else ""
        return (str(number.value) if number else describe(answer.text)) + sign
    items = [canonical(item, describe) for item in answer.items]
    if answer.kind in ("list", "set", "union"):
        items = sorted(items)
    left, right = answer.kind if len(answer.kind) == 2 else {"set": "{}", "matrix": "[]"}.get(answer.kind, ("", ""))
    return left + ", ".join(items) + right


def plain_text(text: str) -> str:
    """
    Writes an expression without looking into it.

    Args:
        text (`str`):
            LaTeX or words.

    Returns:
        `str`: The text without white space, words in lower case.
    """
    return _letters(text) if _is_words(text) else re.sub(r"\s+", "", text)


def _in_order(
    references: Sequence[Answer], predictions: Sequence[Answer], same_value: Callable[[str, str], bool]
) -> bool:
    """Whether two sequences are equal item by item."""
    return len(references) == len(predictions) and all(
        equivalent(*pair, same_value) for pair in zip(references, predictions, strict=True)
    )


def _in_any_order(
    references: Sequence[Answer], predictions: Sequence[Answer], same_value: Callable[[str, str], bool]
) -> bool:
    """Whether each item of one sequence has its equal in the other."""
    if len(references) != len(predictions):
        return False
    left = list(predictions)
    for reference in references:
        match = next((item for item in left if equivalent(reference, item, same_value)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _distinct(items: Iterable[Answer]) -> list[Answer]:
    """The items of a set, each once."""
    return list({canonical(item, plain_text): item for item in items}.values())


def _same_scalar(reference: Answer, prediction: Answer, same_value: Callable[[str, str], bool]) -> bool:
    """Whether two single expressions are equal."""
    if reference.unit and prediction.unit and reference.unit != prediction.unit:
        return False
    right, given = reference.text, prediction.text
    numbers = read_number(right), read_number(given)
    if None not in numbers:
        return _same_number(*numbers, reference.percent, prediction.percent)
    if not right or not given or reference.percent != prediction.percent:
        return False
    if plain_text(right) == plain_text(given):
        return True
    if _is_words(right) or _is_words(given) or _NOTATION.search(right) or _NOTATION.search(given):
        return False
    relations = bool(_RELATION.search(right)), bool(_RELATION.search(given))
    if relations == (True, False) and prediction.name:
        given = f"{prediction.name} = {given}"
    elif relations == (False, True) and reference.name:
        right = f"{reference.name} = {right}"
    elif relations[0] != relations[1]:
        return False
    return same_value(right, given)


def _same_number(right: Number, given: Number, right_percent: bool, given_percent: bool) -> bool:
    """Whether two numbers agree, each of them perhaps a percentage."""
    if right_percent == given_percent:
        return agree(right, given)
    share = agree(right.scaled(1, 100), given) if right_percent else agree(right, given.scaled(1, 100))
    return share or (abs((right if right_percent else given).value) > 1 and agree(right, given))


def _is_words(text: str) -> bool:
    """Whether a text is language, not mathematics."""
    return bool(_WORD.search(text)) and not _MATHEMATICAL_WORD.search(text)


def _letters(text: str) -> str:
    """The letters and digits of words, without case."""
    return "".join(re.findall(r"\w", text.casefold()))
