r"""Decides whether two answers are the same: text, numbers with units, lists, pairs, intervals, equations, formulas.

The rules, and what was chosen where people disagree, are in docs/grading.md. Numbers are compared exactly. What only
computer algebra can decide is left to `symbolic`, which is math-verify or, to find out what needs it, an exception.
Everything else is bounded.
"""

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from .answer_parts import INEQUALITY, parts_of, split
from .answer_writing import WRAPPERS, clean, squeeze
from .exact_numbers import Number, TooLarge, is_huge, read_number, same_number
from .formulas import equal_by_math_verify
from .units import Unit, parse_unit


Symbolic = Callable[[str, str, float | None], bool]


class _Terms(NamedTuple):
    """What holds for a whole comparison."""

    tolerance: float | None
    unit: str | None
    symbolic: Symbolic


def equal_answers(
    gold: str,
    answer: str,
    tolerance: float | None = None,
    unit: str | None = None,
    symbolic: Symbolic = equal_by_math_verify,
) -> bool:
    r"""Whether an answer equals the reference answer, however it is written.

    Args:
        gold (`str`):
            Reference answer.
        answer (`str`):
            Answer to compare.
        tolerance (`float`, *optional*):
            Relative tolerance of numbers.
        unit (`str`, *optional*):
            Unit of the reference answer, if its text has none.
        symbolic (`Callable`, *optional*, defaults to math-verify):
            Compares two formulas, the reference first, within the tolerance.

    Example:

    ```python
    >>> equal_answers(r"1 \pm \sqrt{19}", r"1 - \sqrt{19} \text{ and } 1 + \sqrt{19}")
    True
    >>> equal_answers("(2, 5)", "[2, 5]"), equal_answers("52_8", "528"), equal_answers("2^{100}", "2^{100}+1")
    (False, False, False)

    ```
    """
    try:
        return _equal(clean(gold), clean(answer), _Terms(tolerance, unit, symbolic))
    except TooLarge:  # and not written the same way
        return False


# ---- Structure: lists, sets, pairs, intervals, unions ----


def _equal(gold: str, answer: str, terms: _Terms) -> bool:
    if squeeze(gold) == squeeze(answer):
        return True
    gold, answer = (_condition(_without_approximation(_DOMAIN.sub("", text))) for text in (gold, answer))
    gold_parts = parts_of(gold)
    if words_of(gold):
        answer = _without_explanation(answer)
    elif len(gold_parts.items) == 1 and (_RATIO.match(gold) or _quantity(gold).number):
        answer = _without_comment(answer)
    answer_parts = parts_of(answer)
    if len(gold_parts.items) == 1 == len(answer_parts.items) and not gold_parts.brackets + answer_parts.brackets:
        return _equal_item(gold_parts.items[0], answer_parts.items[0], terms)
    if INEQUALITY.search(gold + answer) and (len(gold_parts.items) == 1 or len(answer_parts.items) == 1):
        return terms.symbolic(gold, answer, terms.tolerance)  # 2 < x < 5 for the interval
    kinds = {gold_parts.brackets, answer_parts.brackets}
    if kinds <= {"", "{}"} or kinds == {"∪"}:
        return all(any(_equal(g, a, terms) for a in answer_parts.items) for g in gold_parts.items) and all(
            any(_equal(g, a, terms) for g in gold_parts.items) for a in answer_parts.items
        )
    # Of a pair, or an interval, the order counts, and the brackets do; a bare list may stand for a pair in its order
    if "∪" in kinds or "{}" in kinds or ("" not in kinds and len(kinds) > 1):
        return False
    if "" in kinds and kinds != {"", "()"}:
        return False
    return len(gold_parts.items) == len(answer_parts.items) and all(
        _equal(g, a, terms) for g, a in zip(gold_parts.items, answer_parts.items, strict=True)
    )


def _without_approximation(text: str) -> str:
    """Of "1/3, about 0.33" the exact part, of "x is about 0.33" the number."""
    exact, sign, approximate = text.partition(r"\approx")
    return approximate.strip() if sign and _NAME.match(exact) else exact.strip()


