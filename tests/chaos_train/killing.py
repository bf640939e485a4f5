"""Faults that end a training: SIGKILL at a random step, or SIGTERM."""

from __future__ import annotations

import random
import signal
from contextlib import suppress
from pathlib import Path

import psutil

from tests.chaos.driver import Driver, title
from tests.chaos_train.ledger import Outcome, count
from tests.chaos_train.world import STEPS, World

TIMES = 20  # kills of one process
_FEWER = 6  # kills of two processes: each start waits for Ray
_SOME_CHECKPOINTS = "student.checkpoint_every_s=0.3"


def kill_1(world: World) -> Outcome:
    """Kill the process (SIGKILL) at twenty random steps of one run, one after the other."""
    return _kill_at_steps(world, 1, TIMES)


def kill_2(world: World) -> Outcome:
    """Kill the second of two Ray Train workers at random steps; only the same command starts them again."""
    return _kill_at_steps(world, 2, _FEWER)


def _kill_at_steps(world: World, workers: int, times: int) -> Outcome:
    outcome, run_dir = Outcome(), world.new_run(f"kill-{workers}")
    words = (f"student.workers={workers}", _SOME_CHECKPOINTS, "student.max_failures=0")
    expected = -signal.SIGKILL if workers == 1 else 2
    for step in sorted(random.Random(workers).sample(range(STEPS), times)):
        driver = world.start(run_dir, *words, failpoint=f"step-{step}/student/rank-{workers - 1}")
        code = driver.wait()
        outcome.expect(code == expected, f"step {step}: exit code {code}: {driver.last_words()}")
        outcome.times += code == expected
    _finish(world, run_dir, workers, outcome)
    return outcome


def term_1(world: World) -> Outcome:
    """Send SIGTERM to the command in the middle of the training, five times."""
    return _terminate(world, 1, 5)


def term_2(world: World) -> Outcome:
    """As `term_1` with two Ray Train workers, three times."""
    return _terminate(world, 2, 3)


def _terminate(world: World, workers: int, times: int) -> Outcome:
    outcome, run_dir = Outcome(), world.new_run(f"term-{workers}")
    words = (f"student.workers={workers}", "student.checkpoint_every_s=0")
    for number in range(times):
        driver = world.start(run_dir, *words)
        if not driver.wait_for(lambda number=number: saved(run_dir) >= STEPS * (number + 1) // (times + 2)):  # type: ignore[misc]
            outcome.expect(False, f"it ended before it could be stopped: {driver.last_words()}")
            break
        code, _, _ = driver.stop(signal.SIGTERM)
        outcome.times += 1
        outcome.expect(code == 128 + signal.SIGTERM, f"exit code {code} after SIGTERM: {driver.last_words()}")
        outcome.expect(
            "the same command again" in driver.output(), f"does not say how to continue: {driver.last_words()}"
        )
        outcome.expect("Traceback" not in driver.output(), f"a traceback after SIGTERM: {driver.last_words()}")
    _finish(world, run_dir, workers, outcome)
    outcome.expect(outcome.steps_lost == 0, f"{outcome.steps_lost} steps were lost, though each SIGTERM saves")
    return outcome


def rank_lost_2(world: World) -> Outcome:
    """Kill one of two Ray Train workers, twice in one command, which starts both again."""
    outcome, run_dir = Outcome(), world.new_run("rank-lost-2")
    driver = world.start(run_dir, "student.workers=2", "student.checkpoint_every_s=0", "student.max_failures=2")
    for share in (1, 2):
        if driver.wait_for(lambda share=share: saved(run_dir) >= share * STEPS // 4):  # type: ignore[misc]
            outcome.times += _kill_one(driver)
    outcome.expect(driver.wait() == 0, driver.last_words())
    reported = driver.output().count("all are started again from the last checkpoint")
    outcome.expect(reported == outcome.times, f"{reported} lost workers are reported, {outcome.times} were killed")
    outcome.expect("Traceback" not in driver.output(), f"a traceback for a killed worker: {driver.last_words()}")
    count(world, run_dir, 2, outcome)
    return outcome


def _kill_one(driver: Driver) -> bool:
    workers = [process for process in driver.family() if "RayTrainWorker" in title(process)]
    with suppress(psutil.Error):
        if workers:
            random.Random(0).choice(workers).kill()
            return True
    return False


def saved(run_dir: Path) -> int:
    """The newest checkpoint's step."""
    names = sorted(path.stem for path in (run_dir / "gen-1/student/checkpoints").glob("step-*.pt"))
    return int(names[-1].removeprefix("step-")) if names else 0


def _finish(world: World, run_dir: Path, workers: int, outcome: Outcome) -> None:
    driver = world.start(run_dir, f"student.workers={workers}")
    outcome.expect(driver.wait() == 0, f"{run_dir.name} does not continue: {driver.last_words()}")
    count(world, run_dir, workers, outcome)
