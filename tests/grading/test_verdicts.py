"""The grader on each kind of answer: what is right, and what only looks like it."""

import doctest
import json
import subprocess
import sys
import threading
import time

import pytest

from trl_lightreasoner.grading import (
    answer_parts,
    answers,
    equal_answers,
    exact_numbers,
    graders,
    references,
    units,
    verdicts,
)
from trl_lightreasoner.grading.answers import (
    find_answer,
    find_letter,
    first_answer,
    has_first_answer,
    last_boxed,
)
from trl_lightreasoner.grading.references import is_sentence, read_reference
from trl_lightreasoner.grading.verdicts import Verdict, grade, grade_all


pytest.importorskip("math_verify", reason="math-verify is not installed: pip install 'trl-lightreasoner[eval]'")


def is_right(answer: str, gold: str | list[str], **kwargs) -> bool:
    """Whether an answer in a box is right."""
    return grade(rf"So the answer is $\boxed{{{answer}}}$.", gold, **kwargs).correct


def check(gold: str | list[str], right: list[str], wrong: list[str], **kwargs) -> None:
    assert [answer for answer in right if not is_right(answer, gold, **kwargs)] == []
    assert [answer for answer in wrong if is_right(answer, gold, **kwargs)] == []


# ---- How an answer is written ----


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        pytest.param("5/4", ["1 1/4", r"1\frac{1}{4}", r"1\frac14", "1 and 1/4", "1.25"], ["11/4", "1/4"], id="mixed"),
        pytest.param(r"137 \frac{1}{2}", ["137.5", r"\frac{275}{2}"], ["136.5", "1371/2"], id="mixed gold"),
        pytest.param(r"-1\frac{1}{2}", ["-1.5", "-3/2"], ["-0.5", "1.5"], id="mixed below zero"),
        pytest.param(r"\frac 34", ["0.75", "3/4", r"\dfrac{3}{4}", ".75"], ["4/3", "0.7"], id="fraction"),
        pytest.param("1/3", ["0.333333", "0.3333333333", r"0.\overline{3}"], ["0.33", "0.3334"], id="rounded"),
        pytest.param(".0000672", ["0.0000672", r"6.72 \times 10^{-5}"], ["0.0000671", "0.00007"], id="small decimal"),
        pytest.param("58,500", ["58500", "58,500", r"58{,}500", r"58\,500"], ["58", "58.5", "585"], id="thousands"),
        pytest.param(r"11,\! 111,\! 111,\! 100", ["11111111100"], ["11111111101", "11"], id="latex thousands"),
        pytest.param("1800000", ["1.8 million", "1,800,000"], ["1.8", "1.8 billion"], id="millions"),
        pytest.param(r"864 \mbox{ inches}^2", ["864", r"864 \text{ in}^2", "6 ft^2"], ["864 cm^2", "6"], id="unit"),
        pytest.param(
            "18", ["18 apples", r"18\text{ kg}", "18 m"], ["18 apples and 3 pears", "18x"], id="unit only here"
        ),
        pytest.param(
            r"\$18.90", ["18.9", r"\$18.90", "18.90 dollars", "1890 cents"], ["1890", "€18.90"], id="currency"
        ),
        pytest.param(
            "62.5%", ["62.5", r"62.5\%", "0.625", "5/8", "62.5 percent"], ["6.25", "0.0625"], id="percent gold"
        ),
        pytest.param("0.15", [r"15\%", "3/20"], ["15", r"1.5\%"], id="percent of a share"),
        pytest.param(
            "(3,2)", ["(3, 2)", r"\left(3,2\right)", "3, 2", "(x,y) = (3,2)"], ["(2,3)", r"\{3,2\}"], id="pair"
        ),
        pytest.param(
            r"\left(3, \frac{\pi}{2}\right)",
            [r"(r,\theta) = (3, \frac{\pi}{2})", r"(x_1, x_2) = (3, \pi/2)", r"(A,B)=(3,\pi/2)"],
            [r"(r,\theta) = (\frac{\pi}{2}, 3)"],
            id="named pair",
        ),
        pytest.param(r"\{1,2\}", [r"\{2,1\}", "1, 2", "1 or 2"], ["1", r"\{1,2,3\}", "(1,2)"], id="set"),
        pytest.param("1,-2", ["-2, 1", "x=1 or x=-2", "(1, -2)"], ["1", "1, 2", "(-2, 1)"], id="list"),
        pytest.param("(2,5)", ["2 < x < 5", r"x \in (2,5)"], ["[2,5]", "(2,5]", r"2 \le x < 5"], id="open interval"),
        pytest.param("[2,5]", [r"2 \le x \le 5", r"[2, \frac{10}{2}]"], ["(2,5)", "2,5"], id="closed interval"),
        pytest.param(
            r"(-\infty,2)\cup(3,\infty)", [r"(3,\infty)\cup(-\infty,2)"], [r"(-\infty,2]\cup(3,\infty)"], id="∪"
        ),
        pytest.param(r"1 \pm \sqrt{19}", [r"1-\sqrt{19}, 1+\sqrt{19}"], [r"1+\sqrt{19}", r"1 \pm \sqrt{18}"], id="±"),
        pytest.param(
            "5x - 7y + 4 = 0",
            ["-10x + 14y = 8", "7y = 5x + 4"],
            ["5x - 7y = 4", "5x + 7y + 4 = 0", "5x - 7y + 4"],
            id="equation",
        ),
        pytest.param("x^2 + 1 = 0", ["-2x^2 = 2"], ["x^2 + 2 = 0", "x^2 = 1"], id="equation without a real solution"),
        pytest.param("y = 2x + 3", ["2x+3", "y - 2x = 3", "3 + 2x = y"], ["y = 2x - 3", "x = 2y + 3"], id="function"),
        pytest.param("x=5", ["5", "x = 5", "5 = x"], ["y=5", "x=-5", "x^2=5"], id="assignment"),
        pytest.param("2^{100}", ["1267650600228229401496703205376"], ["1267650600228229401496703205377"], id="power"),
        pytest.param("25!", ["15511210043330985984000000"], ["15511210043330985984000001", "24!"], id="factorial"),
        pytest.param(r"10^{20}\sqrt{2}+1", [r"1+10^{20}\sqrt{2}"], [r"10^{20}\sqrt{2}"], id="large root"),
        pytest.param("52_8", ["52_{8}", r"52_{\text{eight}}", "52", "52 (base 8)"], ["528", "52_9", "42"], id="base"),
        pytest.param(r"9^{9^{9^{9}}}", [r"9^{9^{9^9}}"], [r"9^{9^{9^{8}}}", "9"], id="tower"),
        pytest.param(
            "5",
            ["5"],
            [r"9^{9^{9^{9}}}", r"\sqrt{9^{9^{9^{9}}}}", r"10^{10^{10}}!", "(9^{99999})^{99999}"],
            id="tower as an answer",
        ),
        pytest.param(
            r"\frac{\pi}{2}", [r"\pi/2", "1.570796", r"\frac{\pi}{2} \approx 1.57"], ["1.57", r"\pi"], id="pi"
        ),
        pytest.param(
            r"12\pi", [r"12\pi \text{ square inches}"], [r"12\pi x", r"\text{12 square inches}"], id="pi and unit"
        ),
        pytest.param(
            "0.5",
            [r"x \approx 0.5", r"\approx 0.5", r"\frac12 \text{ m} \approx 1 \text{ m}"],
            [r"x \approx 0.6", r"0.6 \approx 0.5"],
            id="about",
        ),
        pytest.param(
            "18",
            ["18 apples (9 red and 9 green)", "18 apples: 9 red and 9 green", "18 (since 9 * 2 is 18)", "18 quarters"],
            ["minus 18", "negative 18", "half of 18", "twice 18", "more than 18"]
            + ["the square root of 18", "18 squared", "18 cubed", "18 apples (or 19)"],
            id="words that change a number",
        ),
        pytest.param(
            "18000",
            ["18 thousand", r"18 \text{ thousand}", "180 hundred dollars"],
            ["18 million"],
            id="thousands in words",
        ),
        pytest.param(
            "405", ["405 million", "$405 million", "405 million dollars"], ["4 million"], id="asked in millions"
        ),
        pytest.param(
            "4 million", ["4", "4000000", "4,000 thousand"], ["4 thousand", "5 million", "40"], id="millions"
        ),
        pytest.param("-5", ["minus 5", "negative 5 degrees", "−5"], ["5", "10 minus 5"], id="minus in words"),
        pytest.param(
            "3.5",
            ["3½", "3 and a half", "3 and one half hours", "7/2"],
            ["3", "3 and a third", "3¼"],
            id="halves in words",
        ),
        pytest.param(
            "11/3", ["3 and two thirds", "3⅔"], ["3 and one third", "3 and two quarters"], id="thirds in words"
        ),
        pytest.param(
            r"\frac{7}{6}",
            ["1.1666...", r"1.1\bar{6}", r"1.1\dot{6}", "1.16666…"],
            ["1.16...", "1.166", "1.1777..."],
            id="periods",
        ),
        pytest.param(
            "2/11", [r"0.1818\ldots", r"0.\overline{18}"], [r"0.18\ldots", "0.1919..."], id="a period of two"
        ),
        pytest.param(
            r"(-\infty,\infty)", [r"\mathbb{R}", r"x \in \mathbb{R}"], [r"\mathbb{Z}"], id="all real numbers"
        ),
        pytest.param(r"\emptyset", [r"\varnothing"], ["0"], id="empty set"),
        pytest.param("12.5", ["12.50€", "12.50 £"], ["12.05€"], id="currency behind the number"),
        pytest.param("€12.50", ["12.50 €"], ["12.50 £"], id="another currency behind the number"),
        pytest.param(
            ["1,000", "2,500"],
            ["1,000, 2,500", "2500, 1000", "1,000; 2,500", r"\$1,000, \$2,500", "1,000 and 2,500"],
            ["1,000", "1,000, 250", "1,000, 2,500, 3"],
            id="thousands in a list",
        ),
        pytest.param("2, 1,234,567", ["1,234,567, 2", "1234567 and 2"], ["1,234,567", "1,234,567,2"], id="list"),
        pytest.param("(a+5)(b+2)", ["ab+2a+5b+10", "(2+b)(a+5)"], ["ab+2a+5b+9"], id="formula"),
        pytest.param("6 - 5i", ["-5i+6", "-5 i + 6"], ["6+5i"], id="complex"),
        pytest.param(r"\frac{x^2+1}{x}", [r"x+\frac{1}{x}"], [r"x+\frac{1}{y}"], id="letter in the denominator"),
        pytest.param(r"\frac{K-1}{L}", ["(K-1)/L"], ["(K-1)/M"], id="letter below letters"),
        pytest.param(
            r"(\gamma-1)mc^2", [r"\gamma mc^2 - mc^2"], [r"(\gamma-2)mc^2", r"(\gamma+1)mc^2"], id="gamma is a letter"
        ),
        pytest.param(r"\Gamma+2", [r"2+\Gamma"], [r"\Gamma+1"], id="a large gamma, too"),
        pytest.param("24", [r"\Gamma(5)"], [r"\Gamma(4)"], id="the gamma function"),
        pytest.param(
            r"m \frac{d v}{d t}+b v=f",
            [r"m\frac{dv}{dt}=f-bv", r"f - bv = m \frac{dv}{dt}"],
            ["bv=f", r"m\frac{dv}{dt}=bv-f", r"2m\frac{dv}{dt}=f-bv"],
            id="differential equation",
        ),
        pytest.param(
            r"\begin{pmatrix} -1/3 \\ 2 \end{pmatrix}",
            [r"\begin{pmatrix} -\frac13 \\ 2 \end{pmatrix}"],
            [r"\begin{pmatrix} 2 \\ -\frac13 \end{pmatrix}"],
            id="matrix",
        ),
        pytest.param(r"\text{(B)}", ["B", "(B)", r"\textbf{B}"], ["C", "A, B"], id="letter as text"),
        pytest.param(r"\text{east}", ["east", "East", r"\text{east}"], ["west", r"\text{north east}"], id="text"),
        pytest.param(
            "120^\\circ", ["120", r"120^{\circ}", r"120\text{ degrees}"], ["12", r"120\text{ rad}"], id="degrees"
        ),
        pytest.param("11", ["11"], ["1 1"], id="space between digits"),
        pytest.param(
            "864",
            [r"864~\mathrm{g~cm^{-3}}", r"864 \text{ m}^{3}", r"864\ {\rm kg\,m^{-3}}"],
            [r"864 x^{2}"],
            id="braced exponent of a unit",
        ),
        pytest.param(
            r"3\text{ mm}",
            [r"3000\ \mu m", r"3000\,\mu\text{m}", r"3000 \mathrm{\mu m}", "3000 μm"],
            [r"3\ \mu m", r"3000 \mu x"],
            id="micrometres",
        ),
        pytest.param(r"2 \mu m g", [r"2mg\mu"], ["2", r"2 \mu m"], id="mu as a letter"),
        pytest.param(
            r"5000\text{ ohms}",
            [r"5000\,\Omega", "5000 Ω", r"5\ \text{k}\Omega", r"5\,\mathrm{k\Omega}"],
            [r"5\,\Omega", r"5000 \text{ V}", r"5000 \Omega x"],
            id="ohms",
        ),
        pytest.param(
            "1.5e3",
            [r"1.5 \times 10^3 M_\odot", r"1500\,M_{\odot}", r"1500\,\mathrm{M}_\odot", r"1500\,L_{\odot}"],
            [r"150 M_\odot", r"1500 M_\odot x"],
            id="solar masses",
        ),
        pytest.param(r"\$0.75", ["75¢", r"75\text{¢}", r"75 \cents"], ["0.75¢", "750¢"], id="cent sign"),
        pytest.param("75¢", ["75", "75 cents", r"\$0.75"], ["7500 cents", r"\$75"], id="cent sign in the reference"),
        pytest.param(
            "Yes",
            [
                "Yes, because 3 > 2",
                r"\text{Yes, since } n > 2",
                r"\text{Yes}, \text{because it is even}",
                "Yes, it is",
            ],
            ["No, because 3 > 2", "Yes, no", "Yes and no", "No, yes is wrong", "Perhaps, because 3 > 2"],
            id="yes and why",
        ),
        pytest.param(
            r"\text{Purple}",
            ["Purple, because she has 6", r"\text{Purple (since } 6 > 5)"],
            ["Red, because Purple has 6", "Purple, as well as Red", "Purple or Red, because"],
            id="word and why",
        ),
        pytest.param(r"\text{(B)}", ["(B), since it is even"], ["A, B because"], id="letter and why"),
        pytest.param(
            "2n",
            [r"2n \text{ rooks}", r"2n\ \text{ways}", r"2n \text{ rooks are needed}"],
            [
                r"3n \text{ rooks}",
                r"2n + 1 \text{ rooks}",
                r"2n \text{ or } 3n",
                r"2n \text{ for odd } n",
                r"2n \text{ plus one}",
            ],
            id="words behind a formula",
        ),
        pytest.param("12", [r"12 m \text{ per s}"], [r"12n \text{ rooks}"], id="unit in two parts"),
        pytest.param(
            r"(3,\infty)",
            [r"\{x \mid x > 3\}", "\\{x : x > 3\\}", r"\{x \in \mathbb{R} \,|\, x > 3\}"],
            [r"\{x \mid x \ge 3\}", r"\{x \in \mathbb{Z} \mid x > 3\}", r"\{3\}"],
            id="set-builder",
        ),
        pytest.param(
            r"(-\infty,-1)\cup(3,\infty)",
            ["x < -1 or x > 3", r"x > 3 \text{ or } x < -1", r"\{x \mid x < -1 \text{ or } x > 3\}"],
            ["x < -1", r"x \le -1 \text{ or } x > 3", r"x < -1 \text{ and } x > 3", "x < -1, x > 3, x = 2"],
            id="conditions for a union",
        ),
        pytest.param(
            r"x < 1 \text{ or } x = 2",
            [r"(-\infty, 1) \cup \{2\}", "x = 2 or x < 1"],
            [r"(-\infty, 1]", r"(-\infty, 1) \cup \{3\}"],
            id="conditions in the reference",
        ),
        pytest.param(
            "f(x)=2x",
            [
                r"f(x)=2x \text{ for all } x \in \mathbb{R}",
                r"2x \quad \forall x \in \mathbb{R}",
                r"2x, x \in \mathbb{R}",
            ],
            [r"f(x)=x \text{ for all } x \in \mathbb{R}", r"f(x)=2x \text{ for all } x > 5"],
            id="for all x",
        ),
        pytest.param(
            "f(x)=x,f(x)=-x",
            [r"f(x)=-x \text{ for all } x, f(x)=x \text{ for all } x"],
            [r"f(x)=x \text{ for all } x"],
            id="for all x in a list",
        ),
        pytest.param(
            "y''+y=0", [r"y^{\prime\prime}=-y", "y+y''=0"], ["y'+y=0", "y+y=0", r"y^{\prime}=-y"], id="two primes"
        ),
        pytest.param("f'(x)", [r"f^{\prime}(x)", r"f^\prime(x)"], ["f(x)", "g'(x)"], id="prime"),
        pytest.param("y'=2x", ["2x", r"y^{\prime}=2x"], ["y=2x", "y'=3x"], id="assignment to a derivative"),
        pytest.param(
            r"m\ddot{x}+b\dot{x}=f", [r"m\ddot x=f-b\dot x"], [r"m\ddot{x}+bx=f", r"m\dot{x}+b\ddot{x}=f"], id="dots"
        ),
        pytest.param("2E_1-E_2", ["E_{1}+E_1-E_{2}"], ["2E-E", "2E_2-E_1", "E_1"], id="subscript of E"),
        pytest.param("2E_1", [r"2 \cdot E_{1}"], ["2E", "2E_2"], id="E is no digit in base 1"),
        pytest.param("1E_{16}", ["1E"], ["30", "1F"], id="E as a digit"),
        pytest.param("3I_0", ["I_{0}+2I_0"], ["3I_1"], id="subscript of I"),
        pytest.param("iR", ["Ri", "R i"], ["-Ri", "R"], id="i as a current"),
        pytest.param(
            r"T_{\text{red}} / 2",
            [r"\frac{T_\text{red}}{2}", r"\frac12 T_{\mathrm{red}}", r"\frac{T_{red}}{2}", r"\frac{T_{\rm red}}{2}"],
            [r"\frac{T_{\text{blue}}}{2}", r"\frac{T}{2}"],
            id="subscript in words",
        ),
        pytest.param(r"2x_{\max}", [r"2x_{\text{max}}", r"2x_{max}"], [r"2x_{\min}"], id="subscript max"),
        pytest.param(
            r"\sqrt{gh}",
            ["(gh)^{1/2}", r"\sqrt{g}\sqrt{h}"],
            [r"-\sqrt{gh}", r"\sqrt{g+h}", "gh"],
            id="root of letters",
        ),
        pytest.param(
            r"\sqrt{4 \pi G \rho r_{0}^{2}}",
            [r"2r_0\sqrt{\pi G\rho}"],
            [r"2r_0^2\sqrt{\pi G\rho}"],
            id="root of a square",
        ),
        pytest.param(
            r"\ln(a/b)", [r"\ln a - \ln b", r"-\ln(b/a)"], [r"\ln(b/a)", r"\ln a + \ln b"], id="logarithm of letters"
        ),
        pytest.param("|x|", [r"\sqrt{x^2}"], ["x", "-x"], id="absolute value"),
        pytest.param("x", ["x"], ["|x|", r"\sqrt{x^2}", r"\max(x, 0)"], id="no absolute value"),
        pytest.param("e^{0.3t}", ["e^{3t/10}", "e^{0.1t}e^{0.2t}"], ["e^{0.1t}e^{0.1t}"], id="decimal exponent"),
        pytest.param("x/2", ["0.5x", r"\frac{x}{2}"], ["0.6x", "0.05x"], id="decimal factor"),
        pytest.param(
            "0.1x(x+3)+0.2", [r"0.1x^2+0.3x+0.2", r"\frac{1}{10}(x+1)(x+2)"], ["0.1x^2+0.3x"], id="decimals in a sum"
        ),
        pytest.param("2:30 p.m.", ["14:30", "2:30"], ["13:30", "2:30 a.m.", "14:31"], id="24 hours"),
        pytest.param("12:15 a.m.", ["0:15", "12:15"], ["12:15 p.m."], id="midnight"),
        pytest.param("Ann's", ["Ann’s"], ["Bob’s"], id="curly apostrophe"),
        pytest.param("6", ["6^{th}", r"6^\text{th}", r"6^{\mathrm{th}}"], ["16^{th}", "6^t"], id="ordinal"),
        pytest.param(
            r"60^\circ",
            [r"\frac{120^\circ}{2}", r"\frac{180^{\circ}}{3}"],
            [r"\frac{120^\circ}{3}"],
            id="degree above",
        ),
    ],
)
def test_forms_of_an_answer(gold, right, wrong):
    check(gold, right, wrong)


