"""Choose among the cells of a study within a budget, and say which are not told apart from the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

from scipy.stats import t

from pipeline.advise.costs import Cost, Costed

_CERTAINTY = 0.95  # of a paired t test, from which on two cells differ


@dataclass(frozen=True)
class Advice:
    """The answer.

    Attributes:
        best: of least error within the budget; among equal ones the one that takes the least time.
        equal: cells within the budget that the seeds do not tell apart from it and that train in less time, the cheapest first.
        better: the one beyond the budget that is nearest to it and better beyond chance; None: there is none.
    """

    best: Costed
    equal: tuple[Costed, ...]
    better: Costed | None


def choose(cells: Sequence[Costed], budget: Cost) -> Advice:
    """The advice. At least one cell must be within the budget."""
    within = [cell for cell in cells if cell.cost.is_within(budget)]
    best = min(within, key=lambda cell: (cell.error, cell.cost.hours))
    equal = [cell for cell in within if cell.cost.hours < best.cost.hours and _are_alike(cell, best)]
    beyond = [cell for cell in cells if cell not in within and cell.error < best.error and not _are_alike(cell, best)]
    better = min(beyond, key=lambda cell: cell.cost.times(budget), default=None)
    return Advice(best, tuple(sorted(equal, key=lambda cell: cell.cost.hours)), better)


def _are_alike(one: Costed, other: Costed) -> bool:
    """Whether the difference of two cells, seed by seed, is within chance. One seed tells nothing, but is not a reason to list all."""
    differences = [a - b for a, b in zip(one.errors, other.errors, strict=True)]
    if len(differences) == 1:
        return False
    limit = t.ppf((1 + _CERTAINTY) / 2, len(differences) - 1)  # 12.7 standard errors with two seeds
    return bool(abs(mean(differences)) <= limit * stdev(differences) / sqrt(len(differences)))
