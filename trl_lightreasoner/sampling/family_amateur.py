"""An amateur of the expert's family, which has the same tokens: what it can read, and its part in the sampling."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..vocabulary import Vocabulary, check_embedded
from .scoring import Trajectory, TrajectoryScores, prepare_scoring, score_trajectories


class FamilyAmateur:
    """
    The sampler's work for an amateur with the expert's tokens, with the methods of [`OtherAmateur`].

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The expert's.
        vocabulary ([`Vocabulary`]): The tokens that the two models share.
        expert_vocabulary ([`Vocabulary`]): The expert's.
        widths (`tuple[int, int]`): Numbers of columns of the two models' logits.
        contexts (`Sequence[int]`): Maximum number of tokens that each model reads, `None` for any.

    Attributes:
        max_length (`int`, *optional*): Maximum number of tokens that both read.
        unreadable_ids (`list[int]`): Tokens of the expert without an embedding in the amateur.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
        expert_vocabulary: Vocabulary,
        widths: tuple[int, int],
        contexts: Sequence[int | None],
    ):
        self.tokenizer, self.vocabulary, self._width = tokenizer, vocabulary, widths[0]
        self.max_length = min((context for context in contexts if context is not None), default=None)
        self.context = f"the models' context is {self.max_length} tokens"
        ids = expert_vocabulary.ids
        self.unreadable_ids: list[int] = ids[ids >= widths[1]].tolist()

    def identity(self) -> dict[str, Any]:
        """Nothing but what the sampler compares for every amateur."""
        return {}

    def describe_tokens(self) -> dict[str, Any]:
        """Facts about the tokens that the two models share, for the metadata."""
        return {"shared_tokens": len(self.vocabulary)}

    def check_prompts(self, dataset: Dataset) -> None:
        """Refuses nothing: the amateur's prompts are made with the expert's tokenizer."""

    def room(self, row: dict[str, Any], index: int) -> int | None:
        """
        Number of completion tokens that fit in the amateur's context, `None` for any.

        Raises:
            `ValueError`: If the amateur has no embedding for a token of the row. The message names the row.
        """
        prompt_ids = row["prompt_ids"]
        if "amateur_prompt_ids" in row:
            prompt_ids = row["amateur_prompt_ids"]
            check_embedded(prompt_ids, self.tokenizer, self._width, index, "amateur")
        completion_ids = row.get("completion_ids") or []
        ids = {*prompt_ids, *completion_ids[:-1]} if self.unreadable_ids else set()
        for token_id in ids & set(self.unreadable_ids):
            raise ValueError(
                f"Row {index} has the token {self.tokenizer.convert_ids_to_tokens(token_id)!r}, for which the amateur "
                f"has no embedding: its id is {token_id}. Choose another amateur, remove the token, or resize the "
                "amateur's embeddings and pass it as a model."
            )
        return None if self.max_length is None else self.max_length - len(prompt_ids)

    def prepare(self, expert: torch.nn.Module, amateur: torch.nn.Module, eos_ids: list[int]) -> None:
        """Prepare the scoring once the models are loaded."""
        prepare_scoring(expert, amateur, self.vocabulary)

    def score(
        self,
        expert: torch.nn.Module,
        amateur: torch.nn.Module,
        trajectories: list[Trajectory],
        prompts: list[list[int]] | None,
        **settings: Any,
    ) -> list[TrajectoryScores]:
        """[`score_trajectories`], with the amateur's `prompts` if they differ from the expert's."""
        models = (expert, amateur, trajectories)
        return score_trajectories(*models, self.vocabulary, amateur_prompts=prompts, **settings)

    def dropped(self, num_steps: int) -> str:
        """Nothing: every step is read."""
        return ""
