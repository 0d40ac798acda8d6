"""The winner of a search: which candidate it is, and how good it looks beside how good it is."""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tfxfer.errors import InputError
from tfxfer.metrics import paired_difference
from tfxfer.tally import Tally, checked, group_numbers


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which candidate is taken.

    Attributes:
        best: The one with the highest value.
        chosen: The cheapest of those that are equal to it.
        equal: All within one standard error of the best, itself among them, the cheapest first.
        differences: (T,) how much lower each is than the best.
        standard_errors: (T,) of these, paired over the images; 0 of the best.
    """

    best: int
    chosen: int
    equal: tuple[int, ...]
    differences: tuple[float, ...]
    standard_errors: tuple[float, ...]


def choose_cheapest(
    labels: ArrayLike,
    candidates: Sequence[ArrayLike],
    costs: Sequence[float],
    *,
    metric: str = "accuracy",
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Choice:
    """The cheapest candidate that is within one standard error of the best, on the images they were selected on.

    Args:
        labels: (N,) int of the validation images.
        candidates: T tables (N, K) of probabilities, or (S, N, K) of S trainings with different seeds.
        costs: (T,) such as parameters that train; of equal ones the earlier is taken.
        metric: One of `METRICS`.
        groups: (N,) names; images of one group are drawn together.
        seed: Of the bootstrap.

    Raises:
        InputError: Where there are no candidates, or not a cost for each.

    Example:
        >>> tables = [[[0.9, 0.1], [0.1, 0.9]], [[0.8, 0.2], [0.3, 0.7]]]  # both are right twice
        >>> choose_cheapest([0, 1], tables, [5.0, 2.0]).chosen
        1

    Reference:
        Breiman, Friedman, Olshen, Stone. Classification and Regression Trees. 1984, section 3.4.3 (the rule of one
        standard error); here the error is that of the paired difference.
    """
    if not candidates or len(candidates) != len(costs):
        raise InputError(f"{len(candidates)} candidates and {len(costs)} costs were given; one of each is needed.")
    values = [_value(labels, table, metric) for table in candidates]
    best = int(np.argmax(values))
    differences, errors = [], []
    for index, table in enumerate(candidates):
        if index == best:
            found = {"difference": 0.0, "standard_error": 0.0}
        else:
            found = paired_difference(candidates[best], table, labels, metric=metric, groups=groups, seed=seed)
        differences.append(found["difference"])
        errors.append(found["standard_error"])
    equal = [index for index in range(len(costs)) if differences[index] <= errors[index] + 1e-12]
    equal.sort(key=lambda index: costs[index])
    return Choice(best, equal[0], tuple(equal), tuple(differences), tuple(errors))


def corrected_score(
    labels: ArrayLike,
    candidates: Sequence[ArrayLike],
    *,
    metric: str = "accuracy",
    groups: Sequence[Hashable] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """What the winner of a search is likely to reach on other images: its own value is that of the luckiest, too.

    In each draw the best candidate on the images that were drawn is judged on those that were not; so each is judged
    where it was not chosen.

    Args:
        labels: (N,) int of the validation images.
        candidates: T tables (N, K) of probabilities, by models that did not train on these images.
        metric: One of `METRICS`.
        groups: (N,) names; images of one group are drawn together.
        draws: At least 1; those that leave no image out are drawn again.
        seed: Of the draws.

    Returns:
        `value` (the winner's own), `corrected`, `low` and `high` (95 % of the draws), `optimism` (the difference).

    Raises:
        InputError: Where there are no candidates, or fewer than two groups.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> labels, luck = np.arange(40) % 2, rng.dirichlet([1, 1], size=(20, 40))  # twenty that know nothing
        >>> found = corrected_score(labels, luck)
        >>> bool(found["value"] > 0.55 and found["corrected"] < found["value"])
        True

    Reference:
        Tsamardinos, Greasidou, Borboudakis. Bootstrapping the Out-of-sample Predictions for Efficient and Accurate
        Cross-validation. Machine Learning 107, 2018.
    """
    if not len(candidates):
        raise InputError("A search without a finished trial has no winner.")
    numbers = group_numbers(groups, len(np.asarray(labels)))
    tallies = [Tally(*checked(labels, table), numbers) for table in candidates]
    num_groups = tallies[0].num_groups
    if num_groups < 2:
        raise InputError("A search is judged on at least two groups of images; there is one.")
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=draws).T.astype(float)
    while (empty := ~(counts == 0).any(0)).any():
        again = rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=int(empty.sum()))
        counts[:, empty] = again.T
    inside = np.stack([tally.scores(counts)[metric] for tally in tallies])
    outside = np.stack([tally.scores((counts == 0).astype(float))[metric] for tally in tallies])
    found = outside[inside.argmax(0), np.arange(draws)]
    value = max(float(tally.scores()[metric][0]) for tally in tallies)
    low, high = np.percentile(found, (2.5, 97.5))
    corrected = float(found.mean())
    return {
        "value": value, "corrected": corrected, "low": float(low), "high": float(high), "optimism": value - corrected,
    }  # fmt: skip


def _value(labels: ArrayLike, table: ArrayLike, metric: str) -> float:
    stacked = np.asarray(table)
    tables = stacked if stacked.ndim == 3 else stacked[None]
    return float(np.mean([Tally(*checked(labels, one)).scores()[metric][0] for one in tables]))
