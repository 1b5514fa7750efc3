r"""Finds the answer that a completion marks, and where its first finished answer ends.

A marked answer is, in this order,

1. the last complete `\boxed{}` or line of `####`. Boxes of one line joined by a comma, "and" or "or" are one answer;
2. what follows the last "answer is", "answer:" or a heading that says "final answer";
3. bold type in the last line;
4. a value in the first line, above "Explanation" or "Reasoning".

The last one counts, so an answer that was withdrawn and boxed anew is the new one. A box that the length limit cut off
is no answer: `\boxed{12` may have become 128. Without any mark the last formula or number is taken.

Standard library only; every search is linear in the text.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Answer(NamedTuple):
    """The text of an answer, and whether the completion marked it as one (or it is only the last number)."""

    text: str
    marked: bool


class _Box(NamedTuple):
    start: int
    end: int
    content: str


# What a base model writes when it goes on with a question of its own, and the ends of a turn
_RUN_ON = re.compile(
    r"<\|(?:im_end|im_start|endoftext|eot_id|end_of_text|end|user|assistant)\|>|</s>|<(?:eos|end_of_turn)>"
    r"|\n[ \t]*(?:\*\*|#{1,6} *)?(?:(?:New |Next )?(?:Question|Problem|Exercise|Example)(?: *\d+)?(?:\*\*)? *[:.]"
    r"|Q *\d*(?:\*\*)? *:|(?:Human|User|Instruction|Input)(?:\*\*)? *:)"
    # Behind an answer without a space, "The answer is 5.Human: Tom has", as Qwen2.5 goes on
    r"|(?<=[.!?)\]}$*\d])(?:Human|User) *:|(?<=[.!?)\]}$*\d]) ?\[(?:Question|Problem|Instruction)\]"
)
_WITHDRAWN = re.compile(
    r"[\s$*.)\]\\]*(?:wait|hold on|hmm|oops|actually|however|but\b|no,|sorry|correction|on second thought"
    r"|(?:let me|let us|let's) (?:double.?check|re|check|verify)"
    r"|(?:this|that) (?:is|was|seems) (?:wrong|incorrect|not))",
    re.I,
)
# At least as many characters as its longest phrase
_LENGTH_WITHDRAWN = 24

# "The answer is", "Answer:", "**Final Answer**" before a line break; "answer to the question is"
_PHRASE = re.compile(
    r"\banswers?\b(?:[*_ ]{0,4}(?:to [^.\n:]{0,80}? )?"
    r"(?:(?:is|are|(?:must|should|would) be)\b(?: thus| therefore| that)?|[:=])[*_: ]*"
    r"|[*_ ]*(?=\n))",
    re.I,
)
# "Answer:" above "1. First ..." announces reasoning, but "The answer is 1." does not
_LIST = re.compile(r"[* ]*\n[*\s]*+1[.)][* ]+\S|(?<![a-z] )1[.)][* ]+\S[^\n]{0,1000}\n+[* ]*2[.)]\s")
# What may become such a list when the text goes on
_BEGUN_LIST = re.compile(r"(?<![a-z] )1[.)][* ]+\S[^\n]{0,1000}\n*[* ]*(?:2[.)]?)?\Z")
_NO_VALUE = re.compile(r"\W*(?:not|wrong|incorrect|correct|right|unclear|as follows|given|found|obtained)\b", re.I)
# Of multiple-choice answers
_LETTERS = "ABCDEFGHIJ"
# Another sentence may follow without a space, "5 feet.A train"
_SENTENCE = r"(?:[A-Z][a-z]+[ ,:]|[AI] [a-z]|\*\*[A-Z])"
_SENTENCE_END = re.compile(
    r"(?<![A-Z])(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bMrs)(?<!\b[ap]\.m)[.!?](?=\s+[A-Z\\$*(]|\s*$|" + _SENTENCE + ")"
)

_VALUE = re.compile(r"\s*(?:(?:\*\*|\$|\\[(\[])\s*)*\(?(?:[-+]?[$€£]?\.?\d|[A-J]\b|\\(?!boxed|[(\[]))")
_EXPLAINED = re.compile(
    r"\s*(?!\d+[.)]\s+\D)([^\n]{1,100})\n+[*_ ]*(?:Explanation|(?:The )?Reason(?:ing)?|Rationale)\b", re.I
)
_FORMULA = re.compile(
    r"\$\$([^$]+)\$\$|\\\[((?:[^\\]|\\(?!\])){1,500})\\\]|\\\(((?:[^\\]|\\(?!\))){1,500})\\\)|\$([^$\n]+)\$"
)
NUMBER = re.compile(
    r"(?<![\w.])(?:[-+−](?=[\d.$€£\\])|(?<!\d )(?:minus|negative) (?=[\d.$€£]))?(?:\\?[$€£] ?)?"
    r"(?:\d+(?: \d+/\d+| ?/ ?\d+|:\d+|(?:,\d{3})*(?!\d)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+)?|\.\d+)(?: ?\\?%)?"
    r"(?: (?:hundred|thousand|(?:m|b|tr)illion)\b)?"
)
_FRACTION = re.compile(r"-?\\[dt]?frac\{[^{}]+\}\{[^{}]+\}")


def find_answer(completion: str) -> Answer | None:
    r"""Extract the answer that counts from a completion. The rules are in the docstring of the module.

    Example:

    ```python
    >>> find_answer(r"So \boxed{17}. Wait, I forgot one. So it is \boxed{18}.")
    Answer(text='18', marked=True)
    >>> find_answer("That is 9 * 2 = 18.\n#### 18")
    Answer(text='18', marked=True)
    >>> find_answer("She makes $18 every day.")
    Answer(text='$18', marked=False)
    >>> find_answer(r"So she makes \boxed{1") is None
    True

    ```
    """
    marked = next(_marked_answers(completion), None)
    if marked is not None:
        return Answer(marked, True)
    return None if _find_boxes(completion)[1] is not None else _last_value(completion)


def _marked_answers(completion: str) -> Iterator[str]:
    """The marked answers of a completion, the one that counts first."""
    boxes, unfinished = _find_boxes(completion)
    if unfinished is not None:
        completion = completion[:unfinished]
    strong = [_joined(completion, boxes)] if boxes else []
    strong += _after_hashes(completion)[-1:]
    yield from (text for _, text in sorted(strong, reverse=True))
    yield from _after_phrases(completion)
    yield from reversed(_bold_in_last_line(completion))
    if (explained := _EXPLAINED.match(completion)) and _VALUE.match(value := _value(explained[1])):
        yield value


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{}`, as in the reference solutions of MATH and Minerva Math.

    Example:

    ```python
    >>> last_boxed(r"the image is \boxed{1.6} \mathrm{~cm}")
    '1.6'

    ```
    """
    boxes, _ = _find_boxes(text)
    return boxes[-1].content if boxes else None


