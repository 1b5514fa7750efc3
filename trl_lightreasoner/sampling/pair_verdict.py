"""The verdict on a pair: its numbers against those of pairs of known gain.

Nothing is trained, so a pair can only be compared with others. The limits are at the top, with their evidence.
"""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .pair_check import PairCheck


# What the limits rest on (docs/evidence.md): three tiny pairs with seven amateurs each, and one real pair of 1.5 and
# 0.5 billion parameters with a chat template and with a raw prompt, all at beta = 0.4 and with known gains. With the
# pairs that gained KL at 50 % was 0.018 or less, 8 to 17 % of the steps were kept, and at 20 to 43 % of these v_C
# preferred another token.
JUDGED_AT = 0.4
# Merely unskilled amateurs: 0.3 to 0.7 at 50 %, 45 to 53 % kept. A plain prompt to a chat model: 41 to 45 % kept
MAX_KL_50, WIDE_KL_50 = 0.05, 0.2
MAX_KEPT, WIDE_KEPT = 0.22, 0.3
# More careful ones than the expert: 1.3 and more at 90 %, where pairs that gained had 0.2 to 0.9
MAX_KL_90 = 1.1
# With an "expert" that was hardly trained, and the expert for its amateur: 54 % kept, another token at 74 %
SWAPPED_CHANGED = 0.5
# Incoherent ones: 5 and more
INCOHERENT_KL_50 = 2.0
# Amateurs made of the real expert: 0.1 to 2 % kept. As careful ones of the study: 1 to 9 %, at 6 % of them another
# token, as with unskilled ones
MIN_KEPT = 0.03
MIN_CHANGED, REPEATS_CHANGED = 0.15, 0.1
# At fewer steps a share of some per cent is a matter of luck
MIN_STEPS = 200
# Models are of one size if the sizes differ by less, as by an adapter that one of them carries. As amateurs, the real
# expert without three layers and the one rounded to 3 bits look good in all of these numbers. The first brought as
# much as a second model, the other lost 9 points
SAME_SIZE = 0.9
# With a raw prompt, where first steps did harm, they were 5 % of the kept steps; with the chat template 0.1 %
MANY_FIRST_STEPS = 0.02

_USE_TEMPLATE = "Make them conversations with `--conversational`, or give messages for `prompt`."


def judge(check: "PairCheck", plain: bool, labels_from: float) -> tuple[str, list[str]]:
    """
    Verdict and reasons. `plain` says whether plain prompts may be the cause. `labels_from` is the lowest divergence of
    a step whose label is judged.
    """
    verdict, reasons = _judge_numbers(check, plain, labels_from)
    if check.samplings:
        return "doubtful" if verdict == "promising" else verdict, [say_several(check.samplings), *reasons]
    expert, amateur = check.expert_parameters, check.amateur_parameters
    if not expert or not amateur:
        return verdict, reasons
    if expert < SAME_SIZE * amateur:
        first = (
            f"The expert has {expert:,} parameters, the amateur {amateur:,}: exchange `expert` and `amateur`. If the "
            f'smaller model is meant to be the expert, the verdict by the other numbers is "{verdict}".'
        )
        return "swapped", [first, *reasons]
    if check.differ_by_adapter:
        first = (
            "The two models differ by an adapter. If this method has trained it, the label leads back to the amateur "
            "of that training. Such an adapter on the amateur cost a real expert 8.7 points with a raw prompt, and "
            "tiny ones up to 29. On the expert, it gained nothing or lost up to 21. Choose a weaker model as the "
            "amateur, or set `amateur_num_skipped_layers` instead."
        )
        return "doubtful" if verdict == "promising" else verdict, [first, *reasons]
    if verdict == "promising" and amateur > SAME_SIZE * expert:
        if check.is_of_expert:
            return "doubtful", [
                "The amateur is made from the expert, and these numbers do not predict the gain of such a pair. "
                "Without three layers in their middle, two real experts gained 7.1 and 0.1 points with a raw prompt, "
                "and -0.2 and 1.8 with their chat template. Evaluate on held-out questions before and after training, "
                "as `lightreasoner run` does."
            ]
        return "doubtful", [
            f"The amateur has as many parameters as the expert ({amateur:,}). Choose a smaller model. A real expert "
            "with its own weights rounded to 3 bits as the amateur lost 9 points (with first steps)."
        ]
    return verdict, reasons


