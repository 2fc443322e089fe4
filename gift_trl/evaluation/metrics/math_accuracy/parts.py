"""An answer taken apart: lists, tuples, intervals, sets and matrices of single expressions."""

import re
from dataclasses import dataclass, replace
from itertools import product

from gift_trl.evaluation.metrics.math_accuracy.typesetting import CLOSE_WORDS, OPEN_WORDS, clean_latex
from gift_trl.evaluation.metrics.math_accuracy.units import Unit, split_unit


@dataclass(frozen=True)
class Answer:
    r"""
    An answer, or a part of one.

    Parameters:
        kind (`str`):
            `"scalar"`; or what `items` are: a `"list"` (without brackets), a `"set"`, a `"union"`, a `"matrix"` (of lists),
            the brackets of a tuple or interval, as in `"(]"`, the numbers `"except"` which all real ones are meant, or the
            letter and the value of a `"choice"`.
        text (`str`, *optional*, defaults to `""`):
            The LaTeX of a scalar, without typesetting, name and unit.
        name (`str`, *optional*, defaults to `""`):
            What stands before the equals sign in `x = 5`, or before `\in`.
        unit ([`Unit`], *optional*):
            Its unit, if it is a known one.
        percent (`bool`, *optional*, defaults to `False`):
            Whether it is a percentage.
        items (`tuple[Answer, ...]`, *optional*):
            The parts.
    """

    kind: str
    text: str = ""
    name: str = ""
    unit: Unit | None = None
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
_UNEQUAL = re.compile(_TOKEN + r"\\ne(?![A-Za-z]))")
_WITHOUT = re.compile(_TOKEN + r"\\(?:setminus|backslash)(?![A-Za-z])|(?<=\\mathbb\{R\})\s*-)")
_ROW = re.compile(r"(?P<open>\\begin(?![A-Za-z])|\{)|(?P<close>\\end(?![A-Za-z])|\})|(?P<separator>\\\\)")

_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_MATRIX = re.compile(r"\\begin\s*\{([pb]?matrix|array)\}(?:\s*\{[clr|\s]*\})?(.*)\\end\s*\{\1\}", re.DOTALL)
_SET_BUILDER = re.compile(r"\s*[A-Za-z]\s*(?:\\mid(?![A-Za-z])|\\vert(?![A-Za-z])|[|:])(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\s*(?:[A-Za-z]|\\(?:theta|alpha|beta|phi|lambda|mu))\s*")
_SUBSCRIPT = re.compile(r"_\s*(?:\{[^{}]*\}|[A-Za-z\d])|\([^()]*\)")
_VARIABLES = re.compile(r"\s*\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\)\s*")
_DERIVATIVE = re.compile(r"\\frac\s*\{\s*d\s*[A-Za-z]?\s*\}\s*\{\s*d\s*[A-Za-z]\s*\}")
_NAME = re.compile(rf"(?=.*[A-Za-z])(?!\s*-)[A-Za-z\\{{}}'+\-\s|{OPEN_WORDS}{CLOSE_WORDS}]+", re.DOTALL)
_OPERATION = re.compile(r"\\(?:sqrt|log|ln|exp|sin|cos|tan|frac|pm|mp|cdot|times)(?![A-Za-z])")
_REALS = re.compile(
    r"\\mathbb\s*\{?\s*R\s*\}?|\\R|(?:the\s+set\s+of\s+)?all\s+reals?(?:\s+numbers?)?|real\s+numbers", re.IGNORECASE
)
_STATEMENT = re.compile(
    rf"\s*{OPEN_WORDS}?\s*(?:(?:the\s+)?(?:(?:final|correct)\s+)?answer(?:\s+is)?\s*:?|(?:option|choice)(?=\s*\(?[A-J]\)?\W*$))"
    rf"\s*{CLOSE_WORDS}?(?=.*\w)",
    re.IGNORECASE | re.DOTALL,
)
_CHOICE = re.compile(
    rf"{OPEN_WORDS}\s*\(?([A-J])[).:]\s*{CLOSE_WORDS}(.+)|{OPEN_WORDS}?\s*\(?([A-J])[).:]\s+(?![-+*/^=<>]|\\(?:cdot|times|div|pm|c[au]p)(?![A-Za-z]))(.+)",
    re.DOTALL,
)
_CHOICE_AFTER = re.compile(rf"(.*\S)\s*{OPEN_WORDS}\s*\(([A-J])\)\s*{CLOSE_WORDS}", re.DOTALL)
_LABEL = re.compile(r"[A-Z]'?\s*(?=\()")
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
    statement = _STATEMENT.match(text)
    if statement:
        text = _without_braces(text[statement.end() :])
        if text.count(CLOSE_WORDS) > text.count(OPEN_WORDS):
            text = text.replace(CLOSE_WORDS, "", 1)
    text = _THOUSANDS.sub(_without_commas, text)
    choice, choice_after = _CHOICE.fullmatch(text), _CHOICE_AFTER.fullmatch(text)
    if choice or choice_after:
        value, letter = choice_after.groups() if choice_after else (choice[2] or choice[4], choice[1] or choice[3])
        return Answer("choice", items=(Answer("scalar", letter), _parse(value, depth=1)))
    return _parse(text, depth=0)


