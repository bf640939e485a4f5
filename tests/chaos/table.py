"""The table that a chaos suite prints while it runs: a line for each fault, and below it what went wrong."""

from __future__ import annotations

from collections.abc import Sequence


def print_header(columns: Sequence[str]) -> None:
    """The columns' names, above `print_row`."""
    print("fault              " + " ".join(f"{column:>11}" for column in columns), flush=True)


def print_row(name: str, values: Sequence[object], problems: Sequence[str]) -> None:
    """One fault."""
    print(f"{name:<18} " + " ".join(f"{value:>11}" for value in values), flush=True)
    for problem in problems:
        print(f"    WRONG: {problem}", flush=True)
