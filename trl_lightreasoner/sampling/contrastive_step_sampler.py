"""`ContrastiveStepSampler`: from prompts, an expert and an amateur to a Dataset of kept steps."""

import copy
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..config_checks import check_args, check_whole_number
from ..contrast import NonFiniteLogitsError
from ..generation.batches import find_batch_size, run_in_batches, share_batches
from ..generation.completions import GreedyDecoder
from ..generation.greedy import find_eos_ids
from ..generation.vllm import check_vllm, connect_vllm
from ..models.equal_tokenizers import have_equal_tokenizers
from ..models.forward import check_causal, context_length
from ..models.loading import init_kwargs, load_config, load_tokenizer
from ..models.weights import short_name, weight_fingerprint
from ..processes import Processes
from ..steps.dataset import kl_quantiles
from ..steps.messages import say_unread
from ..steps.prompt_format import PromptFormat, agree_on_switches, format_of_prompts, has_messages
from ..steps.prompt_sources import read_prompts, source_of
from ..steps.prompts import check_prompts
from ..steps.run_file import run_date
from ..steps.switches import list_switches, put_switches
from ..steps.writer import StepWriter, describe_rows
from ..vocabulary import OtherTokensError, check_embedded, model_vocabulary, shared_vocabulary
from .amateur_prompts import AmateurPrompts
from .contrastive_sampling_config import ContrastiveSamplingConfig
from .encoding import encode_dataset
from .family_amateur import FamilyAmateur
from .metadata import identify_model, identify_tokens, make_metadata
from .model_pair import AMATEUR_SETTINGS, SAME_READING, ModelPair, check_own_amateur, name_skipped_layers
from .other_amateur import OtherAmateur
from .pair_check import PairCheck, check_steps
from .pair_verdict import JUDGED_AT
from .planning import plan_prompts
from .scoring import Trajectory, TrajectoryScores


if TYPE_CHECKING:  # slow to import, and a run without an adapter does without
    from peft import PeftModel


logger = get_logger(__name__)

_NUM_ANSWERS = 3
_EQUAL_WEIGHTS = (
    "Expert and amateur have equal weights, so they never diverge and there is nothing to learn. Choose a weaker "
    "model as the amateur."
)
_LABEL_SETTINGS = ("alpha", "beta", "contrast_strength", "expert_anchor", "include_first_step")
_SETTINGS = (*_LABEL_SETTINGS, *AMATEUR_SETTINGS, "label_expert", "max_new_tokens", "max_prompt_length", "use_vllm")


