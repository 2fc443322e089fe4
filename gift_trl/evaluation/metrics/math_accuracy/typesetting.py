r"""
LaTeX of an answer without what does not change its meaning: Unicode, spacing, sizes, fonts, dollars, `\text{}`.

Regular expressions only, each of which takes linear time.
"""

import re
import unicodedata


# Around the words of a \text{}: a unit or an answer in words, but no product of letters
OPEN_WORDS, CLOSE_WORDS = "\ue000", "\ue001"

_CHARACTERS = str.maketrans(
    {
        **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},
        **dict.fromkeys("−–—‒﹣", "-"),
        **dict.fromkeys("\t\r\n\u00a0\u2002\u2003\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\u2061\u2062\ufeff" + OPEN_WORDS + CLOSE_WORDS, ""),
        **{char: rf"^{{{digit}}}" for digit, char in zip("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻", strict=True)},
        **{char: rf"_{{{digit}}}" for digit, char in enumerate("₀₁₂₃₄₅₆₇₈₉")},
        **{
            char: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", char).split("⁄"))
            for char in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
        },
        **dict.fromkeys("×✕", r"\times "),
        **dict.fromkeys("⋅·∙", r"\cdot "),
        **dict.fromkeys("∕⁄", "/"),
        **dict.fromkeys("≤⩽", r"\le "),
        **dict.fromkeys("≥⩾", r"\ge "),
        **{"€": r"\euro ", "£": r"\poundsterling ", "¥": r"\yen ", "₹": r"\rupee "},
        **{"÷": r"\div ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap "},
        **{"∈": r"\in ", "∅": r"\emptyset ", "∞": r"\infty ", "π": r"\pi ", "θ": r"\theta ", "°": r"\degree "},
        **{"ℝ": r"\mathbb{R}", "′": "'", "’": "'", "…": r"\ldots ", "∖": r"\setminus "},
    }
)
_COMMANDS = {
    **dict.fromkeys(["left", "right", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr"], ""),
    **dict.fromkeys(["displaystyle", "textstyle", "limits", "bf", "rm", "it", "!"], ""),
    **dict.fromkeys(["mathbf", "mathit", "mathsf", "boldsymbol", "bm", "vec"], ""),
    **dict.fromkeys([",", ";", ":", " ", "quad", "qquad", "(", ")", "[", "]"], " "),
    **dict.fromkeys(["dots", "cdots", "dotsc", "dotsb"], r"\ldots"),
    **dict.fromkeys(["dfrac", "tfrac", "cfrac"], r"\frac"),
    **dict.fromkeys(["leq", "leqslant"], r"\le"),
    **dict.fromkeys(["geq", "geqslant"], r"\ge"),
    **{"$": r"\dollar ", "pounds": r"\poundsterling "},
    **{"lt": "<", "gt": ">", "neq": r"\ne", "varnothing": r"\emptyset", "%": "%", "circ": r"\degree"},
    **{"langle": "(", "rangle": ")", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]"},
}
_COMMAND = re.compile(r"\\([A-Za-z]+|.)")
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:\{([^{}]*)\})?")
# What Unicode writes digit by digit
_SCRIPTS = re.compile(r"([_^])\{[\d-]\}(?:\1\{\d\})+")
# An interval with brackets that are turned outwards where an end does not belong to it
_TURNED_INTERVAL = re.compile(
    r"([\[\]])(\s*[^\s\[\](){},;][^\[\](){},;]*[,;]\s*[^\s\[\](){},;][^\[\](){},;]*)([\[\]])"
)
_POWERS_OF_TEN = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(rf"(?<=\d)\s*{OPEN_WORDS}?\s*({'|'.join(_POWERS_OF_TEN)})(?![A-Za-z])(?:\s*{CLOSE_WORDS})?")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|textsf|mathrm|operatorname|mbox|hbox)\s*\{([^{}]*)\}")
_CONNECTIVE = re.compile(r"\s*,?\s*(?:and|or)\s*,?\s*")
# A letter after a space is a unit
_MATHEMATICS = re.compile(r"\d|^(?:[A-Za-z]|\s*(?:sin|cos|tan|cot|sec|csc|log|ln|exp|gcd|lcm|max|min))\s*$")
_SYMBOLS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"√\s*(\d+(?:\.\d+)?|[A-Za-z])", r"\\sqrt{\1}"),
        (r"√|(?<![\\A-Za-z])sqrt(?![A-Za-z])", r"\\sqrt "),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\\\\\s*\[\s*[\d.]+\s*(?:pt|em|ex|mm|cm)\s*\]", r"\\\\"),
        (r"(?<=\d)\.\.\.+", r"\\ldots "),
        (r"\\dot\s*\{?(\d)\}?", r"\\overline{\1}"),
        (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![\\A-Za-z])inf(?:inity|ty)?(?![A-Za-z])", r"\\infty "),
        (r"\^\s*(?:\{\s*\\degree\s*\}|\\degree)", r"\\degree "),
        (r"(?<![A-Za-z\\])degrees?(?![A-Za-z])", r"\\degree "),
        (r"(?<![A-Za-z\\])(?:per\s?cent(?:age)?|pct)(?![A-Za-z])", "%"),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"!=", r"\\ne "),
        (r"(?<=\d)\{,\}(?=\d)", ","),
        (r"(?<=[\w)}])\*\*(?=[\w({-])", "^"),
        (r"\*\*|[$\"`]", " "),
    ]
]


def clean_latex(text: str) -> str:
    r"""
    Takes typesetting out of an answer.

    Args:
        text (`str`):
            The answer, LaTeX or plain text.

    Returns:
        `str`: LaTeX in which each thing is written in one way. What stood in `\text{}` is between `OPEN_WORDS` and
        `CLOSE_WORDS`, or is a comma if it was "and" or "or".
    """
    text = _BOX.sub(lambda match: match[1] or "", text.translate(_CHARACTERS))
    for _ in range(2):  # \text{\textbf{...}}
        text = _TEXT.sub(_mark_words, text)
    text = re.sub(r",\s*\\!\s*", ",", text)
    text = _COMMAND.sub(lambda match: _COMMANDS.get(match[1], match[0]), text)
    text = _SCRIPTS.sub(lambda match: f"{match[1]}{{{re.sub('[_^{}]', '', match[0])}}}", text)
    text = _SCALED.sub(lambda match: rf"\times 10^{{{_POWERS_OF_TEN[match[1]]}}}", text)
    for pattern, replacement in _SYMBOLS:
        text = pattern.sub(replacement, text)
    return _TURNED_INTERVAL.sub(_turn_brackets, text)


def _turn_brackets(match: re.Match) -> str:
    """`(1,2)` for `]1,2[`."""
    left, ends, right = match.groups()
    return ("(" if left == "]" else left) + ends + (")" if right == "[" else right)


def _mark_words(match: re.Match) -> str:
    r"""The content of a `\text{}`, marked if it is neither a connective nor mathematics."""
    words = match[1]
    if _CONNECTIVE.fullmatch(words):
        return " , "
    return f" {words}" if _MATHEMATICS.search(words) else f"{OPEN_WORDS}{words}{CLOSE_WORDS}"
