"""An answer taken apart: lists, tuples, intervals, sets and matrices of single expressions."""

import re
from dataclasses import dataclass, replace
from itertools import product

from gift_trl.evaluation.metrics.math_accuracy.quantities import split_unit
from gift_trl.evaluation.metrics.math_accuracy.typesetting import CLOSE_WORDS, OPEN_WORDS, clean_latex


@dataclass(frozen=True)
class Answer:
    r"""
    An answer, or a part of one.

    Parameters:
        kind (`str`):
            `"scalar"`; or what `items` are: a `"list"` (without brackets), a `"set"`, a `"union"`, a `"matrix"` (of lists),
            or the brackets of a tuple or interval, as in `"(]"`.
        text (`str`, *optional*, defaults to `""`):
            The LaTeX of a scalar, without typesetting, name and unit.
        name (`str`, *optional*, defaults to `""`):
            What stands before the equals sign in `x = 5`, or before `\in`.
        unit (`str`, *optional*, defaults to `""`):
            Its unit by a standard name, if it is a known one.
        percent (`bool`, *optional*, defaults to `False`):
            Whether it is a percentage.
        items (`tuple[Answer, ...]`, *optional*):
            The parts.
    """

    kind: str
    text: str = ""
    name: str = ""
    unit: str = ""
    percent: bool = False
    items: tuple["Answer", ...] = ()


_DEEPEST = 8

# Brackets, and the separator that stands in none. A "\\" begins no bracket.
_TOKEN = r"\\\\|(?P<open>\\begin(?![A-Za-z])|\\\{|[(\[{])|(?P<close>\\end(?![A-Za-z])|\\\}|[)\]}])|(?P<separator>"
_COMMA = re.compile(_TOKEN + r"[,;]|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))")
_EQUALS = re.compile(_TOKEN + r"(?<![<>!:\\])=|\\in(?![A-Za-z]))")
_APPROX = re.compile(_TOKEN + r"\\approx(?![A-Za-z]))")
_UNION = re.compile(_TOKEN + r"\\cup(?![A-Za-z]))")
_ORDER = re.compile(_TOKEN + r"<|>|\\[lg]e(?![A-Za-z]))")
_CELL = re.compile(_TOKEN + r"&)")
_ROW = re.compile(r"(?P<open>\\begin(?![A-Za-z])|\{)|(?P<close>\\end(?![A-Za-z])|\})|(?P<separator>\\\\)")

_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_MATRIX = re.compile(r"\\begin\s*\{([pb]?matrix|array)\}(?:\s*\{[clr|\s]*\})?(.*)\\end\s*\{\1\}", re.DOTALL)
_SET_BUILDER = re.compile(r"\s*[A-Za-z]\s*(?:\\mid(?![A-Za-z])|\\vert(?![A-Za-z])|[|:])(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\s*(?:[A-Za-z]|\\(?:theta|alpha|beta|phi|lambda|mu))\s*")
_SUBSCRIPT = re.compile(r"_\s*(?:\{[^{}]*\}|[A-Za-z\d])|\([^()]*\)")
_NAME = re.compile(rf"(?=.*[A-Za-z])(?!\s*-)[A-Za-z\\{{}}'+\-\s|{OPEN_WORDS}{CLOSE_WORDS}]+", re.DOTALL)
_OPERATION = re.compile(r"\\(?:sqrt|log|ln|exp|sin|cos|tan|frac|pm|mp|cdot|times)(?![A-Za-z])")
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])")


def parse_answer(text: str) -> Answer:
    """
    Takes an answer apart.

    Args:
        text (`str`):
            The answer, LaTeX or plain text.

    Returns:
        [`Answer`]: Its parts.
    """
    text = _without_braces(clean_latex(text))
    return _parse(_THOUSANDS.sub(lambda match: match[0].replace(",", ""), text), depth=0)


def _parse(text: str, depth: int) -> Answer:
    """The parts of clean text."""
    text = _without_braces(text)
    if depth > _DEEPEST:
        return Answer("scalar", text)
    parts = [part for part in _split(text, _COMMA) if part.strip()]
    if len(parts) > 1:
        return Answer("list", items=_flat(_parse(part, depth + 1) for part in parts))
    name, text = _split_name(parts[0] if parts else "")
    text = _without_braces(text)
    answer = _union(text, depth) or _bracketed(text, depth) or _matrix(text, depth) or _interval(text) or _signed(text)
    return replace(answer, name=name) if name else answer


def _flat(items) -> tuple[Answer, ...]:
    """The items of a list, with those of lists in it."""
    return tuple(part for item in items for part in (item.items if item.kind == "list" else [item]))


def _without_braces(text: str) -> str:
    """Text without white space and punctuation at its ends, and without braces around the whole of it."""
    text = text.strip().rstrip(".,;:").strip()
    while text.startswith("{") and _closing(text) == len(text):
        text = text[1:-1].strip()
    return text


def _closing(text: str) -> int:
    """Where the bracket that a text begins with has been closed, or -1."""
    depth = 0
    for match in _COMMA.finditer(text):
        depth += bool(match["open"]) - bool(match["close"])
        if match["close"] and depth == 0:
            return match.end()
    return -1