# "for all x in R" behind a function, but not "for all x > 0"
_DOMAIN = re.compile(
    r"(?<=[\w)}'])[\s,]*(?:\\forall|(?:\\text\s*\{[\s,]*)?\bfor (?:all|any|each|every)\b|,(?=\s*\w\s*\\in\s*\\mathbb))"
    r"(?:\\(?:text|in|mathbb)\b|\b(?:(?:real|rational|natural|positive|integer|number|value)s?|of|in|\w)\b"
    r"|[\s{},^+])*$"
)
_SET_BUILDER = re.compile(
    r"\\\{\s*[a-zA-Z]\s*(?:\\in\s*\\mathbb\s*\{?R\}?\s*)?(?:\\mid|\\vert|(?:\\middle\s*)?\||:)(.*)\\\}", re.S
)
_EXPLANATION = re.compile(
    r"\s*(?:[,;.(]?\s*\b(?:because|since|due to)|[,;.(]\s*(?:as(?! well)|for|so|it|this|that|there|they|he|she|we))\b",
    re.I,
)


def _condition(text: str) -> str:
    r"""Of \{x | x > 3\} the condition."""
    builder = _SET_BUILDER.fullmatch(text)
    return builder[1].strip() if builder else text


def _without_explanation(text: str) -> str:
    """Of "yes, because 3 > 2" what comes first."""
    plain = re.sub(WRAPPERS, r" \1 ", text)
    explanation = _EXPLANATION.search(plain)
    return plain[: explanation.start()].strip() if explanation else text


# "which is the difference", but not "which is wrong"
_COMMENT = re.compile(
    r",?\s+(?:because|since)\b|,\s+(?:as(?! well)|where|which(?!(?: is| was)? (?:not|incorrect|wrong|impossible)))\b"
    r"|,\s+not\s+(?=[-+]?¤?\d)|\s+\((?:because|since|as|which)\b"
)
# "18 apples: 9 red and 9 green", "18 apples (9 red and 9 green)"
_DETAILED = re.compile(r"([-+]?¤?\d[\d.,]*(?: [a-z]+)+)(?::\s| \((?!(?:or|not|no)\b)).*", re.S)
_WORDS = re.compile(r"(?!.*\b(?:not|neither|nor|none|incorrect|wrong)\b)[a-z][A-Za-z'’-]+(?: [a-z][A-Za-z'’-]*)*")


def _without_comment(text: str) -> str:
    """Of "4, not 10", of "4, as calculated" and of "4 red and green pens" what is asked for where it is a number."""
    plain = re.sub(WRAPPERS, r" \1 ", text)
    if detailed := _DETAILED.fullmatch(plain):
        return detailed[1]
    comment = _COMMENT.search(plain)
    if comment and re.search(r"\d", plain[: comment.start()]):
        text = plain[: comment.start()].strip()
    first, *others = parts_of(text).items
    if others and re.match(r"[-+]?¤?\d", first) and all(_WORDS.fullmatch(each) for each in others):
        return first
    return text


# ---- One item ----

_TIME = re.compile(r"(\d{1,2})(?::(\d{2}))?(?::(\d{2}))?\s*(?:([ap])\.?\s*m\.?)?$", re.I)
_RATIO = re.compile(r"(\d+(?:\.\d+)?)\s*(?:(?::|\bto\b)\s*(\d+(?:\.\d+)?)\s*)(?:(?::|\bto\b)\s*(\d+(?:\.\d+)?)\s*)?$")
_BASE = re.compile(r"(\d[\dA-F]*)\s*(?:_\{?\s*(\d+|[a-z]+)\s*\}?|\(?\s*(?:in )?base[ -](\d+|[a-z]+)\s*\)?)$")
_BASE_NAMES = "zero one two three four five six seven eight nine ten eleven twelve".split() + ["sixteen"]
_LABEL = re.compile(r"(?:[A-Za-z][A-Za-z' ]*+:\s*)+(?=\S)")  # "Total cost: 18"
_NAME = re.compile(
    r"(?:\\(?:angle|triangle|text|mathrm|operatorname)\b)?[\sA-Za-z\\]*(?:_\{?[\w\s\\]*\}?)?'*(?:\([\w\s,]*\))?$"
)


