"""The chaos suite of training.

    python -m tests.chaos_train [faults=NAME,NAME] [folder=DIR]

A student on labeled and pseudo-labeled images is killed again and again, in one process (names that end in 1) and in two under Ray
Train (2). Every step must see the same images as in an undisturbed run; weights, EMA, momentum and metrics must be the same bytes.
Prints a table and, as its last line, one JSON object; exits 1 if anything differs. `steps lost` are steps after the last checkpoint,
which were repeated; `back s` is the longest time from the start of a continued training to its first step. `folder` keeps the runs
(by default a temporary folder); nothing is resumed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tests.chaos.table import print_header, print_row
from tests.chaos_train.killing import kill_1, kill_2, rank_lost_2, term_1, term_2
from tests.chaos_train.ledger import COLUMNS, Outcome
from tests.chaos_train.world import World, make_world

FAULTS: dict[str, Callable[[World], Outcome]] = {
    fault.__name__: fault for fault in (kill_1, term_1, kill_2, term_2, rank_lost_2)
}


def main(words: list[str]) -> int:
    """Run the faults named on the command line; return the exit code."""
    options = dict(word.split("=", 1) for word in words if "=" in word)
    names = options.pop("faults", ",".join(FAULTS)).split(",")
    folder = options.pop("folder", "")
    unknown = [*options, *(word for word in words if "=" not in word), *(n for n in names if n not in FAULTS)]
    if unknown:
        print(f"{' '.join(unknown)}: expected folder=DIR, or faults=, some of {','.join(FAULTS)}", file=sys.stderr)
        return 2
    if folder:
        Path(folder).mkdir(parents=True)
        return _run(Path(folder), names)
    with tempfile.TemporaryDirectory(prefix="chaos-train-") as temporary:
        return _run(Path(temporary), names)


def _run(folder: Path, names: list[str]) -> int:
    world = make_world(folder, {int(name[-1]) for name in names})
    print_header(COLUMNS)
    outcomes = {name: _inject(world, name) for name in names}
    good = all(outcome.is_good for outcome in outcomes.values())
    print(json.dumps({"chaos_train": {name: asdict(outcome) for name, outcome in outcomes.items()}, "good": good}))
    return 0 if good else 1


def _inject(world: World, name: str) -> Outcome:
    started = time.monotonic()
    try:
        outcome = FAULTS[name](world)
    except Exception as error:  # a failure must not hide those of other faults
        outcome = Outcome(problems=[f"{type(error).__name__}: {error}"])
    outcome.seconds = round(time.monotonic() - started, 1)
    print_row(name, outcome.row(), outcome.problems)
    return outcome


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
