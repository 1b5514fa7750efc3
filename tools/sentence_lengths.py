"""
Sentences of README.md and docs/ with more words than a reader takes in at once. `make lint` runs it.

Code, tables, formulas and headings are left out. A word has a letter in it, so figures and intervals do not count.
"""

import re
import sys
from pathlib import Path


LIMIT = 30
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Full stops that end no sentence
ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|vs|etc|cf)\.")
# What ends one: the mark, what closes behind it, and something that can begin the next
END = re.compile(r"(?<=[.!?])[\"')*\]]*\s+(?=[\"'(*\[`]*[\w$`])")
NOT_PROSE = re.compile(r"\||#|<|:::|    |!\[|---")


def read_paragraphs(text: str) -> list[tuple[int, str]]:
    """The prose of a page: the line at which a paragraph or an item of a list begins, and its text."""
    text = re.sub(r"^( *)```.*?^\1```$", _blank_lines, text, flags=re.MULTILINE | re.DOTALL)
    paragraphs: list[tuple[int, list[str]]] = []
    inside = False
    for number, line in enumerate(text.splitlines(), 1):
        item = re.match(r"\s*(?:[-*]|\d+\.) +", line)
        if not line.strip() or (NOT_PROSE.match(line) and not inside and not item):
            inside = False
        elif NOT_PROSE.match(line.strip()) and not item:
            inside = False
        elif item or not inside:
            paragraphs.append((number, [line[item.end() :] if item else line]))
            inside = True
        else:
            paragraphs[-1][1].append(line)
    return [(number, " ".join(line.strip() for line in lines)) for number, lines in paragraphs]


def split_sentences(paragraph: str) -> list[str]:
    """
    >>> split_sentences("It learns (slowly). See [the page](page.md): `a.b` is a name. 3 steps, e.g. these.")
    ['It learns (slowly).', 'See the page: CODE is a name.', '3 steps, e.g these.']
    """
    text = re.sub(r"`[^`]+`", "CODE", paragraph)
    text = re.sub(r"\$[^$]+\$", "FORMULA", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return END.split(ABBREVIATIONS.sub(r"\1", text))


def count_words(sentence: str) -> int:
    return sum(1 for word in sentence.split() if re.search("[A-Za-z]", word))


def find_long_sentences(text: str, limit: int = LIMIT) -> list[tuple[int, int, str]]:
    """The line at which the paragraph begins, the number of words, and the sentence."""
    return [
        (line, count, sentence)
        for line, paragraph in read_paragraphs(text)
        for sentence in split_sentences(paragraph)
        if (count := count_words(sentence)) > limit
    ]


def _blank_lines(match: re.Match) -> str:
    return "\n" * match[0].count("\n")


def main() -> int:
    found = [
        f"{page.relative_to(ROOT)}:{line}: {count} words, more than {LIMIT}. Make two sentences of: {sentence}"
        for page in PAGES
        for line, count, sentence in find_long_sentences(page.read_text(encoding="utf-8"))
    ]
    for sentence in found:
        print(sentence)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
