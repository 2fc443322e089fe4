"""Whether two answers say the same."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import product

from gift_trl.evaluation.metrics.math_accuracy.parts import Answer
from gift_trl.evaluation.metrics.math_accuracy.quantities import Number, agree, read_number
from gift_trl.evaluation.metrics.math_accuracy.units import Unit, known_unit, split_unit


_DEGREE, _RADIAN = known_unit("degree"), known_unit("radian")
_SYMBOL = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?")
_BOUND = re.compile(r"_\{[^{}]*\}")
_WORD = re.compile(r"[^\W\d_]{3,}")
_MATHEMATICAL_WORD = re.compile(r"\\|[\d^_=<>+*/{}()|]")
_RELATION = re.compile(r"[=<>]|\\(?:[lgn]e|in|equiv)(?![A-Za-z])")
# A time, a ratio or a number in another base means what its digits say, and nothing can be computed from it
_NOTATION = re.compile(r"\d\s*:\s*\d|\d\s*_")


_MARKS = {"set": ("{", "}"), "matrix": ("[", "]"), "except": ("R\\\\{", "}")}
_SUBSCRIPT = re.compile(r"_\{(\w+)\}|\^\{(\w)\}")
_ARTICLE = re.compile(r"^\s*(?:an?|the)\s+", re.IGNORECASE)
# A letter that may be a unit beside an answer with that unit
_LETTER_AFTER_NUMBER = re.compile(r"(?<=\d)(?=[a-z]$)")


def equivalent(reference: Answer, prediction: Answer, same_value: Callable[[str, str], bool]) -> bool:
    """
    Whether a prediction says what the reference says.

    - Numbers are compared as exact fractions, with the rule of [`agree`] for rounded decimals. With one percent sign among
      two numbers, 50% is 0.5, and also 50, since a question may ask for the percentage; 0.5% is not 0.5.
    - A list without brackets is in any order, as a set; next to a tuple its order counts. A tuple or an interval is equal to
      one with the same brackets, which are passed over from three parts on. A column is equal to a tuple.
    - Two known units must measure the same, and 100 cm is 1 m; one alone, or one that is not known, does not count. Nor does
      what the answer is called (`x = 5` is 5), unless both have a name and the two are different symbols.
    - The choice of a competition, "(C) 42", is its letter as well as its value.
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
    if "choice" in kinds:
        if kinds[0] == kinds[1]:
            return equivalent(reference.items[0], prediction.items[0], same_value)
        pairs = product(*(answer.items if answer.kind == "choice" else [answer] for answer in (reference, prediction)))
        return any(equivalent(*pair, same_value) for pair in pairs)
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
    if set(kinds) in ({"set"}, {"list", "set"}, {"except"}):
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
    if answer.kind == "choice":
        return items[0]
    if answer.kind in ("list", "set", "union", "except"):
        items = sorted(items)
    left, right = answer.kind if len(answer.kind) == 2 else _MARKS.get(answer.kind, ("", ""))
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
    if _is_words(text):
        return "".join(re.findall(r"\w", _ARTICLE.sub("", text).casefold()))
    return _SUBSCRIPT.sub(lambda match: f"{match[0][0]}{match[1] or match[2]}", re.sub(r"\s+", "", text))


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
    reference, prediction = _with_unit(reference, prediction), _with_unit(prediction, reference)
    reference, prediction = _as_angle(reference, prediction), _as_angle(prediction, reference)
    scale = _scale(prediction.unit, reference.unit)
    if scale is None:
        return False
    right, given = reference.text, prediction.text
    numbers = read_number(right), read_number(given)
    if numbers[1] and scale != 1:
        numbers = numbers[0], numbers[1].scaled(scale.numerator, scale.denominator)
    if None not in numbers:
        return _same_number(*numbers, reference.percent, prediction.percent)
    if not right or not given or reference.percent != prediction.percent:
        return False
    if scale != 1:
        given = rf"\frac{{{scale.numerator}}}{{{scale.denominator}}} \cdot ({given})"
    if plain_text(right) == plain_text(given):
        return True
    if _is_words(right) or _is_words(given) or _NOTATION.search(right) or _NOTATION.search(given):
        return False
    relations = _is_relation(right), _is_relation(given)
    if relations == (True, False) and prediction.name:
        given = f"{prediction.name} = {given}"
    elif relations == (False, True) and reference.name:
        right = f"{reference.name} = {right}"
    elif relations[0] != relations[1]:
        return False
    return same_value(right, given)


def _with_unit(answer: Answer, other: Answer) -> Answer:
    """An answer that ends in a single letter, which is a unit where the other one has a unit of its kind: 5m beside 5 cm."""
    if answer.unit is None and other.unit is not None and _LETTER_AFTER_NUMBER.search(answer.text):
        text, unit, _ = split_unit(_LETTER_AFTER_NUMBER.sub(" ", answer.text))
        if unit is not None and unit.dimension == other.unit.dimension:
            return replace(answer, text=text, unit=unit)
    return answer


def _as_angle(answer: Answer, other: Answer) -> Answer:
    r"""An angle without a unit, if the other one is in degrees or radians, and it is not: 90 degrees beside \pi/2."""
    if answer.unit == _RADIAN:
        return replace(answer, unit=None)
    in_radians = other.unit == _RADIAN or (other.unit is None and r"\pi" in other.text)
    if answer.unit == _DEGREE and in_radians:
        return replace(answer, text=rf"\frac{{\pi}}{{180}} \cdot ({answer.text})", unit=None)
    return answer


def _scale(unit: Unit | None, wanted: Unit | None) -> Fraction | None:
    """What a number in one unit is multiplied with to be in another; 1 if one of them is missing, `None` for another dimension."""
    if unit is None or wanted is None:
        return Fraction(1)
    return unit.factor / wanted.factor if unit.dimension == wanted.dimension else None


def _same_number(right: Number, given: Number, right_percent: bool, given_percent: bool) -> bool:
    """Whether two numbers agree, each of them perhaps a percentage."""
    if right_percent == given_percent:
        return agree(right, given)
    share = agree(right.scaled(1, 100), given) if right_percent else agree(right, given.scaled(1, 100))
    return share or (abs((right if right_percent else given).value) > 1 and agree(right, given))


def _is_relation(text: str) -> bool:
    """Whether a text is an equation or inequality; the bounds of a sum are not."""
    return bool(_RELATION.search(_BOUND.sub("", text)))


def _is_words(text: str) -> bool:
    """Whether a text is language, not mathematics."""
    return bool(_WORD.search(text)) and not _MATHEMATICAL_WORD.search(text)