def _judge_numbers(check: "PairCheck", plain: bool, labels_from: float) -> tuple[str, list[str]]:
    kl, kept, changed = check.kl_50, check.judged_kept_share, check.judged_changed_share
    kept_text = f"{percent(kept)} of the steps diverge by {JUDGED_AT:g} nats or more"
    if check.num_steps < MIN_STEPS:
        return "doubtful", [f"There are only {check.num_steps:,} steps, too few to judge. Check more prompts."]
    if kl >= INCOHERENT_KL_50:
        return "incoherent", [
            f"Half of the steps diverge by {kl:.3g} nats or more, as with random weights or a shuffled vocabulary (5 "
            "and more): the amateur does not know the language of the prompts. Choose one that does."
        ]
    if kept >= WIDE_KEPT or kl >= WIDE_KL_50:
        if plain:
            return "plain prompt", [
                f"{kept_text}, and the prompts are plain text, although the expert has a chat template. On a real "
                "pair it was 8 to 10 % with the template. Without it, it was 41 to 45 %, and the answers were "
                f"nonsense. {_USE_TEMPLATE}"
            ]
        if (changed or 0) >= SWAPPED_CHANGED:
            return "swapped", [
                f"{kept_text}, and at {percent(changed)} of them v_C prefers a token other than the expert's: the "
                "contrast leads away from the expert's answers. Exchange `expert` and `amateur`, or choose an expert "
                "that can do the task."
            ]
        return "unskilled", [
            f"{kept_text} (KL at 50 %: {kl:.3g}). With amateurs that merely lack skill it was 45 to 53 % (0.3 to "
            "0.7). Tiny pairs gained nothing. A real expert lost 2.1 points with its chat template, and gained 6.5 "
            "with a raw prompt. Choose a better trained amateur that lacks the behaviour that you want, or let "
            "`lightreasoner run` decide on held-out questions."
        ]
    if kept < MIN_KEPT:
        return "too close", [
            f"Only {kept_text}. With pairs that gained, it was 8 to 17 %. Choose a weaker amateur. A lower beta did "
            "not help."
        ]
    if changed is None or changed < REPEATS_CHANGED:
        share = "none" if changed is None else f"{percent(changed)}"
        reason = (
            f"v_C prefers a token other than the expert's at {share} of the steps of {labels_from:g} nats or more, so "
            "the label repeats the expert. With pairs that gained, it was 20 to 43 %."
        )
        if labels_from > JUDGED_AT:
            return "doubtful", [
                f"{reason} This dataset has no labels of steps from {JUDGED_AT:g} nats. `lightreasoner check` judges "
                "those."
            ]
        return "too close", [f"{reason} Choose an amateur that lacks the behaviour that you want."]
    reasons = []
    if kl > MAX_KL_50:
        reasons.append(f"Half of the steps diverge by {kl:.3g} nats or more. With pairs that gained, it was 0.02.")
    if check.kl_90 > MAX_KL_90:
        reasons.append(
            f"A tenth of the steps diverge by {check.kl_90:.3g} nats or more. With pairs that gained, it was 0.2 to "
            "0.9. Amateurs that were more careful than the expert had 1.3 and more, and did harm."
        )
    if kept > MAX_KEPT:
        reasons.append(f"{kept_text}. With pairs that gained, it was 8 to 17 %.")
    if changed < MIN_CHANGED:
        reasons.append(
            f"v_C prefers a token other than the expert's at {percent(changed)} of the steps of {labels_from:g} nats "
            "or more. With pairs that gained, it was 20 to 43 %."
        )
    if reasons:
        return "doubtful", reasons
    return "promising", [
        f"KL is near 0 at most steps (50 %: {kl:.3g}) and large at a few: {kept_text}. v_C prefers a token other than "
        f"the expert's at {percent(changed)} of the steps of {labels_from:g} nats or more. The pairs that gained "
        "were like this."
    ]


def warn(check: "PairCheck", plain: bool) -> list[str]:
    """What is wrong beside the verdict, with the remedy."""
    warnings = []
    if plain and check.verdict != "plain prompt":
        warnings.append(
            "The prompts are plain text, although the expert has a chat template. If it was trained to chat, its "
            f"answers to plain text can be nonsense. {_USE_TEMPLATE}"
        )
    if (check.first_step_share or 0) >= MANY_FIRST_STEPS:
        warnings.append(
            f"{percent(check.first_step_share)} of the kept steps are first steps. With a plain prompt their labels "
            "cost a real pair 6 to 34 points. Exclude them with `include_first_step=False`."
        )
    at_beta, judged = check.changed_share or 0, check.judged_changed_share or 0
    if check.verdict == "promising" and at_beta < REPEATS_CHANGED <= judged and check.beta is not None:
        warnings.append(
            f"At beta = {check.beta:g} the label repeats the expert at nearly every kept step "
            f"({percent(check.changed_share)} another token). A lower beta keeps steps at which it does not."
        )
    return warnings


def say_several(samplings: list[str]) -> str:
    """A sentence about rows of several samplings, from the result of [`name_samplings`]."""
    return (
        f"The rows come from {len(samplings)} samplings, whose numbers are mixed here: {'; '.join(samplings)}. Judge "
        "the rows of each by themselves."
    )


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
