"""Accuracy during training: questions that the current model answers at every evaluation.

The loss keeps falling, while the accuracy rises and falls. The trained model itself generates the answers, with its
adapter and in the precision of training. Its weights, its random numbers and the graphs of its updates stay unchanged.
"""

import hashlib
from collections.abc import Callable
from datetime import datetime
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, concatenate_datasets
from transformers import PretrainedConfig, PreTrainedTokenizerBase, logging

from ..contrast import NonFiniteLogitsError
from ..evaluation.answering import Answering, grade_answers, plan_answers
from ..evaluation.sets import check_question, read_answers, read_gold
from ..evaluation.statistics import standard_error
from ..generation.batches import batches_that_fit
from ..generation.completions import GreedyDecoder
from ..generation.greedy import find_eos_ids
from ..models.forward import context_length, evaluating
from ..steps.prompt_format import PromptFormat, has_messages
from ..steps.prompt_sources import BESIDE_MESSAGES, beside_messages
from ..steps.prompts import encode_rows
from ..text import name_columns
from ..vocabulary import Vocabulary, check_embedded


logger = logging.get_logger(__name__)

# Columns that determine a row's prompt
_PROMPT_COLUMNS = ("prompt", *BESIDE_MESSAGES)


def as_questions(dataset: Dataset, make_prompt: Callable[[str], str | list[dict[str, str]]]) -> Dataset:
    """
    The `eval_questions` of a trainer, from rows with an `answer` and a `question`, or a `prompt` of messages or text.

    Args:
        dataset ([`~datasets.Dataset`]): The rows.
        make_prompt (`Callable`): From the text of a question to its prompt. Messages stay as they are.

    Raises:
        `ValueError`: If a column is missing, or a question is blank, or neither text nor messages.
    """
    column = "question" if "question" in dataset.column_names else "prompt"
    if column not in dataset.column_names or "answer" not in dataset.column_names:
        raise ValueError(
            "Questions need the columns `question` or `prompt`, and `answer`. The columns are "
            f"{', '.join(map(repr, dataset.column_names))}."
        )
    prompts = dataset[column][:]
    for number, prompt in enumerate(prompts):
        check_question(prompt, f"Row {number}", column)
    prompts = [make_prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    questions = Dataset.from_dict({"prompt": prompts, "answer": read_answers(dataset, "answer")})
    beside = beside_messages(dataset)
    return concatenate_datasets([questions, beside], axis=1) if beside.column_names else questions


class EvalQuestions:
    """
    Questions with reference answers, checked and encoded before any weights are loaded.

    Args:
        dataset ([`~datasets.Dataset`]): Rows with `prompt` and `answer`, in the form of [`LightReasonerTrainer`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's.
        config ([`~transformers.PretrainedConfig`]): The model's, which gives the length of its context.
        max_new_tokens (`int`): Longest answer.
        date ([`~datetime.datetime`], *optional*): Date for chat templates that print today's date.
        prompt_format ([`PromptFormat`], *optional*): The format of the training, whose switches of the chat template
            apply to rows without a column `chat_template_kwargs`.

    Raises:
        `ValueError`: If a column is missing or a row is invalid. The message names the row.
        `TypeError`: If it is not a [`~datasets.Dataset`].
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
        max_new_tokens: int,
        date: datetime | None = None,
        prompt_format: PromptFormat | None = None,
    ):
        if not isinstance(dataset, Dataset):
            raise TypeError(f"`eval_questions` must be a `datasets.Dataset`, got `{type(dataset).__name__}`.")
        if not {"prompt", "answer"} <= set(dataset.column_names):
            raise ValueError(
                "`eval_questions` must have the columns `prompt` and `answer`, got "
                f"{name_columns(dataset.column_names)}."
            )
        if len(dataset) == 0:
            raise ValueError("`eval_questions` holds no question.")
        self.is_raw = not has_messages(dataset)
        if not self.is_raw and tokenizer.chat_template is None:
            raise ValueError(
                "The prompts of `eval_questions` are messages, but the model's tokenizer has no chat template. Give "
                "them as text, in the prompt format of the dataset."
            )
        self.tokenizer = tokenizer
        self.references = read_gold(dataset, "answer", "`eval_questions`")
        columns = [name for name in _PROMPT_COLUMNS if name in dataset.column_names]
        try:
            switches: dict[str, Any] | None = {} if prompt_format is None else prompt_format.chat_template_kwargs
            if switches is None and not self.is_raw and "chat_template_kwargs" not in columns:
                logger.warning(
                    "The model is trained on rows that differ in 'chat_template_kwargs', but `eval_questions` are "
                    "asked without any. Give them a column 'chat_template_kwargs'."
                )
            rows = [{"chat_template_kwargs": switches, **row} for row in dataset.select_columns(columns).to_list()]
            self.prompt_ids = encode_rows(rows, tokenizer, set(), date=date)["prompt_ids"]
            for row, ids in enumerate(self.prompt_ids):
                check_embedded(ids, tokenizer, config.vocab_size, row, "model")
        except ValueError as error:
            raise ValueError(f"`eval_questions`: {error}") from None
        context = context_length(config)
        self.plan = plan_answers(self.prompt_ids, max_new_tokens, context)
        if len(self.plan) < len(self.prompt_ids):
            logger.warning(
                f"{len(self.prompt_ids) - len(self.plan):,} of {len(self.prompt_ids):,} prompts of `eval_questions` "
                f"are empty or leave no room in the model's context of {context} tokens. They count as wrong."
            )
        self._answering: Answering | None = None

    def checksum(self) -> str:
        """A checksum of the questions and their answers."""
        return hashlib.sha256(repr((self.prompt_ids, self.references)).encode()).hexdigest()

    def warn_of_trained(self, rows: Dataset) -> None:
        """Warn if some of the questions are prompts of the rows to train on."""
        trained = {tuple(ids) for ids in rows.with_format(None)["prompt_ids"]}
        if count := sum(tuple(ids) in trained for ids in self.prompt_ids):
            logger.warning(
                f"{count:,} of {len(self.prompt_ids):,} prompts of `eval_questions` are also trained on, so the "
                "accuracy can be higher than on new questions. Hold them out of the sampling, or ask others."
            )

    @torch.no_grad()
    def measure(self, model: torch.nn.Module, vocabulary: Vocabulary, accelerator: Accelerator) -> dict[str, float]:
        """
        Accuracy of the answers. Call it on all processes, which share the questions.

        Args:
            model (`torch.nn.Module`): The model, all of it on the device of the process.
            vocabulary ([`Vocabulary`]): Its real tokens.
            accelerator ([`~accelerate.Accelerator`]): Provides the processes and the precision.

        Returns:
            `dict[str, float]`: `accuracy` between 0 and 1, `accuracy_standard_error`, `accuracy_num_cut`, the number
            of answers that were cut off, and `accuracy_num_undecided`, the number that could not be graded. They are
            the same on all processes.
        """
        model = accelerator.unwrap_model(model, keep_torch_compile=False)
        if self._answering is None or self._answering.model is not model:
            eos_ids = find_eos_ids(model, self.tokenizer)
            decode = GreedyDecoder(model, vocabulary, eos_ids)
            self._answering = Answering(model, decode, self.tokenizer, eos_ids, self.is_raw)
        order = self.plan[accelerator.process_index :: accelerator.num_processes]
        answered: list[int] = []
        completions: list[list[int]] = []
        num_ended = 0
        # Memory cached by training is not available to a graph, nor the reverse
        clear_device_cache()
        with evaluating(model), accelerator.autocast():
            for rows, (ids, ended) in self._answer(order, self._answering):
                answered += rows
                completions += ids
                num_ended += sum(ended)
        clear_device_cache()
        references = [{"gold": self.references[row]} for row in answered]
        verdicts = grade_answers(self._answering.texts(completions), references, self.is_raw)
        counts = [
            sum(verdict.correct for verdict in verdicts),
            num_ended,
            sum(verdict.failure is not None for verdict in verdicts),
        ]
        sums = accelerator.reduce(torch.tensor(counts, dtype=torch.float, device=accelerator.device), "sum")
        num_correct, num_ended, num_undecided = sums.tolist()
        count = len(self.references)
        accuracy = num_correct / count
        return {
            "accuracy": accuracy,
            "accuracy_standard_error": standard_error(accuracy, count),
            "accuracy_num_cut": count - num_ended,
            "accuracy_num_undecided": num_undecided,
        }

    def _answer(self, order: list[tuple[int, int]], answering: Answering):
        rooms = dict(order)

        def run(rows: list[int], _: int) -> tuple[list[list[int]], list[bool]]:
            try:
                return answering.complete([self.prompt_ids[row] for row in rows], [rooms[row] for row in rows])
            except NonFiniteLogitsError as error:
                row = rows[error.row]
                place = f"{error.place} to row {row} of `eval_questions`"
                raise NonFiniteLogitsError(error.model, row, place) from None

        if not order:
            return iter(())
        remedy = "Lower `eval_max_new_tokens`, or remove long questions."
        # Each answer is followed by the next one, or made in pieces, so all are asked for at once
        together = [(row, max(rooms.values())) for row in rooms]
        return batches_that_fit(together, len(together), run, lambda row: len(self.prompt_ids[row]), remedy)
