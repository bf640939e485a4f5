"""The chaos suite of training.

    python -m tests.chaos_train [faults=NAME,NAME] [folder=DIR]

A student on labeled and pseudo-labeled images is killed again and again, in one process (names that end in 1) and in two under Ray
Train (2). Every step must see the same images as in an undisturbed run; weights, EMA, momentum and metrics must be the same bytes.
Prints a table and, as its last line, one JSON object; exits 1 if anything differs. `steps lost` are steps after the last checkpoint,
which were repeated; `back s` is the longest time from the start of a continued training to its first step. `folder` keeps the runs
(by default a temporary folder); nothing is resumed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from data.settings import wants_help
from tests.chaos.suite import run_suite
from tests.chaos_train.killing import kill_1, kill_2, rank_lost_2, term_1, term_2
from tests.chaos_train.ledger import COLUMNS, Outcome
from tests.chaos_train.world import World, make_world

FAULTS: dict[str, Callable[[World], Outcome]] = {
    fault.__name__: fault for fault in (kill_1, term_1, kill_2, term_2, rank_lost_2)
}


def main(words: list[str]) -> int:
    """Run the faults named on the command line; return the exit code."""
    if wants_help(words):
        print((__doc__ or "").strip())
        return 0

    def make(folder: Path, names: list[str]) -> World:
        return make_world(folder, {int(name[-1]) for name in names})

    return run_suite("chaos_train", words, FAULTS, COLUMNS, make, Outcome)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
