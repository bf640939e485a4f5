"""Faults that kill a process: at a step of a commit, or at a random moment."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import psutil

from tests.chaos.driver import Driver, left_over
from tests.chaos.ledger import Outcome, check_whole, count
from tests.chaos.world import World

STEPS = ("before-write", "after-write", "before-rename", "after-rename")
# In the order in which the driver reaches them: each kill resumes from the one before.
# tests/data/storage/test_failpoints.py has all failpoints.
_DRIVERS = [
    *(
        f"before-rename/{file}"
        for file in ("lock.json", "config.yaml", "started.json", "journal.json", "quarantine.parquet")
    ),
    *(f"{step}/manifest.json" for step in STEPS),
    "before-done/label",
    *(f"{step}/done.json" for step in STEPS),
    "before-rename/selection.json",
    "before-done/select",
    "before-rename/done.json",
    "after-done/select",
    "before-rename/current",
]
TIMES = 10  # number of random faults


def failpoints_driver(world: World) -> Outcome:
    """Kill the driver at the steps of its commits, and start it again."""
    outcome, run_dir = Outcome(), world.new_run("failpoints-driver")
    for failpoint in _DRIVERS:
        _kill_at(world, run_dir, failpoint, outcome)
    _finish(world, run_dir, outcome)
    _before_the_done_marker(world.reference, again := world.folder / "failpoints-after-done")
    _kill_at(world, again, "after-done/label", outcome)
    _finish(world, again, outcome)
    return outcome


def _before_the_done_marker(finished: Path, run_dir: Path) -> None:
    shutil.copytree(finished, run_dir)
    (run_dir / "gen-1/labels/done.json").unlink()


def _kill_at(world: World, run_dir: Path, failpoint: str, outcome: Outcome) -> None:
    code = world.start(run_dir, failpoint=failpoint).wait()
    outcome.expect(code == -signal.SIGKILL, f"{failpoint}: exit code {code}, not killed there")
    outcome.times += code == -signal.SIGKILL
    check_whole(world, run_dir, outcome)


def failpoints_worker(world: World) -> Outcome:
    """Kill every worker at each step of its eighth commit; then at its first, until the stage gives up."""
    outcome = Outcome()
    for step in STEPS:
        run_dir = world.new_run(f"failpoints-worker-{step}")
        driver = world.start(run_dir, failpoint=f"{step}/unlabeled-*.parquet:8")
        # the driver has the failpoint too: the selection has files of the same names
        outcome.expect(driver.wait() in (0, -signal.SIGKILL), f"{step}: {driver.last_words()}")
        outcome.expect((run_dir / "gen-1/labels/done.json").exists(), f"{step}: not done with other workers")
        outcome.times += _workers_lost(driver)
        _finish(world, run_dir, outcome)
    run_dir = world.new_run("failpoints-worker-first")
    driver = world.start(run_dir, failpoint=f"{STEPS[0]}/unlabeled-*.parquet")
    outcome.expect(driver.wait() == 2, "every worker was killed at its first commit, but the exit code is not 2")
    outcome.expect(
        "labeling workers that had no other shard were lost at it" in driver.output(),
        "the message does not name the shard",
    )
    outcome.times += _workers_lost(driver)
    check_whole(world, run_dir, outcome)
    _finish(world, run_dir, outcome)
    return outcome


def _workers_lost(driver: Driver) -> int:
    return driver.output().count("its work goes to another")


def worker_kill(world: World) -> Outcome:
    """Kill a random labeling worker every few seconds, ten times in all."""
    outcome, dice = Outcome(), random.Random(0)
    for number in range(TIMES):
        driver = world.start(run_dir := world.new_run(f"worker-kill-{number}"))
        while driver.is_running:
            outcome.times += _kill_one(driver, dice)
            with suppress(psutil.TimeoutExpired):
                driver.process.wait(dice.uniform(2, 5))
        outcome.expect(driver.wait() == 0, f"{run_dir.name}: {driver.last_words()}")
        outcome.expect("Traceback" not in driver.output(), f"{run_dir.name}: a traceback of a worker's death")
        count(world, run_dir, outcome)
        if outcome.times >= TIMES:
            break
    return outcome


def _kill_one(driver: Driver, dice: random.Random) -> bool:
    workers = driver.workers()
    with suppress(psutil.Error):
        if workers:
            dice.choice(workers).kill()
            return True
    return False


def driver_term(world: World) -> Outcome:
    """Send SIGTERM to the driver at a random moment and run the same command again; ten times."""
    return _stop_driver(world, signal.SIGTERM, TIMES)


def driver_kill(world: World) -> Outcome:
    """Send SIGKILL to the driver at a random moment and run the same command again at once; five times."""
    return _stop_driver(world, signal.SIGKILL, TIMES // 2)


def _stop_driver(world: World, number: signal.Signals, times: int) -> Outcome:
    outcome, dice = Outcome(), random.Random(1)
    run_dirs = (world.new_run(f"{number.name}-{which}") for which in itertools.count())
    run_dir, family = next(run_dirs), list[psutil.Process]()
    while outcome.times < times:
        driver = world.start(run_dir)
        _expect_gone(family, number, outcome)  # the previous driver's processes: this one started beside them
        with suppress(psutil.TimeoutExpired):
            driver.process.wait(dice.uniform(1, 0.8 * world.seconds))
        if driver.is_running:
            outcome.times += 1
            family = _check_stop(driver, number, outcome)
            check_whole(world, run_dir, outcome)
        else:
            outcome.expect(driver.wait() == 0, driver.last_words())
            count(world, run_dir, outcome)
            run_dir = next(run_dirs)
    _expect_gone(family, number, outcome)
    _finish(world, run_dir, outcome)
    return outcome


def _expect_gone(family: list[psutil.Process], number: signal.Signals, outcome: Outcome) -> None:
    left = left_over(family)
    outcome.expect(not left, f"left running after {number.name}: {left}")


def _check_stop(driver: Driver, number: signal.Signals, outcome: Outcome) -> list[psutil.Process]:
    """Stop the driver and check how it ends; return the processes that it had started."""
    code, seconds, family = driver.stop(number)
    if number == signal.SIGKILL:
        outcome.expect(code == -number, f"exit code {code} after {number.name}")
    elif code != -number:  # killed by the signal itself: soon after its start the command handles none yet
        outcome.expect(code == 128 + number, f"exit code {code} after {number.name}")
        outcome.expect(
            "the same command again" in driver.output(),
            f"the output does not tell how to continue: {driver.last_words()}",
        )
    outcome.expect(seconds < 10, f"{seconds:.0f} s from {number.name} to the end")
    outcome.expect("Traceback" not in driver.output(), f"a traceback after {number.name}: {driver.last_words()}")
    return family


def _finish(world: World, run_dir: Path, outcome: Outcome) -> None:
    driver = world.start(run_dir)
    outcome.expect(driver.wait() == 0, f"{run_dir.name} does not continue: {driver.last_words()}")
    count(world, run_dir, outcome)
