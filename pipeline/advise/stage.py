"""stage=advise: what should my student be, for this data and this budget? The answer of a finished scaling study.

cells of the study ──► what each would cost here ──► those within the budget ──► the best, and what is as good or a little better
"""

from __future__ import annotations

from collections.abc import Sequence

from data.settings import UsageError
from pipeline.advise.choice import Advice, choose
from pipeline.advise.costs import Cost, Costed, costs_of
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.timing import duration

_FARTHEST = 4.0  # times the longest training of the study, beyond which it says nothing


def advise(config: Config, layouts: Sequence[Layout]) -> None:
    """Print the advice.

    Raises:
        StageError: there is no finished scaling study.
        UsageError: no budget is given, no cell is within it, or it is far beyond the study.
    """
    wanted = config.advise
    budget = Cost(*(_or_endless(value) for value in (wanted.hours, wanted.latency_ms, wanted.gpu_memory_gb)))
    if budget == Cost.endless():
        raise UsageError("stage=advise needs a budget: give advise.hours, advise.latency_ms or advise.gpu_memory_gb")
    cells = costs_of(config, layouts[0])
    _require_within_study(budget, cells)
    print(_describe(choose(cells, budget)))


def _or_endless(value: float | None) -> float:
    return float("inf") if value is None else value


def _require_within_study(budget: Cost, cells: Sequence[Costed]) -> None:
    longest = max(cell.cost.hours for cell in cells)
    if longest * _FARTHEST < budget.hours < float("inf"):
        raise UsageError(
            f"advise.hours={budget.hours:g}: over {_FARTHEST:g} times the study's longest training, which would take "
            f"{_hours(longest)}; larger models are not known to be better: give a study with a larger ablate.grid"
        )
    if not any(cell.cost.is_within(budget) for cell in cells):
        cheapest = min(cells, key=lambda cell: cell.cost.times(budget))
        raise UsageError(
            f"no cell of the study is within the budget; nearest is {cheapest.name}: {_costs(cheapest.cost)}"
        )


def _describe(advice: Advice) -> str:
    best = advice.best
    lines = [f"advise: {_with_error(best)}", f"  fields: {' '.join(best.words('student'))}"]
    if advice.equal:
        lines.append(f"  not told apart from it by {best.seeds} seeds, and cheaper:")
        lines += [f"    {_with_error(cell)}" for cell in advice.equal]
    elif best.seeds == 1:
        lines.append("  one seed tells no two cells apart: give ablate.seeds=2 or more")
    if advice.better is not None:
        lines.append(f"  better, but beyond the budget: {_with_error(advice.better)}")
    return "\n".join(lines)


def _with_error(cell: Costed) -> str:
    return f"{cell.name}: error {cell.error:.2f} % ({cell.seeds} seed{'s' * (cell.seeds > 1)}); {_costs(cell.cost)}"


def _costs(cost: Cost) -> str:
    return f"{_hours(cost.hours)} of training, {cost.latency_ms:.3g} ms an image, {cost.memory_gb:.3g} GiB"


def _hours(hours: float) -> str:
    return duration(3600 * hours)
