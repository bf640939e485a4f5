"""What a scaling study shows: a power law and where it breaks, depth against width, pixels against depth, each with an interval.

Errors are in per cent, costs in FLOPs or milliseconds. Intervals hold 95 % of a bootstrap over seeds; a comparison whose interval
holds 0 is "cannot tell". With one seed there is no interval, and nothing can be told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np
from scipy.optimize import nnls

CANNOT_TELL = "cannot tell"
EXPONENTS = np.linspace(0.02, 2.0, 100)
_DRAWS = 400
_FEWEST = 4  # cells of a fit: it has three parameters
_RANGE = 30  # of FLOPs, below which a power law cannot be told from a line (RECIPES: arXiv 2603.22339)
_EQUAL = 0.15  # relative difference up to which costs are equal


@dataclass(frozen=True)
class CellResult:
    """A trained cell.

    Attributes:
        errors: 100 − top-1 by seed, in per cent.
        flops: of an image's forward pass.
        step_ms: a training step of one batch; inference_ms: an image, in batches.
    """

    width: float
    depth: int
    image_size: int
    epochs: float
    errors: tuple[float, ...]
    parameters: int
    flops: int
    activation_bytes: int
    step_ms: float
    inference_ms: float


@dataclass(frozen=True)
class PowerLaw:
    """error = c + a · FLOPs^(−b)."""

    a: float
    b: float
    c: float

    def __call__(self, flops: np.ndarray) -> np.ndarray:
        """Errors in per cent."""
        return self.c + self.a * flops**-self.b


@dataclass(frozen=True)
class Finding:
    """One answer.

    Attributes:
        question: what was asked, in words.
        value, low, high: with its interval; None: nothing to compare.
        answer: in words, or `CANNOT_TELL`.
    """

    question: str
    value: float | None
    low: float | None
    high: float | None
    answer: str


def fit_power_law(flops: np.ndarray, errors: np.ndarray) -> PowerLaw:
    """Least squares over `EXPONENTS`; given b the law is linear in c and a, which are not negative.

    Args:
        flops, errors: float64 (N,), N ≥ 2.
    """
    unit = float(flops.min())  # so that both columns are of one size

    def fitted(b: float) -> tuple[float, PowerLaw]:
        (c, a), norm = nnls(np.stack([np.ones(len(flops)), (flops / unit) ** -b], axis=1), errors)
        return norm, PowerLaw(a * unit**b, b, c)

    return min((fitted(float(b)) for b in EXPONENTS), key=lambda found: found[0])[1]


def findings(cells: Sequence[CellResult]) -> list[Finding]:
    """All answers, for each length of training."""
    found = []
    for epochs in sorted({cell.epochs for cell in cells}):
        group = [cell for cell in cells if cell.epochs == epochs]
        found += [_exponent(group), _break(group), _spread(group), _depth_or_width(group), _pixels_or_depth(group)]
    return found


def _exponent(cells: Sequence[CellResult]) -> Finding:
    question = f"{cells[0].epochs:g} epochs: exponent b of error = c + a · FLOPs^-b"
    if len(cells) < _FEWEST:
        return Finding(question, None, None, None, f"{CANNOT_TELL}: fewer than {_FEWEST} cells")
    flops = _flops(cells)
    value, low, high = _bootstrap(cells, lambda errors: fit_power_law(flops, errors).b)
    at_edge = low is not None and high is not None and (low <= EXPONENTS[0] or high >= EXPONENTS[-1])
    answer = CANNOT_TELL if low is None or at_edge else f"{value:.2f}"
    return Finding(question, value, low, high, answer)


def _break(cells: Sequence[CellResult]) -> Finding:
    """Fit the smaller half, ask about the larger one: its error above what the law says, in points."""
    question = f"{cells[0].epochs:g} epochs: does the power law of the smaller half hold for the larger half?"
    ordered = sorted(cells, key=lambda cell: cell.flops)
    half = len(ordered) // 2
    flops = _flops(ordered)
    if half < _FEWEST:
        return Finding(question, None, None, None, f"{CANNOT_TELL}: fewer than {_FEWEST} cells in the smaller half")

    def excess(errors: np.ndarray) -> float:
        law = fit_power_law(flops[:half], errors[:half])
        return float((errors[half:] - law(flops[half:])).mean())

    value, low, high = _bootstrap(ordered, excess)
    if flops[-1] / flops[0] < _RANGE:
        return Finding(question, value, low, high, f"{CANNOT_TELL}: FLOPs range over less than {_RANGE} times")
    return Finding(question, value, low, high, _sign(low, high, "it breaks: more errors", "fewer errors than it says"))


def _spread(cells: Sequence[CellResult]) -> Finding:
    """The largest difference of mean errors among cells of equal FLOPs."""
    question = f"{cells[0].epochs:g} epochs: largest difference of error at equal FLOPs"
    pairs = [(abs(_mean(a) - _mean(b)), a, b) for a, b in combinations(cells, 2) if _are_equal(a.flops, b.flops)]
    if not pairs:
        return Finding(question, None, None, None, f"{CANNOT_TELL}: no two cells have equal FLOPs")
    value, one, other = max(pairs, key=lambda pair: pair[0])
    better, worse = sorted((one, other), key=_mean)
    _, low, high = _bootstrap([worse, better], lambda errors: float(errors[0] - errors[1]))
    answer = f"{_shape(better)} is better than {_shape(worse)}"
    return Finding(question, value, low, high, _sign(low, high, answer, CANNOT_TELL))


def _depth_or_width(cells: Sequence[CellResult]) -> Finding:
    """Error of the wider cell less that of the deeper one, over pairs of one image size and equal time per step."""

    def are_pair(wide: CellResult, deep: CellResult) -> bool:
        trades = wide.width > deep.width and wide.depth < deep.depth
        return trades and wide.image_size == deep.image_size and _are_equal(wide.step_ms, deep.step_ms)

    question = f"{cells[0].epochs:g} epochs: depth or width, at equal time of a step?"
    return _compared(question, _pairs(cells, are_pair), "depth", "width")


def _pixels_or_depth(cells: Sequence[CellResult]) -> Finding:
    """Error of the deeper cell less that of the one with more pixels, over pairs of one width and equal FLOPs."""

    def are_pair(deep: CellResult, fine: CellResult) -> bool:
        trades = deep.depth > fine.depth and deep.image_size < fine.image_size
        return trades and deep.width == fine.width and _are_equal(deep.flops, fine.flops)

    question = f"{cells[0].epochs:g} epochs: depth or pixels, at equal FLOPs?"
    return _compared(question, _pairs(cells, are_pair), "pixels", "depth")


def _pairs(
    cells: Sequence[CellResult], are_pair: Callable[[CellResult, CellResult], bool]
) -> list[tuple[CellResult, CellResult]]:
    return [pair for pair in permutations(cells, 2) if are_pair(*pair)]


def _compared(question: str, pairs: Sequence[tuple[CellResult, CellResult]], positive: str, negative: str) -> Finding:
    if not pairs:
        return Finding(question, None, None, None, f"{CANNOT_TELL}: no pair of equal cost")
    flat = [cell for pair in pairs for cell in pair]
    value, low, high = _bootstrap(flat, lambda errors: float((errors[0::2] - errors[1::2]).mean()))
    return Finding(f"{question} ({len(pairs)} pairs)", value, low, high, _sign(low, high, positive, negative))


def _bootstrap(
    cells: Sequence[CellResult], statistic: Callable[[np.ndarray], float]
) -> tuple[float, float | None, float | None]:
    """The statistic of mean errors (N,), and its interval when seeds are drawn with replacement, the same for all cells."""
    errors = np.array([cell.errors for cell in cells])
    value, seeds = statistic(errors.mean(axis=1)), errors.shape[1]
    if seeds == 1:
        return value, None, None
    draws = {tuple(sorted(draw)) for draw in np.random.default_rng(0).integers(seeds, size=(_DRAWS, seeds)).tolist()}
    weights = [
        math.factorial(seeds) / math.prod(math.factorial(draw.count(seed)) for seed in range(seeds)) for draw in draws
    ]
    values = [statistic(errors[:, list(draw)].mean(axis=1)) for draw in draws]
    low, high = _quantiles(values, weights, (0.025, 0.975))
    return value, low, high


def _quantiles(values: Sequence[float], weights: Sequence[float], at: Iterable[float]) -> Iterator[float]:
    order = np.argsort(values)
    below = np.cumsum(np.array(weights)[order]) / sum(weights)
    return (float(np.array(values)[order][min(int(np.searchsorted(below, share)), len(values) - 1)]) for share in at)


def _sign(low: float | None, high: float | None, positive: str, negative: str) -> str:
    if low is None or high is None or low <= 0 <= high:
        return CANNOT_TELL
    return positive if low > 0 else negative


def _are_equal(one: float, other: float) -> bool:
    return abs(one - other) <= _EQUAL * min(one, other)


def _flops(cells: Sequence[CellResult]) -> np.ndarray:
    return np.array([cell.flops for cell in cells], float)


def _mean(cell: CellResult) -> float:
    return float(np.mean(cell.errors))


def _shape(cell: CellResult) -> str:
    return f"width {cell.width:g}, depth {cell.depth}, {cell.image_size} px"