def test_tolerance_is_a_share_of_the_reference():
    check("4.5e33", [r"4.52 \times 10^{33}", "4.5e33"], [r"4.6 \times 10^{33}", r"4.5 \times 10^{32}"], tolerance=0.01)
    check(r"2+\pi", ["5.14"], ["5.2"], tolerance=0.01)
    check("(1, 2)", ["(1.001, 2)"], ["(1.1, 2)"], tolerance=0.01)


def test_the_reference_answer_is_the_first_that_math_verify_gets(monkeypatch):
    calls = []
    monkeypatch.setattr("math_verify.verify", lambda gold, answer, **kwargs: calls.append((str(gold), str(answer))))
    equal_answers.equal_answers("x + z", "x + y + 1")
    assert calls == [("x + z", "x + y + 1")]


def test_signs_may_be_typographic():
    check("-3", ["\u22123", "\u20133"], ["3"])
    check("x-1", ["x \u2212 1"], ["x + 1"])


def test_of_a_rate_the_first_unit_may_be_asked_for():
    check("12", [r"12 \text{ inches per day}", r"1 \text{ foot per day}"], [r"12 \text{ feet per day}"], unit="inches")
    check("5", [], [r"5 \text{ m/s}"], unit="m")


def test_unit_of_the_reference():
    check("1.5", ["1.5", "90 minutes", r"1.5\text{ h}"], ["90", "1.5 minutes", "1.5 km"], unit="hours")


