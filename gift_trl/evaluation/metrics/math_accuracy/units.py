"""Units of single expressions."""

import re
from dataclasses import dataclass
from fractions import Fraction

from gift_trl.evaluation.metrics.math_accuracy.typesetting import CLOSE_WORDS, OPEN_WORDS


@dataclass(frozen=True)
class Unit:
    """
    A unit that is known.

    Parameters:
        dimension (`tuple[tuple[str, int], ...]`):
            What it measures: base units with their powers, sorted.
        factor (`Fraction`):
            How many of these it is.
    """

    dimension: tuple[tuple[str, int], ...]
    factor: Fraction


def _length(metres: str) -> tuple[str, int, Fraction]:
    return "m", 1, Fraction(metres)


# Words of a unit, its base unit, the power of it and how many of that it is
_WORDS: dict[str, tuple[str, int, Fraction]] = {
    "mm millimeter millimetre": _length("0.001"),
    "cm centimeter centimetre": _length("0.01"),
    "dm decimeter decimetre": _length("0.1"),
    "m meter metre": _length("1"),
    "km kilometer kilometre": _length("1000"),
    "in inch inche": _length("0.0254"),
    "ft foot feet": _length("0.3048"),
    "yd yard": _length("0.9144"),
    "mi mile": _length("1609.344"),
    "ml milliliter millilitre": ("m", 3, Fraction(1, 10**6)),
    "l liter litre": ("m", 3, Fraction(1, 1000)),
    "gal gallon": ("m", 3, 231 * Fraction("0.0254") ** 3),
    "mg milligram": ("g", 1, Fraction(1, 1000)),
    "g gm gram": ("g", 1, Fraction(1)),
    "kg kilogram": ("g", 1, Fraction(1000)),
    "lb pound": ("g", 1, Fraction("453.59237")),
    "oz ounce": ("g", 1, Fraction("453.59237") / 16),
    "s sec second": ("s", 1, Fraction(1)),
    "min minute": ("s", 1, Fraction(60)),
    "h hr hour": ("s", 1, Fraction(3600)),
    "day": ("s", 1, Fraction(86_400)),
    "week wk": ("s", 1, Fraction(604_800)),
    "month": ("month", 1, Fraction(1)),
    "year yr": ("month", 1, Fraction(12)),
    "dollar usd buck": ("dollar", 1, Fraction(1)),
    "cent": ("dollar", 1, Fraction(1, 100)),
    "euro eur": ("euro", 1, Fraction(1)),
    "poundsterling": ("poundsterling", 1, Fraction(1)),
    "yen": ("yen", 1, Fraction(1)),
    "rupee": ("rupee", 1, Fraction(1)),
    "degree deg": ("degree", 1, Fraction(1)),
    "radian rad": ("radian", 1, Fraction(1)),
}
_UNITS = {word: unit for words, unit in _WORDS.items() for word in words.split()}
_ABBREVIATIONS = {"mph": "mi/h", "kmh": "km/h", "kph": "km/h"}

_POWER = r"\s*(?:\^\s*\{?\s*(-?\d)\s*\}?)?"
_MARKED_UNIT = re.compile(rf"(.*\S)\s*{OPEN_WORDS}([^{OPEN_WORDS}{CLOSE_WORDS}]*){CLOSE_WORDS}{_POWER}", re.DOTALL)
_BARE_UNIT = re.compile(rf"(.*[\d}})\]])(\s*)((?<![A-Za-z])[A-Za-z][A-Za-z./ ]*){_POWER}", re.DOTALL)
_DEGREE = re.compile(rf"(.*\S)\s*\\degree\s*[{OPEN_WORDS}]?\s*[CF]?\s*[{CLOSE_WORDS}]?", re.DOTALL)
_OF_AN_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_CURRENCY = re.compile(
    r"\\(dollar|euro|poundsterling|yen|rupee)(?![A-Za-z])|^\s*(?:us|rs\.?)(?=\s*(?:\\dollar|[\d.]))", re.IGNORECASE
)
_MARKED = re.compile(rf"{OPEN_WORDS}[^{OPEN_WORDS}{CLOSE_WORDS}]*{CLOSE_WORDS}")
_FACTOR = re.compile(r"([a-z]+)\s*(?:\^\s*(-?\d))?")


def split_unit(text: str) -> tuple[str, Unit | None, bool]:
    r"""
    Takes the unit and the percent sign off an expression.

    A unit is what stands in `\text{}` at the end, or after a number the name of a unit or words of at least three letters.
    Single letters are one only in `\text{}` or after a space, and never if the expression has variables.

    Args:
        text (`str`):
            The expression, as from [`clean_latex`].

    Returns:
        `tuple[str, Unit | None, bool]`: The expression; its unit, `None` if there is none or an unknown one; whether it is a
        percentage.
    """
    currency = _CURRENCY.search(text)
    if currency:
        amount = _CURRENCY.sub("", text).strip()
        return split_unit(amount)[0], known_unit(currency[1]) if currency[1] else None, False
    if text.endswith("%"):
        return text[:-1].strip(), None, True
    degree = _DEGREE.fullmatch(text)
    if degree and not _OF_AN_ANGLE.search(text):
        return degree[1], known_unit("degree"), False
    marked = _MARKED_UNIT.fullmatch(text)
    if marked and _MARKED.sub("", marked[1]).strip():  # else it is the last of several words
        return marked[1], known_unit(marked[2], marked[3]), False
    bare = _BARE_UNIT.fullmatch(text)
    if bare and not re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", bare[1])):
        unit = known_unit(bare[3], bare[4])
        long = len(bare[3].strip()) >= 3 and bool(bare[2])
        if long or (unit and (bare[2] or len(bare[3].strip()) > 1)):
            return bare[1], unit, False
    return text, None, False


def known_unit(words: str, power: str | None = None) -> Unit | None:
    """
    Reads a unit.

    Args:
        words (`str`):
            Its name or abbreviation, or a quotient of several: "square centimeters", "km/h", "miles per hour".
        power (`str`, *optional*):
            Power that is written after it.

    Returns:
        [`Unit`] or `None`: The unit; `None` if one of the words is not known.
    """
    words = words.lower().replace(".", " ").strip()
    words = _ABBREVIATIONS.get(words, words) + (f"^{power}" if power else "")
    words = re.sub(r"\b(?:square|sq)\s+([a-z]+)|\b([a-z]+)\s+squared\b", r"\1\2^2", words)
    words = re.sub(r"\bcubic\s+([a-z]+)|\b([a-z]+)\s+cubed\b", r"\1\2^3", words)
    powers: dict[str, int] = {}
    factor = Fraction(1)
    for place, part in enumerate(re.split(r"/|\bper\b", words)):
        if not part.strip() or _FACTOR.sub("", part).strip():
            return None
        for name, exponent in _FACTOR.findall(part):
            unit = _UNITS.get(name) or _UNITS.get(name.removesuffix("s"))
            if unit is None:
                return None
            base, dimension, size = unit
            exponent = int(exponent or 1) * (-1 if place else 1)
            powers[base] = powers.get(base, 0) + dimension * exponent
            factor *= size**exponent
    return Unit(tuple(sorted((base, exponent) for base, exponent in powers.items() if exponent)), factor)