class ContrastiveStepSampler:
    """
    Finds the steps at which an expert knows what an amateur does not (LightReasoner, arXiv 2510.07962, section 3).

    For every prompt the expert decodes greedily. The amateur then reads prompt and completion once. The expert reads
    them again only if its distributions were not kept from the decoding. Steps whose distributions diverge by at least
    `args.beta` are kept, each with its contrastive label.

    Args:
        expert (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The stronger model, to be fine-tuned afterwards: a model id on the Hub, a path, or a model. PEFT adapters
            are loaded on their base model.
        amateur (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The weaker model. If its tokenizer differs from the expert's, its probabilities are converted to the
            expert's tokens by a covering over bytes. If `None`, the amateur is the expert without a tenth of
            its layers, or as `args.amateur_num_skipped_layers`, `args.amateur_skipped_layers`,
            `args.amateur_system_prompt` and `args.amateur_prompt_template` say. A base model and its adapter, in
            either order, are loaded as one model.
        args ([`ContrastiveSamplingConfig`], *optional*):
            Settings. If `None`, a default configuration is used, and the Dataset is saved in a folder named after the
            expert, such as `Qwen2.5-Math-1.5B-LightReasoner-steps`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The expert's tokenizer, which also applies the chat template. If `None`, it is loaded from the expert's
            folder or repository.
        amateur_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The amateur's tokenizer. If `None`, it is loaded from the amateur's folder or repository.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization configuration used when loading the expert from a string.
        amateur_quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            The same for the amateur.

    Raises:
        `ValueError`: If the amateur is the expert itself but gets settings of another model, the bytes of two
            different tokenizers' tokens cannot be determined, or a model has no next-token distribution.
        `ImportError`: If loading in 4 or 8 bits needs bitsandbytes, or generating with vLLM needs vLLM, and it is not
            installed.

    Example:

    ```python
    >>> from datasets import Dataset, IterableDataset
    >>> from trl_lightreasoner import ContrastiveSamplingConfig, ContrastiveStepSampler

    >>> sampler = ContrastiveStepSampler(
    ...     expert="Qwen/Qwen2.5-Math-1.5B",
    ...     amateur="Qwen/Qwen2.5-0.5B",
    ...     args=ContrastiveSamplingConfig(output_dir="steps"),
    ... )
    >>> dataset = sampler.sample(Dataset.from_dict({"prompt": ["What is 17 * 3?"]}))
    ```
    """

    def __init__(
        self,
        expert: "str | PreTrainedModel | PeftModel",
        amateur: "str | PreTrainedModel | PeftModel | None",
        args: ContrastiveSamplingConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        amateur_processing_class: PreTrainedTokenizerBase | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        amateur_quantization_config: BitsAndBytesConfig | None = None,
    ):
        if args is None:
            args = ContrastiveSamplingConfig(f"{short_name(expert)}-LightReasoner-steps")
        check_args(args, ContrastiveSamplingConfig)
        self.processes = Processes()
        named_amateur = expert if amateur is None else amateur
        expert_kwargs = amateur_kwargs = init_kwargs(args, expert, quantization_config, "sampler")
        if amateur is not None:
            amateur_kwargs = init_kwargs(args, amateur, amateur_quantization_config, "sampler", "amateur_")
        self._expert_kwargs, self._amateur_kwargs = expert_kwargs, amateur_kwargs
        self._names: list[Any] = [model if isinstance(model, str) else None for model in (expert, named_amateur)]
        self._checks_in: Path | None = None  # the folder that `check` lends
        self._prompt_format: PromptFormat | None = None
        self._decode: GreedyDecoder | None = None  # of a run that scores given completions

        # Weights are loaded by `sample`, when nothing is left that could be refused before
        expert_config = load_config(expert, "expert", **expert_kwargs)
        amateur_config = load_config(named_amateur, "amateur", **amateur_kwargs)
        self.args = args = name_skipped_layers(args, amateur_config, is_own=amateur is None)
        if amateur is None:
            check_own_amateur(args, amateur_processing_class, amateur_quantization_config)
        self._pair = ModelPair(
            expert, amateur, expert_kwargs, amateur_kwargs, args.amateur_skipped_layers or (), args.label_expert
        )
        if args.use_vllm:
            check_vllm(args, expert, self.processes.count, **expert_kwargs)
        share = amateur is None
        if processing_class is None:
            if type(expert_config) is type(amateur_config) and amateur_processing_class is None:
                share = share or have_equal_tokenizers((expert, expert_kwargs), (amateur, amateur_kwargs))
            processing_class = load_tokenizer(expert, "expert", **expert_kwargs)
        if share:
            amateur_processing_class = processing_class
        elif amateur_processing_class is None:
            amateur_processing_class = load_tokenizer(amateur, "amateur", "amateur_processing_class", **amateur_kwargs)
        self.processing_class, self.amateur_processing_class = processing_class, amateur_processing_class
        configs = (expert_config.get_text_config(), amateur_config.get_text_config())
        widths = (configs[0].vocab_size, configs[1].vocab_size)
        contexts = [context_length(config) for config in configs]
        self._expert_width = widths[0]
        self.amateur_side: FamilyAmateur | OtherAmateur
        try:
            self.shared_vocabulary = shared_vocabulary(processing_class, amateur_processing_class, *widths)
        except OtherTokensError:
            self.expert_vocabulary = self.shared_vocabulary = model_vocabulary(processing_class, widths[0], "expert")
            end_ids = find_eos_ids(named_amateur, amateur_processing_class, **amateur_kwargs)
            self.amateur_side = OtherAmateur(
                processing_class,
                amateur_processing_class,
                self.expert_vocabulary,
                widths,
                end_ids,
                args.amateur_chat_template,
                contexts,
            )
            self.max_length = contexts[0]
            logger.warning(self.amateur_side.reading)
            return
        if args.amateur_chat_template is not None:
            logger.warning(
                "`amateur_chat_template` has no effect: the two models have the same tokens, so the amateur reads the "
                "expert's prompts."
            )
        self.expert_vocabulary = self.shared_vocabulary  # the usual case
        if len(self.shared_vocabulary) != len(processing_class):
            self.expert_vocabulary = model_vocabulary(processing_class, widths[0], "expert")
        family = FamilyAmateur(processing_class, self.shared_vocabulary, self.expert_vocabulary, widths, contexts)
        self.amateur_side, self.max_length = family, family.max_length

    @property
    def expert(self) -> Any:
        """The expert: the model, or its id or path until [`~ContrastiveStepSampler.sample`] loads it."""
        return self._pair.expert

    @property
    def amateur(self) -> Any:
        """The amateur, likewise. An amateur that is the expert itself is `None` until then."""
        return self._pair.amateur

    def sample(self, dataset: Dataset | IterableDataset | list, prompt_format: PromptFormat | None = None) -> Dataset:
        """
        Sample and score every prompt of a dataset. Under `accelerate launch` or `torchrun` the processes share the
        prompts, and each returns the complete Dataset.

        Args:
            dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `list`):
                Prompts, in one of these forms. A stream needs `args.num_prompts`. Columns other than those named here
                are copied as stored. A transform (`dataset.with_transform`) is applied before tokenizing, and must
                keep the columns `prompt`, `completion` and `chat_template_kwargs`.

                - A prompt-only dataset, standard (`"prompt": text`) or conversational (`"prompt": [messages]`).
                - A prompt-completion dataset, whose completions are scored instead of generated.
                - A dataset without these columns and with `messages`. An answer at the end of a conversation is left
                  out, with a warning.
                - A list of texts, or of conversations.
            prompt_format ([`PromptFormat`], *optional*):
                How the prompts were made from questions. It is stored with the Dataset and with models trained on it.
                If `None`, it is inferred from messages: the system message that all of them begin with. Its
                `chat_template_kwargs` apply to every row, as a column of that name would.

        Returns:
            [`~datasets.Dataset`] with one row per trajectory, in the order of the prompts, memory-mapped from the
            Parquet files in `args.output_dir`. For the columns see `trl_lightreasoner.steps.dataset`.

        Raises:
            `ValueError`: If the dataset is malformed or every prompt is skipped.
        """
        dataset = read_prompts(dataset, self.args.num_prompts, self.processes)
        check_prompts(dataset, self.processing_class)
        self.amateur_side.check_prompts(dataset)
        self._prompt_format = prompt_format or format_of_prompts(dataset)
        if self._prompt_format is not None:
            dataset, self._prompt_format = agree_on_switches(dataset, self._prompt_format)
        names = {name for switches in list_switches(dataset) for name in switches}
        if has_messages(dataset) and (said := say_unread(self.processing_class, names)):
            logger.warning_once(said)
        folder, overwrite = self.args.output_dir, self.args.overwrite_output_dir
        date = self.processes.on_main(lambda: run_date(folder, overwrite))
        writer = StepWriter(folder, dataset, overwrite, date=date)
        self.eos_ids = find_eos_ids(self.expert, self.processing_class, **self._expert_kwargs)

        scoring_only = "completion" in dataset.column_names
        if scoring_only and self.args.use_vllm:
            raise ValueError(
                "The dataset has a column 'completion', so there is nothing for vLLM to generate. Remove `use_vllm`, "
                "or remove the column."
            )
        encoded = encode_dataset(dataset, self.processing_class, self.eos_ids, date, self._amateur_prompts())
        self._reads_otherwise = bool(self.args.amateur_skipped_layers)
        if "amateur_prompt_ids" in encoded.column_names:
            self._reads_otherwise |= encoded["amateur_prompt_ids"][:] != encoded["prompt_ids"][:]
        if self._pair.is_one_model and not self._reads_otherwise:
            raise ValueError(SAME_READING)
        context = self.amateur_side.context
        plan = plan_prompts(encoded, scoring_only, self.args, self.max_length, self._amateur_room, context)
        self._sampled_rows = sorted(index for index, _ in plan)
        self._vllm = None
        if self.args.use_vllm:
            longest, room = plan[0]
            max_length = len(encoded[longest]["prompt_ids"]) + room
            self._vllm = connect_vllm(self.args, self._names[0], max_length, **self._expert_kwargs)
        with self._pair.loaded():
            sampled = self._sample_plan(dataset, encoded, plan, writer)
        low, high, tenth = kl_quantiles(sampled, [0.5, 0.99, 0.9])
        if low is None:
            raise ValueError(
                "The amateur could not read any step: the expert's answers change when its own tokenizer encodes "
                "their text, or the amateur's tokenizer cannot reproduce that text. Choose another amateur."
            )
        if self._checks_in is None and not any(sampled["step_positions"]):
            logger.warning(
                f"No step reached beta = {self.args.beta}: half of the divergences are at most {low:.3g} and 99 % at "
                f"most {high:.3g} nats. beta = {tenth:.3g} would keep 10 %. If that is near 0, the amateur is too "
                "close to the expert: choose a weaker one."
            )
        return sampled

    def _sample_plan(
        self, dataset: Dataset, encoded: Dataset, plan: list[tuple[int, int]], writer: StepWriter
    ) -> Dataset:
        """[`~ContrastiveStepSampler.sample`] with the models in memory."""
        if self._checks_in is not None and not self._reads_otherwise:
            if weight_fingerprint(self.expert) == weight_fingerprint(self.amateur):
                raise ValueError(_EQUAL_WEIGHTS)
        longest = encoded[plan[0][0]]
        completion_ids = longest.get("completion_ids", [])[:-1]
        check_causal(self.expert, "expert", [*longest["prompt_ids"], *completion_ids])
        with self._pair.as_amateur():
            own = longest.get("amateur_prompt_ids")
            check_causal(self.amateur, "amateur", own or [*longest["prompt_ids"], *completion_ids])
        self._decode = None
        if "completion" not in dataset.column_names:
            # Behind a token that the amateur cannot read, it has nothing to say
            end_ids = [*self.eos_ids, *self.amateur_side.unreadable_ids]
            self._decode = GreedyDecoder(self.expert, self.expert_vocabulary, end_ids, self._vllm)
        self.batch_size = self.processes.on_main(lambda: self._find_batch_size(encoded, plan))
        try:

            def describe() -> tuple[dict[str, Any], dict[str, Any]]:
                identity = {**self._identity(encoded), **describe_rows(dataset)}
                return identity, self._metadata(dataset, writer, identity)

            done = writer.open_on(self.processes, describe)
            order = [item for item in plan if item[0] not in done]
            if len(order) < len(plan):
                share = f"{len(plan) - len(order):,} of" if order else "all"
                logger.warning(f"Resuming: {share} {len(plan):,} prompts are already sampled. Their steps are reused.")
            self._sample(encoded, share_batches(order, self.batch_size, self.processes), writer)
            self.processes.on_main(lambda: writer.finish({index for index, _ in plan}))
            return writer.load(None if self._checks_in is None else str(self._checks_in / "cache"))
        finally:
            writer.close()
            if self._vllm is not None:
                self._vllm.close()

    def check(
        self,
        dataset: Dataset | IterableDataset | list,
        num_prompts: int = 50,
        prompt_format: PromptFormat | None = None,
    ) -> PairCheck:
        """
        Sample some prompts and judge whether the pair is worth training. Nothing is saved, and `args.output_dir` is
        not used. Under several processes, which must be on one machine, each returns the same result.

        Args:
            dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `list`):
                Prompts as for [`~ContrastiveStepSampler.sample`].
            num_prompts (`int`, *optional*, defaults to `50`):
                Number of prompts to check, from the start of the dataset.
            prompt_format ([`PromptFormat`], *optional*):
                As for [`~ContrastiveStepSampler.sample`].

        Returns:
            [`PairCheck`], with three greedy answers of each model.

        Raises:
            `ValueError`: If the models have equal weights, or the dataset is malformed.

        Example:

        ```python
        >>> check = sampler.check(dataset)  # doctest: +SKIP
        >>> print(check)  # doctest: +SKIP
        ```
        """
        check_whole_number("num_prompts", num_prompts)
        same_kwargs = self._expert_kwargs == self._amateur_kwargs
        reads_alike = all(getattr(self.args, name) is None for name in AMATEUR_SETTINGS)
        if isinstance(self.expert, str) and self.expert == self.amateur and same_kwargs and reads_alike:
            raise ValueError(_EQUAL_WEIGHTS)  # without loading them
        checked = read_prompts(dataset, num_prompts, self.processes)
        if prompt_format is not None:
            checked = put_switches(checked, prompt_format.chat_template_kwargs)
        folder = Path(self.processes.on_main(tempfile.mkdtemp))
        try:
            sampler = copy.copy(self)
            sampler._checks_in = folder
            # With the labels of all steps that are judged, whatever `beta` is
            beta = min(self.args.beta, JUDGED_AT)
            sampler.args = replace(self.args, output_dir=str(folder / "steps"), num_prompts=None, beta=beta)
            sampled = sampler.sample(checked, prompt_format)

            def judge() -> PairCheck:
                check = check_steps(sampled, self.processing_class, self.args.beta)
                firsts = sampled[:_NUM_ANSWERS]
                check.expert_answers = self._as_texts(firsts["completion_ids"])
                rows = [checked[index] for index in sampler._sampled_rows[:_NUM_ANSWERS]]
                check.amateur_answers = sampler._amateur_answers(rows, firsts["prompt_ids"])
                return check

            return self.processes.on_main(judge)
        finally:
            if self.processes.is_main:
                shutil.rmtree(folder, ignore_errors=True)

    def _amateur_answers(self, rows: list[dict[str, Any]], prompt_ids: list[list[int]]) -> list[str]:
        side = self.amateur_side
        if (own := self._amateur_prompts()) is not None:
            prompt_ids = own.encode(rows, date=run_date(self.args.output_dir))
        room = self.args.max_new_tokens
        if side.max_length is not None:
            room = min(room, side.max_length - max(map(len, prompt_ids)))
        with self._pair.loaded(), self._pair.as_amateur():
            decode = GreedyDecoder(self.amateur, side.vocabulary, find_eos_ids(self.amateur, side.tokenizer))
            return side.tokenizer.batch_decode(decode(prompt_ids, room)[0], skip_special_tokens=True)

    def _as_texts(self, completion_ids: list[list[int]]) -> list[str]:
        return self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)

    def _find_batch_size(self, encoded: Dataset, order: list[tuple[int, int]]) -> int:
        if self.args.per_device_batch_size is not None or not order:
            return self.args.per_device_batch_size or 1
        longest = None
        if self._decode is not None:
            index, room = order[0]  # the longest
            longest = len(encoded[index]["prompt_ids"]) + room
        return find_batch_size(self.expert, longest, len(order), self.processes.count)

    def _sample(self, encoded: Dataset, order: list[tuple[int, int]], writer: StepWriter) -> None:
        num_steps = num_kept = 0

        def run(indices: list[int], room: int) -> tuple[list[Trajectory], list[TrajectoryScores]]:
            return self._run(indices, encoded[indices], room)

        def write(indices: list[int], result: tuple[list[Trajectory], list[TrajectoryScores]]) -> str:
            nonlocal num_steps, num_kept
            trajectories, scores = result
            writer.write(indices, self._columns(trajectories, scores))
            num_steps += sum(len(score.kl_divergence) for score in scores)
            num_kept += sum(len(score.step_positions) for score in scores)
            return f"{num_kept:,} of {num_steps:,} steps kept"

        def length(index: int) -> int:
            return len(encoded[index]["prompt_ids"])

        self.amateur_side.prepare(self.expert, self.amateur, self.eos_ids)
        desc = f"Sampling, {'given completions' if self._decode is None else self._decode.way}"
        run_in_batches(order, self.batch_size, run, write, length, self.processes, desc)
        if said := self.amateur_side.dropped(num_steps):
            logger.warning(said, main_process_only=False)  # each process says it for itself

    def _amateur_prompts(self) -> AmateurPrompts | None:
        """The maker of the amateur's prompts, if they differ from the expert's."""
        system_prompt, template = self.args.amateur_system_prompt, self.args.amateur_prompt_template
        is_family = isinstance(self.amateur_side, FamilyAmateur)
        if is_family and system_prompt is None and template is None:
            return None
        return AmateurPrompts(self.amateur_side.tokenizer, system_prompt, template, self._prompt_format)

    def _amateur_room(self, row: dict[str, Any], index: int) -> int | None:
        """
        Number of completion tokens that fit in the amateur's context, `None` for any. Refuses rows that a model cannot
        read.
        """
        ids = [*row["prompt_ids"], *(row.get("completion_ids") or [])]
        check_embedded(ids, self.processing_class, self._expert_width, index, "expert")
        return self.amateur_side.room(row, index)

    def _run(
        self, indices: list[int], rows: dict[str, list], room: int
    ) -> tuple[list[Trajectory], list[TrajectoryScores]]:
        hidden_states = None
        if self._decode is None:
            completions = rows["completion_ids"]
        else:
            try:
                completions, hidden_states = self._decode(rows["prompt_ids"], room)
            except NonFiniteLogitsError as error:
                row = indices[error.row]  # the first, longest one if `GreedyDecoder` found them beforehand
                raise NonFiniteLogitsError("expert", row, f"{error.place} to row {row}") from None
        trajectories = [Trajectory(*ids) for ids in zip(rows["prompt_ids"], completions, strict=True)]
        settings: dict[str, Any] = {
            **{name: getattr(self.args, name) for name in _LABEL_SETTINGS},
            "names": [f"row {index}" for index in indices],
            # What it answered from is known, and is not what another labels
            "expert_hidden_states": None if self.args.label_expert == "base" else hidden_states,
            "as_expert": self._pair.as_labeller,
            "as_amateur": self._pair.as_amateur,
        }
        prompts = rows.get("amateur_prompt_ids")
        return trajectories, self.amateur_side.score(self.expert, self.amateur, trajectories, prompts, **settings)

    def _columns(self, trajectories: list[Trajectory], scores: list[TrajectoryScores]) -> dict[str, list]:
        columns = {
            "prompt_ids": [trajectory.prompt_ids for trajectory in trajectories],
            "completion_ids": [trajectory.completion_ids for trajectory in trajectories],
            **{field: [getattr(score, field) for score in scores] for field in TrajectoryScores._fields},
        }
        if self._decode is not None:
            columns["completion"] = self._as_texts(columns["completion_ids"])
        return columns

    def _identity(self, encoded: Dataset) -> dict[str, Any]:
        """Everything that the rows depend on, by the user's names."""
        return {
            **{name: getattr(self.args, name) for name in _SETTINGS},
            **identify_model("expert", self.expert, self._expert_kwargs),
            **identify_model("amateur", self.amateur, self._amateur_kwargs),
            **self.amateur_side.identity(),
            **identify_tokens(self.shared_vocabulary, self.eos_ids, encoded),
        }

    def _metadata(self, dataset: Dataset, writer: StepWriter, identity: dict[str, Any]) -> dict[str, Any]:
        return make_metadata(
            {"expert": (self.expert, self._names[0]), "amateur": (self.amateur, self._names[1])},
            identity,
            {name: getattr(self.args, name) for name in _SETTINGS},
            self.batch_size,
            self.amateur_side.describe_tokens(),
            self.eos_ids,
            self._prompt_format,
            self.processing_class,
            None if self._vllm is None else self._vllm.version,
            source_of(dataset),
            writer.date,
        )
