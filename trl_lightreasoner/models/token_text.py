"""Token ids as text to be trusted: what cannot be seen, or would move what stands around it, is spelled out."""

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
    `text` in which every character shows: a line break has an arrow before it, a tab is one, and other control
    characters, directions of writing, zero widths, surrogates, private and unassigned ones are shown by number.

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
    """A token's text where it stands alone: blanks at its ends show, and a line break breaks no line."""
    text = text.replace("\u21b5\n", "\u21b5")
    inner = text.strip(" ")
    if not inner:
        return "\u2423" * len(text) or "\u27e8empty\u27e9"
    before = len(text) - len(text.lstrip(" "))
    return "\u2423" * before + inner + "\u2423" * (len(text) - before - len(inner))


class TokenTexts:
    """
    The text of each token of a tokenizer, spelled out; without a tokenizer, its number.

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
            # Some tokenizers take the blank from the first token of a text
            self._anchor = tokenizer("a", add_special_tokens=False).input_ids
            self._before = self._decode([])

    def __call__(self, token_id: int) -> str:
        if self.tokenizer is None:
            return f"#{token_id}"
        if token_id not in self._texts:
            self._texts[token_id] = self._text(token_id)
        return self._texts[token_id]

    def is_special(self, token_id: int) -> bool:
        """Whether the token stands for something other than text, such as the end."""
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