def _equal_item(gold: str, answer: str, terms: _Terms) -> bool:
    if squeeze(gold) == squeeze(answer):
        return True
    if words := words_of(gold):
        said = words_of(answer) or words_of(rf"\text{{{answer}}}") or ""
        return said == words or _is_said_of(re.sub(WRAPPERS, r"\1", gold), words, said)

    if (gold_base := _base(gold)) or _base(answer):
        # An answer without a base is taken to be in the one that was asked for
        gold_digits, base = gold_base or (squeeze(gold), None)
        answer_digits, answer_base = _base(answer) or (squeeze(answer), None)
        return gold_digits == answer_digits and (base == answer_base or None in (base, answer_base))
    if ":" not in gold and (label := _LABEL.match(plain := re.sub(WRAPPERS, r"\1", answer))):
        answer = plain[label.end() :]
    if ":" in gold + answer or _RATIO.match(gold) or _RATIO.match(answer):
        return _equal_time_or_ratio(gold, answer, terms)
    gold_sides, answer_sides = (split(text.replace("==", "="), {"="}) for text in (gold, answer))
    if max(len(gold_sides), len(answer_sides)) > 1 and not INEQUALITY.search(gold + answer):
        return _equal_equation(gold, gold_sides, answer_sides, terms)

    gold_quantity = _quantity(gold)
    # Behind a number that is asked for "m" is metres, in a formula it is a variable
    answer_quantity = _quantity(answer, letter_is_unit=gold_quantity.number is not None)
    if gold_quantity.number and not answer_quantity.number:
        answer_quantity = _quantity_in_prose(answer) or answer_quantity
    if terms.unit and not gold_quantity.unit:
        gold_quantity = gold_quantity._replace(unit=_unit(terms.unit))
    factor = _conversion(gold_quantity, answer_quantity)
    if factor is None:
        return False
    if gold_quantity.number and answer_quantity.number:
        number = answer_quantity.number.times(factor)
        return any(
            same_number(g, n, terms.tolerance)
            for g, a in _scaled(gold_quantity.number, number, gold_quantity.scale, answer_quantity.scale)
            for n in _percents(a, gold_quantity, answer_quantity)
        )
    if gold_quantity.number and re.search(
        r"[a-zA-Z]{2,}", re.sub(WRAPPERS + r"|\\[a-zA-Z]+", "", answer_quantity.text)
    ):
        return False  # prose
    if is_huge(gold_quantity.text) or is_huge(answer_quantity.text):
        raise TooLarge
    text = answer_quantity.text
    factor *= Fraction(answer_quantity.scale, gold_quantity.scale)
    if factor != 1:
        text = rf"\frac{{{factor.numerator}}}{{{factor.denominator}}} \cdot ({text})"
    return terms.symbolic(gold_quantity.text, text, terms.tolerance)


def words_of(text: str) -> str | None:
    r"""A text answer in small letters without articles; `None` for numbers and formulas."""
    wrapped = re.search(WRAPPERS, text)
    plain = re.sub(WRAPPERS, r" \1 ", text)
    letters = re.sub(r"[^A-Za-z]", "", plain)
    if (
        not re.fullmatch(r"[\w\s.,'’()&:?!-]+", plain)
        or _TIME.match(plain)
        or not letters
        or re.match(r"\s*[-(]?\d", plain)
    ):
        return None
    if "_" in plain or re.search(r"[A-Za-z]\(|\d[A-Za-z]|-\s", plain):
        return None
    if not wrapped and not re.search(r"[A-Z]?[a-z]{2,}|^\s*No\s*$", plain):
        return None
    kept = [word for word in re.findall(r"[\w'’]+", plain.lower()) if word not in {"the", "a", "an"}]
    return " ".join(kept) or " ".join(re.findall(r"\w+", plain.lower()))


