"""Format numbers for the report and the printed table."""

from __future__ import annotations

import math

from pipeline.inference.accuracy import Comparison


def percent(fraction: float | None, digits: int = 2) -> str:
    """Format as `77.12 %`; None as –."""
    return "–" if fraction is None else f"{100 * fraction:.{digits}f} %"


def points(comparison: Comparison) -> str:
    """Format a difference and its standard error, in percentage points, as `+3.20 ± 0.41`."""
    return f"{signed(100 * comparison.difference)} ± {100 * comparison.error:.2f}"


def signed(value: float) -> str:
    """Format with a sign and two decimals: `−0.50`."""
    return f"{value:+.2f}".replace("-", "−")


def binomial_error(fraction: float, number: int) -> float:
    """Compute the binomial standard error of a fraction of `number` images."""
    return math.sqrt(fraction * (1 - fraction) / number)


def with_error(fraction: float, number: int) -> str:
    """Format a fraction of `number` images and its standard error as `77.12 ± 0.42 %`."""
    return f"{100 * fraction:.2f} ± {100 * binomial_error(fraction, number):.2f} %"


def millions(number: int | None) -> str:
    """Format as `1.03 M`; None as –."""
    return "–" if number is None else f"{number / 1e6:.2f} M"