# ---- Where an answer stands ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{1}", "1"),
        (r"\boxed{1} and \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{2}} cm", r"\frac{1}{2}"),
        (r"\fbox{3}", "3"),
        (r"\boxed 4$ and {x}", "4"),
        ("", None),
        ("no box, {x}", None),
        (r"\boxed{open", None),
    ],
)
def test_the_last_box(text, expected):
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9 * 2 = <<9*2=18>>18 dollars.\n#### 18", "18"),
        ("#### 1,080", "1,080"),
        ("#### -3\n", "-3"),
        (r"So $x = \boxed{\frac{1}{2}}$ and not \boxed{2}, but \boxed{3}.", "3"),
        ("#### Step 1\nAdd.\n#### Step 2\n" + r"It is \boxed{7}.", "7"),  # headings
        (r"By \boxed{7} we have" + "\n#### 8", "8"),
        (" 3/4 ", "3/4"),
        ("Paris", "Paris"),
        ("The answer is 4.", "4"),
        ("She sells 9 eggs at $2.\nThe answer is: 18", "18"),
        ("She sells 9 eggs. The answer is **18** dollars.\n\\boxed{19}", "19"),
        ("The answer is 18.\nBut that is not all.", "The answer is 18.\nBut that is not all."),
        ("No answer", "No answer"),
        ("It is 18 apples.", "18 apples"),
        ("Ben has 18 apples left over, so he shares.", "18 apples left over"),
        ("The total is $18$ dollars.", "$18 dollars"),
        ("It's $1,450.50", "$1,450.50"),
        ("The change was -18 degrees", "-18 degrees"),
        ("He walks a total of 2.5 miles a day.", "2.5 miles a day"),
        ("about 18", "18"),
        ("x is 3/4", "3/4"),
        ("Total: 18", "18"),
        ("= 18", "18"),
        # No sentence, or no number that is surely the answer
        ("Team 2", "Team 2"),
        ("In room 12", "In room 12"),
        ("Ann: 18, Ben: 3", "Ann: 18, Ben: 3"),
        ("It is Team 2.", "It is Team 2."),
        ("It is on June 12.", "It is on June 12."),
        ("It is 12 June.", "It is 12 June."),
        ("He is 5th.", "He is 5th."),
        ("He buys 3 kites for 18 dollars.", "He buys 3 kites for 18 dollars."),
        ("There are 18 pens and two kites.", "There are 18 pens and two kites."),
        ("It is half of 18.", "It is half of 18."),
        ("It is not 18.", "It is not 18."),
        ("It is 18 or more.", "It is 18 or more."),
        ("It is 3:30 p.m.", "It is 3:30 p.m."),
        ("It is 5x + y.", "It is 5x + y."),
        ("Ann, who is 12, is older.", "Ann, who is 12, is older."),
        ("It has 18 " + "red " * 100 + "apples.", "It has 18 " + "red " * 100 + "apples."),
    ],
)
def test_the_answer_in_a_reference(text, expected):
    assert read_reference(text) == expected


