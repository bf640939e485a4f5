"""The chaos suite of the label stage.

    python -m tests.chaos [faults=NAME,NAME] [folder=DIR]

Inject each fault into runs of `stage=label`. Afterwards every image must be labeled or quarantined exactly once, and labels and
selection must be the same bytes as those of an undisturbed run. Print a table and, as the last line, one JSON object; exit with 1 if an
image is lost or duplicated, bytes differ, or another check fails. `folder` keeps the runs (default: a temporary folder); nothing is
resumed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from data.settings import wants_help
from tests.chaos.killing import driver_kill, driver_term, failpoints_driver, failpoints_worker, worker_kill
from tests.chaos.ledger import COLUMNS, Outcome
from tests.chaos.losing import disk_full, node_loss, two_drivers, worker_stop
from tests.chaos.suite import run_suite
from tests.chaos.world import World, make_world

FAULTS: dict[str, Callable[[World], Outcome]] = {
    fault.__name__: fault
    for fault in (
        failpoints_driver, failpoints_worker, worker_kill, driver_term, driver_kill, node_loss, disk_full, two_drivers, worker_stop,
    )
}  # fmt: skip


def main(words: list[str]) -> int:
    """Run the named faults; return the exit code."""
    if wants_help(words):
        print((__doc__ or "").strip())
        return 0
    columns = (*COLUMNS, "same bytes", "seconds")
    return run_suite("chaos", words, FAULTS, columns, lambda folder, _: make_world(folder), Outcome)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
