r"""Units of measure: what one stands for, so that 90 minutes are 1.5 hours and 5 feet are not 5 inches.

Standard library only.
"""

import math
import re
from collections import Counter
from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    """How many base units of its dimensions one unit is; `dimensions` are pairs of a name and a power."""

    factor: Fraction
    dimensions: frozenset[tuple[str, int]]


def _table(dimension: str, **factors: str) -> dict[str, tuple[Fraction, dict[str, int]]]:
    return {
        name: (Fraction(factor), {dimension: 1}) for names, factor in factors.items() for name in names.split("__")
    }


_UNITS = {
    **_table(
        "length",
        m__meter__metre="1",
        km__kilometer__kilometre="1000",
        cm__centimeter__centimetre="1/100",
        mm__millimeter__millimetre="1/1000",
        um__micron__micrometer="1e-6",
        nm__nanometer__nanometre="1e-9",
        pm__picometer="1e-12",
        AA__angstrom="1e-10",
        inch__inches__in="0.0254",
        foot__feet__ft="0.3048",
        yard__yd="0.9144",
        mile__mi="1609.344",
    ),
    **_table("mass", g__gram="1", kg__kilogram="1000", mg__milligram="1/1000", oz__ounce="28.349523125",
             lb__lbs__pound="453.59237"),
    **_table("time", s__sec__second="1", ms__millisecond="1/1000", min__mins__minute="60", h__hr__hrs__hour="3600",
             day="86400", week="604800"),
    **_table("calendar", month="1", year__yr="12"),
    **_table("volume", L__liter__litre="1", mL__ml__milliliter="1/1000"),
    **_table("cup", cup="1", pint="2", quart="4", gallon="16"),
    **_table("dollar", **{"¤": "1"}, dollar__usd="1", cent="1/100"),
    **_table("euro", **{"€": "1"}, euro="1"),
    **_table("british pound", **{"£": "1"}),
    **_table("yen", **{"¥": "1"}, yen="1"),
    **_table("angle", degree__deg="1", arcminute="1/60", arcsecond__arcsec="1/3600"),
    **_table("radian", radian__rad="1"),
    **_table("energy", J__joule="1", kJ__kilojoule="1000", eV="1.602176634e-19", erg="1e-7", cal="4.184",
             kcal="4184"),
    **_table("power", W__watt="1", kW__kilowatt="1000"),
    **_table("force", N__newton="1", kN="1000"),
    **_table("voltage", V__volt="1"),
    **_table("resistance", ohm="1", kohm="1000", Mohm="1e6"),
    **_table("solar mass", solarM="1"),
    **_table("solar luminosity", solarL="1"),
    **_table("solar radius", solarR="1"),
    **_table("frequency", Hz__hertz="1", kHz="1000", MHz="1e6", GHz="1e9"),
    **_table("temperature", K__kelvin="1"),
    **_table("amount", mol__mole="1"),
    "mph": (Fraction("1609.344") / 3600, {"length": 1, "time": -1}),
    "kph": (Fraction(1000, 3600), {"length": 1, "time": -1}),
}  # fmt: skip
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_TOKEN = re.compile(r"\\?[A-Za-zµμ¤€£¥]+|\^\s*\{?\s*(-?\d)\s*\}?|/|\s|\\cdot|[~{}.]")


def parse_unit(text: str) -> Unit | None:
    r"""Read a unit; `None` for what is not a unit of measure, such as "apples", or is not known.

    Example:

    ```python
    >>> parse_unit("km/h") == parse_unit("kilometers per hour")
    True
    >>> parse_unit("square feet") == parse_unit("ft^2")
    True
    >>> parse_unit("pieces of candy") is None
    True

    ```
    """
    text = re.sub(r"\\mu\s*", "µ", re.sub(r"\s*\\Omega(?![a-zA-Z])", "ohm", text))
    text = re.sub(r"([MLR])\s*_\s*\{?\s*\\odot\s*\}?", r"solar\1", text)
    if _TOKEN.sub("", text):
        return None
    parts: list[tuple[Fraction, dict[str, int], int]] = []  # of "km/h^2": a kilometre, an hour to the power of -2
    sign, square = 1, 1
    for token in _TOKEN.finditer(text):
        word = token[0].strip("~{}. \t\n\\")
        if token[1]:
            if not parts:
                return None
            factor, dimensions, power = parts.pop()
            parts.append((factor, dimensions, power * int(token[1])))
        elif word in {"/", "per"}:
            sign = -1
        elif word.lower() in _POWERS:
            square = _POWERS[word.lower()]
        elif word and word != "cdot":
            found = _look_up(word)
            if found is None:
                return None
            parts.append((*found, sign * square))
            square = 1
    exponents: Counter[str] = Counter()
    for _, dimensions, power in parts:
        exponents.update({name: exponent * power for name, exponent in dimensions.items()})
    total = frozenset((name, power) for name, power in exponents.items() if power)
    return Unit(math.prod((factor**power for factor, _, power in parts), start=Fraction(1)), total) if total else None


def _look_up(word: str) -> tuple[Fraction, dict[str, int]] | None:
    if word in _UNITS:
        return _UNITS[word]
    if word[:1] in {"µ", "μ"} and word[1:] in _UNITS:
        factor, dimensions = _UNITS[word[1:]]
        return factor / 10**6, dimensions
    # "M" is not a metre
    return (_UNITS.get(word.lower()) or _UNITS.get(word.lower().removesuffix("s"))) if len(word) > 2 else None