@pytest.mark.parametrize("text", ["It is 18 dollars.", "Ben pays 18 dollars for kites.", "about $18"])
@pytest.mark.parametrize(
    ("answer", "is_correct"), [("18", True), ("1800 cents", True), ("18 feet", False), ("17", False)]
)
def test_a_sentence_as_reference_is_graded_by_its_number_and_unit(text, answer, is_correct):
    assert is_right(answer, read_reference(text)) == is_correct


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("Ben is taller than Ann.", True),
        ("He ran three miles.", True),
        ("It is 3:30 p.m.", True),
        ("Yes, because it is even", True),
        ("Because every number in this list can be halved without rest it works", True),
        ("Seven apples and then two pears beside the old green house", True),  # no verb, but long
        ("Mrs. Hilt", False),
        ("Ben and Ann", False),
        ("Yes", False),
        ("18 apples are left", False),
        (r"\frac{1}{2}", False),
    ],
)
def test_a_reference_that_hardly_any_answer_repeats_is_a_sentence(reference, expected):
    assert is_sentence(reference) == expected


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"Ann has 3, so \boxed{18} are left of 20.", "18"),
        (r"So \boxed{17}. Wait, that is wrong. So \boxed{18}.", "18"),
        (r"So \boxed{18}. Again, it is \boxed{1", "18"),
        (r"It is 12, so \boxed{12", None),
        (r"So it is \boxed 7.", "7"),
        (r"It is a half, \boxed{\frac{1}{2}", None),
        (r"\boxed{1} and $\boxed{3}$", "1, 3"),
        ("\\boxed{1}\n\\boxed{3}", "3"),
        (r"\boxed{1},\ \boxed{3}", "1, 3"),
        (r"$x = \boxed{3}$, $y_1 = \boxed{4}$", "x = 3, y_1 = 4"),
        (r"$x = \boxed{3}$. So $y = \boxed{4}$", "4"),
        (r"so $y = \boxed{4}$", "4"),
        ("Answer:\n1. Add 5 and 4.\n2. That is 9.", "9"),
        (r"$\boxed{52}_8$", "52_8"),
        ("9*2=18\n#### 18", "18"),
        ("#### Step 1\n4 + 5 = 9\n#### Step 2\n18", "18"),
        ("#### 18\n#### 20", "20"),
        ("#### 1. Eggs left\n16 - 3 - 4 = 9\n\n#### 2. Money\n9 * 2 = 18\n\nThe answer is 18.", "18"),
        ("The answer is **18** dollars (9 eggs at $2 each).", "18"),
        ("The answer is **Yes**, because 3 > 2.", "Yes"),
        ("**Answer:** The total is **18** dollars.", "18"),
        ("\\boxed{17}\n#### 18", "18"),
        ("#### 17\nNo, \\boxed{18}", "18"),
        ("5 + 4 = 9 eggs. So she has **18** eggs", "18"),
        ("So she has **18** eggs, 2 more than 16.", "18"),
        ("**Answer: 18**", "18"),
        ("**Final Answer**\n\n\\[18\\]", r"\[18\]"),
        ("The answer is 18 because I had 4. Then I stop.", "18 because I had 4"),
        ("Answer: 17\nNo. The answer is: 18", "18"),
        ("The answer is not 17. It is 18", "18"),
        ("It costs $5 and then $18.", "$18"),
        ("That makes 1 1/4 cups.", "1 1/4"),
        ("That makes -2 degrees.", "-2"),
        ("It is 1,450,000.", "1,450,000"),
        (r"so we get $x = \frac{3}{4}$", r"x = \frac{3}{4}"),
        ("18\nExplanation: 30 - 12 = 18, as 12 of 30 are gone.", "18"),
        ("30 - 12 = 18 eggs\n\n**Reasoning:** 12 are gone.", "30 - 12 = 18 eggs"),
        ("17\nExplanation: 30 - 12. The answer is 18.", "18"),
        ("1. Subtract\nReasoning: 30 - 12 = 18", "18"),
        ("Let us see.\nExplanation: 30 - 12 = 18", "18"),
        ("The answer is 18 feet.A train", "18 feet"),
        ("The answer is 18.Question: Tom", "18"),
        ("The answer is 18.5", "18.5"),
        ("The answer is 18.**New question**: Tom", "18"),
        ("The answer is that she has 18 eggs.", "she has 18 eggs"),
        ("The final answer is:\n\\[\n18\n\\]", "\\[\n18\n\\]"),
        ("I do not know.", None),
        ("", None),
        ("In all they have $5 million.", "$5 million"),
        ("At night it fell to minus 5.", "minus 5"),
        ("That is 10 minus 5.", "5"),
    ],
)
def test_answer_that_counts(completion, answer):
    found = find_answer(completion)
    assert found == (answer and (answer, found.marked))