def marked_in_solution(text: str) -> str | None:
    r"""
    The answer that a reference solution marks: after `####` as in GSM8K, in the last `\boxed{}` as in MATH, or after
    "the answer is" in the last line as in MetaMathQA.

    Example:

    ```python
    >>> marked_in_solution("She makes 9 * 2 = <<9*2=18>>18 dollars.\n#### 18"), marked_in_solution("18 apples")
    ('18', None)
    >>> marked_in_solution(r"Hence $x = \boxed{\frac{1}{2}}$."), marked_in_solution("It is 9 * 2. The answer is: 18")
    ('\\frac{1}{2}', '18')

    ```
    """
    boxes, _ = _find_boxes(text)
    found = [(box.end, box.content) for box in boxes[-1:]] + _after_hashes(text)[-1:]
    return max(found)[1] if found else next(_after_phrases(_last_line(text)), None)


def last_sentence(text: str) -> str:
    """The last sentence of a text, without the end of a turn."""
    line = _last_line(text)
    ends = [match.end() for match in _SENTENCE_END.finditer(line) if match.end() < len(line)]
    return line[ends[-1] if ends else 0 :].strip()


def first_answer(completion: str) -> str:
    r"""Cut a completion after its first finished answer, for base models that continue with their own questions.

    The text ends before the first sign of a new turn or question (`<|im_end|>`, a line that starts with "Question:",
    "Q:", "Problem:", "Human:" and the like), and behind the sentence of the first complete `\boxed{}`, line of `####`
    or "answer is" with a value, whichever ends first. If that answer is withdrawn at once ("Wait", "However", "Let me
    check"), the next one ends the text. Text without a finished answer is only cut at the signs.

    Example:

    ```python
    >>> first_answer("6 * 3 = 18. The answer is 18.\n\nQuestion: Tom has 5 pens. The answer is 5.")
    '6 * 3 = 18. The answer is 18.'
    >>> first_answer(r"So it is $\boxed{18}$ dollars. Ann has 7 pens: \boxed{7}")
    'So it is $\\boxed{18}$ dollars.'

    ```
    """
    sign = _RUN_ON.search("\n" + completion)
    text = completion[: max(sign.start() - 1, 0)] if sign else completion
    boxes, _ = _find_boxes(text)
    sentence_end = _sentence_ends(text)
    ends = {sentence_end(box.end) for box in boxes}
    ends |= {position for position, _ in _after_hashes(text)}
    for match in _phrases(text):
        if value := _VALUE.match(text, match.end()):
            ends.add(sentence_end(value.end()))
    for end in sorted(ends):
        if not _WITHDRAWN.match(text, end):
            return text[:end].rstrip()
    return text.rstrip()


