"""Single expressions compared by math-verify and sympy. Both can take forever: see `worker.py`."""

import re
from fractions import Fraction
from functools import lru_cache

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from gift_trl.evaluation.metrics.math_accuracy.quantities import Number, agree, read_number


# Units and numbers are ours: math-verify takes the s of 12s for seconds, and rounds 1.6e-19 and 0 to the same six places
_EXTRACTION = LatexExtractionConfig(
    boxed_match_priority=-1,
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
    ),
)
_DECIMAL = re.compile(r"(?<![\d.])\d*\.\d+")
_DEGREES = re.compile(r"(\d+)\s*\\degree")

# Where two expressions are compared: far from 0, 1 and each other, of both signs
_POINTS = [
    [sympy.Rational(*point) for point in points]
    for points in (((7919, 3511), (-5557, 4001), (2741, 997)), ((-6133, 2017), (8887, 6991), (-1289, 1201)))
]
_PRECISION, _TOLERANCE = 30, sympy.Float("1e-20")


def same_value(reference: str, prediction: str) -> bool:
    """
    Whether two expressions or relations are equal as mathematics.

    math-verify must find them equal, and they must be equal in numbers, too, to 20 digits at two points; of two equations
    the differences of their sides must be multiples of each other. A decimal beside an expression without variables is
    judged as by [`agree`].

    Args:
        reference (`str`):
            LaTeX of the right one.
        prediction (`str`):
            LaTeX of the one to judge.

    Returns:
        `bool`: Whether they are equal. `False` if one of them cannot be read.
    """
    right, given = _expression(reference), _expression(prediction)
    if right is None or given is None:
        return False
    numbers = _number(reference, right), _number(prediction, given)
    if None not in numbers and any(number.step for number in numbers):
        return agree(*numbers)
    if isinstance(right, sympy.Eq) and isinstance(given, sympy.Eq):
        return _proportional(right, given)
    if isinstance(right, sympy.Expr) and isinstance(given, sympy.Expr) and not _equal_in_numbers(right, given):
        return False
    return verify(right, given, timeout_seconds=None)


def describe(text: str) -> str:
    """
    Writes an expression as sympy does.

    Args:
        text (`str`):
            Its LaTeX.

    Returns:
        `str`: Sympy's form, without white space; the LaTeX, if it cannot be read.
    """
    expression = _expression(text)
    return re.sub(r"\s+", "", text if expression is None else str(expression.doit()))


@lru_cache(maxsize=64)
def _expression(latex: str) -> sympy.Basic | None:
    """The parsed LaTeX. Decimals become fractions, so that only exact numbers are in it, and `i` the imaginary unit."""
    latex = _DEGREES.sub(r"(\\frac{\1\\pi}{180})", latex)
    latex = _DECIMAL.sub(_as_fraction, latex)
    parsed = parse(
        f"${latex}$",
        extraction_config=[_EXTRACTION],
        # A string would be taken for Python by sympy's set constructors
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    if not parsed or not isinstance(parsed[0], sympy.Basic | sympy.MatrixBase):
        return None
    if not isinstance(parsed[0], sympy.Expr | sympy.Eq):
        return parsed[0]
    expression = parsed[0].subs({symbol: sympy.I for symbol in parsed[0].free_symbols if symbol.name == "i"})
    return expression.doit() if expression.has(sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit) else expression


def _as_fraction(match: re.Match) -> str:
    r"""`{\frac{1}{2}}` for `0.5`."""
    value = Fraction(match[0])
    return rf"{{\frac{{{value.numerator}}}{{{value.denominator}}}}}"


def _number(text: str, expression: sympy.Basic) -> Number | None:
    """A number as it was written, or the value of an expression without variables."""
    number = read_number(text)
    if number or not isinstance(expression, sympy.Expr) or expression.free_symbols:
        return number
    value = expression.evalf(_PRECISION)
    return Number(Fraction(str(value))) if value.is_Float and value.is_finite else None


def _equal_in_numbers(right: sympy.Expr, given: sympy.Expr) -> bool:
    """Whether two expressions have the same values, as far as they have any."""
    names = sorted({str(symbol) for symbol in right.free_symbols | given.free_symbols})
    for points in _POINTS:
        values = [_value(expression, names, points) for expression in (right, given)]
        if None in values:
            continue
        if abs(values[0] - values[1]) > _TOLERANCE * max(abs(values[0]), abs(values[1])):
            return False
    return True


def _value(expression: sympy.Expr, names: list[str], points: list[sympy.Rational]) -> sympy.Expr | None:
    """Value at one point, `None` if there is none."""
    values = {
        symbol: points[names.index(str(symbol)) % len(points)] + names.index(str(symbol)) // len(points)
        for symbol in expression.free_symbols
    }
    value = expression.subs(values).evalf(_PRECISION)
    return value if value.is_number and value.is_finite and not value.has(sympy.nan) else None


def _proportional(right: sympy.Eq, given: sympy.Eq) -> bool:
    """Whether two equations are multiples of each other."""
    differences = [equation.lhs - equation.rhs for equation in (right, given)]
    names = sorted({str(symbol) for difference in differences for symbol in difference.free_symbols})
    values = [[_value(difference, names, points) for difference in differences] for points in _POINTS]
    if any(value is None or value == 0 for pair in values for value in pair):
        return False
    ratios = [first / second for first, second in values]
    return bool(abs(ratios[0] - ratios[1]) <= _TOLERANCE * abs(ratios[0]))
