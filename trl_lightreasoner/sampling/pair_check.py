"""Is a pair worth training? From a Dataset of kept steps to a few numbers, one verdict and its reasons."""

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..models.token_text import TokenTexts, label_of, spell_out
from ..steps.columns import Trajectories, check_sampled, count_changes, longest_completion, read_columns
from ..steps.dataset import check_dataset, name_samplings, parse_metadata
from ..steps.prompt_format import has_messages
from .pair_verdict import (
    JUDGED_AT,
    MAX_KEPT,
    MAX_KL_50,
    MAX_KL_90,
    MIN_CHANGED,
    MIN_KEPT,
    REPEATS_CHANGED,
    WIDE_KEPT,
    WIDE_KL_50,
    judge,
    percent,
    warn,
)


CAVEAT = (
    "An amateur that is more careful than the expert does harm, and no number detects it reliably. Read the "
    "corrections: they must lead to the behaviour that you want."
)
RESTS_ON = (
    "The verdict is based on three tiny pairs: with 50 prompts it was right on 20 of 21 amateurs of known gain, which "
    "also chose its limits. With a raw prompt it did not predict the gain of one real expert: a promising amateur, an "
    "unskilled one and a doubtful one all helped."
)
_NUM_CORRECTIONS = 10
_MAX_ANSWER = 400  # characters


class Correction(NamedTuple):
    """The token that the expert sampled, the one that v_C prefers, and the number of such steps."""

    taken: str
    preferred: str
    num_steps: int