def has_first_answer(completion: str) -> bool:
    r"""
    Whether the [`first_answer`] of a text stays the same however the text goes on, because a new
    question follows it, or enough text to see that it is not withdrawn.

    Example:

    ```python
    >>> has_first_answer("The answer is 5. Let me"), has_first_answer("The answer is 5. Let me know if you need more")
    (False, True)

    ```
    """
    text, first = completion.rstrip(), first_answer(completion)
    if len(first) == len(text):
        return False
    if _RUN_ON.search("\n" + completion):
        return True
    following = text[len(first) :].lstrip("$*.)]\\ \t\n")
    is_begun_list = any(_BEGUN_LIST.match(text, match.end()) for match in _PHRASE.finditer(text))
    return len(following) >= _LENGTH_WITHDRAWN and not is_begun_list


def find_letter(completion: str) -> str | None:
    r"""Extract the letter of a multiple-choice answer. Several letters are joined by commas.

    Of what is marked as an answer, the first in the order of this module that begins with a letter counts: a box may
    hold the value, and a line below it the letter.

    Example:

    ```python
    >>> find_letter(r"\boxed{\text{(B) the mitochondria}}")
    'B'
    >>> find_letter("The answer is A and C.")
    'A,C'
    >>> find_letter("A cell needs energy.") is None
    True

    ```
    """
    is_marked = _find_boxes(completion)[1] is not None
    for marked in _marked_answers(completion):
        is_marked = True
        if found := _leading_letters(marked):
            return found
    if is_marked:
        return None
    text = completion.replace("**", "").strip()
    # A completion that is a letter, or starts with one: "B", "(B) because", "B. The rate"
    first = re.match(rf"\(?([{_LETTERS}])(?:[).:]|\s*$|\s*\n)", text)
    if first:
        return _leading_letters(text.split("\n")[0])
    named = re.findall(
        rf"\((?=[{_LETTERS}]\))([{_LETTERS}])\)|\b(?:[Oo]ption|[Cc]hoice)(?: is)?:? \(?([{_LETTERS}])\b"
        rf"|\b([{_LETTERS}]) is (?:the )?(?:correct|right|best)\b",
        text,
    )
    return next(filter(None, named[-1])) if named else None


