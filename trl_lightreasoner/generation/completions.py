"""From prompts to greedy completions, by the fastest method that a model allows, for sampling and evaluation."""

import sys
from collections.abc import Callable

import torch
from accelerate.logging import get_logger
from accelerate.utils.memory import should_reduce_batch_size

from ..contrast import NonFiniteLogitsError
from ..models.forward import logits_of_row, rope_switch
from ..models.weights import get_base_model
from ..vocabulary import Vocabulary
from .cuda_graphs import Generated, complete_in_slots, generate_greedy_by_graph, why_no_graph
from .greedy import Alike, generate_by_passes, generate_greedy, is_broken, length_that_shows, rows_alike
from .vllm import VLLMGeneration


logger = get_logger(__name__)


class GreedyDecoder:
    """
    Greedy completions with vLLM if requested, else with CUDA graphs if the model allows them, else with `generate`.

    Args:
        model (`torch.nn.Module`): A causal language model.
        vocabulary ([`Vocabulary`]): The model's real tokens. No other token is ever chosen.
        eos_ids (`list[int]`): Tokens that end a completion. The one that ended it is kept, once.
        vllm ([`VLLMGeneration`], *optional*): vLLM, to generate instead of the model.
    """

    def __init__(
        self, model: torch.nn.Module, vocabulary: Vocabulary, eos_ids: list[int], vllm: VLLMGeneration | None = None
    ):
        self.model, self.vocabulary, self.eos_ids, self.vllm = model, vocabulary, eos_ids, vllm
        self.rope_switch = rope_switch(get_base_model(model).config)
        self.alike: Alike | None = None
        self._looked_at = 0  # tokens
        reason = why_no_graph(model)
        self.by_graph = reason is None
        if reason is not None and model.device.type == "cuda" and vllm is None:
            self._go_on_plainly(reason)

    def __call__(self, prompt_ids: list[list[int]], max_new_tokens: int) -> Generated:
        if self.vllm is not None:
            self._look_at_logits(prompt_ids[0])
            return Generated(self.vllm(self.model, prompt_ids, self.vocabulary, self.eos_ids, max_new_tokens), None)
        self._look_at_rows(max(prompt_ids, key=len), max_new_tokens)
        completions: list[list[int]] = [[] for _ in prompt_ids]
        going = set(range(len(prompt_ids)))
        while going:
            contexts = {row: prompt_ids[row] + completions[row] for row in going}
            kinds = {row: (len(completions[row]), *self._kind(row, contexts[row])) for row in going}
            kind = max(kinds.values())
            rows = [row for row in sorted(going) if kinds[row] == kind]
            room = min(self._room([contexts[row] for row in rows]), max_new_tokens - len(completions[rows[0]]))
            try:
                made = self._decode([contexts[row] for row in rows], room)
            except NonFiniteLogitsError as error:
                raise NonFiniteLogitsError(error.model, rows[error.row], error.place) from None
            if len(rows) == len(prompt_ids) and room == max_new_tokens:
                return made
            for row, ids in zip(rows, made.completions, strict=True):
                completions[row] += ids
                if ids[-1] in self.eos_ids or len(completions[row]) == max_new_tokens:
                    going.remove(row)
        return Generated(completions, None)

    def in_slots(
        self,
        prompt_ids: list[list[int]],
        rooms: list[int],
        num_slots: int,
        completions: list[list[int]],
        is_answered: Callable[[int, list[int]], bool] | None = None,
    ) -> bool:
        """
        Whether the model allows [`~trl_lightreasoner.generation.cuda_graphs.complete_in_slots`], which has then been
        called with these arguments.
        """
        self._look_at_rows(max(prompt_ids, key=len), max(rooms))
        if not self.has_slots:
            return False
        arguments = (self.model, prompt_ids, rooms, self.vocabulary, self.eos_ids, num_slots, completions, is_answered)
        try:
            complete_in_slots(*arguments)
        except RuntimeError as error:
            if should_reduce_batch_size(error):
                raise
            self._go_on_plainly(str(error).splitlines()[0])
            return False
        return True

    def _look_at_logits(self, prompt: list[int]) -> None:
        """Refuse a model that overflows. vLLM, which does not tell, would choose tokens all the same."""
        if not self._looked_at and is_broken(self.vocabulary.select(logits_of_row(self.model, prompt, 1))):
            raise NonFiniteLogitsError("model", 0, "the first token of an answer")
        self._looked_at = len(prompt)

    def _look_at_rows(self, longest: list[int], max_new_tokens: int) -> None:
        """Test which rows can be batched, on some tokens, and again when contexts exceed a window of attention."""
        length = length_that_shows(self.model, len(longest) + max_new_tokens)
        if length <= self._looked_at:
            return
        self._looked_at = length
        self.alike = rows_alike(self.model, (longest * length)[:length], self.vocabulary)
        if self.alike == "any":
            return
        self.by_graph = False
        name = f"`{type(get_base_model(self.model)).__name__}`"
        logger.warning(
            {
                "length": f"Padding changes the predictions of {name}. Only prompts of equal length are completed "
                "together, which is slower.",
                "row": f"The predictions of {name} depend on other rows of a batch. Prompts are completed one by one, "
                "which is slower.",
                None: f"`generate` does not reproduce the predictions of {name}. Every token is generated by a pass "
                "over the whole context, which is slower.",
            }[self.alike]
        )

    def _kind(self, row: int, context: list[int]) -> tuple[bool, int]:
        """The property that contexts of one batch must share."""
        beyond = self.rope_switch is not None and len(context) > self.rope_switch
        return beyond, {"length": len(context), "row": row}.get(self.alike or "", 0)

    def _room(self, contexts: list[list[int]]) -> int:
        """Number of tokens to generate before the rope changes for one of the contexts."""
        longest = max(map(len, contexts))
        if self.rope_switch is None or longest > self.rope_switch:
            return sys.maxsize
        return self.rope_switch - longest + 1

    def _decode(self, prompt_ids: list[list[int]], max_new_tokens: int) -> Generated:
        arguments = (self.model, prompt_ids, self.vocabulary, self.eos_ids, max_new_tokens)
        if self.alike is None:
            return Generated(generate_by_passes(*arguments), None)
        if self.by_graph:
            try:
                return generate_greedy_by_graph(*arguments)
            except RuntimeError as error:
                if should_reduce_batch_size(error):
                    raise
                self._go_on_plainly(str(error).splitlines()[0])
        return Generated(generate_greedy(*arguments), None)

    @property
    def has_slots(self) -> bool:
        """Whether [`in_slots`] can be tried. With a rope that changes with the length, rows must not mix."""
        return self.vllm is None and self.by_graph and self.rope_switch is None

    @property
    def way(self) -> str:
        """The generation method, for a progress bar."""
        return "by vLLM" if self.vllm is not None else "by CUDA graphs" if self.by_graph else "by generate"

    def _go_on_plainly(self, reason: str) -> None:
        self.by_graph = False
        logger.warning(f"Completions are generated without CUDA graphs, which is slower: {reason}.")
