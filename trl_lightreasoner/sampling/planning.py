"""Which prompts are sampled, in which order, and which are skipped."""

from collections.abc import Callable
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset

from .contrastive_sampling_config import ContrastiveSamplingConfig


logger = get_logger(__name__)


def plan_prompts(
    encoded: Dataset,
    scoring_only: bool,
    args: ContrastiveSamplingConfig,
    max_length: int | None,
    amateur_room: Callable[[dict[str, Any], int], int | None],
    context: str,
) -> list[tuple[int, int]]:
    """
    `(row, room)` of every prompt to sample. The longest come first, to make a too large batch fail at once. Room is
    the maximum number of tokens to generate, 0 for given completions.

    Args:
        encoded ([`~datasets.Dataset`]): Token ids of the rows.
        scoring_only (`bool`): Whether completions are given.
        args ([`ContrastiveSamplingConfig`]): Settings.
        max_length (`int`, *optional*): Maximum number of tokens to read.
        amateur_room (`Callable`): From a row and its number to the longest completion that the amateur can read,
            `None` for any. Raises if a model cannot read the row at all.
        context (`str`): Description of the available context, for messages.

    Raises:
        `ValueError`: If no prompt is left.
    """
    skipped = {"empty": 0, f"longer than `max_prompt_length={args.max_prompt_length}`": 0, "no room": 0}
    empty, too_long, no_room = skipped
    plan = []
    for index, row in enumerate(encoded):
        rooms = [amateur_room(row, index)]
        prompt_length, completion_length = len(row["prompt_ids"]), len(row.get("completion_ids") or [])
        rooms += [None if max_length is None else max_length - prompt_length]
        most = min((room for room in rooms if room is not None), default=None)
        room = args.max_new_tokens if most is None else min(args.max_new_tokens, most)
        no_prompt = prompt_length == 0 or row.get("amateur_prompt_ids") == []
        if no_prompt or (scoring_only and completion_length == 0):
            skipped[empty] += 1
        elif args.max_prompt_length is not None and prompt_length > args.max_prompt_length:
            skipped[too_long] += 1
        elif room < 1 or (most is not None and completion_length > most):
            skipped[no_room] += 1
        else:
            plan.append((prompt_length + completion_length, index, 0 if scoring_only else room))
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items() if count)
    if skipped[empty] == len(encoded):
        columns = "`prompt` or `completion`" if scoring_only else "`prompt`"
        raise ValueError(
            f"Every row of the dataset is empty: {columns} holds no text, or the expert's tokenizer makes no token of "
            "it. Check the column and the tokenizer."
        )
    if not plan:
        remedies = ["Shorten the prompts" + (" and completions" if scoring_only else "")]
        remedies += ["raise `max_prompt_length`"] if skipped[too_long] else []
        remedies += ["choose models with a longer context"] if skipped[no_room] else []
        raise ValueError(f"Every prompt of the dataset was skipped ({reasons}; {context}). {', or '.join(remedies)}.")
    if reasons:
        logger.warning(f"Skipped {len(encoded) - len(plan):,} of {len(encoded):,} prompts: {reasons} ({context}).")
    plan.sort(key=lambda item: (-item[0], item[1]))
    return [(index, room) for _, index, room in plan]
