"""The amateur's prompts: with its own tokenizer, or with words other than the expert's."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..steps.prompt_format import PromptFormat
from ..steps.prompts import encode_rows


@dataclass
class AmateurPrompts:
    """
    Makes the amateur's prompts from the expert's.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The amateur's, or the expert's if they have the same
            tokens.
        system_prompt (`str`, *optional*): System message that replaces the expert's, empty for none. If `None`, it is
            the expert's.
        template (`str`, *optional*): Text that contains {question} and replaces the expert's template.
        prompt_format ([`PromptFormat`], *optional*): Format of the expert's prompts, used to find the question in
            them. If `None`, a text is the question, and so is the last message.

    Example:

    ```python
    >>> experts = PromptFormat("raw", "Q: {question}")
    >>> AmateurPrompts(tokenizer, template="{question} =", prompt_format=experts).make("Q: 2+2")
    '2+2 ='

    ```
    """

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str | None = None
    template: str | None = None
    prompt_format: PromptFormat | None = None

    def make(self, prompt: Any) -> Any:
        """
        The amateur's prompt, text or messages like the expert's.

        Raises:
            `ValueError`: If plain text would need a system message, or the question cannot be found.
        """
        if not prompt:
            return prompt
        if isinstance(prompt, str):
            if self.system_prompt is not None:
                raise ValueError(
                    "A plain prompt has no system message: put the text of `amateur_system_prompt` into "
                    "`amateur_prompt_template`."
                )
            return prompt if self.template is None else self._put(prompt)
        messages = list(prompt)
        if self.system_prompt is not None:
            messages = messages[1:] if messages[0].get("role") == "system" else messages
            if self.system_prompt:
                messages = [{"role": "system", "content": self.system_prompt}, *messages]
        if self.template is not None:
            if not messages or messages[-1].get("role") != "user" or not isinstance(messages[-1]["content"], str):
                raise ValueError(
                    "`amateur_prompt_template` needs prompts whose last message is the user's and holds text. Remove "
                    "it, or convert the messages."
                )
            messages[-1] = {**messages[-1], "content": self._put(messages[-1]["content"])}
        return messages

    def _put(self, text: str) -> str:
        """The question of a text, in the amateur's template."""
        assert self.template is not None
        question = text if self.prompt_format is None else self.prompt_format.find_question(text)
        return self.template.replace("{question}", question)

    def encode(self, rows: list[dict[str, Any]], first_row: int = 0, date: datetime | None = None) -> list[list[int]]:
        """
        Token ids of the amateur's prompts of some rows, in the chat template of `tokenizer`.

        Raises:
            `ValueError`: If a prompt cannot be made, or the template refuses it. The message names the row.
        """
        prompts = []
        for number, row in enumerate(rows, first_row):
            try:
                prompts.append({**row, "prompt": self.make(row["prompt"])})
            except ValueError as error:
                raise ValueError(f"Row {number}: {error}") from None
            prompts[-1].pop("completion", None)
        try:
            return encode_rows(prompts, self.tokenizer, set(), first_row, date)["prompt_ids"]
        except ValueError as error:
            raise ValueError(f"The amateur cannot read the prompts. {error}") from None
