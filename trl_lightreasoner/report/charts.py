"""Charts as inline SVG. Lines and bars stretch with the page. Labels are HTML text, which does not stretch.

So a chart is readable at 320 and at 1,600 pixels. Colours are classes (`s0`, `s1` for two datasets), which the page's
style sets for light and dark mode. Each series also has its own stroke.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np


Numbers = Sequence[float] | np.ndarray


_MAX_TICKS = 6
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Axis(NamedTuple):
    """
    One axis of a chart.

    Attributes:
        low, high (`float`): Its ends, both above 0 on a logarithmic axis.
        is_log (`bool`): Whether it is logarithmic.
        is_share (`bool`): Whether its values are fractions, written as percentages.
        label (`str`): What it shows, with the unit.
    """

    low: float
    high: float
    is_log: bool = False
    is_share: bool = False
    label: str = ""

    def place(self, value: float) -> float:
        """Position of `value`, from 0 at the low end to 1 at the high end. Values outside are put at the end."""
        if self.is_log:
            value = max(value, self.low)
            place = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            place = (value - self.low) / (self.high - self.low)
        return min(max(place, 0.0), 1.0)

    def ticks(self) -> list[float]:
        """
        Round values along the axis.

        Example:

        ```python
        >>> Axis(0, 47).ticks()
        [0.0, 10.0, 20.0, 30.0, 40.0]
        >>> Axis(0.002, 3, is_log=True).ticks()
        [0.01, 0.1, 1.0]

        ```
        """
        if self.is_log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            every = max(1, -(-(last - first + 1) // _MAX_TICKS))
            return [10.0**power for power in range(last, first - 1, -every)][::-1]
        raw = (self.high - self.low) / (_MAX_TICKS - 1)
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def write(self, value: float) -> str:
        return write_share(value) if self.is_share else write_number(value)


def write_number(value: float) -> str:
    """
    Write a number with three significant digits.

    Example:

    ```python
    >>> [write_number(value) for value in (0.41234, 1234, 0.00002, 0)]
    ['0.412', '1,234', '2·10⁻⁵', '0']

    ```
    """
    if value == int(value):
        return f"{int(value):,}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 0.001:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    power = f"10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    mantissa = mantissa.rstrip("0").rstrip(".")
    return power if mantissa == "1" else f"{mantissa}\u00b7{power}"


def write_share(share: float) -> str:
    """
    Write a fraction as a percentage, with a non-breaking space.

    Example:

    ```python
    >>> [write_share(share).replace("\\u00a0", " ") for share in (0.0524, 0.5, 1, 0.00012, 0)]
    ['5.2 %', '50 %', '100 %', '0.012 %', '0 %']

    ```
    """
    percent = 100 * share
    digits = 0 if percent == 0 or percent >= 99.95 else 1 if percent >= 0.1 else 3
    text = f"{percent:.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"{text}\u00a0%"


class Chart:
    """
    A chart drawn layer by layer.

    Args:
        x, y ([`Axis`]): The axes.

    Example:

    ```python
    >>> chart = Chart(Axis(0, 10), Axis(0, 1))
    >>> chart.line([0, 10], [0.5, 1], "s0")
    >>> "<path class=\\"line s0\\" d=\\"M0 500L1000 0\\"/>" in chart.html("One line that rises.")
    True

    ```
    """

    def __init__(self, x: Axis, y: Axis):
        self.x, self.y = x, y
        self._shapes: list[str] = []
        self._marks: list[str] = []

    def line(self, xs: Numbers, ys: Numbers, style: str) -> None:
        """A line through points."""
        self._shapes.append(f'<path class="line {style}" d="M{"L".join(self._points(xs, ys))}"/>')

    def band(self, xs: Numbers, lows: Numbers, highs: Numbers, style: str) -> None:
        """The area between two lines."""
        points = self._points(xs, highs) + self._points(xs, lows)[::-1]
        self._shapes.append(f'<path class="band {style}" d="M{"L".join(points)}Z"/>')

    def bars(self, edges: Numbers, heights: Numbers, style: str, outline: bool = False) -> None:
        """Bars from each edge to the next, or only their outline if they are drawn over others."""
        if outline:
            xs, ys = np.repeat(edges, 2)[1:-1], np.repeat(heights, 2)
            self.line(xs, ys, style)
            return
        for left, right, height in zip(edges, edges[1:], heights, strict=False):
            if height > 0:
                x, y = 1000 * self.x.place(left), 1000 * self.y.place(height)
                place = f'x="{x:.1f}" y="{1000 - y:.1f}" width="{1000 * self.x.place(right) - x:.1f}" height="{y:.1f}"'
                self._shapes.append(f'<rect class="bar {style}" {place}/>')

    def points(self, xs: Numbers, ys: Numbers, styles: Sequence[str]) -> None:
        """Points, each with its own style. They are outside the SVG, which would stretch them."""
        for x, y, style in zip(xs, ys, styles, strict=True):
            place = f"left:{100 * self.x.place(x):.2f}%;--y:{self.y.place(y):.4f}"
            self._marks.append(f'<span class="point {style}" style="{place}"></span>')

    def mark(self, value: float, label: str, style: str = "") -> None:
        """A labelled vertical line at a value of x."""
        place = self.x.place(value)
        self._shapes.append(f'<path class="mark {style}" d="M{1000 * place:.1f} 0V1000"/>')
        side = "before" if place > 0.6 else "after"
        self._marks.append(f'<span class="mark-label {side} {style}" style="left:{100 * place:.2f}%">{label}</span>')

    def level(self, value: float, label: str, style: str = "") -> None:
        """A labelled horizontal line at a value of y."""
        place = self.y.place(value)
        self._shapes.append(f'<path class="mark {style}" d="M0 {1000 - 1000 * place:.1f}H1000"/>')
        self._marks.append(f'<span class="level-label {style}" style="bottom:{100 * place:.2f}%">{label}</span>')

    def html(self, description: str) -> str:
        """The chart as HTML. Screen readers read `description` instead."""
        lines = []
        ticks = {"x": "", "y": ""}
        for tick in self.y.ticks():
            place = self.y.place(tick)
            lines.append(f'<path class="rule" d="M0 {1000 - 1000 * place:.1f}H1000"/>')
            ticks["y"] += f'<span style="bottom:{100 * place:.2f}%">{self.y.write(tick)}</span>'
        for tick in self.x.ticks():
            place = self.x.place(tick)
            lines.append(f'<path class="tick" d="M{1000 * place:.1f} 1000v-18"/>')
            ticks["x"] += f'<span style="left:{100 * place:.2f}%">{self.x.write(tick)}</span>'
        return (
            f'<div class="chart" role="img" aria-label="{escape(description)}">'
            f'<p class="y-label">{escape(self.y.label)}</p>'
            f'<div class="frame"><div class="y-ticks">{ticks["y"]}</div><div class="plot">'
            f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none">{"".join(lines)}{"".join(self._shapes)}</svg>'
            f'{"".join(self._marks)}<div class="x-ticks">{ticks["x"]}</div></div></div>'
            f'<p class="x-label">{escape(self.x.label)}</p></div>'
        )

    def _points(self, xs: Numbers, ys: Numbers) -> list[str]:
        return [
            f"{1000 * self.x.place(x):.4g} {1000 - 1000 * self.y.place(y):.4g}" for x, y in zip(xs, ys, strict=True)
        ]


def figure(
    title: str, text: str, chart: str, head: Sequence[str], rows: Sequence[Sequence[str]], style: str = ""
) -> str:
    """
    A chart with its title, an explanation, and its numbers as a table. `title` and `text` are HTML, cells are text.
    """
    return (
        f'<figure class="card {style}"><figcaption><h3>{title}</h3><p>{text}</p></figcaption>{chart}'
        f'<details class="numbers"><summary>Numbers</summary>{table(head, rows)}</details></figure>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table. Cells are text, and the first cell of a row is its header."""
    cells = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    # A scrollable region must be reachable with the keyboard
    return (
        '<div class="scroll" tabindex="0" role="group" aria-label="Table">'
        f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"
    )
