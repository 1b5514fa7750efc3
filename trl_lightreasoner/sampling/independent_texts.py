"""Places in a text at which a tokenizer treats what is before and what is behind independently of each other.

Most tokenizers do so before a blank, and many do so behind a word or at the start of a line. This needs two things. No
token reaches across the place, so that no merge does. And the split into pieces, from left to right, has an end there.
The first is looked up in the vocabulary, and the second is tried.
"""

import random
import re
from collections import defaultdict
from itertools import pairwise

from ..models.token_bytes import TokenBytes, split_characters


_PRINTABLE, _LETTERS = range(33, 127), frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
# Bytes on the two sides. A blank behind a character that is none: other characters than ASCII can be blanks, too
_BLANKS = {(last, 32) for last in _PRINTABLE}
# Anything but a letter, or an apostrophe as of "'s", behind a letter
_WORD_ENDS = {(last, first) for last in _LETTERS for first in (10, *_PRINTABLE) if first != 39} - {
    (last, first) for last in _LETTERS for first in _LETTERS
}
# Anything but a blank or an apostrophe behind the end of a line
_LINE_STARTS = {(10, first) for first in _PRINTABLE if first != 39}
# Pairs of texts with which it is tried, and texts among them that are no tokens
_PAIRS = 4096
_MORE = (b"  a", b" \n", b" \n\n ", b" 's", b" 12", b"12", b".a", b"\n\n a", b"()\n")


def independent_places(tokens: TokenBytes) -> re.Pattern[bytes] | None:
    """
    A pattern of the first byte behind such places, or `None` if a tokenizer has none. It looks at the byte before.

    Example:

    ```python
    >>> tokens = TokenBytes(tokenizer, len(tokenizer))
    >>> [found.start() for found in independent_places(tokens).finditer(b"Ann has 12.")]
    [3, 7]

    ```
    """
    crossed = {pair for content in tokens.ids for pair in pairwise(content)}
    for sides in (_BLANKS | _WORD_ENDS | _LINE_STARTS, _BLANKS | _WORD_ENDS, _BLANKS):
        sides = sides - crossed
        if sides and _are_independent(tokens, sides):
            return _pattern(sides)
    return None


def _pattern(sides: set[tuple[int, int]]) -> re.Pattern[bytes]:
    behind: defaultdict[int, list[int]] = defaultdict(list)
    for last, first in sorted(sides):
        behind[last].append(first)
    before: defaultdict[bytes, list[int]] = defaultdict(list)
    for last, firsts in behind.items():
        before[bytes(firsts)].append(last)
    parts = [b"(?<=[%s])[%s]" % (re.escape(bytes(lasts)), re.escape(firsts)) for firsts, lasts in before.items()]
    return re.compile(b"|".join(parts))


def _are_independent(tokens: TokenBytes, sides: set[tuple[int, int]]) -> bool:
    """Whether texts between which some bytes are, on the two sides, are independent of each other."""
    draw = random.Random(0)
    contents = [content for content in tokens.ids if split_characters(content)]
    before: dict[int, list[bytes]] = {}
    behind: dict[int, list[bytes]] = {}
    for content in contents:
        before.setdefault(content[-1], []).append(content)
    for content in (*contents, *_MORE):
        behind.setdefault(content[0], []).append(content)
    # Whatever the bytes beside the place are
    pairs = [(bytes([last]), bytes([first, *more])) for last, first in sorted(sides) for more in (b"", b"a")]
    possible = [(last, first) for last, first in sorted(sides) if last in before and first in behind]
    if not possible:
        return False
    for last, first in draw.choices(possible, k=_PAIRS):
        pairs.append((draw.choice(before[last]), draw.choice(behind[first])))
    # All ends of lines: some tokenizers split the last line break off if a line follows
    firsts = [first for last, first in possible if last == 10]
    pairs += [(one, draw.choice(behind[draw.choice(firsts)])) for one in before.get(10, ()) if firsts]
    parts = [tokens.encode_all(list(side)) for side in zip(*pairs, strict=True)]
    whole = tokens.encode_all([one + other for one, other in pairs])
    return all(None in (one, other) or ids == one + other for one, other, ids in zip(*parts, whole, strict=True))
