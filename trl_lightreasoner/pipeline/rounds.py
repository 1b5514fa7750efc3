"""Several rounds of a run: the outcome of each, when to stop, and which one is kept.

The trajectories of a later round are those of the adapter of the round before, and its labels, by default, those of
the expert as it was at first. They amplify nothing that a round has taught, and show states that the trained model
comes into (DAgger, arXiv 1011.0686).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, concatenate_datasets, load_dataset

from ..evaluation.candidate import Candidate
from ..evaluation.evaluation import grade_candidates
from ..evaluation.evaluation_config import EvaluationConfig
from ..evaluation.sets import HELD_OUT
from ..evaluation.statistics import compare
from ..processes import Processes
from ..sampling.contrastive_step_sampler import ContrastiveStepSampler
from ..steps.prompt_format import PromptFormat
from ..steps.whole_files import write_json
from .folder import RoundFolder, RunFolder
from .run_config import RunConfig
from .stages import (
    Stages,
    answer_with_adapter,
    evaluation_config,
    make_sampler,
    sample_steps,
    train_adapter,
    training_config,
)


# If v_C prefers another token at fewer of the kept steps, there is nothing left to correct
_MIN_CORRECTIONS = 0.01
# The largest increase over the expert in the share of answers that are cut off
_MAX_CUT = 0.02
# Rows on which entropy and drift are measured
_NUM_MEASURED = 100
_WARNED = {
    "entropy": "the model has become more certain than its labels",
    "drift": "the model has moved further from the expert than its labels ask for",
}


class Round(NamedTuple):
    """
    Outcome of a round, as stored in round.json.

    Attributes:
        number (`int`): From 1.
        num_prompts, num_steps, num_kept (`int`): What was sampled.
        corrections (`float`): Fraction of the kept steps at which v_C prefers a token other than the sampled one.
        warned (`list[str]`): The warnings given: `"entropy"`, `"drift"`, both or neither.
        results (`dict[str, Any]`, *optional*): What results.json holds, if anything was answered.
        against_last (`dict[str, float]`, *optional*): Difference on the held-out questions from the previous round, or
            from the expert, in the form of [`PairedDifference`].
    """

    number: int
    num_prompts: int
    num_steps: int
    num_kept: int
    corrections: float
    warned: list[str]
    results: dict[str, Any] | None
    against_last: dict[str, float] | None


def split_prompts(prompts: Dataset, args: RunConfig) -> list[Dataset]:
    """The questions of each round. No question is in two rounds."""
    edges = [0, *(args.num_prompts + i * args.num_prompts_later for i in range(args.num_rounds))]
    ends = [min(edge, len(prompts)) for edge in edges]
    return [prompts.select(range(*pair)) for pair in zip(ends, ends[1:], strict=False)]


class Rounds:
    """
    State that the rounds of a run share. Each round continues from the adapter of the previous one.

    Args:
        args ([`RunConfig`]): Settings.
        folder ([`RunFolder`]): Where everything goes.
        stages ([`Stages`]): Prints the progress.
        sampler ([`ContrastiveStepSampler`]): Sampler of the first round.
        prompt_format ([`PromptFormat`]): The format of the prompts.
        problems (`dict[str, Dataset]`): What is answered.

    Attributes:
        expert, amateur: The models of the last round that was played. The expert has no adapter.
        tokenizer, amateur_tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Their tokenizers.
        sampled (`list[Dataset]`): The steps of every round so far.
    """

    def __init__(
        self,
        args: RunConfig,
        folder: RunFolder,
        stages: Stages,
        sampler: ContrastiveStepSampler,
        prompt_format: PromptFormat,
        problems: dict[str, Dataset],
    ):
        self.args, self.folder, self.stages = args, folder, stages
        self.prompt_format, self.problems = prompt_format, problems
        self.tokenizer, self.amateur_tokenizer = sampler.processing_class, sampler.amateur_processing_class
        self._sampler: ContrastiveStepSampler | None = sampler
        self._baseline: Candidate | None = None
        if problems:
            self._baseline = Candidate(
                "baseline",
                args.expert,
                self.tokenizer,
                None,
                self._eval_args(folder.evaluation),
                problems,
                Processes(),
            )
        self._asked = f"{sum(map(len, problems.values())):,} questions"
        self.sampled: list[Dataset] = []
        self.expert: Any = None
        self.amateur: Any = None

    def play(self, number: int, prompts: Dataset) -> Round:
        """Sample, train and answer. Work that is already saved is not repeated."""
        place, before = self.folder.round(number), self.folder.round(number - 1) if number > 1 else None
        suffix, what = ("", "") if before is None else (f"_{number}", f"Round {number}: ")
        with self.stages(f"sample{suffix}", f"{what}Expert and amateur read {len(prompts):,} questions"):
            steps, num_steps, num_kept = self._sample(place, before, prompts)
            self.sampled.append(steps)
        if self._baseline is not None and before is None:
            with self.stages("answer_before", f"The expert answers {self._asked}"):
                self._baseline.answer(self.expert)
        with self.stages(f"train{suffix}", f"{what}The expert learns: {num_kept:,} of {num_steps:,} steps are kept"):
            self._train(place, before)
        results = None
        if self._baseline is not None:
            with self.stages(f"answer_after{suffix}", f"{what}The trained expert answers {self._asked}"):
                results = self._answer(place)
        outcome = self._describe(number, num_steps, num_kept, results, place, before)
        write_json(place.outcome, outcome._asdict())
        return outcome

    def _eval_args(self, path: Path) -> EvaluationConfig:
        return evaluation_config(self.args, path, self.prompt_format)

    def _sample(self, place: RoundFolder, before: RoundFolder | None, prompts: Dataset) -> tuple[Dataset, int, int]:
        if before is not None:
            self.expert = self.amateur = None  # frees memory for the models loaded now
            clear_device_cache(garbage_collection=True)
            adapter = str(before.adapter)
            self._sampler = make_sampler(self.args, adapter, place.steps, label_expert=self.args.label_expert)
        assert self._sampler is not None
        sampled = sample_steps(self._sampler, prompts, self.prompt_format, place.adapter)
        self.expert, self.amateur = self._sampler.expert, self._sampler.amateur
        self._sampler = None  # frees its graphs and caches for training
        if before is not None:
            self.expert = self.expert.unload()
        clear_device_cache(garbage_collection=True)
        return sampled

    def _train(self, place: RoundFolder, before: RoundFolder | None) -> None:
        if place.is_trained:
            return
        steps = concatenate_datasets(self.sampled if self.args.keep_earlier_steps else self.sampled[-1:])
        train_adapter(
            self.expert,
            self.tokenizer,
            steps,
            training_config(self.args, place.adapter),
            self.args,
            measured=rows_to_measure(steps, self.args.beta) if self._is_one_of_several else None,
            earlier=None if before is None else before.adapter,
        )

    @property
    def _is_one_of_several(self) -> bool:
        return self.args.num_rounds > 1

    def _answer(self, place: RoundFolder) -> dict[str, Any]:
        args = self._eval_args(place.evaluation)
        # Its tokenizer was saved from this one, and a large one takes a second to load
        candidate = Candidate(
            "model", str(place.adapter), self.tokenizer, None, args, self.problems, Processes(), self._baseline
        )
        answer_with_adapter(candidate, self.expert, str(place.adapter))
        assert self._baseline is not None
        return grade_candidates([candidate, self._baseline], args)

    def _describe(
        self,
        number: int,
        num_steps: int,
        num_kept: int,
        results: dict[str, Any] | None,
        place: RoundFolder,
        before: RoundFolder | None,
    ) -> Round:
        steps = self.sampled[-1]
        others = sum(
            row["completion_ids"][t] != label_ids[0]
            for row in steps.select_columns(["completion_ids", "step_positions", "label_ids"])
            for t, label_ids in zip(row["step_positions"], row["label_ids"], strict=True)
        )
        warned = json.loads(place.warnings.read_text(encoding="utf-8"))["warned"] if self._is_one_of_several else []
        against_last = None
        if results is not None and HELD_OUT in results["benchmarks"]:
            last = place.evaluation / "baseline" if before is None else before.evaluation / "model"
            against_last = compare(*map(read_verdicts, (place.evaluation / "model", last)))._asdict()
        return Round(number, len(steps), num_steps, num_kept, others / num_kept, warned, results, against_last)


def rows_to_measure(steps: Dataset, beta: float | None) -> Dataset:
    """
    The last rows that training reads, on which the warnings of a round rest.

    Args:
        steps ([`~datasets.Dataset`]): Rows as [`ContrastiveStepSampler`] makes them.
        beta (`float`, *optional*): Threshold in nats of the training. It skips rows without a step that reaches it.
    """
    pairs = zip(steps["kl_divergence"], steps["step_positions"], strict=True)
    rows = [row for row, (nats, kept) in enumerate(pairs) if any(nats[t] >= (beta or 0.0) for t in kept)]
    return steps.select(rows[-_NUM_MEASURED:])


def read_verdicts(path: Path) -> list[bool]:
    """Which of the held-out questions were answered correctly."""
    file = str(path / f"{HELD_OUT}.parquet")
    return load_dataset("parquet", data_files=file, split="train")["correct"][:]


def why_stop(last: Round) -> str | None:
    """
    Why the run stops after this round, or `None` if it continues.

    Example:

    ```python
    >>> why_stop(Round(2, 1000, 90000, 8000, 0.002, [], None, None))
    'v_C prefers another token at 0.2% of the kept steps, which leaves little to learn'

    ```
    """
    if last.warned:
        return _WARNED[last.warned[0]]
    if last.against_last is not None and last.against_last["difference"] < 0:
        return "it answered fewer of the held-out questions correctly than the model before it"
    if last.results is not None:
        after, before = (_share_cut(last.results["benchmarks"], role) for role in ("model", "baseline"))
        if after > before + _MAX_CUT:
            return f"{after:.1%} of its answers were cut off, compared with {before:.1%} of the expert's"
    if last.corrections < _MIN_CORRECTIONS:
        return f"v_C prefers another token at {last.corrections:.1%} of the kept steps, which leaves little to learn"
    return None


def choose_round(rounds: list[Round]) -> Round:
    """The round with the most correct answers, the first of equals. Without answers, the last round."""
    if rounds[-1].results is None:
        return rounds[-1]
    return max(rounds, key=lambda each: (_accuracy(each), -each.number))


def _share_cut(benchmarks: dict[str, Any], role: str) -> float:
    num_cut = sum(scores[role]["num_cut"] for scores in benchmarks.values())
    return num_cut / sum(scores["num_problems"] for scores in benchmarks.values())


def _accuracy(outcome: Round) -> float:
    assert outcome.results is not None
    benchmarks = outcome.results["benchmarks"]
    if HELD_OUT in benchmarks:
        return benchmarks[HELD_OUT]["model"]["accuracy"]
    return sum(scores["model"]["accuracy"] for scores in benchmarks.values()) / len(benchmarks)