@pytest.mark.parametrize(
    ("completion", "correct"),
    [
        (r"\boxed{\text{Janet makes } 18 \text{ dollars}}", True),
        (r"\boxed{The answer is 18}", True),
        (r"\boxed{\text{Total: } 18}", True),
        ("So,\n\n**Total cost: $18**", True),
        ("Final Answer: Total cost: $18", True),
        ("**Total cost: $19**", False),
        (r"\boxed{9 \cdot 2 = 18}", True),
        (r"\boxed{It is not 18}", False),
        (r"\boxed{18 \text{ or } 19}", False),
        ("The answer is 18 eggs.", True),
        ("The answer is $18 per day.", True),
        ("The answer is between 18 and 19.", False),
        (r"\boxed{18}" + "\n\n" + r"\boxed{18}", True),
    ],
)
def test_text_around_the_number(completion, correct):
    assert grade(completion, "18").correct is correct


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        ("18, which is the difference between 30 and 12", True),
        ("18, as calculated above", True),
        ("$18, not $20", True),
        ("30 - 12 = 18, not 20", True),
        ("18 because 30 - 12 = 18", True),
        ("18 red and green peaches in the basket", True),
        ("x = 18, where x is the number of peaches", True),
        ("20, not 18", False),
        ("18, which is incorrect", False),
        ("18, as well as 20", False),
        ("18 peaches and 2 pears", False),
        ("20, because 38 - 18 = 20", False),
    ],
)
def test_a_comment_behind_a_number_is_no_part_of_it(answer, correct):
    assert grade(f"The answer is {answer}.", "18").correct is correct


def test_a_comment_behind_a_ratio_is_no_part_of_it():
    assert grade("The answer is 2:5, not 3:2.", "2:5").correct
    assert not grade("The answer is 2:5, not 3:2.", "3:2").correct


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        (r"\text{Harry's wand is longer}", True),
        ("Harry is taller than Sam", True),
        ("Harry’s wand", True),
        ("Sam is taller than Harry", False),
        ("Harry or Sam", False),
        ("Harry is not taller", False),
        ("Harryson is taller", False),
    ],
)
def test_what_is_said_of_a_name_names_it(answer, correct):
    assert grade(rf"So \boxed{{{answer}}}.", "Harry").correct is correct


def test_boxes_with_names_are_one_answer():
    for gold in ("(3,4)", "3,4", "x=3,y=4"):
        assert grade(r"So $x = \boxed{3},\ y = \boxed{4}$.", gold).correct
        assert not grade(r"So $x = \boxed{3},\ y = \boxed{5}$.", gold).correct
    assert not grade(r"So $x = \boxed{4},\ y = \boxed{3}$.", "x=3,y=4").correct
    assert not grade(r"So $x = \boxed{4},\ y = \boxed{3}$.", "(3,4)").correct


def test_runaway_text_is_no_answer():
    check("301", ["1+" * 300 + "1"], [])
    check("601", [], ["1+" * 600 + "1"])


def test_a_text_answer_may_stand_in_the_last_sentence():
    assert grade("Ann has 5 and Purple has 6. So Purple won.", "Purple").correct
    assert not grade("Purple has 6. So Red won.", "Purple").correct
    assert not grade("So Red or Purple won.", "Purple").correct
    assert grade("So it is Ann’s hat.", "Ann's hat").correct


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{(B)}}", "B"),
        (r"\boxed{b}", "B"),
        (r"\boxed{B) it lowers the rate, as in A}", "B"),
        (r"\boxed{\textbf{(B)}\ 5}", "B"),
        ("The answer is (B) because A is wrong.", "B"),
        ("The correct answer is option **B**.", "B"),
        ("Answer: B. A gene is lost", "B"),
        ("**B**", "B"),
        ("B", "B"),
        ("(B) since the rate falls.", "B"),
        ("#### B", "B"),
        ("The answer is (A). Wait, the answer is (B).", "B"),
        ("So option B is what remains.", "B"),
        ('The answer is "B".', "B"),
        ("So the answer must be B.", "B"),
        ("B is the correct answer.", "B"),
        (r"\boxed{A and B}", "A,B"),
        (r"\boxed{AB}", "A,B"),
        (r"\boxed{A} or \boxed{B}", "A,B"),
        ("The answer is both A and B.", "A,B"),
        (r"\boxed{\langle H\rangle} is what remains. **Answer: B**", "B"),
        ("\\boxed{12} moles.\nThe answer is (B).", "B"),
        ("#### 12\nAnswer: B", "B"),
        (r"Answer: B. It weighs \boxed{12}", "B"),
        (r"\boxed{12}. It is not (B).", None),
        ("The answer is a gene.", None),
        ("A gene is lost.", None),
        ("Answer: A gene is lost.", None),
        (r"\boxed{B", None),
    ],
)
def test_letter_of_a_multiple_choice(completion, letter):
    assert find_letter(completion) == letter
    assert grade(completion, "B", kind="choice") == Verdict(letter, letter == "B")


