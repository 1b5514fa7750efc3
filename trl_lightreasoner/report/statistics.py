"""From a Dataset of kept steps to the numbers of a report: over every row, in memory that holds some rows at a time.

Divergences are counted in bins of a thousandth of a decade, so that a quantile is right to 0.3 % however many steps
there are; beta lies between two bins, so that what reaches it is counted exactly. A trajectory whose
steps several rows hold counts once; every label counts.
"""

import math
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from ..sampling.model_pair import AMATEUR_SETTINGS
from ..steps.columns import StepColumns, Trajectories, check_sampled, count_changes, longest_completion, read_columns
from ..steps.dataset import read_samplings, sampling_metadata


BINS_PER_DECADE = 1000
# Bars of a histogram in a decade, each of several bins
_SHOWN_PER_DECADE = 10
_LOWEST, _HIGHEST = -10, 3  # decades; what lies outside goes into the first bin and the last
_NUM_BINS = BINS_PER_DECADE * (_HIGHEST - _LOWEST)
_NUM_POSITIONS = 40  # groups of positions
_NUM_SUPPORTS = 10  # sizes of the support, the last one open
_NUM_MASSES = 10


class TokenGain(NamedTuple):
    """
    What the contrast does to one token.

    Attributes:
        token_id (`int`): The token.
        gain (`float`): Sum of v_C - 1/|support| over the kept steps whose support holds it: above 0 where the expert
            prefers it to the other plausible tokens more than the amateur does, below 0 where less.
        num_steps (`int`): Number of those steps.
    """

    token_id: int
    gain: float
    num_steps: int


