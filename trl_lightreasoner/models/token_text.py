"""Token ids as text that can be trusted: characters that are invisible or move other text are spelled out."""

import unicodedata

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..vocabulary import special_ids


_BYTES = {char: byte for byte, char in bytes_to_unicode().items()}
# Categories of Unicode
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
_MARKS = {"\n": "\u21b5\n", "\t": "\u21e5"}


def spell_out(text: str) -> str:
    """
    Make every character of a text visible. A line break gets an arrow before it, and a tab becomes an arrow. Other
    invisible characters are shown by number: control, bidirectional, zero-width, surrogate, private and unassigned.

    Example:

    ```python
    >>> print(spell_out("a\\u202eb\\x00"))
    a\u27e8U+202E\u27e9b\u27e8U+0000\u27e9

    ```
    """
    # What is printable is of none of these categories
    shown = text if text.isprintable() else "".join(map(_spell, text))
    # An accent would otherwise be put on the token before
    return f"\u25cc{shown}" if text and unicodedata.combining(text[0]) else shown


def _spell(char: str) -> str:
    if char in _MARKS:
        return _MARKS[char]
    return f"\u27e8U+{ord(char):04X}\u27e9" if unicodedata.category(char) in _UNSEEN else char


def label_of(text: str) -> str:
    """The text of a single token: spaces at its ends are visible, and a line break does not break the line."""
    text = text.replace("\u21b5\n", "\u21b5")
    inner = text.strip(" ")
    if not inner:
        return "\u2423" * len(text) or "\u27e8empty\u27e9"
    before = len(text) - len(text.lstrip(" "))
    return "\u2423" * before + inner + "\u2423" * (len(text) - before - len(inner))


class TokenTexts:
    """
    The text of each token of a tokenizer, spelled out. Without a tokenizer it is the token's number.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): The expert's tokenizer.

    Example:

    ```python
    >>> texts = TokenTexts(tokenizer)
    >>> "".join(texts(i) for i in tokenizer("2 + 2 = 4").input_ids)
    '2 + 2 = 4'
    >>> TokenTexts(None)(7)
    '#7'

    ```
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None):
        self.tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        if tokenizer is not None:
            self._size = len(tokenizer)
            self._special = special_ids(tokenizer)
            # Some tokenizers remove the space from the first token of a text
            self._anchor = tokenizer("a", add_special_tokens=False).input_ids
            self._before = self._decode([])

    def __call__(self, token_id: int) -> str:
        if self.tokenizer is None:
            return f"#{token_id}"
        if token_id not in self._texts:
            self._texts[token_id] = self._text(token_id)
        return self._texts[token_id]

    def is_special(self, token_id: int) -> bool:
        """Whether the token stands for something other than text, such as EOS."""
        return self.tokenizer is not None and token_id in self._special

    def _text(self, token_id: int) -> str:
        assert self.tokenizer is not None
        token = self.tokenizer.convert_ids_to_tokens(token_id) if 0 <= token_id < self._size else None
        if token is None:
            return f"\u27e8token {token_id}\u27e9"
        if token_id in self._special:
            return spell_out(token)
        text = self._decode([token_id])
        if not text.startswith(self._before):  # a decoder that joins tokens
            return spell_out(token)
        text = text[len(self._before) :]
        if "\ufffd" not in text:
            return spell_out(text)
        # Part of a character
        if token.startswith("<0x") and token.endswith(">"):
            return f"\u27e8{token[3:-1]}\u27e9"
        if all(char in _BYTES for char in token):
            return f"\u27e8{bytes(_BYTES[char] for char in token).hex(' ').upper()}\u27e9"
        return spell_out(token)

    def _decode(self, token_ids: list[int]) -> str:
        assert self.tokenizer is not None
        return self.tokenizer.decode(
            [*self._anchor, *token_ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
