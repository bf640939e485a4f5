"""Print the table of a chaos suite: a line per fault, followed by its problems."""

from __future__ import annotations

from collections.abc import Sequence


def print_header(columns: Sequence[str]) -> None:
    """Print the names of the columns."""
    print("fault              " + " ".join(f"{column:>11}" for column in columns), flush=True)


def print_row(name: str, values: Sequence[object], problems: Sequence[str]) -> None:
    """Print one fault."""
    print(f"{name:<18} " + " ".join(f"{value:>11}" for value in values), flush=True)
    for problem in problems:
        print(f"    WRONG: {problem}", flush=True)