@pytest.mark.parametrize(
    ("completion", "kept"),
    [
        ("6*3=18. The answer is 18.\n\nQuestion: Tom has 5. The answer is 5.", "6*3=18. The answer is 18."),
        (r"So $\boxed{18}$ dollars. Next: \boxed{3}", r"So $\boxed{18}$ dollars."),
        ("\\[\n\\boxed{18}\n\\]\nTom has 5", "\\[\n\\boxed{18}\n\\]"),
        (r"\boxed{18}. Wait, no. \boxed{20}. Next: \boxed{3}", r"\boxed{18}. Wait, no. \boxed{20}."),
        (r"\boxed{1} and \boxed{3}. More: \boxed{4}", r"\boxed{1} and \boxed{3}."),
        ("9*2=18\n#### 18\nTom has 5\n#### 5", "9*2=18\n#### 18"),
        ("#### 1. Eggs\n16-7=9\n#### 2. Money\n#### 18\nTom", "#### 1. Eggs\n16-7=9\n#### 2. Money\n#### 18"),
        (
            "Answer: Let us add 5 and 4.\nThe answer is 9.5 or so. Next",
            "Answer: Let us add 5 and 4.\nThe answer is 9.5 or so.",
        ),
        (
            "We find the answer:\n1. Add 5 and 4.\n2. So \\boxed{9}.\nNext: \\boxed{3}",
            "We find the answer:\n1. Add 5 and 4.\n2. So \\boxed{9}.",
        ),
        ("**Answer:**\n\n1. **Add** 5.\nThe answer is 9.\nNext", "**Answer:**\n\n1. **Add** 5.\nThe answer is 9."),
        ("**Answer:** 1. Add 5.\n2. The answer is 9.\nNext", "**Answer:** 1. Add 5.\n2. The answer is 9."),
        ("Answer:\n1.\nNext: \\boxed{3}", "Answer:\n1."),
        ("The answer is 1. It is odd.\n2. Next: \\boxed{3}", "The answer is 1."),
        ("I think<|im_end|>\nfoo", "I think"),
        ("I think\n\nQ: foo", "I think"),
        ("I think\nHuman: foo", "I think"),
        ("I think\n**Problem 2:** foo", "I think"),
        ("The question: is it 5?", "The question: is it 5?"),
        ("The answer is 18.Human: A man has 5. The answer is 5.", "The answer is 18."),
        ("It is 18Human: A man has 5", "It is 18"),
        ("She has 18 eggs.User: A man has 5", "She has 18 eggs."),
        ("She has 18 eggs. [Question] A man has 5", "She has 18 eggs."),
        ("The final answer is:\n\\[\n18\n\\]\nTom has 5. The answer is 5.", "The final answer is:\n\\[\n18"),
        ("The answer is:\n\\[\n\\boxed{18}\n\\]\nTom has 5", "The answer is:\n\\[\n\\boxed{18}\n\\]"),
        ("The answer is 18 eggs.A man has 5. The answer is 5.", "The answer is 18 eggs."),
        ("The answer is 18.5 eggs. Next", "The answer is 18.5 eggs."),
        ("The kind is Human: 18 of them", "The kind is Human: 18 of them"),
        (r"Cut off, \boxed{5", r"Cut off, \boxed{5"),
        ("Question: foo", ""),
    ],
)
def test_first_answer(completion, kept):
    assert first_answer(completion) == kept
    assert first_answer(kept) == kept


@pytest.mark.parametrize(
    ("completion", "is_finished"),
    [
        (r"So it is $\boxed{5}$. Wait, I forgot one. So it is \boxed{6}. That is the number of pens.", True),
        ("The answer is 5. Let me double-check: 2 + 4 = 6. The answer is 6. He has 6 pens then, and no more.", True),
        ("#### 5\nThis seems incorrect, as he lost one.\n#### 4\nSo there are four of them left.", True),
        (
            "The answer is 5.\n\nOn second thought, it is not. The answer is 6.\n\nA train runs 60 miles every hour.",
            True,
        ),
        (
            "Answer: 1. Add both numbers, which gives 5.\n2. Add one.\nThe answer is 6. He has six pens at the end.",
            True,
        ),
        ("The answer is 5.\nQuestion: Tom has 3 pens.", True),
        ("The answer is 5.Human: Tom has 3 pens.", True),
        ("The answer is 5.", False),
        ("She adds 2 and 3 first. Then she adds the others, which are 4 and 5, to it", False),
    ],
)
def test_what_is_called_finished_is_the_first_answer_however_the_text_goes_on(completion, is_finished):
    cuts = [completion[:length] for length in range(1, len(completion) + 1)]
    finished = [cut for cut in cuts if has_first_answer(cut)]
    assert {first_answer(cut) for cut in finished} == ({first_answer(completion)} if is_finished else set())


# ---- The answers of each benchmark, a dozen each. The rows are written for this test, the forms are the files' ----

# Numbers with a point
SVAMP = [
    ("145.0", ["145", r"145 \text{ bananas}", "290/2"], ["144", "14.5"]),
    ("19.0", ["19", "19 pounds", "30 - 11 = 19"], ["11", "41"]),
    ("8.0", ["8.00", r"\$8"], ["80", "0.8"]),
    ("1.0", ["1", r"1 \text{ page}"], ["10", "0"]),
    ("3.0", ["3", "n = 3"], ["-3", "1/3"]),
    ("1200.0", ["1,200", "1200"], ["1.2", "12"]),
    ("0.0", ["0", "0 marbles"], ["1", "10"]),
    ("56.0", ["56", "7 * 8"], ["15", "78"]),
    ("2.0", ["2", r"\text{She needs } 2 \text{ more}"], ["2 or 3", "20"]),
    ("417.0", ["417", "417.0"], ["471", "417.5"]),
    ("30.0", ["30 minutes", "30"], ["3", "300"]),
    ("7.0", ["7", r"\text{7 groups}"], ["7.1", "77"]),
]

# The unit in brackets; ratios, fractions, times, names
ASDIV = [
    ("12 (pears)", ["12", "12 pears"], ["21", "12 pears and 3 plums"]),
    ("2.5 (dollars)", [r"\$2.50", "2.5", "250 cents"], ["250", r"\$25"]),
    ("75 (cents)", ["75", r"\$0.75", "75 cents"], ["0.75", r"\$75"]),
    ("90 (minutes)", ["90", "1.5 hours", "90 min"], ["1.5", "90 hours"]),
    ("36 (square feet)", ["36", r"36\text{ ft}^2", "4 square yards"], ["36 feet", "63"]),
    ("9 (years old)", ["9", "9 years old", "9 years"], ["19", "9.5"]),
    ("3:1", ["3 : 1", "6:2", r"3 \text{ to } 1", "3"], ["1:3", "4:1"]),
    ("3/8", ["0.375", r"\frac{3}{8}", "6/16"], ["8/3", "3:5"]),
    ("-(1/4)", ["-0.25", r"-\frac14"], ["1/4", "-4"]),
    ("5:45 p.m.", ["5:45", "5:45 PM", r"5:45 \text{ p.m.}"], ["5:45 a.m.", "5:54 p.m."]),
    ("Mr. Bell", ["Mr. Bell", r"\text{Mr. Bell}", "mr bell"], ["Mrs. Bell", "Bell or Mr. Bell"]),
    ("The 3rd runner.", ["the 3rd runner", r"\text{The 3rd runner}"], ["the 4th runner", "3"]),
    ("Yes", ["Yes", r"\text{yes}"], ["No", "yes and no"]),
    ("5th", ["5", "5th", r"5^{\text{th}}"], ["15th", "6th"]),
    ("3:0", ["3:0", "3.0:0"], ["6:0", "0:3", "3"]),
    ("0:1:2", ["0:2:4"], ["0:2:3"]),
    ("1:00", ["1:00", "01:00", "13:00", "1:00 p.m."], ["12:00", "2:00", "1:00:30"]),
    ("2:30", ["2:30", "2 to 30", "14:30"], ["1:15", "3:30"]),
    ("1:20:00", ["1:20:00"], ["2:40:00", "12:00:00"]),
    ("10:20", ["1:2", "10:20"], ["5:10"]),
    ("May 2nd", ["May 2nd", "May 2"], ["May 3rd", "June 2nd"]),
]