class StepStatistics:
    """
    Numbers over all rows of a Dataset of kept steps.

    Args:
        dataset ([`~datasets.Dataset`]): Rows as [`ContrastiveStepSampler`] makes them, one step a row or several.
        name (`str`): What to call it in messages.

    Attributes:
        alpha, beta (`float`, *optional*): As the Dataset says; None if it does not, or holds rows of several values.
        label_power (`tuple[float, float]`, *optional*): gamma and lambda of the labels, by default the paper's; None
            if the rows differ.
        num_rows, num_trajectories, num_steps, num_kept (`int`): Counts. Steps are those of the distinct trajectories.
        num_known (`int`): Steps whose divergence is known: all, but for a Dataset of `lightreasoner import`.
        position_edges (`np.ndarray` of shape `(G + 1,)`): Bounds of the groups of positions.
        steps_by_position, kept_by_position (`np.ndarray` of shape `(G,)`): Known steps, and kept ones, of each group.
        support_counts (`np.ndarray` of shape `(10,)`): Kept steps whose support has 1, 2, ... and 10 or more tokens.
        mass_counts (`np.ndarray` of shape `(10,)`): Kept steps by v_C of their favourite, in tenths.
        num_changed (`int`): Kept steps at which v_C's favourite is not the token that was taken.
        changes (`Counter`): Of them, how often each pair (taken, favourite) is met.
        kept_per_row (`np.ndarray` of shape `(num_rows,)`): Kept steps.
        prompt_keys, trajectory_keys (`np.ndarray` of shape `(num_rows,)`): Equal where the ids are.

    Raises:
        `ValueError`: If it is no Dataset of kept steps, or a row does not add up.

    Example:

    ```python
    >>> dataset = dataset.add_column("prompt_ids", [[5]]).add_column("completion_ids", [[2, 1, 3, 4, 3]])
    >>> statistics = StepStatistics(dataset)
    >>> statistics.num_kept, statistics.num_steps, statistics.share_kept(0.4)
    (3, 5, 0.6)

    ```
    """

    def __init__(self, dataset: Dataset, name: str = "dataset"):
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"The {name} must be a `datasets.Dataset`, got `{type(dataset).__name__}`. Choose one split of it, or "
                "load it without streaming."
            )
        check_sampled(dataset, name)
        settings = [each["settings"] for each in all_made_with(dataset)] or [{}]
        self.alpha, self.beta = (_if_one({each.get(key) for each in settings}) for key in ("alpha", "beta"))
        self.label_power = _if_one(
            {(each.get("contrast_strength", 1.0), each.get("expert_anchor", 0.0)) for each in settings}
        )
        longest = longest_completion(dataset, name)
        width = -(-longest // _NUM_POSITIONS)
        num_groups = -(-longest // width)
        self.position_edges = np.arange(num_groups + 1) * width
        self._bins = Bins(self.beta)
        self._histogram = np.zeros((num_groups, _NUM_BINS), dtype=np.int64)
        self.kept_by_position = np.zeros(num_groups, dtype=np.int64)
        self.support_counts = np.zeros(_NUM_SUPPORTS, dtype=np.int64)
        self.mass_counts = np.zeros(_NUM_MASSES, dtype=np.int64)
        self.lowest, self.highest = math.inf, 0.0
        self.num_trajectories = self.num_steps = self.num_kept = self.num_changed = 0
        self.changes: Counter[tuple[int, int]] = Counter()
        self._gains: dict[int, tuple[float, int]] = {}
        self._trajectories = Trajectories()
        kept_per_row, keys = [], []
        for columns in read_columns(dataset, name):
            kept_per_row.append(np.diff(columns.steps))
            keys += columns.keys()
            self._add_trajectories(columns, [key for _, key in keys[-len(kept_per_row[-1]) :]])
            if len(columns.positions):
                self._add_labels(columns)
        self.num_rows = len(keys)
        self.kept_per_row = np.concatenate(kept_per_row)
        self.prompt_keys, self.trajectory_keys = np.array(keys, dtype=np.int64).T
        self.steps_by_position = self._histogram.sum(1)
        self.num_known = int(self.steps_by_position.sum())

    def _add_trajectories(self, columns: StepColumns, keys: list[int]) -> None:
        steps = [part.tolist() for part in np.split(columns.positions, columns.steps[1:-1])]
        is_new = np.array([*map(self._trajectories.begins, keys, steps)])
        lengths = np.diff(columns.completions)
        positions = np.arange(len(columns.divergences)) - np.repeat(columns.completions[:-1], lengths)
        counts = np.repeat(is_new, lengths)
        self.num_trajectories += int(is_new.sum())
        self.num_steps += int(counts.sum())
        counts &= ~np.isnan(columns.divergences)
        divergences, groups = columns.divergences[counts], positions[counts] // self.position_edges[1]
        np.add.at(self._histogram, (groups, self._bins.of(divergences)), 1)
        self.lowest = min(self.lowest, divergences.min(initial=math.inf))
        self.highest = max(self.highest, divergences.max(initial=0))

    def _add_labels(self, columns: StepColumns) -> None:
        self.num_kept += len(columns.positions)
        np.add.at(self.kept_by_position, columns.positions // self.position_edges[1], 1)
        sizes, favourites = np.diff(columns.labels), columns.favourites
        np.add.at(self.support_counts, np.minimum(sizes, _NUM_SUPPORTS) - 1, 1)
        masses = columns.label_probs[favourites]
        np.add.at(self.mass_counts, np.minimum(masses * _NUM_MASSES, _NUM_MASSES - 1).astype(int), 1)
        changes = count_changes(columns.completion_ids[columns.places], columns.label_ids[favourites])
        self.changes.update(changes)
        self.num_changed += sum(changes.values())
        moved = columns.label_probs - np.repeat(1 / sizes, sizes)
        tokens, places = np.unique(columns.label_ids, return_inverse=True)
        gains, counts = np.bincount(places, weights=moved), np.bincount(places)
        for token, gain, count in zip(tokens.tolist(), gains.tolist(), counts.tolist(), strict=True):
            before = self._gains.get(token, (0.0, 0))
            self._gains[token] = (before[0] + gain, before[1] + count)

    def share_kept(self, beta: float) -> float:
        """Share of the steps whose divergence is at least `beta`, exact at the Dataset's own `beta`."""
        return float(self.shares(np.array([beta]))[0])

    def beta_for(self, share: float) -> float:
        """The lowest beta that keeps no more than `share` of the steps."""
        return self._value_at(self._histogram.sum(0), 1 - share)

    def quantiles_by_position(self, quantile: float) -> np.ndarray:
        """A quantile of the divergence in each group of positions, `(G,)`."""
        return np.array([self._value_at(counts, quantile) for counts in self._histogram])

    def histogram(self) -> tuple[np.ndarray, np.ndarray]:
        """
        Edges `(N + 1,)` in nats, and how many steps lie between them, `(N,)`, without empty bins at the ends. Beta is
        one of the edges.
        """
        width = BINS_PER_DECADE // _SHOWN_PER_DECADE
        counts = self._histogram.sum(0).reshape(-1, width).sum(1)
        edges = self._bins.edges(np.arange(len(counts) + 1) * width)
        first, last = counts.nonzero()[0][[0, -1]]
        return edges[first : last + 2], counts[first : last + 1]

    def shares(self, betas: np.ndarray) -> np.ndarray:
        """[`~StepStatistics.share_kept`] at many values, `(N,)`."""
        reversed_sums = self._histogram.sum(0)[::-1].cumsum()[::-1]
        return reversed_sums[self._bins.of(betas)] / self.num_known

    def _value_at(self, counts: np.ndarray, quantile: float) -> float:
        """The lower edge of the first bin with no more than 1 - `quantile` of the counts in it and above."""
        above = counts[::-1].cumsum()[::-1]
        bins = (above <= (1 - quantile) * above[0] + 1e-9).nonzero()[0]
        first = bins[0] if len(bins) else _NUM_BINS
        return float(self._bins.edges(first)) if first else 0.0

    def gains(self) -> list[TokenGain]:
        """Every token of a support, the one that gains most first."""
        gains = [TokenGain(token_id, *values) for token_id, values in self._gains.items()]
        return sorted(gains, key=lambda token: (-token.gain, token.token_id))


class Bins:
    """
    Bins of a thousandth of a decade, of which one begins at `beta`: no bin holds both what is kept and what is not.

    Args:
        beta (`float`, *optional*): Threshold in nats. It counts in single precision, as the divergences did when they
            were compared with it.

    Example:

    ```python
    >>> bins = Bins(0.4)
    >>> bins.edges(bins.of(np.array([0.4, 0.4005, 0.3999]))).round(4)
    array([0.4   , 0.4   , 0.3991])

    ```
    """

    def __init__(self, beta: float | None):
        lies_inside = beta is not None and 10.0**_LOWEST < beta < 10.0**_HIGHEST
        self._origin = float(np.float32(beta if lies_inside else 1.0))
        # A tenth of a decade, such as the histogram's bins have, begins there too
        self._place = 100 * round(10 * (np.log10(self._origin) - _LOWEST))

    def of(self, divergences: np.ndarray) -> np.ndarray:
        """Numbers of the bins of divergences in nats."""
        with np.errstate(divide="ignore"):
            # At the origin itself the difference is 0 to the last bit
            decades = np.log10(divergences.astype(np.float32).astype(float)) - np.log10(self._origin)
        return np.clip(np.floor(decades * BINS_PER_DECADE) + self._place, 0, _NUM_BINS - 1).astype(int)

    def edges(self, numbers: np.ndarray | int) -> np.ndarray:
        """Where bins begin, in nats."""
        return self._origin * 10.0 ** ((numbers - self._place) / BINS_PER_DECADE)


def made_with(dataset: Dataset) -> dict[str, Any]:
    """What [`sampling_metadata`] says, or nothing where it is not of the sampler's making."""
    metadata = sampling_metadata(dataset)
    return _parts_of(metadata) if isinstance(metadata, dict) else {}


def all_made_with(dataset: Dataset) -> list[dict[str, Any]]:
    """[`made_with`] of every distinct metadata of its rows."""
    return [_parts_of(each) for each in read_samplings([dataset])]


def _if_one(values: set[Any]) -> Any:
    return values.pop() if len(values) == 1 else None


def _parts_of(metadata: dict[str, Any]) -> dict[str, Any]:
    parts = {name: part for name, part in metadata.items() if isinstance(part, dict)}
    settings = parts.get("settings", {})
    parts["settings"] = {
        name: value
        for name, value in settings.items()
        if type(value) in (int, float) or (name in (*AMATEUR_SETTINGS, "label_expert") and value is not None)
    }
    return parts
