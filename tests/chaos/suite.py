"""Run a chaos suite: faults one after another, a table of their outcomes, and one JSON object."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

World = TypeVar("World")


@dataclass
class Outcome(ABC):
    """The result of one fault over its runs; `problems` in words."""

    times: int = 0
    same: bool = True
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def expect(self, holds: object, problem: str) -> None:
        """Add the problem unless the condition holds."""
        if not holds:
            self.problems.append(problem)

    @property
    @abstractmethod
    def is_good(self) -> bool:
        """Whether nothing is wrong, and the fault did happen."""

    @abstractmethod
    def row(self) -> list[object]:
        """The values of the suite's columns; a single text instead of them."""


def run_suite(
    name: str,
    words: Sequence[str],
    faults: Mapping[str, Callable[[World], Outcome]],
    columns: Sequence[str],
    make_world: Callable[[Path, list[str]], World],
    failed: type[Outcome],
) -> int:
    """Run the faults that the words name; return the exit code: 1 if anything is wrong, 2 for wrong words.

    Args:
        words: `faults=NAME,NAME` and `folder=DIR`, which keeps the runs.
        make_world: from the folder and the names of the faults.
        failed: of a fault that raised.
    """
    options = dict(word.split("=", 1) for word in words if "=" in word)
    names, folder = options.pop("faults", ",".join(faults)).split(","), options.pop("folder", "")
    unknown = [*options, *(word for word in words if "=" not in word), *(n for n in names if n not in faults)]
    if unknown:
        print(f"{' '.join(unknown)}: expected folder=DIR, or faults=, some of {','.join(faults)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as temporary:
        if folder:
            Path(folder).mkdir(parents=True)
        world = make_world(Path(folder or temporary), names)
        print("fault              " + " ".join(f"{column:>11}" for column in columns), flush=True)
        outcomes = {fault: _inject(world, fault, faults[fault], failed) for fault in names}
    good = all(outcome.is_good for outcome in outcomes.values())
    print(json.dumps({name: {fault: asdict(outcome) for fault, outcome in outcomes.items()}, "good": good}))
    return 0 if good else 1


def _inject(world: World, name: str, fault: Callable[[World], Outcome], failed: type[Outcome]) -> Outcome:
    started = time.monotonic()
    try:
        outcome = fault(world)
    except Exception as error:  # one fault's failure must not hide the others'
        outcome = failed(problems=[f"{type(error).__name__}: {error}"])
    outcome.seconds = round(time.monotonic() - started, 1)
    print(f"{name:<18} " + " ".join(f"{value:>11}" for value in outcome.row()), flush=True)
    for problem in outcome.problems:
        print(f"    WRONG: {problem}", flush=True)
    return outcome