def _is_said_of(name: str, words: str, said: str) -> bool:
    """Whether a text says something of who was asked for: "Tom's dog", "Tom is taller than Ann" for "Tom"."""
    if not name[:1].isupper() or re.search(r"\b(?:or|not|neither|as well)\b", said):
        return False
    return re.match(rf"{re.escape(words)}(?:['’]s| is| are| was| were| has| have| had)\b", said) is not None


def says(sentence: str, words: str) -> bool:
    sentence = sentence.lower().replace("’", "'")
    said = " ".join(re.findall(r"[\w']+", re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", sentence)))
    if re.search(r"\b(?:or|not|neither)\b", said) and words != "no":
        return False
    return re.search(rf"\b{re.escape(words)}\b", said) is not None


def _base(text: str) -> tuple[str, int | None] | None:
    match = _BASE.match(re.sub(WRAPPERS, r"\1", text).strip())
    if not match:
        return None
    base = match[2] or match[3]
    if base in _BASE_NAMES:
        base = [*range(13), 16][_BASE_NAMES.index(base)]
    elif not base.isdigit():
        return None
    # 2E_1 is no number
    return (match[1], int(base)) if all(int(digit, 16) < int(base) for digit in match[1]) else None


def _equal_time_or_ratio(gold: str, answer: str, terms: _Terms) -> bool:
    gold, answer = re.sub(WRAPPERS, r"\1", gold).strip(), re.sub(WRAPPERS, r"\1", answer).strip()
    gold_time, answer_time = _TIME.match(gold), _TIME.match(answer)
    # Without a.m. or p.m. 2:30 may be a ratio, which 1:15 would equal; of two that can both be times it is one
    of_day = gold_time and answer_time and (gold_time[4] or answer_time[4] or _on_clock(gold) and _on_clock(answer))
    if gold_time and answer_time and of_day:
        return not _readings(gold_time).isdisjoint(_readings(answer_time))
    gold_ratio, answer_ratio = _ratio(gold), _ratio(answer)
    if gold_ratio and answer_ratio:
        return gold_ratio == answer_ratio
    # 3:4 is 3/4
    gold_number, answer_number = (
        Number(ratio[0] / ratio[1]) if ratio and len(ratio) == 2 and all(ratio) else read_number(text)
        for ratio, text in ((gold_ratio, gold), (answer_ratio, answer))
    )
    if gold_number is None or answer_number is None:
        return False
    return same_number(gold_number, answer_number, terms.tolerance)


def _on_clock(text: str) -> bool:
    """Whether a text can be a time of day, or a duration, in digits alone: hours, minutes and perhaps seconds."""
    return re.fullmatch(r"(?:[01]?\d|2[0-4])(?::[0-5]\d){1,2}", text) is not None


def _readings(time: re.Match) -> set[tuple[int, int, int]]:
    """The times of day that are meant; 2:30 without a.m. or p.m., like a number without a unit, may be either."""
    hour, minute, second = (int(part or 0) for part in time.groups()[:3])
    if time[4]:
        hours = {hour % 12 + (12 if time[4] in "pP" else 0)}
    else:
        hours = {hour % 12, hour % 12 + 12} if 0 < hour <= 12 else {hour}
    return {(hour, minute, second) for hour in hours}


def _ratio(text: str) -> tuple[Fraction, ...] | None:
    """The terms of a ratio, in lowest terms."""
    match = _RATIO.match(text)
    if not match:
        return None
    terms = [Fraction(term) for term in match.groups() if term]
    scale = math.lcm(*(term.denominator for term in terms))
    whole = [int(term * scale) for term in terms]
    if sum(term != 0 for term in whole) < 2:  # 1:0 is not 12:0, though both would be reduced to it
        return tuple(terms)
    return tuple(Fraction(term // math.gcd(*whole)) for term in whole)


def _equal_equation(gold: str, gold_sides: list[str], answer_sides: list[str], terms: _Terms) -> bool:
    if len(gold_sides) == 1:
        # "9 * 2 = 18", "x = 5", "5 = x"
        last = answer_sides[0] if _NAME.match(answer_sides[-1]) and not _NAME.match(gold) else answer_sides[-1]
        return _equal(gold, last, terms)
    is_named = _NAME.match(gold_sides[0])
    if len(answer_sides) == 1:
        return bool(is_named) and _equal(gold_sides[-1], answer_sides[0], terms)
    if is_named and _bare_name(gold_sides[0]) == _bare_name(answer_sides[0]):
        return _equal(gold_sides[-1], answer_sides[-1], terms)
    return terms.symbolic(
        f"{gold_sides[0]}={gold_sides[-1]}", f"{answer_sides[0]}={answer_sides[-1]}", terms.tolerance
    )


def _bare_name(text: str) -> str:
    return re.sub(r"_(?:\{[^{}]*\}|\w)|\s", "", text)


# ---- Numbers with their units ----


class _Quantity(NamedTuple):
    """
    The text without its unit, its value if that is a number, whether it is a percentage, and of "5 dollars per hour"
    the unit of what comes first, and of "5 million" the million, which is no part of the text.
    """

    text: str
    number: Number | None
    unit: Unit | None
    is_percent: bool = False
    first_unit: Unit | None = None
    scale: int = 1


_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = rf"\s*(?:({'|'.join(_SCALES)})\b|\\text\s*\{{\s*({'|'.join(_SCALES)})\s*\}})"
_UNIT_WORD = (
    rf"(?:{WRAPPERS}|\{{\s*[A-Za-z~\s]+\}}|[A-Za-zµμ'’-]++\.?|\\(?:AA|mu|Omega|cdot)(?![a-zA-Z]))"
    r"(?:\s*_\s*\{?\s*\\odot\s*\}?)?"
)
_UNIT_TAIL = re.compile(
    # Behind 2n only the words in \text{} are a unit
    r"(?:(?<=[\d)}!.])(?!\s*[A-Za-z]{1,2}\s*\\(?:text|mbox|mathrm)\s*\{\s*(?!per\b)[a-z]{3})"
    r"|(?<=[A-Za-z])(?=\s*\\(?:text|mbox|mathrm)\b))"
    rf"\s*(?P<unit>(?:{_UNIT_WORD}|/(?=\s*{_UNIT_WORD}))(?:{_UNIT_WORD}|\^\s*\{{?\s*-?\d\s*\}}?|/|\s)*)$"
)
# "2n plus one", "2n for odd n"
_CHANGES_A_FORMULA = re.compile(
    r"(?:for|if|when|where|unless|except|and|or|not|plus|minus|times|divided|over|choose|mod|modulo|more|less|squared"
    r"|cubed|factorial)\b"
)
_CHANGES_A_NUMBER = re.compile(r"(?:squared|cubed|factorial)\b")
# "twice 18", "half of 18", "more than 18"
_CHANGED = re.compile(r"\b(?:(?:half|third|quarter|root) of|twice|double|triple|minus|negative|than|times|log)\s*$")


def _quantity(text: str, letter_is_unit: bool = False) -> _Quantity:
    text, unit, first_unit, scale = text.strip(), None, None, 1
    if scaled := re.fullmatch(rf"([-+¤€£¥ ]*[\d.,]*\d){_SCALE}([^\d^*/+-]*)", text):
        text, scale = f"{scaled[1]} {scaled[4]}".strip(), _SCALES[scaled[2] or scaled[3]]
    currency = re.match(r"([-+]?)\s*([¤€£¥])\s*", text)
    if currency:
        text, unit = currency[1] + text[currency.end() :], parse_unit(currency[2])
    bracketed = re.match(r"(.*[\d}])\s*\(([^()\d\\]*[A-Za-z]{2}[^()\d\\]*)\)$", text)
    if bracketed and read_number(bracketed[1]):
        text, unit = bracketed[1], parse_unit(bracketed[2])
    for tail in [] if bracketed else _UNIT_TAIL.finditer(text):
        value = text[: tail.start()].strip()
        words = re.sub(WRAPPERS, r" \1 ", tail["unit"]).strip()
        is_wrapped = re.match(rf"(?:\\mu\s*)?{WRAPPERS}|\{{", tail["unit"]) is not None
        found = parse_unit(words)
        known_word = found is not None and re.search(r"(?<![A-Za-z\\])[A-Za-zµμ]{2}", words)
        plain_words = re.match(r"[\s(]*[a-z][A-Za-z'’-]{2,}", words) and text[tail.start() : tail.start("unit")]
        one_letter = letter_is_unit and found is not None and read_number(value)
        if tail["unit"].startswith("{") and text[: tail.start("unit")].endswith("}"):
            break  # the denominator of \frac{3}{x}
        if _CHANGES_A_NUMBER.match(words) or _CHANGES_A_FORMULA.match(words) and not read_number(value):
            break
        if value.count("{") == value.count("}") and (is_wrapped or known_word or plain_words or one_letter):
            # Several words, "feet tall", are no measure
            text, unit = value, unit or found
            first_unit = parse_unit(words.split(" per ")[0]) if " per " in words else None
        break
    is_percent = text.endswith("%")
    text = text.removesuffix("%").strip()
    return _Quantity(text, read_number(text), unit, is_percent, first_unit, scale)


def _unit(text: str) -> Unit | None:
    return parse_unit(re.sub(WRAPPERS, r" \1 ", clean(text)))


def _conversion(gold: _Quantity, answer: _Quantity) -> Fraction | None:
    """What to multiply the answer by to have the unit of the reference; `None` if that measures something else."""
    if gold.unit is None or answer.unit is None:
        return Fraction(1)  # a unit that is missing or not known is not held against anybody
    for unit in (answer.unit, answer.first_unit):
        if unit is not None and unit.dimensions == gold.unit.dimensions:
            return unit.factor / gold.unit.factor
    return None


def _scaled(gold: Number, answer: Number, gold_scale: int, answer_scale: int) -> list[tuple[Number, Number]]:
    """5 million may be meant where 5 stands, as the question may ask for millions."""
    scaled = gold.times(Fraction(gold_scale)), answer.times(Fraction(answer_scale))
    return [scaled] if (gold_scale == 1) == (answer_scale == 1) else [scaled, (gold, answer)]


def _percents(number: Number, gold: _Quantity, answer: _Quantity) -> list[Number]:
    """50% may be meant where the reference says 50, 0.5 or 1/2, and the other way round."""
    if gold.is_percent and not answer.is_percent:
        return [number, number.times(Fraction(100))]
    if answer.is_percent and not gold.is_percent:
        return [number, number.times(Fraction(1, 100))]
    return [number]


def _quantity_in_prose(text: str) -> _Quantity | None:
    """The only number among words, "18 apples are left" or "she has 18"; `None` if there are several or a formula."""
    plain = re.sub(WRAPPERS, r" \1 ", text)
    numbers = list(
        re.finditer(
            r"(?<![\w.])[-+]?[¤€£¥]?\s?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?\s*%?"
            rf"(?:{_SCALE})?",
            plain,
        )
    )
    rest = re.sub(r"[\s,.;:'’!?-]", "", plain[: numbers[0].start()] + plain[numbers[0].end() :]) if numbers else ""
    words = plain[numbers[0].end() :].split() if numbers else []
    if (
        len(numbers) != 1
        or not re.fullmatch("[A-Za-z()]*", rest)
        or any(len(w) == 1 and w not in "aAI" for w in words)
    ):
        return None
    is_changed = _CHANGED.search(plain[: numbers[0].start()]) or _CHANGES_A_NUMBER.match(" ".join(words))
    if is_changed or re.search(r"\bnot\b", plain):
        return None
    quantity = _quantity(numbers[0][0].strip(" ,"))
    unit = quantity.unit or (
        parse_unit(re.split(r"\b(?:for|in|per|on|at|of)\b", " ".join(words))[0]) if words else None
    )
    return quantity._replace(unit=unit) if quantity.number else None
