"""Faults that end a training: at a random step, or when asked to."""

from __future__ import annotations

import random
import signal
from contextlib import suppress
from pathlib import Path

import psutil

from tests.chaos.driver import Driver, title
from tests.chaos_train.ledger import Outcome, count
from tests.chaos_train.world import STEPS, World

TIMES = 20  # of random faults in one process
_FEWER = 6  # in two, where each start takes Ray's time as well
_ONCE_A_WHILE = "student.checkpoint_every_s=0.3"


def kill_1(world: World) -> Outcome:
    """The process is killed (SIGKILL) at twenty random steps, one after the other, in one run."""
    return _kill_at_steps(world, 1, TIMES)


def kill_2(world: World) -> Outcome:
    """The second of two Ray Train workers is killed at random steps, and nothing is started again but by the same command."""
    return _kill_at_steps(world, 2, _FEWER)


def _kill_at_steps(world: World, workers: int, times: int) -> Outcome:
    outcome, run_dir = Outcome(), world.new_run(f"kill-{workers}")
    words = (f"student.workers={workers}", _ONCE_A_WHILE, "student.max_failures=0")
    expected = -signal.SIGKILL if workers == 1 else 2
    for step in sorted(random.Random(workers).sample(range(STEPS), times)):
        driver = world.start(run_dir, *words, failpoint=f"step-{step}/student/rank-{workers - 1}")
        code = driver.wait()
        outcome.expect(code == expected, f"step {step}: exit code {code}: {driver.last_words()}")
        outcome.times += code == expected
    _finish(world, run_dir, workers, outcome)
    return outcome


def term_1(world: World) -> Outcome:
    """The command gets SIGTERM in the middle of the training, five times."""
    return _terminate(world, 1, 5)


def term_2(world: World) -> Outcome:
    """The same with two Ray Train workers, three times."""
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
            "the same command again" in driver.output(), f"no word of how to continue: {driver.last_words()}"
        )
        outcome.expect("Traceback" not in driver.output(), f"a traceback after SIGTERM: {driver.last_words()}")
    _finish(world, run_dir, workers, outcome)
    outcome.expect(outcome.steps_lost == 0, f"{outcome.steps_lost} steps were lost, though each SIGTERM saves")
    return outcome


def rank_lost_2(world: World) -> Outcome:
    """Twice in one command, one of two Ray Train workers is killed, and Ray Train starts both again."""
    outcome, run_dir = Outcome(), world.new_run("rank-lost-2")
    driver = world.start(run_dir, "student.workers=2", "student.checkpoint_every_s=0", "student.max_failures=2")
    for share in (1, 2):
        if driver.wait_for(lambda share=share: saved(run_dir) >= share * STEPS // 4):  # type: ignore[misc]
            outcome.times += _kill_one(driver)
    outcome.expect(driver.wait() == 0, driver.last_words())
    told = driver.output().count("all are started again from the last checkpoint")
    outcome.expect(told == outcome.times, f"{told} lost workers are told of, {outcome.times} were killed")
    outcome.expect("Traceback" not in driver.output(), f"a traceback of a worker's death: {driver.last_words()}")
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
