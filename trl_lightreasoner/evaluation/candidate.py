"""`Candidate`: a model that answers benchmarks, from its prompts to the files with its answers."""

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate.logging import get_logger
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, Value
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..contrast import NonFiniteLogitsError
from ..generation.batches import run_in_batches, share_batches
from ..generation.completions import GreedyDecoder
from ..generation.greedy import find_eos_ids
from ..generation.vllm import check_vllm, connect_vllm
from ..models.forward import context_length, evaluating
from ..models.loading import init_kwargs, load_config, load_model, load_tokenizer
from ..models.weights import describe_loading, describe_model, weight_fingerprint
from ..processes import Processes
from ..steps.prompt_format import PromptFormat
from ..steps.prompt_sources import beside_messages
from ..steps.prompts import encode_rows
from ..steps.run_file import run_date
from ..steps.switches import without_nulls
from ..steps.writer import StepWriter, describe_rows, hash_ids
from ..text import shown_value
from ..vocabulary import check_embedded, model_vocabulary
from .answering import Answering, plan_answers
from .evaluation_config import EvaluationConfig
from .sets import HELD_OUT, title_of


if TYPE_CHECKING:  # slow to import, and not needed without an adapter
    from peft import PeftModel


logger = get_logger(__name__)

# What the answers depend on besides weights and problems
ANSWER_SETTINGS = (
    *("prompt_style", "prompt_template", "system_prompt", "chat_template_kwargs"),
    *("max_new_tokens", "use_vllm"),
)
_ANSWER_FEATURES = {"num_tokens": Value("int32"), "ended": Value("bool")}
# A few long answers would occupy a GPU with room for hundreds, so those of several batches are continued together
_BATCHES_TOGETHER = 4


class AskedProblems(NamedTuple):
    """
    The problems of a benchmark, as a model reads them.

    Attributes:
        prompt_ids (`list[list[int]]`): Token ids of each prompt, empty for a problem without text.
        prompts (`list[str]`): Their texts.
        plan (`list[tuple[int, int]]`): `(row, room)` of those that are answered, as of [`plan_answers`].
        writer ([`StepWriter`]): The files with the answers.
    """

    prompt_ids: list[list[int]]
    prompts: list[str]
    plan: list[tuple[int, int]]
    writer: StepWriter


def check_messages(questions: list[Any], prompt_format: PromptFormat, title: str) -> None:
    """
    Refuse questions that are messages if the others are plain text, as which all would be graded. Warn of those that
    lack the system prompt: messages are asked as they are.

    Raises:
        `ValueError`: If there are messages and the style is `"raw"`.
    """
    messages = [question for question in questions if isinstance(question, list)]
    if messages and prompt_format.prompt_style == "raw":
        raise ValueError(
            f"The questions of {title} are messages, which need a chat template, but `prompt_style` is 'raw', so "
            "only their first answer would be graded. Give them as text, or set `prompt_style='chat'`."
        )
    system = {"role": "system", "content": prompt_format.system_prompt}
    lacking = sum(without_nulls(question[:1]) != [system] for question in messages) if system["content"] else 0
    if lacking:
        logger.warning(
            f"{lacking:,} of {len(questions):,} questions of {title} are messages without the system prompt "
            f"{system['content']!r}. They are asked as they are. Put it into them, or give them as text."
        )