def _without_commas(match: re.Match) -> str:
    """A number without the commas between its thousands; `(12,102)` is a pair."""
    before, after = match.string[: match.start()].rstrip(), match.string[match.end() :].lstrip()
    alone = before.endswith(("(", "[")) and after.startswith((")", "]"))
    return match[0] if alone else match[0].replace(",", "")


def _parse(text: str, depth: int) -> Answer:
    """The parts of clean text."""
    text = _without_braces(text)
    if depth > _DEEPEST:
        return Answer("scalar", text)
    parts = [part for part in _split(text, _COMMA) if part.strip()]
    if len(parts) > 1:
        return _list([_parse(part, depth + 1) for part in parts])
    name, text = _split_name(parts[0] if parts else "")
    text = _without_braces(text)
    answer = (
        _except(text, depth)
        or _union(text, depth)
        or _bracketed(text, depth)
        or _matrix(text, depth)
        or _interval(text)
        or _signed(text)
    )
    return replace(answer, name=name) if name else answer


def _list(items: list[Answer]) -> Answer:
    """A list, with the items of lists in it; of what is left out, as in `x \\ne 1, 2`, all that is."""
    flat = tuple(part for item in items for part in (item.items if item.kind == "list" else [item]))
    if flat[0].kind == "except" and all(item.kind in ("except", "scalar") for item in flat):
        left_out = (part for item in flat for part in (item.items if item.kind == "except" else [item]))
        return Answer("except", name=flat[0].name, items=tuple(left_out))
    return Answer("list", items=flat)


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
    if len(sides) == 1 and _VARIABLE.fullmatch(sides[0]):  # 5 = x
        return _compact(sides[0]), first
    if sides and not re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", exact)):
        return "", sides[-1]
    return "", exact


def _is_name(text: str) -> bool:
    r"""Whether a text names what is asked for, as `x`, `f(2)`, `a_5`, `a + b` or `\angle ABC`: `2x = 10` is yet to solve."""
    if _VARIABLES.fullmatch(text):
        return True
    text = _DERIVATIVE.sub("y", text)
    return not _OPERATION.search(text) and bool(_NAME.fullmatch(_SUBSCRIPT.sub("", text)))


def _compact(text: str) -> str:
    """Text without white space and marks."""
    return re.sub(rf"[\s{OPEN_WORDS}{CLOSE_WORDS}]", "", text)


def _union(text: str, depth: int) -> Answer | None:
    """A union of sets."""
    parts = _split(text, _UNION)
    if len(parts) == 1:
        return None
    items = tuple(_parse(part, depth + 1) for part in parts)
    if all(item.kind == "()" and len(item.items) == 2 for item in items):
        ends = [end for item in items for end in item.items]
        holes = ends[1:-1]
        if _is_infinite(ends[0], "-") and _is_infinite(ends[-1], "+") and holes[::2] == holes[1::2]:
            return Answer("except", items=tuple(holes[::2]))
    return Answer("union", items=items)


def _except(text: str, depth: int) -> Answer | None:
    r"""All real numbers, or all but some: `\mathbb{R}`, `\mathbb{R} \setminus \{1\}`, `x \ne 1`."""
    first, *left_out = _split(text, _UNEQUAL)
    if len(left_out) == 1 and _VARIABLE.fullmatch(first):
        answer = _parse(left_out[0], depth + 1)
        return Answer("except", name=first.strip(), items=answer.items if answer.kind == "list" else (answer,))
    first, *left_out = _split(text, _WITHOUT)
    if not _REALS.fullmatch(_compact_words(first)) or len(left_out) > 1:
        return None
    answer = _parse(left_out[0], depth + 1) if left_out else Answer("set")
    return Answer("except", items=answer.items) if answer.kind == "set" else None


def _is_infinite(answer: Answer, sign: str) -> bool:
    """Whether an end of an interval is infinite, to one of the two sides."""
    return answer.text.replace(" ", "") in {"-": (r"-\infty",), "+": (r"\infty", r"+\infty")}[sign]


def _compact_words(text: str) -> str:
    """Text without marks."""
    return text.replace(OPEN_WORDS, "").replace(CLOSE_WORDS, "").strip()


def _bracketed(text: str, depth: int) -> Answer | None:
    """A set, a tuple or an interval; or what stands alone in round brackets."""
    if text in (r"\emptyset", r"\{\}"):
        return Answer("set")
    label = _LABEL.match(text)
    if label and _closing(text[label.end() :]) == len(text) - label.end():  # A(1,2)
        point = _bracketed(text[label.end() :], depth)
        return replace(point, name=label[0].strip()) if point and point.kind == "()" else None
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
    if len(items) == 2 and text[0] + text[-1] == "()" and _is_infinite(items[0], "-") and _is_infinite(items[1], "+"):
        return Answer("except")
    if len(items) > 1:
        return Answer(text[0] + text[-1], items=items)
    return items[0] if text[0] == "(" or items[0].kind == "matrix" else None


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
