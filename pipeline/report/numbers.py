"""How the report and its table write numbers."""

from __future__ import annotations

import math

from pipeline.inference.accuracy import Comparison
from pipeline.report.facts import Model


def percent(fraction: float | None, digits: int = 2) -> str:
    """`77.12 %`, or – without a value."""
    return "–" if fraction is None else f"{100 * fraction:.{digits}f} %"


def points(comparison: Comparison) -> str:
    """`+3.20 ± 0.41`: a difference in points and its standard error."""
    return f"{signed(100 * comparison.difference)} ± {100 * comparison.error:.2f}"


def signed(value: float) -> str:
    """Two digits and a sign."""
    return f"{value:+.2f}".replace("-", "−")


def binomial_error(fraction: float, number: int) -> float:
    """The standard error of a fraction of `number` images."""
    return math.sqrt(fraction * (1 - fraction) / number)


def with_error(fraction: float, number: int) -> str:
    """`77.12 ± 0.42 %`."""
    return f"{100 * fraction:.2f} ± {100 * binomial_error(fraction, number):.2f} %"


def millions(number: int | None) -> str:
    """`1.03 M`, or – without a value."""
    return "–" if number is None else f"{number / 1e6:.2f} M"


def verdict(first: Model, last: Model, comparison: Comparison | None) -> str:
    """One sentence: did the student beat its teacher?"""
    if comparison is None:
        return (
            f"{last.name.capitalize()} and {first.name} are not compared: there are no results on the same test images"
        )
    amount, error = 100 * comparison.difference, 100 * comparison.error
    student = "The student" if last.name == "student" else last.name.capitalize()
    ending = f"on {comparison.images:,} test images"
    if abs(amount) < 2 * error:
        return f"No clear difference: {student.lower()} is {signed(amount)} ± {error:.2f} points from the {first.name} {ending}"
    way = "better than" if amount > 0 else "worse than"
    return f"{student} is {abs(amount):.2f} ± {error:.2f} points {way} the {first.name} {ending}"