class Candidate:
    """
    A model, its prompts and the files with its answers. Invalid input is refused before any weights are loaded.

    Args:
        role (`str`): `"model"` or `"baseline"`.
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Its tokenizer, if it is not in the model's
            folder.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*): Quantization configuration used when
            loading it.
        args ([`EvaluationConfig`]): Settings, with the prompt format filled in.
        problems (`dict[str, Dataset]`): By name, rows of `ROW_FEATURES`, whose `question` can be messages as well.
        processes ([`~trl_lightreasoner.processes.Processes`]): The processes that share the problems.
        other ([`Candidate`], *optional*): The one that it is compared with. A chat template that prints the date
            prints the same day for both, whenever their answers are started.
    """

    def __init__(
        self,
        role: str,
        model: "str | PreTrainedModel | PeftModel",
        tokenizer: PreTrainedTokenizerBase | None,
        quantization_config: BitsAndBytesConfig | None,
        args: EvaluationConfig,
        problems: dict[str, Dataset],
        processes: Processes,
        other: "Candidate | None" = None,
    ):
        self.role, self.args, self.processes = role, args, processes
        self.model: Any = model  # a name or a path until `answer` loads it
        self.answering: Any = None
        self.name = model if isinstance(model, str) else None
        prefix = "" if role == "model" else "baseline_"
        self.kwargs = init_kwargs(args, model, quantization_config, "evaluation", prefix)
        config = load_config(model, role, **self.kwargs).get_text_config()
        if args.use_vllm:
            check_vllm(args, model, processes.count, role, **self.kwargs)
        if tokenizer is None:
            tokenizer = load_tokenizer(model, role, f"{prefix}processing_class", **self.kwargs)
        if args.prompt_style == "chat" and tokenizer.chat_template is None:
            raise ValueError(
                f"The tokenizer of the {role} has no chat template. Set `prompt_style='raw'`, as for a base model, or "
                f"give a tokenizer with a chat template: saved with the {role}, or in Python as "
                f"`{prefix}processing_class`."
            )
        self.tokenizer = tokenizer
        self.vocabulary = model_vocabulary(tokenizer, config.vocab_size, role)
        self.eos_ids = find_eos_ids(model, tokenizer, **self.kwargs)
        context = context_length(config)
        self.asked: dict[str, AskedProblems] = {}  # by benchmark
        for name, dataset in problems.items():
            prompt_format = args.prompt_format()
            if other is None and name != HELD_OUT:  # those of `run`, in whose format it asks
                check_messages(dataset["question"], prompt_format, title_of(name))
            beside = beside_messages(dataset).to_list() or [{}] * len(dataset)
            rows = [
                {
                    "chat_template_kwargs": prompt_format.chat_template_kwargs,
                    **row,
                    "prompt": each if isinstance(each, list) else prompt_format.make_prompt(each),
                }
                for each, row in zip(dataset["question"], beside, strict=True)
            ]
            folder = str(Path(args.output_dir, role, name))
            others = None if other is None else other.asked[name]
            begun = None if others is None else others.writer.date
            date = processes.on_main(partial(run_date, folder, args.overwrite_output_dir, begun))
            ids = encode_rows(rows, tokenizer, set(self.eos_ids), date=date)["prompt_ids"]
            for row, prompt in enumerate(ids):
                check_embedded(prompt, tokenizer, config.vocab_size, row, role)
            plan = plan_answers(ids, args.max_new_tokens, context)
            if len(plan) < len(ids):
                logger.warning(
                    f"{len(ids) - len(plan):,} of {len(ids):,} prompts of {title_of(name)} leave no room in the "
                    f"{role}'s context of {context} tokens. They count as wrong."
                )
            prompts = tokenizer.batch_decode(ids)
            if others is not None and prompts != others.prompts:
                logger.warning(
                    f"The model and the baseline read other prompts ({title_of(name)}), because their chat templates "
                    "or tokenizers differ. The difference between their answers is also that between the prompts."
                )
            prompted = dataset.add_column("prompt", prompts)
            writer = StepWriter(folder, prompted, args.overwrite_output_dir, _ANSWER_FEATURES, date)
            self.asked[name] = AskedProblems(ids, prompts, plan, writer)

    def answer(self, loaded: "PreTrainedModel | PeftModel | None" = None) -> None:
        """Generate and save the missing answers, with a model that may be `loaded` already, and release it."""
        lengths = [len(each.prompt_ids[row]) + room for each in self.asked.values() for row, room in each.plan]
        vllm = None
        if self.args.use_vllm and lengths:
            vllm = connect_vllm(self.args, self.model, max(lengths), self.role, **self.kwargs)
        try:
            self.model = load_model(self.model if loaded is None else loaded, **self.kwargs)
            self.description = describe_model(self.model, self.name)
            self.weights = weight_fingerprint(self.model)
            self.loading = describe_loading(self.model, self.role, self.kwargs)
            decode = GreedyDecoder(self.model, self.vocabulary, self.eos_ids, vllm)
            self.answering = Answering(
                self.model,
                decode,
                self.tokenizer,
                self.eos_ids,
                is_raw=self.args.prompt_style == "raw",
                batch_size=self.args.per_device_batch_size,
                in_pieces=not self.args.use_vllm or self.args.prompt_style == "raw",
            )
            with evaluating(self.model):
                for name, asked in self.asked.items():
                    self._answer(name, asked)
        finally:
            if vllm is not None:
                vllm.close()
        self.model = self.answering = None  # the baseline may need its memory
        clear_device_cache(garbage_collection=True)

    def _answer(self, name: str, asked: AskedProblems) -> None:
        all_prompt_ids, _, plan, writer = asked
        rooms = dict(plan)

        def run(indices: list[int], _: int) -> tuple[list[list[int]], list[bool]]:
            prompt_ids = [all_prompt_ids[index] for index in indices]
            try:
                return self.answering.complete(prompt_ids, [rooms[index] for index in indices])
            except NonFiniteLogitsError as error:
                row = indices[error.row]
                question = shown_value(writer.input.with_format(None)[row]["question"])
                place = f"{error.place} to problem {row} of {title_of(name)}, {question},"
                raise NonFiniteLogitsError(self.role, row, place) from None

        def write(indices: list[int], result: tuple[list[list[int]], list[bool]]) -> str:
            completion_ids, ended = result
            num_tokens.extend(map(len, completion_ids))
            texts = self.answering.texts(completion_ids)
            columns = {"completion": texts, "num_tokens": num_tokens[-len(indices) :], "ended": ended}
            writer.write(indices, columns)
            return f"{sum(num_tokens) / len(num_tokens):.0f} tokens per answer"

        num_tokens: list[int] = []
        try:
            done = writer.open_on(self.processes, lambda: (self._identity(asked), {"model": self.description}))
            without_room = sorted(set(range(len(all_prompt_ids))) - {row for row, _ in plan} - done)
            if without_room and self.processes.is_main:
                write(without_room, ([[] for _ in without_room], [False] * len(without_room)))
                num_tokens.clear()  # they do not describe the model
            # Answers are made in pieces, so those of a batch need not have the same room
            order = [(row, self.args.max_new_tokens) for row in rooms if row not in done]
            if len(order) < len(plan):
                share = f"{len(plan) - len(order):,} of" if order else "all"
                logger.warning(
                    f"Resuming: the {self.role} has already answered {share} {len(plan):,} problems "
                    f"({title_of(name)}). These answers are reused."
                )
            batch_size = self.processes.on_main(lambda: self._find_batch_size(all_prompt_ids, order))
            run_in_batches(
                share_batches(order, batch_size, self.processes),
                batch_size,
                run,
                write,
                lambda index: len(all_prompt_ids[index]),
                self.processes,
                desc=f"{title_of(name)}, {self.role}, {self.answering.decode.way}",
            )
            self.processes.on_main(lambda: writer.finish(set(range(len(all_prompt_ids)))))
        finally:
            writer.close()

    def _find_batch_size(self, prompt_ids: list[list[int]], order: list[tuple[int, int]]) -> int:
        if not order:
            return 1
        row, room = order[0]  # the longest
        count = self.processes.count
        size = self.answering.rows_together(len(prompt_ids[row]), room, len(order), count)
        if self.args.per_device_batch_size is not None or self.args.use_vllm:
            return size
        return min(_BATCHES_TOGETHER * size, math.ceil(len(order) / count))

    def describe_form(self) -> dict[str, Any]:
        """The tokens that end an answer, and the chat template of the prompts, if any."""
        is_raw = self.args.prompt_style == "raw"
        return {
            "eos_tokens": self.tokenizer.convert_ids_to_tokens(self.eos_ids),
            "chat_template": None if is_raw else self.tokenizer.get_chat_template(),
        }

    def _identity(self, asked: AskedProblems) -> dict[str, Any]:
        """Everything that the answers depend on, by the user's names."""
        return {
            **{setting: getattr(self.args, setting) for setting in ANSWER_SETTINGS},
            f"{self.role} dtype": self.description["dtype"],
            f"{self.role} weights": self.weights,
            **self.loading,
            "EOS tokens": self.eos_ids,
            "number of problems": len(asked.prompt_ids),
            "prompts (tokens)": hash_ids(asked.prompt_ids),
            **describe_rows(asked.writer.input),
        }
