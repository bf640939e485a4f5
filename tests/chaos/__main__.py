"""The chaos suite of the label stage.

    python -m tests.chaos [faults=NAME,NAME] [folder=DIR]

Inject each fault into runs of `stage=label`. Afterwards every image must be labeled or quarantined exactly once, and labels and
selection must be the same bytes as those of an undisturbed run. Print a table and, as the last line, one JSON object; exit with 1 if an
image is lost or duplicated, bytes differ, or another check fails. `folder` keeps the runs (default: a temporary folder); nothing is
resumed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tests.chaos.killing import driver_kill, driver_term, failpoints_driver, failpoints_worker, worker_kill
from tests.chaos.ledger import Outcome
from tests.chaos.losing import disk_full, node_loss, two_drivers, worker_stop
from tests.chaos.table import print_header, print_row
from tests.chaos.world import World, make_world

FAULTS: dict[str, Callable[[World], Outcome]] = {
    fault.__name__: fault
    for fault in (
        failpoints_driver, failpoints_worker, worker_kill, driver_term, driver_kill, node_loss, disk_full, two_drivers, worker_stop,
    )
}  # fmt: skip
_COLUMNS = ("times", "images", "labels", "quarantined", "lost", "duplicated")


def main(words: list[str]) -> int:
    """Run the named faults; return the exit code."""
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
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        return _run(Path(temporary), names)


def _run(folder: Path, names: list[str]) -> int:
    world = make_world(folder)
    print_header((*_COLUMNS, "same bytes", "seconds"))
    outcomes = {name: _inject(world, name) for name in names}
    good = all(outcome.is_good for outcome in outcomes.values())
    print(json.dumps({"chaos": {name: asdict(outcome) for name, outcome in outcomes.items()}, "good": good}))
    return 0 if good else 1


def _inject(world: World, name: str) -> Outcome:
    started = time.monotonic()
    try:
        outcome = FAULTS[name](world)
    except Exception as error:  # one fault's failure must not hide the others'
        outcome = Outcome(problems=[f"{type(error).__name__}: {error}"])
    outcome.seconds = round(time.monotonic() - started, 1)
    _print(name, outcome)
    return outcome


def _print(name: str, outcome: Outcome) -> None:
    if outcome.skipped:
        print(f"{name:<18} skipped: {outcome.skipped}", flush=True)
        return
    numbers = [*(getattr(outcome, column) for column in _COLUMNS), "yes" if outcome.same else "NO", outcome.seconds]
    print_row(name, numbers, outcome.problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