def _find_boxes(text: str) -> tuple[list[_Box], int | None]:
    r"""The outermost complete boxes in order, and where a box starts that is still open at the end of the text."""
    boxes: list[_Box] = []
    stack: list[tuple[int, int, bool]] = []
    for token in re.finditer(r"\\(?:boxed|fbox)(?:\s*\{|\s+(\w+)(?=\W))|\\.|[{}]", text, re.S):
        if token[1]:  # "\boxed 7"
            boxes.append(_Box(token.start(), token.end(), token[1]))
        elif token[0].startswith((r"\boxed", r"\fbox")):
            stack.append((token.start(), token.end(), True))
        elif token[0] == "{":
            stack.append((token.start(), token.end(), False))
        elif token[0] == "}" and stack:
            start, inner, is_box = stack.pop()
            # With a blank line in it the box was never closed, and this brace belongs to something else
            if is_box and text[inner : token.start()].strip() and "\n\n" not in text[inner : token.start()]:
                while boxes and boxes[-1].start > start:
                    boxes.pop()
                boxes.append(_Box(start, token.end(), text[inner : token.start()].strip()))
    is_open = [start for start, _, is_box in stack if is_box]
    # Only the last box can have been cut off by the length limit
    unfinished = is_open[-1] if is_open and (not boxes or boxes[-1].end < is_open[-1]) else None
    return boxes, unfinished


_BETWEEN_BOXES = re.compile(r"(?:[ $,;~]|\\[(),;:! ]|\\q?quad|\\text ?\{ ?(?:and|or) ?\}|\b(?:and|or)\b)*")
_NAME_OF_BOX = re.compile(r"(?<![a-zA-Z\\])[a-zA-Z](?:_\w|_\{\w+\})? ?= ?$")


def _joined(text: str, boxes: list[_Box]) -> tuple[int, str]:
    """Where the last answer in boxes ends, and its text. Of several boxes the names count, "x = " before the box."""
    contents = [boxes[-1].content + _suffix(text, boxes[-1].end)]
    name = _name_before(text, boxes[-1])
    for box, following in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        between = text[box.end : following.start].removesuffix(name)
        if not (_BETWEEN_BOXES.fullmatch(between) and re.search(r",|;|and|or", between)):
            break
        contents[0] = name + contents[0]
        name = _name_before(text, box)
        contents.insert(0, box.content)
    if len(contents) > 1:
        contents[0] = name + contents[0]
    return boxes[-1].end, ", ".join(contents)


def _name_before(text: str, box: _Box) -> str:
    name = _NAME_OF_BOX.search(text[max(box.start - 20, 0) : box.start])
    return name[0] if name else ""


def _suffix(text: str, end: int) -> str:
    r"""A percent sign or a base written after the box: `\boxed{12}\%`, `\boxed{52}_8`."""
    match = re.compile(r"\$? ?(\\?%|_\{?\d+\}?)").match(text, end)
    return match[1] if match else ""


def _after_hashes(text: str) -> list[tuple[int, str]]:
    """
    The end and the text of each answer behind `####`. A heading, "#### Step 2" or "#### 2. Money", is none unless it
    is the end.
    """
    found, end = [], len(text.rstrip())
    for match in re.finditer(r"#### *([^\n]+)", text):
        is_value = re.match(r"[^A-Za-z\d]*\d|\W*\\", match[1]) and not re.match(r"\d+[.):]\s+\D", match[1])
        if is_value or match.end() >= end:
            found.append((match.end(), _value(match[1])))
    return [(end, value) for end, value in found if value]


def _phrases(text: str) -> list[re.Match]:
    return [match for match in _PHRASE.finditer(text) if not _LIST.match(text, match.end())]


