"""Numbers, as they are written and how far they agree."""

import re
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Number:
    """
    A rational number as it was written.

    Parameters:
        value (`Fraction`):
            Its value.
        step (`Fraction`, *optional*):
            Value of the last digit of a decimal; `None` for integers and fractions, which are exact.
        digits (`int`, *optional*, defaults to `0`):
            Significant digits of a decimal.
    """

    value: Fraction
    step: Fraction | None = None
    digits: int = 0

    def scaled(self, numerator: int, denominator: int) -> "Number":
        """The number times a fraction, with as many digits."""
        factor = Fraction(numerator, denominator)
        return Number(self.value * factor, self.step and self.step * factor, self.digits)


# A decimal of this many significant digits stands for the values that round to it
_DIGITS_OF_REFERENCE, _DIGITS_OF_PREDICTION = 3, 6
# What a float says: the digits after these come from its binary form
_DIGITS_OF_FLOAT = 15

_DECIMAL = r"(?:\d+\.?\d*|\.\d+)"
_FRACTION = rf"\\frac(?:\{{([+-]?{_DECIMAL})\}}|(\d))(?:\{{([+-]?{_DECIMAL})\}}|(\d))"
_PLAIN = re.compile(rf"([+-]*)({_DECIMAL})")
_QUOTIENT = re.compile(rf"([+-]*)(?:{_FRACTION}|({_DECIMAL})/({_DECIMAL}))")
_MIXED = re.compile(rf"([+-]*)(\d+)(?:{_FRACTION}|\s+(\d+)/(\d+))")
_SCIENTIFIC = re.compile(
    rf"([+-]*)(?:({_DECIMAL})(?:\\times|\\cdot|\*|x))?10\^(?:\{{([+-]?\d{{1,3}})\}}|(\d{{1,3}}))"
    rf"|([+-]*)({_DECIMAL})[eE]([+-]?\d{{1,3}})"
)
_REPEATING = re.compile(r"([+-]*)(\d*)\.(\d*)\\overline\{(\d+)\}")
# A digit that stands there three times, or several that do so twice, go on for ever
_GOING_ON = re.compile(r"([+-]*)(\d*)\.(\d*?)(?:(\d)\4{2,}|(\d{2,})\5+)\\ldots")
_DIGIT_GROUPS = re.compile(r"[+-]*\d{1,3}(?: \d{3})+(?:\.\d+)?")


def read_number(text: str) -> Number | None:
    r"""
    Reads a rational number: `-12`, `0.50`, `\frac{3}{4}`, `3/4`, `2\frac{1}{2}`, `1.5 \times 10^{3}`, `1.5e3`,
    `0.1\overline{6}`, `0.1666\ldots`, `12 000`.

    Args:
        text (`str`):
            An expression, as from [`clean_latex`], without commas between thousands.

    Returns:
        [`Number`] or `None`: The number; `None` if the text is anything else.
    """
    text = text.strip()
    mixed = _MIXED.fullmatch(re.sub(r"\s*(\\frac|[{}])\s*", r"\1", text))
    if mixed:
        sign, whole, *parts = mixed.groups()
        part = _quotient(parts)
        return None if part is None else Number(_sign(sign) * (int(whole) + part))
    if " " in text and re.search(r"\d\s+\.?\d", text) and not _DIGIT_GROUPS.fullmatch(text):
        return None
    text = re.sub(r"\s+", "", text)
    plain = _PLAIN.fullmatch(text)
    if plain:
        return _decimal(plain[2], sign=_sign(plain[1]))
    quotient = _QUOTIENT.fullmatch(text)
    if quotient:
        value = _quotient(quotient.groups()[1:])
        return None if value is None else Number(_sign(quotient[1]) * value)
    scientific = _SCIENTIFIC.fullmatch(text)
    if scientific:
        sign, factor, braced, bare, e_sign, e_factor, e_exponent = scientific.groups()
        exponent = Fraction(10) ** int(braced or bare or e_exponent)
        return _decimal(factor or e_factor or "1", sign=_sign(sign or e_sign or ""), unit=exponent)
    repeating = _REPEATING.fullmatch(text) or _GOING_ON.fullmatch(text)
    if repeating:
        sign, whole, start, *periods = repeating.groups()
        period = next(filter(None, periods))
        value = int((whole or "0") + start) + Fraction(int(period), 10 ** len(period) - 1)
        return Number(_sign(sign) * value / 10 ** len(start))
    return None


def agree(reference: Number, prediction: Number) -> bool:
    """
    Whether a number is the right one.

    It is if the two are equal. A reference that is written as a decimal of at least three significant digits also stands for
    every value that rounds to it: 1/3 is right where the reference is 0.333, and is not where it is 0.33. A prediction
    that is a decimal of at least six significant digits may be a rounded one in the same way: 0.333333 for 1/3. Of more
    than fifteen digits, as a float has them, those after the fifteenth do not count.

    Args:
        reference ([`Number`]):
            The right number.
        prediction ([`Number`]):
            The number to judge.

    Returns:
        `bool`: Whether they agree.
    """
    difference = abs(reference.value - prediction.value)
    return difference == 0 or any(
        number.step is not None
        and number.digits >= digits
        and difference <= number.step * 10 ** max(number.digits - _DIGITS_OF_FLOAT, 0) / 2
        for number, digits in ((reference, _DIGITS_OF_REFERENCE), (prediction, _DIGITS_OF_PREDICTION))
    )


def _sign(signs: str) -> int:
    """−1 or 1."""
    return -1 if signs.count("-") % 2 else 1


def _decimal(digits: str, sign: int, unit: Fraction = Fraction(1)) -> Number:
    """The number of a decimal's digits, times a power of ten."""
    fraction = digits.partition(".")[2]
    value = sign * Fraction(digits.rstrip(".")) * unit
    if not fraction:
        return Number(value)
    return Number(value, unit / 10 ** len(fraction), len(digits.replace(".", "").lstrip("0")))


def _quotient(parts: tuple[str | None, ...] | list[str | None]) -> Fraction | None:
    """The quotient of the two numbers among the groups of a match, `None` if the second is zero."""
    numerator, denominator = (Fraction(part.rstrip(".")) for part in parts if part is not None)
    return numerator / denominator if denominator else None
