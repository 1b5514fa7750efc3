"""An amateur whose tokenizer differs from the expert's: its prompts, and its part in the sampling."""

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..models.token_bytes import TokenBytes
from ..steps.prompt_format import has_messages
from ..text import read_text
from ..vocabulary import Vocabulary, check_embedded, model_vocabulary
from .covering import Covering
from .cross_scoring import MAX_WIDTH, TOP_TOKENS, CrossScoring
from .scoring import TrajectoryScores


# The contents of the messages, each followed by an empty line
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"


class OtherAmateur:
    """
    The sampler's work for an amateur with a different tokenizer, with the methods of [`FamilyAmateur`].

    Args:
        expert_tokenizer, tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the two models.
        expert_vocabulary ([`Vocabulary`]): The expert's tokens.
        widths (`tuple[int, int]`): Numbers of columns of the two models' logits.
        end_ids (`list[int]`): Tokens that end the amateur's answer.
        chat_template (`str`, *optional*): The user's template, to replace the amateur's own.
        contexts (`Sequence[int]`): Maximum number of tokens that each model reads, `None` for any.

    Raises:
        `ValueError`: If the bytes of a tokenizer's tokens cannot be determined.
    """

    def __init__(
        self,
        expert_tokenizer: PreTrainedTokenizerBase,
        tokenizer: PreTrainedTokenizerBase,
        expert_vocabulary: Vocabulary,
        widths: tuple[int, int],
        end_ids: list[int],
        chat_template: str | None,
        contexts: Sequence[int | None],
    ):
        self.tokenizer, self.max_length, self._width = tokenizer, contexts[1], widths[1]
        self.context = f"the expert's context is {contexts[0]} tokens, the amateur's {contexts[1]}"
        self._expert_vocabulary = expert_vocabulary
        if chat_template is not None:
            self.tokenizer = copy.deepcopy(tokenizer)
            self.tokenizer.chat_template = read_chat_template(chat_template)
        self.vocabulary = model_vocabulary(tokenizer, widths[1], "amateur")
        self.end_ids = [token_id for token_id in end_ids if token_id in self.vocabulary]
        expert, amateur = (
            TokenBytes(expert_tokenizer, widths[0], "expert"),
            TokenBytes(tokenizer, widths[1], "amateur"),
        )
        self.covering = Covering(expert, amateur, self.end_ids)
        self.num_shared = self.covering.num_shared()
        self.unreadable_ids: list[int] = []  # any text can be read
        self._scoring: CrossScoring | None = None

    @property
    def reading(self) -> str:
        """How the amateur is read, in a few sentences."""
        return (
            "The amateur has a different tokenizer. Its probabilities are converted to the expert's tokens by a "
            f"covering over bytes: {self.num_shared:,} of the expert's {len(self.covering.expert.ids):,} tokens are "
            f"also the amateur's. kl_divergence covers the expert's {TOP_TOKENS} most probable tokens and all others "
            "as one, which is a lower bound."
        )

    def identity(self) -> dict[str, Any]:
        """Everything but the prompts that the rows depend on."""
        content = repr((self.covering.amateur.bytes, self.end_ids))
        return {"amateur tokens": hashlib.sha256(content.encode()).hexdigest(), "amateur reading": self.reading}

    def describe_tokens(self) -> dict[str, Any]:
        """Facts about the tokens that the two models share, for the metadata."""
        reading = {"by": "covering", "description": self.reading}
        return {"shared_tokens": self.num_shared, "amateur_reading": reading}

    def check_prompts(self, dataset: Dataset) -> None:
        """
        Refuse messages that the amateur cannot read.

        Raises:
            `ValueError`: If it has no chat template.
        """
        if has_messages(dataset) and self.tokenizer.chat_template is None:
            raise ValueError(
                "The prompts are conversational, but the amateur's tokenizer has no chat template. Set "
                "`amateur_chat_template` to a template, a file that holds one, or 'plain' for the bare text of the "
                "messages. Or give the prompts as text."
            )

    def room(self, row: dict[str, Any], index: int) -> int | None:
        """
        0 if a prompt leaves no room for an answer in the amateur's context. Otherwise `None`, and steps beyond the
        context are dropped.

        Raises:
            `ValueError`: If the amateur has no embedding for one of its tokens. The message names the row.
        """
        prompt_ids = row["amateur_prompt_ids"]
        check_embedded(prompt_ids, self.tokenizer, self._width, index, "amateur")
        return None if self.max_length is None or len(prompt_ids) < self.max_length else 0

    def prepare(self, expert: torch.nn.Module, amateur: torch.nn.Module, eos_ids: list[int]) -> None:
        """Prepare the scoring once the models are loaded."""
        self._scoring = CrossScoring(self.covering, self._expert_vocabulary, self.vocabulary, eos_ids, self.max_length)

    def score(self, *args: Any, **kwargs: Any) -> list[TrajectoryScores]:
        """[`CrossScoring`]"""
        assert self._scoring is not None
        return self._scoring(*args, **kwargs)

    def dropped(self, num_steps: int) -> str:
        """The dropped steps, in a sentence, empty if there are none."""
        assert self._scoring is not None
        unread, wide = (self._scoring.dropped[name] for name in ("not readable", "not exact enough"))
        parts = [f"{unread:,} could not be read by the amateur"] if unread else []
        parts += [f"{wide:,} would be kept but are uncertain by more than {MAX_WIDTH:g} nats"] if wide else []
        return f"Of {num_steps:,} steps, {' and '.join(parts)}. These steps are dropped." if parts else ""


def read_chat_template(template: str) -> str:
    """
    Read a chat template, given as `"plain"`, as Jinja text, or as a file that holds it.

    Raises:
        `ValueError`: If it is none of these.
    """
    if template == "plain":
        return PLAIN_TEMPLATE
    if "{%" in template or "{{" in template:
        return template
    if not Path(template).is_file():
        raise ValueError(
            f"`amateur_chat_template` must be 'plain', a Jinja template, or a file that holds one, got {template!r}."
        )
    return read_text(template, "The chat template")