def _after_phrases(text: str) -> Iterator[str]:
    """The value after each phrase, the last one first."""
    for match in reversed(_phrases(text)):
        line = text[match.end() : match.end() + 1000].lstrip().split("\n\n")[0]
        # A formula set apart may take several lines, text does not
        formula = re.match(r"(?:\*\*)?(?:\$\$|\\\[)", line)
        line = line if formula else line.split("\n")[0]
        if match[0].endswith("**") and (bold := re.match(r"([^*]+)\*\*", line)):  # "answer is **18** dollars"
            line = bold[1]
        if line and not _NO_VALUE.match(line) and (value := _value(line)):
            yield value


def _bold_in_last_line(text: str) -> list[str]:
    values = [_value(match[1]) for match in re.finditer(r"\*\*([^*\n]+)\*\*", _last_line(text))]
    return [value for value in values if re.search(r"\d|\\", value)]


def _value(line: str) -> str:
    """The first sentence of a line, or what is bold in it."""
    end = _SENTENCE_END.search(line)
    line = line[: end.start()] if end else line
    bold = re.match(r"[^*]{0,60}\*\*([^*\n]+)\*\*", line)
    line = (bold[1] if bold else line).strip(" \t\n*_`:")
    return re.sub(r"^[-•] +", "", line)  # an item of a list, not a minus


def _last_value(text: str) -> Answer | None:
    found = [(match.end(), match[0]) for pattern in (NUMBER, _FRACTION) for match in pattern.finditer(text)]
    for match in _FORMULA.finditer(text):
        formula = next(filter(None, match.groups())).strip()
        # "$5 and then $6" is money
        if not re.search(r"(?<![\\a-zA-Z{])[A-Za-z]{3,}", formula):
            found.append((match.end(), formula))
    return Answer(max(found)[1], False) if found else None


def _last_line(text: str) -> str:
    return text.rstrip().rsplit("\n", 1)[-1]


_END = re.compile(r"\n|[.!?](?=\s|\$|$|" + _SENTENCE + r")\$?")
_CLOSING = re.compile(r"\s*(?:\\\]|\\\)|\$\$?|\*\*)+")


def _sentence_ends(text: str) -> Callable[[int], int]:
    """Where the sentence ends that goes on at a place; the text is searched once for all of them."""
    ends = [(match.start(), match.end()) for match in _END.finditer(text)]

    def sentence_end(start: int) -> int:
        closing = _CLOSING.match(text, start)
        following = bisect_left(ends, (closing.end() if closing else start,))
        return ends[following][1] if following < len(ends) else len(text)

    return sentence_end


def _leading_letters(text: str) -> str | None:
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox|operatorname)\s*\{|[${}*\"“”]|\\[()]|\\left|\\right", "", text)
    text = re.sub(
        r"^\W*(?:(?:the )?(?:correct )?(?:option|choice|answer)s?\b(?: is)?:?\s*|both |either )+", "", text, flags=re.I
    ).strip()
    if re.fullmatch(rf"[{_LETTERS.lower()}]", text):
        return text.upper()
    first = re.match(rf"\(?([{_LETTERS}])(?![\w'])\)?", text)
    if not first:
        together = re.fullmatch(rf"[{_LETTERS}]{{2,}}", text)  # "AC"
        return ",".join(text) if together else None
    found, rest = [first[1]], text[first.end() :]
    while more := re.match(rf"[\s,;/&+]*(?:(?:and|or)\s+)?\(?([{_LETTERS}])(?![\w'])\)?(?!\s+[a-z])", rest):
        if not re.match(r"[\s,;/&+]*(?:and|or)\b|\s*[,;/&+]|\s*\(", rest):
            break
        found.append(more[1])
        rest = rest[more.end() :]
    # "A cell" and "I think" start a sentence
    if (
        len(found) == 1
        and first[0] in {"A", "I"}
        and re.match(r"\s+[a-z]", rest)
        and not re.match(r"\s+(?:because|since|as|is)\b", rest)
    ):
        return None
    return ",".join(dict.fromkeys(found))
