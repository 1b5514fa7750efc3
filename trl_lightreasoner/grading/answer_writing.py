"""How answers are written: what means the same is made to look the same, before anything is compared.

Text in, text out; standard library only.
"""

import re


_CONTENT = r"((?:[^{}]++|\{[^{}]*\})*)"
WRAPPERS = rf"\\(?:text|textbf|textrm|textit|mbox|hbox|mathrm|rm|operatorname)\s*\{{{_CONTENT}\}}"
_ORDINAL = "(?:st|nd|rd|th)"
_FRACTIONS = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4"}
_PARTS = {"half": 2, "third": 3, "quarter": 4}
_SAME = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("−|–", "-"),
        ("×", r" \\times "),
        ("·|⋅", r" \\cdot "),
        ("÷", "/"),
        ("π", r"\\pi "),
        ("∞", r"\\infty "),
        ("≤", r"\\le "),
        ("≥", r"\\ge "),
        ("±", r"\\pm "),
        ("∪", r"\\cup "),
        ("∈", r"\\in "),
        (r"≈|≃|\\simeq\b|\\thickapprox\b", r"\\approx "),
        (r"√\s*\(?(\w+)\)?", r"\\sqrt{\1}"),
        ("°", r"^\\circ "),
        ("²", "^2"),
        ("³", "^3"),
        ("[’‘′]", "'"),
        ("Ω|Ω", r"\\Omega "),
        (r"\\?¢|\\(?:text)?cents?(?![a-z])", " cents "),
        (rf"\{{\s*\\rm\s+{_CONTENT}\}}", r"\\text{\1}"),
        (r"\\[$]|\\textdollar\b", "¤"),
        (r"\$(?=\.?\d[^$]*$)", "¤"),  # "$18", with no other dollar sign behind it
        (r"\$|\*\*|`|(?<!\\)\\[()\[\]]|\\displaystyle|\\boldsymbol|\\mathbf", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\.?", ""),
        (r"\\lbrace|\\lbrack", lambda match: r"\{" if "brace" in match[0] else "["),
        (r"\\rbrace|\\rbrack", lambda match: r"\}" if "brace" in match[0] else "]"),
        (r"\\langle", "("),
        (r"\\rangle", ")"),
        (r"(\d),?\s*(?:\\[!,]|\{,\})\s*(?=\d{3}(?!\d))", r"\1"),  # separators of thousands that can be nothing else
        (r",\\!", ","),
        (r"(?<!\\)\\[!,;:> ]|~|\\q?quad\b|\\hspace\{[^{}]*\}", " "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(ge|le)qslant|\\(ge|le)q(?![a-z])", lambda match: "\\" + (match[1] or match[2]) + " "),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"\\colon\b", ":"),
        (r"\\%|\\?\s*\bper ?cent\b", "%"),
        (r"([-+]?\d[\d.,]*)\s*([€£])\s*$", r"\2\1"),
        (r"\\varnothing", r"\\emptyset"),
        (r"^(?:[a-zA-Z]\s*\\in\s*)?\\mathbb\s*\{?\s*R\s*\}?$", r"(-\\infty, \\infty)"),
        (r"([½⅓⅔¼¾])", lambda match: f" {_FRACTIONS[match[1]]}"),
        (r"^([^\d]*)\b(?:minus|negative)\s+(?=¤?\.?\d)", r"\1-"),
        (r"(\d) and (a|one) (half|third|quarter)\b", lambda match: f"{match[1]} 1/{_PARTS[match[3]]}"),
        (
            r"(\d) and (two|three) (thirds|quarters)\b",
            lambda match: f"{match[1]} {2 + (match[2] == 'three')}/{_PARTS[match[3][:-1]]}",
        ),
        (r"(\\frac\s*\{[^{}]*)\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*(\}\s*\{[^{}]*\})", r"\1\2^\\circ "),
        (r"\^\s*\{?\s*(?:\\circ|\\degree)\s*\}?|\\degree", r" \\text{degrees} "),
        (r"(?<=\d)\s*\^\s*\{\s*\\prime\s*\\prime\s*\}", r" \\text{arcseconds} "),
        (r"\^\s*(?:\\prime|\{((?:\s*\\prime)+)\s*\})", lambda match: "'" * match[0].count("prime")),
        (r"\bnp\.(?=[a-z])", r"\\"),
        (rf"(?<=\d)(?:{_ORDINAL}\b|\s*\^\s*(?:\{{\s*{_ORDINAL}\s*\}}|\{{?\s*\\\w+\s*\{{{_ORDINAL}\}}\s*\}}?))", ""),
        (r"((?:[<>]|\\[gl]e\b)[^<>,]*)\\(?:text|mbox)\s*\{\s*and\s*\}", r"\1 and "),
        (r"\\(?:text|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}", ","),
        (r"(\d) and (?=\d+ ?/ ?\d+)", r"\1 "),  # one and a quarter
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
        (r"(\d+)\s*\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", lambda match: _mixed(*match.groups())),
        (r"(?<![\d/.^])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d/])", lambda match: _mixed(*match.groups())),
        (r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?", lambda match: _repeating(*match.groups())),
        (
            r"(\d*)\.(\d*?)(?:(\d)\3{2,}|(\d{2,6})\4+)\s*(?:\.{3}|…|\\[lc]?dots)",
            lambda match: _repeating(match[1], match[2], match[3] or match[4]),
        ),
        (r"([_^])\{(\w)\}", r"\1\2"),
    )
]
_NUMBER = re.compile(r"(?:[0-9,+-]|\.(?!\.\.))*")  # in which none of them finds anything


def clean(text: str) -> str:
    r"""
    An answer in one way of writing.

    Example:

    ```python
    >>> clean(r"$1,450{,}000\%$."), clean("1 1/4")
    ('1,450000%', '((5)/(4))')

    ```
    """
    if not _NUMBER.fullmatch(text):
        for pattern, replacement in _SAME:
            text = pattern.sub(replacement, text)
    return text.strip(" \n\t,;:").rstrip(" .")


def _mixed(whole: str, numerator: str, denominator: str) -> str:
    if int(numerator) >= int(denominator):  # 3\frac{5}{2} is a product, if anything
        return rf"{whole}\cdot\frac{{{numerator}}}{{{denominator}}}"
    return f"(({int(whole) * int(denominator) + int(numerator)})/({denominator}))"


def _repeating(whole: str, digits: str, period: str) -> str:
    r"""0.\overline{3} is 3/9, 0.1\overline{6} is 15/90."""
    numerator = int(whole + digits + period) - int(whole + digits or 0)
    return f"(({numerator})/({10 ** (len(digits) + len(period)) - 10 ** len(digits)}))"


def squeeze(text: str) -> str:
    """Without wrappers such as `\\text{}`, and without the spaces that mean nothing."""
    # A space between digits stays: "1 1" is not 11
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", re.sub(WRAPPERS, r"\1", text))