def _split(text: str, separators: re.Pattern) -> list[str]:
    """The parts between the separators that stand in no bracket."""
    parts, start, depth = [], 0, 0
    for match in separators.finditer(text):
        depth += bool(match["open"]) - bool(match["close"])
        if match["separator"] and depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


def _split_name(text: str) -> tuple[str, str]:
    """`x` and `5` of `x = 5`; of a chain of equations the last side, of an approximation what is approximated."""
    exact, *approximations = _split(text, _APPROX)
    if approximations and _is_name(exact):
        return _compact(exact), approximations[-1]
    first, *sides = _split(exact, _EQUALS)
    if sides and _is_name(first):
        return _compact(first), sides[-1]
    if sides and not re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", exact)):
        return "", sides[-1]
    return "", exact


def _is_name(text: str) -> bool:
    r"""Whether a text names what is asked for, as `x`, `f(2)`, `a_5`, `a + b` or `\angle ABC`: `2x = 10` is yet to solve."""
    return not _OPERATION.search(text) and bool(_NAME.fullmatch(_SUBSCRIPT.sub("", text)))


def _compact(text: str) -> str:
    """Text without white space and marks."""
    return re.sub(rf"[\s{OPEN_WORDS}{CLOSE_WORDS}]", "", text)


def _union(text: str, depth: int) -> Answer | None:
    """A union of sets."""
    parts = _split(text, _UNION)
    return Answer("union", items=tuple(_parse(part, depth + 1) for part in parts)) if len(parts) > 1 else None


def _bracketed(text: str, depth: int) -> Answer | None:
    """A set, a tuple or an interval; or what stands alone in round brackets."""
    if text in (r"\emptyset", r"\{\}"):
        return Answer("set")
    if not text.startswith(("(", "[", r"\{")) or _closing(text) != len(text):
        return None
    if text.startswith(r"\{"):
        inner = text[2:-2]
        condition = _SET_BUILDER.fullmatch(inner)
        if condition:
            return replace(_parse(condition[1], depth + 1), name="")
        content = _parse(inner, depth + 1)
        return Answer("set", items=content.items if content.kind == "list" else (content,))
    items = tuple(_parse(part, depth + 1) for part in _split(text[1:-1], _COMMA))
    if len(items) > 1:
        return Answer(text[0] + text[-1], items=items)
    return items[0] if text[0] == "(" else None


def _matrix(text: str, depth: int) -> Answer | None:
    """A matrix, as a list of rows."""
    match = _MATRIX.fullmatch(text)
    if match is None:
        return None
    rows = [_split(row, _CELL) for row in _split(match[2], _ROW) if row.strip()]
    return Answer(
        "matrix", items=tuple(Answer("list", items=tuple(_parse(cell, depth + 1) for cell in row)) for row in rows)
    )


def _interval(text: str) -> Answer | None:
    """The interval of one variable that an inequality describes."""
    sides = _split(text, _ORDER)
    signs = [match["separator"] for match in _ORDER.finditer(text) if match["separator"]]
    if len(sides) - 1 != len(signs) or not signs:
        return None
    if signs[0] in (">", r"\ge"):  # from right to left it is the other one
        sides = sides[::-1]
        signs = [{">": "<", r"\ge": r"\le"}.get(sign, "") for sign in reversed(signs)]
    if not all(signs) or not set(signs) <= {"<", r"\le"}:
        return None
    if len(sides) == 2:
        if _VARIABLE.fullmatch(sides[0]):
            sides, signs = [r"-\infty", *sides], ["<", *signs]
        else:
            sides, signs = [*sides, r"\infty"], [*signs, "<"]
    if len(sides) != 3 or not _VARIABLE.fullmatch(sides[1]):
        return None
    variable = sides[1].strip()
    if any(re.search(rf"(?<![A-Za-z\\]){re.escape(variable)}(?![A-Za-z])", side) for side in (sides[0], sides[2])):
        return None
    brackets = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
    return Answer(brackets, name=variable, items=(_scalar(sides[0]), _scalar(sides[2])))


def _signed(text: str) -> Answer:
    """A scalar, or the list of those that plus-minus signs stand for."""
    signs = _PLUS_MINUS.findall(text)
    if not signs or len(signs) > 3:
        return _scalar(text)
    if "mp" in signs:
        choices = [["+" if (sign == "pm") == upper else "-" for sign in signs] for upper in (True, False)]
    else:
        choices = product("+-", repeat=len(signs))
    return Answer("list", items=tuple(_scalar(_with_signs(text, choice)) for choice in choices))


def _with_signs(text: str, choice) -> str:
    """Text with each plus-minus sign replaced by one of the two."""
    signs = iter(choice)
    return _PLUS_MINUS.sub(lambda match: next(signs), text)


def _scalar(text: str) -> Answer:
    """A single expression, without its unit."""
    text, unit, percent = split_unit(text)
    text = _without_braces(text.replace(OPEN_WORDS, "").replace(CLOSE_WORDS, ""))
    while text.startswith("(") and _closing(text) == len(text):
        text = _without_braces(text[1:-1])
    return Answer("scalar", text, unit=unit, percent=percent)
