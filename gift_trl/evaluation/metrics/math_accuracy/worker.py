"""
The process in which answers are compared: sympy takes forever on some of them, in C code that no exception interrupts.

A line of JSON comes in, `[reference, prediction]`, and one goes out, `[correct, answer]`. A pair may take a number of seconds
of processor time, after which the kernel ends the process. `pool.py` is the other side.
"""

import contextlib
import json
import logging
import os
import re
import resource
import signal
import sys


# A thousand times what a check needs; a number of a billion digits ends here
_MEMORY_LIMIT = 4 << 30
# Time on the clock stands behind processor time, for a process that waits
_CLOCK_FACTOR = 10
_READY = "ready"
# Equal, in ways that take the libraries' own mathematics
_WARM_UP = (
    (r"\frac{x^2-1}{x-1}", "x + 1 + 0"),
    (r"\frac{\sqrt{8}}{2}", r"\sqrt{2}"),
    (r"\sin 2x", r"2 \sin x \cos x"),
)


def main(time_limit: float) -> None:
    """
    Compares the pairs that come in on standard input.

    Args:
        time_limit (`float`):
            Seconds of processor time for a pair.
    """
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the results
    logging.disable(logging.CRITICAL)
    with contextlib.suppress(ValueError, OSError):  # not every system can limit it
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
    # The kernel's own action, which needs no interpreter to come to it
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    check = _load_check()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    print(json.dumps(_READY), file=results, flush=True)
    for line in sys.stdin:
        _set_timers(time_limit)
        try:
            result = check(*json.loads(line))
        except MemoryError:
            os._exit(1)
        _set_timers(0)
        print(json.dumps(result), file=results, flush=True)


def _set_timers(seconds: float) -> None:
    """Ends this process after so many seconds; 0 takes that back."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, _CLOCK_FACTOR * seconds)


def _load_check():
    """The comparison, once its libraries are imported and warm."""
    import sympy
    import sympy.physics.units  # what `simplify` imports makes symbols of names, and would fail below
    from sympy.core.sympify import SympifyError
    from sympy.parsing import sympy_parser

    from gift_trl.evaluation.metrics.math_accuracy.algebra import describe, same_value
    from gift_trl.evaluation.metrics.math_accuracy.equivalence import canonical, equivalent
    from gift_trl.evaluation.metrics.math_accuracy.parts import parse_answer

    def read_number(text: str, *args, **kwargs) -> sympy.Rational:
        """Instead of sympy's `parse_expr`, which runs text as Python: sympy makes a number of any string with it."""
        if not re.fullmatch(r"\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*", text):
            raise SympifyError(text)
        return sympy.Rational(text.strip())

    def check(reference: str, prediction: str) -> tuple[bool, str | None]:
        """Whether the prediction is right, and how it is counted in a vote."""
        right, given = parse_answer(reference), parse_answer(prediction)
        try:
            correct = equivalent(right, given, same_value)
            return correct, None if correct else canonical(given, describe)
        except MemoryError:
            raise
        except Exception:  # sympy raises whatever it likes on what it cannot compare
            return False, None

    sympy_parser.parse_expr = read_number
    # Imports that sympy puts off and parsers that are built at their first use
    for reference, prediction in _WARM_UP:
        if not check(reference, prediction)[0]:
            raise RuntimeError(
                f"{prediction} is not found to be {reference}: these versions of sympy and math-verify do not do."
            )
    return check


if __name__ == "__main__":
    main(float(sys.argv[1]))