# Scientific notation, numpy, formulas of physics; a unit only in the answer
MINERVA = [
    ("1.4", [r"1.4 \mathrm{~cm}", "1.4", r"1.4\,\text{cm}"], ["14", "1.5"]),
    ("3.5e33", [r"3.5 \times 10^{33}", r"3.5 \cdot 10^{33} \text{ erg/s}", "3.5e33"], [r"3.5 \times 10^{32}", "3.5"]),
    ("2e-5", [r"2 \times 10^{-5} \text{ rad}", "0.00002"], [r"2 \times 10^{5}", "0.0002"]),
    ("-1./2", ["-0.5", r"-\frac{1}{2}"], ["0.5", "-2"]),
    ("+3", ["3", "+3"], ["-3", "13"]),
    ("np.arcsin(5/13)", [r"\arcsin(5/13)", r"\sin^{-1}\left(\frac{5}{13}\right)"], [r"\arccos(5/13)", "5/13"]),
    (r"\frac{5}{3} m", [r"\frac{5m}{3}", r"\frac53 m"], [r"\frac{3}{5} m", r"\frac{5}{3} n"]),
    (r"\frac{e^{3 t}}{7}+c e^{-2 t}", [r"c e^{-2t} + \frac{1}{7} e^{3t}"], [r"c e^{2t} + \frac17 e^{3t}"]),
    (r"\sqrt{3} \cos (2 t-\pi / 4)", [r"\sqrt{3}\cos\left(2t - \frac{\pi}{4}\right)"], [r"\sqrt{3}\cos(2t)"]),
    (r"4 \pi R^{2} \sigma T^{4}", [r"4\pi\sigma R^2T^4"], [r"4\pi\sigma R^2T^3"]),
    ("q=u(v-w)", ["q = uv - uw", "u(v-w)"], ["q = u(v+w)", "uv"]),
    (r"\frac{1}{2 b}(\exp{b*t} - \exp{-b*t})", [r"\frac{e^{bt} - e^{-bt}}{2b}"], [r"\frac{e^{bt} + e^{-bt}}{2b}"]),
    ("E_{1},E_{2}", ["E_1, E_2", "E_2, E_1"], ["E_1", "E_1, E_3"]),
    (r"\ln 3 + i\pi / 4", [r"\ln(3) + \frac{i\pi}{4}"], [r"\ln(3) - \frac{i\pi}{4}"]),
]

# Lists with one string or several, tuples, named functions, intervals, units
OLYMPIADBENCH = [
    (["$2^{1010}$"], ["2^{1010}", r"4^{505}"], ["2^{1011}", "1010"], {}),
    (["1,4,6"], ["6, 4, 1", r"\{1,4,6\}", r"1, 4 \text{ and } 6"], ["1,4", "1,4,6,7"], {}),
    (["$63$,$82$"], ["63 \\text{ or } 82", "82,63"], ["63", "6382"], {}),
    (["$2$", "$-\\frac{1}{2}$"], ["-1/2, 2", "x = 2, x = -0.5"], ["2", "2, 1/2"], {}),
    (["$(1,9,20), (3,7,14)$"], ["(3,7,14), (1,9,20)"], ["(1,9,20)", "(9,1,20), (3,7,14)"], {}),
    (["$f(x)=-2$,$f(x)=x+2$"], ["f(x) = x+2, f(x) = -2", "x + 2, -2"], ["f(x) = x+2", "f(x) = x-2, f(x) = -2"], {}),
    (["$M=2^{N-3}+1$"], ["2^{N-3}+1", "M = 1 + 2^{N-3}"], ["2^{N-3}", "M = 2^{N-2}+1"], {}),
    (["$m_{\\max }=n^{2}-n-2$"], ["n^2-n-2", "m = (n-2)(n+1)"], ["n^2-n", "n^2+n-2"], {}),
    (["$k \\geqslant 3$"], [r"k \ge 3", "k >= 3", r"[3, \infty)"], ["k > 3", "3"], {}),
    (["$\\left\\lfloor\\log _{3} n\\right\\rfloor$"], [r"\lfloor \log_3 n \rfloor"], [r"\lceil \log_3 n \rceil"], {}),
    (["$[\\frac{1}{3}, 9]$"], [r"\left[\frac13, 9\right]"], [r"\left(\frac13, 9\right)", r"\frac13, 9"], {}),
    (["$(-\\infty, 1) \\cup\\{2\\}$."], [r"\{2\} \cup (-\infty, 1)"], [r"(-\infty, 1)", r"(-\infty, 1)\cup\{3\}"], {}),
    (["$45^{\\circ}$,$30^{\\circ}$"], [r"30^\circ, 45^\circ", "30, 45"], [r"45^\circ", r"30^\circ, 60^\circ"], {}),
    (["$\\frac{100!}{2^{51}}$"], [r"100!/2^{51}"], [r"\frac{100!}{2^{50}}", r"\frac{100!+1}{2^{51}}"], {}),
    (["$\\frac{500}{7}$"], ["500/7 km/h", "71.428571"], ["500/7 km", "71"], {"unit": "km/h"}),
    (["$144$"], ["144", r"144 \text{ cm}^2"], [r"144 \text{ cm}", r"144 \text{ m}^2"], {"unit": "$cm^2$"}),
    (["35"], ["35 minutes", "35"], ["35 hours", "0.35"], {"unit": "min"}),
    (["5.2"], [r"5.2\%", "5.25", "5.1"], ["5.4", "52"], {"unit": "%", "tolerance": 0.1 / 5.2}),
]  # fmt: skip

MMLU = [
    ("A", [r"\boxed{A}", "The answer is A.", "A) increases"], [r"\boxed{B}", "A gene", r"\boxed{A, C}"]),
    ("B", [r"\boxed{\text{B}}", "**Answer: B**", "The answer is (B), 4 m/s."], ["The answer is D.", "B or D?"]),
    ("C", [r"\boxed{C. the enzyme}", "Answer: C", "#### C"], ["Answer: A and C", r"\boxed{the enzyme}"]),
    ("D", ["The correct option is D.", "D", r"\boxed{(D)}"], ["D is wrong, so the answer is A.", r"\boxed{ABD}"]),
    ("A", ["The answer is A because it is a base.", "(A)"], ["The answer is a base.", r"\boxed{A} and \boxed{B}"]),
    ("B", ["First C, but no. The answer is B", r"So \boxed{\mathrm{B}}"], ["First B, but no. The answer is C", ""]),
    ("C", [r"\boxed{C: all of A and B}", "The answer is C) 12"], [r"\boxed{A and B}", r"\boxed{12}"]),
    ("D", ["**D. None of these**", r"\boxed{\textbf{D}}"], [r"\boxed{\text{None}}", r"\boxed{D"]),
    ("A", ["The correct choice is (A).", "Answer: (A)"], ["Answer: (B)", "Answer: (A) or (B)"]),
    ("B", [r"The answer is $\boxed{\text{(B)}}$ since $x = 2$.", "B. 7"], [r"\boxed{7}", r"\boxed{E}"]),
    ("C", ["It cannot be (A), hence (C)", "option C"], ["It cannot be (C), hence (A)", "C major"]),
    ("D", [r"\boxed{d}", "I think the answer is D"], ["I think", r"\boxed{C, D}"]),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "right", "wrong"), SVAMP)
