"""Prompt and completion of a row as readable text."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from ..models.token_text import TokenTexts, spell_out


_MAX_PROMPT = 1000  # characters


def prompt_text(prompt: Any, prompt_ids: list[int], texts: TokenTexts) -> str:
    """
    The prompt without its system message, its first 1,000 characters, spelled out.

    Args:
        prompt (`str` or `list[dict]`, *optional*): The column, if there is one.
        prompt_ids (`list[int]`): Ids to show without that column.
        texts ([`TokenTexts`]): Texts of the tokens.

    Example:

    ```python
    >>> prompt_text([{"role": "user", "content": "2+2?"}], [5, 6], TokenTexts(None))
    '2+2?'

    ```
    """
    if isinstance(prompt, list):
        prompt = "\n".join(str(message.get("content")) for message in prompt if message.get("role") != "system")
    if isinstance(prompt, str):
        text = spell_lines(prompt)
    else:
        text = ("" if texts.tokenizer else " ").join(map(texts, prompt_ids))
    return text if len(text) <= _MAX_PROMPT else f"{text[:_MAX_PROMPT]} …"


def spell_lines(text: str) -> str:
    """Spell out a text of several lines, but keep its line breaks."""
    return spell_out(text).replace("\u21b5\n", "\n")


def completion_text(row: dict, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """The completion of a row as text, from the tokenizer or else from the Dataset. `None` if it is in neither."""
    if tokenizer is not None:
        return tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
    completion = row.get("completion")
    if isinstance(completion, list):
        completion = "\n".join(str(message.get("content")) for message in completion)
    return completion if isinstance(completion, str) else None
