"""Formulas, compared by math-verify: what only computer algebra can decide.

It may fail in many ways and take forever: only a process that can be stopped should ask it (`graders`).
"""

import re
from fractions import Fraction

from .answer_writing import WRAPPERS
from .exact_numbers import Number, read_number, same_number


def check_computer_algebra() -> None:
    """Raise an error if formulas cannot be compared here, for example because a package is missing."""
    from latex2sympy2_extended import latex2sympy

    latex2sympy(r"\sqrt{20}")  # math-verify would hide the error
    if not equal_by_math_verify(r"2\sqrt{5}", r"\sqrt{20}", None):
        raise RuntimeError(r"it does not find that \sqrt{20} is 2\sqrt{5}")


def equal_by_math_verify(gold: str, answer: str, tolerance: float | None) -> bool:
    """
    Whether two formulas in LaTeX are equal; the reference answer has to be the first. What is no formula equals none.

    Raises:
        `Exception`: Any, where computer algebra fails.
    """
    import sympy
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    # What looks like a unit here is a variable
    writing = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    config = [LatexExtractionConfig(normalization_config=writing)]
    expressions = []
    for text in (gold, answer):
        found = parse(f"${_with_plain_letters(text)}$", config, fallback_mode="no_fallback", parsing_timeout=None)
        if not found:
            return False
        expression = found[0]
        if isinstance(expression, sympy.Expr | sympy.Eq):  # 0.1 + 0.2 is not 0.3 in binary
            expression = expression.xreplace({n: sympy.Rational(str(n)) for n in expression.atoms(sympy.Float)})
        expressions.append(expression)

    if all(isinstance(expression, sympy.Eq) for expression in expressions):
        return _same_equation(*expressions)
    if all(isinstance(expression, sympy.Expr) and expression.is_number for expression in expressions):
        # math-verify compares fifteen digits
        first, second = (
            read_number(text) or _approximation(e) for text, e in zip((gold, answer), expressions, strict=True)
        )
        if first and second:
            difference = abs(first.value - second.value)
            return same_number(first, second, tolerance) or difference <= abs(first.value) / 10**40
    if all(isinstance(expression, sympy.Expr) for expression in expressions):
        expressions = _with_positive_letters(*expressions)
    return verify(*expressions, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)


_SUBSCRIPT = re.compile(
    rf"_\s*(?:(\w)|\{{\s*(?:{WRAPPERS}|\\(max|min|odot))\s*\}}|{WRAPPERS}|\\(max|min|odot)(?![a-z]))"
)


def _with_plain_letters(text: str) -> str:
    r"""
    `\gamma`, otherwise Euler's constant or the Gamma function, a `\Gamma` of nothing, and E_1, otherwise refused, as
    letters of no use. Subscripts, dots and primes, otherwise ignored, in one way of writing.
    """
    text = _SUBSCRIPT.sub(lambda match: "_{" + "".join(filter(None, match.groups())).replace(" ", "") + "}", text)
    text = re.sub(r"\\(d?dot)(?:\s+|(?=\\))(\\[a-zA-Z]+|[a-zA-Z])", r"\\\1{\2}", text)
    text = re.sub(r"('+)\s*_\{([^{}]*)\}", r"_{\2}\1", text)
    text = re.sub(
        r"(?:_\{([^{}]*)\}|(?<=[a-zA-Z}]))('+)", lambda m: "_{" + (m[1] or "") + "prime" * len(m[2]) + "}", text
    )
    text = re.sub(r"(\\[a-zA-Z]+)|([eE])(?=_)|I(?=_)", lambda m: m[1] or (r"\Xi " if m[2] else "i"), text)
    text = re.sub(r"(?<=\d)\s+i(?![a-zA-Z])", "i", text)  # else no imaginary unit
    text = re.sub(r"\\gamma(?![a-zA-Z])", r"\\varpi", text)
    return re.sub(r"\\Gamma(?![a-zA-Z])(?!\s*(?:\\left)?\s*\()", r"\\Upsilon", text)


def _with_positive_letters(*expressions) -> list:
    r"""
    Under roots and in logarithms letters stand for what is not negative: \sqrt{gh} is \sqrt{g}\sqrt{h}. Not where the
    sign is what matters, as in an absolute value or its other form, \sqrt{x^2}.
    """
    import sympy

    powers = [power.doit() for expression in expressions for power in expression.atoms(sympy.Pow)]
    signed = (sympy.Abs, sympy.Max, sympy.Min, sympy.sign)
    if any(each.has(*signed) for each in expressions) or any(isinstance(power, sympy.Abs) for power in powers):
        return list(expressions)
    letters = set().union(*(expression.free_symbols for expression in expressions))
    positive = {letter: sympy.Symbol(letter.name, positive=True) for letter in letters}
    return [expression.subs(positive) for expression in expressions]


def _same_equation(gold, answer) -> bool:
    """Up to sign and scale: one side less the other is the same, times a number."""
    import sympy

    def as_symbol(*of):  # `doit` would take dx/dt for the derivative of a constant
        return sympy.Symbol(str(of))

    differences = [(e.lhs - e.rhs).replace(sympy.Derivative, as_symbol) for e in (gold, answer)]
    difference, other = (sympy.expand(each.doit()) for each in _with_positive_letters(*differences))
    if difference == 0 or other == 0:
        return difference == other
    return bool(sympy.simplify(difference / other).is_number)


def _approximation(expression) -> Number | None:
    """Sixty digits of a real number such as a root."""
    import sympy

    value = sympy.N(expression.doit(), 60)
    return Number(Fraction(str(value))) if value.is_Float and value.is_finite else None
