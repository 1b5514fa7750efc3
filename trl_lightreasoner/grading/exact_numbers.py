r"""Numbers as they are written in answers: decimals, fractions, powers, factorials, read exactly.

Bounded: 9^9^9^9 raises [`TooLarge`] instead of being computed. Standard library only.
"""

import ast
import math
import re
from fractions import Fraction
from typing import NamedTuple


# Nothing is computed beyond so many bits
MAX_BITS = 100_000
MAX_FACTORIAL = 5_000
# A decimal with so many significant digits stands for the fraction or root that it was rounded from
DIGITS_OF_ROUNDED = 6


class TooLarge(Exception):
    """A number has too many digits to be computed."""


class Number(NamedTuple):
    """An exact value, and how it was written: the place value of the last digit behind the point, and how many digits.

    `last_place` is `None` for what is not a decimal, such as a fraction.
    """

    value: Fraction
    last_place: Fraction | None = None
    digits: int = 0

    def times(self, factor: Fraction) -> "Number":
        return Number(self.value * factor, self.last_place and self.last_place * abs(factor), self.digits)


_DECIMAL = re.compile(r"([-+]?)(\d*)\.?(\d*)(?:[eE]([-+]?\d{1,4}))?")
_POWER_OF_TEN = re.compile(
    r"([-+]?[\d.]+)\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{\s*([-+]?\d{1,4})\s*\}|([-+]?\d{1,4}))"
)


def read_number(text: str) -> Number | None:
    """The exact value of digits and arithmetic, `None` for anything else.

    Raises:
        `TooLarge`: for 9^9^9^9 and the like.
    """
    text = text.strip()
    power = _POWER_OF_TEN.fullmatch(text)
    text = f"{power[1]}e{power[2] or power[3]}" if power else text
    if re.fullmatch(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?", text):
        text = text.replace(",", "")
    decimal = _DECIMAL.fullmatch(text)
    if decimal and decimal[2] + decimal[3]:
        sign, whole, behind, exponent = decimal.groups()
        place = Fraction(10) ** (int(exponent or 0) - len(behind))
        value = int(whole + behind) * place * (-1 if sign == "-" else 1)
        return Number(value, place if behind or exponent else None, len((whole + behind).lstrip("0")))
    result = _arithmetic(text)
    return None if result is None else Number(result)


def _arithmetic(text: str) -> Fraction | None:
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    for _ in range(20):  # from the inside out
        text, frac = re.subn(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", text)
        text, binom = re.subn(r"\\[dt]?binom\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"C((\1),(\2))", text)
        text, powers = re.subn(r"\^\s*\{([^{}]*)\}", r"**(\1)", text)
        if not frac + binom + powers:
            break
    text = re.sub(r"\\times(?![a-z])|\\cdot(?![a-z])", "*", text.replace("^", "**"))
    text = re.sub(r"(\d+)\s*!", r"F(\1)", text.replace("{", "(").replace("}", ")"))
    text = re.sub(r"(?<=[\d)])\s*(?=[(FC])|(?<=\))\s*(?=\d)", "*", text)
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text.strip())
    if not re.fullmatch(r"[\d.+\-*/()FC, ]*\d[\d.+\-*/()FC, ]*", text):
        return None
    try:
        return _evaluate(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float()):
            return Fraction(str(node.value))
        case ast.UnaryOp(op=ast.USub()):
            return -_evaluate(node.operand)
        case ast.UnaryOp(op=ast.UAdd()):
            return _evaluate(node.operand)
        case ast.Call(func=ast.Name(id="F"), args=[argument]):
            return Fraction(math.factorial(_integer(argument, MAX_FACTORIAL)))
        case ast.Call(func=ast.Name(id="C"), args=[above, below]):
            return Fraction(math.comb(_integer(above, MAX_FACTORIAL), _integer(below, MAX_FACTORIAL)))
        case ast.BinOp(left, operator, right):
            value = _combine(_evaluate(left), operator, _evaluate(right))
            if _bits(value) > MAX_BITS:
                raise TooLarge
            return value
    raise ValueError("not plain arithmetic")


def _combine(left: Fraction, operator: ast.operator, right: Fraction) -> Fraction:
    match operator:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
        case ast.Pow():
            if abs(left) not in (0, 1) and abs(right) * _bits(left) > 2 * MAX_BITS:
                raise TooLarge
            if right.denominator == 1:
                return left**right.numerator
    raise ValueError("not plain arithmetic")


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _integer(node: ast.expr, limit: int) -> int:
    value = _evaluate(node)
    if value > limit:
        raise TooLarge
    if value.denominator != 1 or value < 0:
        raise ValueError("not a whole number")
    return value.numerator


def is_huge(text: str) -> bool:
    """Powers and factorials inside a formula that computer algebra would try to write out."""
    return re.search(r"\d\s*\^\s*\{?\s*\d+\s*(?:\^\s*\{?\s*\d|!)|\d\s*\^\s*\{?\s*\d{6,}|\d{6,}\s*!", text) is not None


def same_number(gold: Number, answer: Number, tolerance: float | None) -> bool:
    difference = abs(gold.value - answer.value)
    if difference == 0 or (tolerance is not None and difference <= Fraction(tolerance) * abs(gold.value)):
        return True
    if not (gold.last_place or answer.last_place):
        return False
    # The noise of binary arithmetic, 13.200000000000001, then what was rounded or cut: 0.666667 and 0.666666 for 2/3
    return difference <= abs(gold.value) / 10**12 or any(
        written.last_place is not None
        and written.digits >= DIGITS_OF_ROUNDED
        and (other.last_place is None or other.last_place < written.last_place)
        and difference < written.last_place
        for written, other in ((gold, answer), (answer, gold))
    )