@dataclass
class PairCheck:
    """
    The judgement of a pair from sampled steps. `str(check)` gives the text, `check.to_dict()` the numbers.

    Args:
        num_prompts (`int`):
            Number of checked prompts.
        num_steps (`int`):
            Number of steps in their completions.
        num_kept (`int`):
            Kept steps.
        beta (`float`, *optional*):
            Threshold in nats at or above which steps are kept. `None` if the Dataset does not record it.
        kl_50 (`float`):
            Median of the divergence over all steps, in nats.
        kl_90 (`float`):
            The 90th percentile.
        kl_99 (`float`):
            The 99th percentile.
        kept_share (`float`):
            Fraction of the steps that are kept.
        changed_share (`float`, *optional*):
            Fraction of the kept steps at which v_C prefers a token other than the one that the expert sampled. `None`
            without a kept step.
        first_step_share (`float`, *optional*):
            Fraction of the kept steps that are the first of their completion.
        cut_off_share (`float`, *optional*):
            Fraction of the completions that do not end in EOS. `None` if the Dataset does not name it.
        judged_kept_share (`float`):
            `kept_share` at 0.4 nats, the threshold at which the pairs of known gain were measured.
        judged_changed_share (`float`, *optional*):
            `changed_share` at 0.4 nats, or at the lowest threshold above it at which there are labels.
        corrections (`list[Correction]`):
            The most frequent pairs of a sampled token and a different one that v_C prefers, at these steps and the
            kept ones.
        expert_parameters (`int`, *optional*):
            Number of the expert's parameters.
        amateur_parameters (`int`, *optional*):
            Number of the amateur's parameters.
        is_of_expert (`bool`):
            Whether both are the same base model, with different adapters, layers or prompts.
        differ_by_adapter (`bool`):
            Whether they are the same base model and only one has an adapter, or each its own.
        samplings (`list[str]`):
            What the rows were sampled with, if they come from several pairs or settings. There is no parameter count
            then unless all have the same.
        verdict (`str`):
            `"promising"`, `"doubtful"`, `"too close"`, `"unskilled"`, `"incoherent"`, `"plain prompt"` or `"swapped"`.
        reasons (`list[str]`):
            The reasons, as sentences. The decisive one comes first.
        warnings (`list[str]`):
            Other problems to fix.
        expert_answers (`list[str]`):
            Greedy answers of the expert to the first prompts.
        amateur_answers (`list[str]`):
            The amateur's own answers to the same prompts.
    """

    num_prompts: int
    num_steps: int
    num_kept: int
    beta: float | None
    kl_50: float
    kl_90: float
    kl_99: float
    kept_share: float
    changed_share: float | None
    first_step_share: float | None
    cut_off_share: float | None
    judged_kept_share: float
    judged_changed_share: float | None
    corrections: list[Correction]
    expert_parameters: int | None = None
    amateur_parameters: int | None = None
    is_of_expert: bool = False
    differ_by_adapter: bool = False
    samplings: list[str] = field(default_factory=list)
    verdict: str = "doubtful"
    reasons: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    expert_answers: list[str] = field(default_factory=list)
    amateur_answers: list[str] = field(default_factory=list)

    @property
    def promising(self) -> bool:
        """Whether the verdict is `"promising"`."""
        return self.verdict == "promising"

    @property
    def headline(self) -> str:
        """The verdict as a sentence."""
        if self.verdict in ("promising", "doubtful"):
            return f"This pair is {self.verdict}."
        return f"This pair is not promising: {_KINDS[self.verdict]}."

    def summary(self) -> str:
        """The judgement in two lines."""
        second = self.reasons[0]
        if self.corrections:
            taken, preferred, count = self.corrections[0]
            second += (
                f" The most frequent correction: {taken} -> {preferred} ({count:,} time{'s' if count > 1 else ''})."
            )
        return f"{self.headline} {second}\n{' '.join([*self.warnings, CAVEAT])}"

    def report(self) -> str:
        """The full result, as text for a terminal."""
        kept = "steps kept" if self.beta is None else f"steps kept at beta = {self.beta:g}"
        changed = "of these, v_C prefers another token"
        rows = [
            ("", "this pair", "looks", "pairs that gained", "amateurs that did not"),
            ("KL in nats at 50 % of the steps", f"{self.kl_50:.3g}", _looks(self.kl_50, 0, MAX_KL_50, 0, WIDE_KL_50))
            + ("0.02 or less", "0.3 to 0.6, 5 and more"),
            ("KL in nats at 90 %", f"{self.kl_90:.3g}", _looks(self.kl_90, 0, MAX_KL_90))
            + ("0.2 to 0.9", "0 to 0.3, 1.3 and more"),
            ("KL in nats at 99 %", f"{self.kl_99:.3g}", "", "", ""),
        ]
        if self.beta != JUDGED_AT:  # with which the pairs of known gain were measured
            rows += [
                (kept, percent(self.kept_share), "", "", ""),
                (changed, percent(self.changed_share), "", "", ""),
            ]
            kept = f"steps of {JUDGED_AT:g} nats or more"
        rows += [
            (kept, percent(self.judged_kept_share))
            + (_looks(self.judged_kept_share, MIN_KEPT, MAX_KEPT, MIN_KEPT, WIDE_KEPT),)
            + ("8 to 17 %", "0 to 9 %, 46 % and more"),
            (changed, percent(self.judged_changed_share))
            + (_looks(self.judged_changed_share, MIN_CHANGED, 1, REPEATS_CHANGED),)
            + ("20 to 43 %", "0 to 6 %"),
            ("kept steps that are first steps", percent(self.first_step_share), "", "", ""),
            ("answers cut off at max_new_tokens", percent(self.cut_off_share), "", "", ""),
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{self.num_prompts:,} prompts, {self.num_steps:,} steps, {self.num_kept:,} of them kept",
            "",
            *("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows),
        ]
        if self.corrections:
            lines += ["", "Corrections: sampled by the expert -> preferred by v_C"]
            lines += [f"{count:>6,}  {taken} -> {preferred}" for taken, preferred, count in self.corrections]
        for i, (expert, amateur) in enumerate(zip(self.expert_answers, self.amateur_answers, strict=True), 1):
            lines += ["", f"Prompt {i}", f"  expert   {_one_line(expert)}", f"  amateur  {_one_line(amateur)}"]
        lines += ["", self.headline, *(f"- {reason}" for reason in self.reasons)]
        lines += [f"Warning: {warning}" for warning in self.warnings]
        return "\n".join([*lines, CAVEAT, RESTS_ON])

    __str__ = report

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON-serializable values."""
        corrections = [correction._asdict() for correction in self.corrections]
        said = {"caveat": CAVEAT, "rests_on": RESTS_ON}
        return {"promising": self.promising, **asdict(self), "corrections": corrections, **said}


_KINDS = {
    "too close": "the amateur is too close to the expert",
    "unskilled": "the amateur is merely unskilled",
    "incoherent": "the amateur is incoherent",
    "plain prompt": "the prompts lack the chat template",
    "swapped": "expert and amateur seem to be swapped",
}


def check_steps(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None = None, beta: float | None = None
) -> PairCheck:
    """
    Judge a pair by steps that are already sampled.

    Args:
        dataset ([`~datasets.Dataset`]): Rows from [`ContrastiveStepSampler`], with one or several steps each. A
            trajectory whose steps are in several rows counts once, and each of its labels counts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): The expert's, for the text of tokens.
            Without it, token ids are shown.
        beta (`float`, *optional*): Count steps of at least this many nats as kept. If `None`, it is the Dataset's own
            threshold, which is the lowest.

    Returns:
        [`PairCheck`], without the models' answers.

    Raises:
        `ValueError`: If it is not a Dataset of kept steps, a row does not add up, it has no step, lacks the
            divergence of a step, or was sampled with a higher `beta`.
        `TypeError`: If it is not a [`~datasets.Dataset`].

    Example:

    ```python
    >>> check = check_steps(dataset, tokenizer)  # doctest: +SKIP
    >>> check.verdict, check.promising  # doctest: +SKIP
    ('promising', True)

    ```
    """
    made_by = _made_with(dataset)
    made = list(dict.fromkeys(made_by))
    longest_completion(dataset)  # refuses what has no step
    # From the highest threshold of the rows on, every step has its label
    sampled_with = max((each.beta for each in made if each.beta is not None), default=None)
    if beta is not None and beta < (sampled_with or 0.0):
        raise ValueError(
            f"The dataset was sampled with beta = {sampled_with:g}, so steps between {beta:g} and that have no label "
            "and cannot be counted as kept. Raise `beta`, or sample again with a lower one."
        )
    beta = sampled_with if beta is None else beta
    judged_at = max(JUDGED_AT, sampled_with or 0.0)
    counts: Counter[str] = Counter()
    changes: Counter[tuple[int, int]] = Counter()
    divergences: list[np.ndarray] = []
    trajectories = Trajectories()
    of_row = iter(made_by)
    for columns in read_columns(dataset):
        kl = columns.divergences
        for row, (_, key) in enumerate(columns.keys()):
            made_with = next(of_row)
            if trajectories.begins(key, columns.positions[slice(*columns.steps[row : row + 2])].tolist()):
                start, end = columns.completions[row : row + 2]
                is_known = ~np.isnan(kl[start:end])
                if not is_known.all() and not made_with.is_read_across:
                    raise ValueError(
                        "A pair cannot be judged without the divergence of every step, and this dataset lacks some, "
                        "like those of `lightreasoner import`. Sample its prompts with `lightreasoner sample`."
                    )
                reached = kl[start:end] >= JUDGED_AT
                counts["reached"] += int(reached[0 if made_with.include_first_step else 1 :].sum())
                counts["cut off"] += int(end > start and columns.completion_ids[end - 1] not in made_with.eos_ids)
                divergences.append(kl[start:end][is_known].astype(np.float32))
        if not len(columns.positions):
            continue
        nats, taken = kl[columns.places], columns.completion_ids[columns.places]
        preferred = columns.label_ids[columns.favourites]
        changed, is_judged = preferred != taken, nats >= judged_at
        is_kept = np.full(len(nats), True) if beta is None else nats >= beta
        for name, steps in (("kept", is_kept), ("judged", is_judged)):
            counts.update({name: int(steps.sum()), f"{name}, changed": int((steps & changed).sum())})
        counts["kept, first"] += int((is_kept & (columns.positions == 0)).sum())
        counted = is_kept | is_judged
        changes.update(count_changes(taken[counted], preferred[counted]))
    every = np.concatenate(divergences) if divergences else np.zeros(0)
    if not len(every):
        raise ValueError("The dataset has no step whose `kl_divergence` is known. Sample again.")
    kl_50, kl_90, kl_99 = np.quantile(every, [0.5, 0.9, 0.99]).tolist()
    texts = TokenTexts(tokenizer)

    check = PairCheck(
        num_prompts=len(divergences),
        num_steps=len(every),
        num_kept=counts["kept"],
        beta=beta,
        kl_50=kl_50,
        kl_90=kl_90,
        kl_99=kl_99,
        kept_share=counts["kept"] / len(every),
        changed_share=_share(counts["kept, changed"], counts["kept"]),
        first_step_share=_share(counts["kept, first"], counts["kept"]),
        cut_off_share=_share(counts["cut off"], len(divergences)) if all(each.eos_ids for each in made) else None,
        judged_kept_share=counts["reached"] / len(every),
        judged_changed_share=_share(counts["judged, changed"], counts["judged"]),
        corrections=[
            Correction(label_of(texts(taken)), label_of(texts(preferred)), count)
            for (taken, preferred), count in changes.most_common(_NUM_CORRECTIONS)
        ],
        expert_parameters=_if_one({each.expert_parameters for each in made}),
        amateur_parameters=_if_one({each.amateur_parameters for each in made}),
        is_of_expert=any(each.is_of_expert for each in made),
        differ_by_adapter=any(each.differ_by_adapter for each in made),
        samplings=name_samplings(dataset),
    )
    plain = all(each.has_template for each in made) and _is_plain(dataset, tokenizer)
    # Of another family, an amateur diverges as much with the chat template as without
    is_blamed = plain and not any(each.is_read_across for each in made)
    check.verdict, check.reasons = judge(check, is_blamed, labels_from=judged_at)
    check.warnings = warn(check, plain)
    return check


class _MadeWith(NamedTuple):
    """What the check needs of the metadata of a row."""

    beta: float | None
    include_first_step: bool
    eos_ids: frozenset[int]
    has_template: bool
    is_read_across: bool
    expert_parameters: int | None
    amateur_parameters: int | None
    is_of_expert: bool
    differ_by_adapter: bool


def _made_with(dataset: Dataset) -> list[_MadeWith]:
    """For each row of a Dataset of kept steps, how it was made."""
    check_dataset(dataset)
    check_sampled(dataset)
    if "sampling_metadata" not in dataset.column_names:
        return [_parse({})] * len(dataset)
    known = {text: _parse(parse_metadata(text)) for text in dataset.unique("sampling_metadata")}
    if len(known) == 1:
        return list(known.values()) * len(dataset)
    return [known[text] for text in dataset["sampling_metadata"]]


def _parse(metadata: Any) -> _MadeWith:
    metadata = metadata if isinstance(metadata, dict) else {}

    def get(part: str, name: str, kind: type | tuple[type, ...]) -> Any:
        holder = metadata.get(part) if part else metadata
        value = holder.get(name) if isinstance(holder, dict) else None
        return value if isinstance(value, kind) else None  # it can be somebody else's column

    is_of_expert = get("expert", "model", str) is not None and all(
        get("expert", name, str) == get("amateur", name, str) for name in ("model", "revision")
    )
    # Labels of a fixed labeller are made without the expert's adapter
    expert_adapter = None if get("settings", "label_expert", str) == "base" else get("expert", "adapter", str)
    return _MadeWith(
        beta=get("settings", "beta", (int, float)),
        include_first_step=get("settings", "include_first_step", bool) is not False,
        eos_ids=frozenset(get("", "eos_token_ids", list) or []),
        has_template=get("", "chat_template_sha256", str) not in (None, hashlib.sha256(b"").hexdigest()),
        is_read_across=get("", "amateur_reading", dict) is not None,
        expert_parameters=get("expert", "num_parameters", int),
        amateur_parameters=get("amateur", "num_parameters", int),
        is_of_expert=is_of_expert,
        differ_by_adapter=is_of_expert and expert_adapter != get("amateur", "adapter", str),
    )


def _if_one(values: set[Any]) -> Any:
    return values.pop() if len(values) == 1 else None


def _is_plain(dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether the prompts are text without any token of a chat template."""
    if "prompt" not in dataset.column_names or has_messages(dataset):
        return False
    if tokenizer is None:
        return True
    marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.bos_token_id}
    return not marks & set(dataset[0]["prompt_ids"])


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _looks(value: float | None, low: float, high: float, lowest: float = 0, highest: float = np.inf) -> str:
    """Whether a number is typical of the pairs that gained, of the others, or of neither."""
    if value is None or not lowest <= value < highest:
        return "bad"
    return "good" if low <= value <= high else "between"


def _one_line(text: str) -> str:
    shown = spell_out(text).replace("\u21b5\n", "\u21b5 ")
    return shown if len(shown) <= _MAX_ANSWER else f"{shown[:_MAX_ANSWER]} ..."