def test_svamp(gold, right, wrong):
    check(gold, right, wrong)


@pytest.mark.parametrize(("gold", "right", "wrong"), ASDIV)
def test_asdiv(gold, right, wrong):
    check(gold, right, wrong)


@pytest.mark.parametrize(("gold", "right", "wrong"), MINERVA)
def test_minerva(gold, right, wrong):
    check(gold, right, wrong)


@pytest.mark.parametrize(("gold", "right", "wrong", "kwargs"), OLYMPIADBENCH)
def test_olympiadbench(gold, right, wrong, kwargs):
    check(gold, right, wrong, **kwargs)


@pytest.mark.parametrize(("gold", "right", "wrong"), MMLU)
def test_mmlu(gold, right, wrong):
    assert [text for text in right if not grade(text, gold, kind="choice").correct] == []
    assert [text for text in wrong if grade(text, gold, kind="choice").correct] == []


# ---- Many at once ----

# Computer algebra would multiply for hours
ENDLESS = {"completion": r"\boxed{\prod_{n=1}^{10^{9}} n}", "gold": r"\sqrt{2}"}
ROOT = {"completion": r"\boxed{\sqrt{20}}", "gold": r"2\sqrt{5}"}


def test_grade_all_keeps_order_and_limits_time():
    items = [ROOT, ENDLESS, {"completion": "#### 18", "gold": "18"}, {**ROOT, "gold": r"2\sqrt{3}"}, ROOT]
    start = time.monotonic()
    verdicts = grade_all(items, num_workers=1, timeout=1)
    assert time.monotonic() - start < 20
    assert [verdict.correct for verdict in verdicts] == [True, False, True, False, True]
    assert [verdict.failure for verdict in verdicts] == [None, "over 1 seconds", None, None, None]
    assert verdicts[1].answer == r"\prod_{n=1}^{10^{9}} n"


def test_grade_all_is_what_grade_is():
    items = [{"completion": rf"\boxed{{{right[0]}}}", "gold": gold} for gold, right, _ in SVAMP + MINERVA[:7]]
    assert grade_all(iter(items), num_workers=2) == [grade(**item) for item in items]


def test_word_problems_start_no_process(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    items = [{"completion": f"#### {number}", "gold": f"{number}", "unit": "km"} for number in range(300)]
    assert all(verdict.correct for verdict in grade_all(items))
    assert grade_all([]) == []


def test_grade_all_in_a_script_without_a_guard_and_in_a_thread(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"from trl_lightreasoner.grading.verdicts import grade_all\nprint(grade_all([{ROOT!r}]))\n")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert run.stdout == "[Verdict(answer='\\\\sqrt{20}', correct=True, failure=None)]\n", run.stderr
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.extend([*grade_all([ROOT]), grade(**ROOT)]))
    thread.start()
    thread.join()
    assert [verdict.correct for verdict in verdicts] == [True, True]


def test_a_worker_that_dies_is_replaced(monkeypatch):
    verdicts._graders.close()
    start = graders.Graders._start
    started = []

    def start_dead(self):
        started.append(worker := start(self))
        if len(started) == 1:
            worker.kill()
            worker.wait()
        return worker

    monkeypatch.setattr(graders.Graders, "_start", start_dead)
    died, graded = grade_all([ROOT, ROOT], num_workers=1)
    assert (died.correct, died.failure) == (False, "the grading process died")
    assert (graded.correct, graded.failure) == (True, None)
    assert len(started) == 2


@pytest.mark.parametrize(
    "text", [r"\boxed{5} ", "#### a\n", "answer: 1. a ", "answer is 5 ", r"\boxed{5}. Wait ", "5.Human"]
)
def test_a_text_is_read_in_time_that_grows_as_its_length(text):
    start = time.process_time()
    first_answer(text * (160_000 // len(text)))
    answers.find_answer(text * (160_000 // len(text)))
    assert time.process_time() - start < 4


def test_what_is_compared_without_computer_algebra_is_limited_as_well():
    numbers = [f"{i}" for i in range(200)]
    item = {"completion": rf"\boxed{{{'; '.join(numbers)}}}", "gold": numbers[::-1] * 20}
    start = time.monotonic()
    assert grade_all([item], timeout=0.5)[0].failure == "over 0.5 seconds"
    assert time.monotonic() - start < 10


def test_long_texts_take_no_time():
    start = time.monotonic()
    for text in (r"\boxed{" * 3000, "answer is 5 " * 1000, "$" * 9999, "\n" * 9999, "answer " * 2000, r"\(" * 5000):
        grade(text, "18")
        first_answer(text)
        find_letter(text)
    for answer in (
        "2 " + "abcdefgh" * 50 + "+",
        "(" * 400,
        "1!" * 400,
        "5000!" * 150,
        r"\text{a} " * 90,
        "x=" * 400 + "1",
    ):
        grade_all([{"completion": f"#### {answer}", "gold": "18 (pears)"}], timeout=1)
    assert time.monotonic() - start < 15


# ---- Errors ----


def test_math_verify_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for call in (lambda: grade("#### 18", "18"), lambda: grade_all([]), verdicts.check_math_verify):
        with pytest.raises(ImportError, match=r"pip install 'trl-lightreasoner\[eval\]'"):
            call()


def test_bad_arguments():
    with pytest.raises(ValueError, match="no reference answer"):
        grade("#### 18", "")
    with pytest.raises(ValueError, match="no reference answer"):
        grade("#### 18", [])
    with pytest.raises(ValueError, match='`kind` must be "math" or "choice", got \'essay\''):
        grade("#### 18", "18", kind="essay")


def test_examples_in_the_docstrings():
    for module in (answer_parts, answers, equal_answers, references, exact_numbers, units, verdicts):
        assert doctest.testmod(module).failed == 0


def test_agreement_script(tmp_path):
    solutions = [("9*2=18\nA: 18", True), ("9+2=11\nA: 11", False), ("9*2=18\nA: 18.0", True), ("it is 9*2=1", False)]
    row = {"question": "How many?", "ground_truth": "9*2=18\nA: 18"}
    row |= {f"model {i}": {"solution": text, "is_correct": mark} for i, (text, mark) in enumerate(solutions)}
    row["model 4"] = {"solution": "A guess.\nA: 17", "is_correct": True}
    file = tmp_path / "graded.jsonl"
    file.write_text(json.dumps(row) + "\n")
    run = subprocess.run(
        [sys.executable, "benchmarks/grader_agreement.py", "--dataset", file],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "box: 4 of 5 agree, 80.00%" in run.stdout, run.stderr
    assert run.stdout.count("(model 4): people accept '17' for '18'") == 4
