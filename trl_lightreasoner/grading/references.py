r"""Reads reference answers: solutions that mark their answer, sentences that state one number, and bare answers.

Text in, text out; standard library only.
"""

import re
from math import isfinite
from typing import Any

from .answers import NUMBER, marked_in_solution


# Longer texts, and those of several lines, are whole solutions, in which the answer must be marked
MAX_UNMARKED = 200

# "Total: 18", "= 18"
_LABEL = re.compile(r"^\s*(?:[A-Za-z][A-Za-z' ]*:|=)\s*(?=[-+$€£.\\]{0,2}\d)(?!.*[A-Za-z] ?:)")
_VERB = re.compile(
    r"\b(?:is|are|was|were|be|been|has|have|had|will|would|can|could|does|did|makes?|made|gets?|got|gives?|gave|takes?"
    r"|took|costs?|needs?|needed|pays?|paid|earns?|earned|spends?|spent|saves?|saved|owes?|owed|buys?|bought|sells?"
    r"|sold|eats?|ate|uses?|used|remains?|contains?|weighs?|equals?|becomes?|(?:it|that|there|s?he)['’]s)\b",
    re.I,
)
_ABOUT = re.compile(r"\s*(?:about|around|approximately|roughly|exactly|only|just)\s+", re.I)
# What makes another number of the next one, "half of 18", and what makes it a part of a name or a date
_CHANGING = re.compile(
    r"\b(?:(?i:(?<!total )of|than|times|twice|half|double|triple|by|plus|minus|negative|on(?: the)?)"
    r"|(?<!^)[A-Z]\w*)\W*$"
)
_NOT_ALONE = re.compile(
    r"\b(?:not|no|or|neither|nor|never|squared|cubed|factorial|half|quarter|dozens?|one|two|three|four|five|six|seven"
    r"|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty|hundred)\b|n['’]t\b|\d",
    re.I,
)
# What may follow a number: no formula, no other statement, and a unit in small letters
_UNIT_OF_NUMBER = re.compile(
    r"\$?(?!(?:st|nd|rd|th)\b)(?P<unit>(?: ?[a-z]{2,})?(?: [a-z]{2,}| a)*?) ?(?:[.!]?$|(?:[,;]| (?:for|in|on|at|of"
    r"|from|to|after|before|because|and|more|less|fewer)\b)(?!.*\b(?:is|are|was|were)\b)[A-Za-z'’,;.!? -]*$)"
)


def read_reference(text: str) -> str:
    r"""
    The answer in a reference: what a solution marks, or of a sentence its only number with its unit. Otherwise it is
    the whole text, without a label.

    Example:

    ```python
    >>> read_reference("She makes 9 * 2 dollars.\n#### 18"), read_reference(" 3/4 "), read_reference("Total: 18")
    ('18', '3/4', '18')
    >>> read_reference("It is 18 apples."), read_reference("Team 2")
    ('18 apples', 'Team 2')

    ```
    """
    return (marked_in_solution(text) or _stated_number(text) or _LABEL.sub("", text)).strip()


def read_references(answer: Any) -> list[str] | None:
    """The answers in a column of references, of which all must be given: text, a number, or a list of them. `None` if
    there is nothing to grade by.

    Example:

    ```python
    >>> read_references("9 * 2 = 18\\n#### 18"), read_references([1, "2"]), read_references(" ")
    (['18'], ['1', '2'], None)

    ```
    """
    texts = answer if isinstance(answer, list) else [answer]
    # A float that is not finite marks a gap
    texts = [str(text) if isinstance(text, int | float) and isfinite(text) else text for text in texts]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        return None
    references = [read_reference(text) for text in texts]
    return references if all(references) else None


def is_sentence(reference: str) -> bool:
    """
    Whether a reference from [`read_reference`] is still a sentence, which hardly any answer repeats.

    Example:

    ```python
    >>> is_sentence("Ben is taller than Ann."), is_sentence("Ben and Ann"), is_sentence("18 apples left")
    (True, False, False)

    ```
    """
    words = re.findall(r"[A-Za-z'’]{2,}", reference)
    is_said = _VERB.search(reference) or reference.rstrip().endswith(".") and len(words) > 2
    return len(words) > 10 or not reference[:1].isdigit() and len(words) > 1 and bool(is_said)


def _stated_number(text: str) -> str | None:
    """
    Of "Ben has 18 apples left." what it states, "18 apples left". `None` if it is no sentence, holds several numbers,
    or its number is part of a name or a date, "Team 2" or "June 12".
    """
    text = text.strip()
    number = NUMBER.search(text)
    if number is None or len(text) > MAX_UNMARKED:
        return None
    before, after = text[: number.start()], text[number.end() :]
    is_said = _VERB.search(before) or _ABOUT.fullmatch(before) or text.endswith(".") and len(before.split()) > 1
    if not is_said or not re.fullmatch(r"[A-Za-z'’, -]*", before) or _NOT_ALONE.search(before + after):
        return None
    unit = _UNIT_OF_NUMBER.match(after)
    return None if unit is None or _CHANGING.search(before) else f"{number[0]}{unit['unit']}"
