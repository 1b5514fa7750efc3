"""The bytes of a tokenizer's tokens, and the tokens of any bytes, which is what two different tokenizers share.

Texts are tokenized here as the continuation of another text: without BOS, without the space that SentencePiece puts
before the first word, and without special tokens, even if the text contains their names.
"""

import copy
import json
from bisect import bisect_left, bisect_right
from itertools import accumulate

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..vocabulary import special_ids


_BYTES = {char: byte for byte, char in bytes_to_unicode().items()}
# Texts that must be restored exactly from their tokens
_SAMPLE = "Ann has 12 apples, and\n\nBen's  cost $3.50 (x = 7).\n"
# Texts to put before another, so that it is tokenized as a continuation
_ANCHORS = ("\n", ".", "a")


class TokenBytes:
    """
    Tokens as byte strings.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Byte-level BPE, or one of SentencePiece's types.
        width (`int`): Number of columns of the model's logits. Tokens beyond it have no bytes here.
        name (`str`): What to call the model in an error message.

    Attributes:
        bytes (`list[bytes | None]`): Of each token, `None` if it stands for no text.
        ids (`dict[bytes, list[int]]`): The tokens of some bytes.
        sorted_ids (`list[int]`): All tokens with bytes, in the order of their bytes.

    Raises:
        `ValueError`: If the bytes of its tokens cannot be determined.

    Example:

    ```python
    >>> tokens = TokenBytes(tokenizer, len(tokenizer))
    >>> [tokens.bytes[i] for i in tokens.encode(b"2+2")]
    [b'2', b'+', b'2']

    ```
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int, name: str = "model"):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(_refusal(name))
        kinds = _decoders_of(backend)
        byte_level = "ByteLevel" in kinds
        if not byte_level and kinds.isdisjoint({"ByteFallback", "Metaspace", "Replace"}):
            raise ValueError(_refusal(name))
        special, added = special_ids(tokenizer), set(tokenizer.added_tokens_decoder)
        self.bytes: list[bytes | None] = [None] * width
        for token, token_id in tokenizer.get_vocab().items():
            if token_id < width and token_id not in special:
                as_text = byte_level and token_id in added  # added tokens are stored as plain text
                self.bytes[token_id] = token.encode() if as_text else _bytes_of(token, byte_level)
        self.ids: dict[bytes, list[int]] = {}
        for token_id, content in enumerate(self.bytes):
            if content:
                self.ids.setdefault(content, []).append(token_id)
        self._sorted = sorted(self.ids)
        self.sorted_ids = [token_id for content in self._sorted for token_id in self.ids[content]]
        self._places = [0, *accumulate(len(self.ids[content]) for content in self._sorted)]
        self._tokenizer = copy.deepcopy(backend)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        # A tokenizer that adds a space to every text gets another text before it
        alone = self._encode([_SAMPLE])[0]
        self._anchors = ("",) if self.join(alone) == _SAMPLE.encode() else _ANCHORS
        self._anchor_ids = self._encode(list(self._anchors))
        if (ids := self.encode(_SAMPLE.encode())) is None or self.join(ids) != _SAMPLE.encode():
            raise ValueError(_refusal(name))

    def join(self, ids: list[int] | tuple[int, ...]) -> bytes | None:
        """The bytes of some tokens, or `None` if one of them has none."""
        parts = [self.bytes[token_id] if token_id < len(self.bytes) else None for token_id in ids]
        return None if None in parts else b"".join(parts)  # type: ignore[arg-type]

    def starting_with(self, beginning: bytes) -> slice:
        """Where in `sorted_ids` the tokens are whose bytes begin with the given ones."""
        low = bisect_left(self._sorted, beginning)
        high = bisect_left(self._sorted, True, lo=low, key=lambda content: not content.startswith(beginning))
        return slice(self._places[low], self._places[high])

    def going_on(self, beginning: bytes, most: int) -> list[bytes]:
        """The remaining bytes of up to `most` longer tokens that begin with the given bytes."""
        low = bisect_right(self._sorted, beginning)
        longer = self._sorted[low : low + most]
        return [content[len(beginning) :] for content in longer if content.startswith(beginning)]

    def encode(self, content: bytes) -> list[int] | None:
        """
        The tokens of some bytes, which may end within a character. `None` if the tokens do not restore the bytes, for
        example if the tokenizer normalizes them or they are not UTF-8.
        """
        return self.encode_all([content])[0]

    def encode_all(self, contents: list[bytes]) -> list[list[int] | None]:
        """The same for many byte strings."""
        texts = [split_characters(content) for content in contents]
        found: list[list[int] | None] = [None] * len(contents)
        open_rows = [row for row, text in enumerate(texts) if text is not None]
        for anchor, anchor_ids in zip(self._anchors, self._anchor_ids, strict=True):
            encoded = self._encode([anchor + texts[row][0] for row in open_rows])  # type: ignore[index]
            for row, ids in zip(open_rows, encoded, strict=True):
                text, rest = texts[row]  # type: ignore[misc]
                ids, head = ids[len(anchor_ids) :], ids[: len(anchor_ids)]
                ends = [self.ids.get(bytes([byte]), [None])[0] for byte in rest]
                if head == anchor_ids and self.join(ids) == text.encode() and None not in ends:
                    found[row] = [*ids, *ends]  # type: ignore[list-item]
            open_rows = [row for row in open_rows if found[row] is None]
        return found

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [each.ids for each in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def split_characters(content: bytes) -> tuple[str, bytes] | None:
    """Split bytes into text and the start of an incomplete character. `None` if they are not UTF-8."""
    try:
        return content.decode(), b""
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            return None
        return content[: error.start].decode(), content[error.start :]


def _bytes_of(token: str, byte_level: bool) -> bytes | None:
    if byte_level:
        return bytes(_BYTES[char] for char in token) if all(char in _BYTES for char in token) else None
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def _decoders_of(backend: Tokenizer) -> set[str]:
    """Types of the tokenizer's decoder and of its parts."""
    if backend.decoder is None:
        return set()
    parts, kinds = [json.loads(backend.decoder.__getstate__())], set()
    while parts:
        part = parts.pop()
        kinds.add(part["type"])
        parts += part.get("decoders", [])
    return kinds


def _refusal(name: str) -> str:
    return (
        f"The bytes of the {name}'s tokens cannot be determined, so it cannot be paired with a model that has "
        "different tokens. Choose two models of one family, or two with byte-level BPE or SentencePiece, whose tokens "
        "reproduce a text."
    )
