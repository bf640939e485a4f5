"""Faults that take away a node, disk space, the run directory, or a worker's CPU (SIGSTOP)."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

from tests.chaos.driver import Driver, left_over, title
from tests.chaos.ledger import Outcome, check_whole, count
from tests.chaos.world import NUM_SHARDS, World

_MEMORY = 80 << 20  # bytes of a node's object store


def _labeled(run_dir: Path) -> int:
    return len(list((run_dir / "gen-1/labels").glob("unlabeled-*.parquet")))


def node_loss(world: World) -> Outcome:
    """Remove a node of a cluster and add another; three times."""
    outcome, run_dir, dice = Outcome(), world.new_run("node-loss"), random.Random(2)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": _MEMORY})
    try:
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=_MEMORY) for _ in range(2)]
        driver = world.start(run_dir, f"ray_address={cluster.address}", "label.workers=1..4", "label.cpus_per_worker=1")
        for share in (1, 2, 3):
            if not driver.wait_for(lambda share=share: _labeled(run_dir) >= share * NUM_SHARDS // 4):  # type: ignore[misc]
                break
            cluster.remove_node(nodes.pop(dice.randrange(len(nodes))), allow_graceful=False)
            outcome.times += 1
            nodes.append(cluster.add_node(num_cpus=1, object_store_memory=_MEMORY))
        outcome.expect(driver.wait() == 0, driver.last_words())
        noise = "Traceback" in driver.output() or "[state-dump]" in driver.output()
        outcome.expect(not noise, f"a lost node's traceback or logs: {driver.last_words()}")
    finally:
        cluster.shutdown()
    count(world, run_dir, outcome)
    return outcome


def disk_full(world: World) -> Outcome:
    """Fill the file system of the labels, then enlarge it; twice."""
    outcome, run_dir = Outcome(), world.new_run("disk-full")
    labels = run_dir / "gen-1/labels"
    labels.mkdir()
    if (problem := _mount(labels, "size=128k")) is not None:
        outcome.skipped = f"cannot mount a small file system here: {problem}"
        return outcome
    try:
        for size in ("size=256k", "size=64m"):
            _fill_up(world, run_dir, outcome)
            _mount(labels, f"remount,{size}")
        driver = world.start(run_dir)
        outcome.expect(driver.wait() == 0, f"it does not continue: {driver.last_words()}")
        count(world, run_dir, outcome)
    finally:
        subprocess.run(["umount", str(labels)], check=False)
    return outcome


def _mount(folder: Path, options: str) -> str | None:
    """Mount a tmpfs; return the error, None if there is none."""
    if not shutil.which("mount"):
        return "no such command as mount"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else None


def _fill_up(world: World, run_dir: Path, outcome: Outcome) -> None:
    driver = world.start(run_dir)
    code, lines = driver.wait(), driver.output().strip().splitlines()
    outcome.times += 1
    outcome.expect(code == 2, f"exit code {code} on a full disk")
    message = lines[-1] if lines else ""
    clear = "No space left" in message and str(run_dir / "gen-1/labels") in message
    outcome.expect(clear, f"the last line on a full disk does not say so: {lines[-3:]}")
    outcome.expect("Traceback" not in driver.output(), "a traceback on a full disk")
    outcome.expect(not list(run_dir.rglob(".tmp-*")), "temporary files are left on a full disk")
    check_whole(world, run_dir, outcome)


def two_drivers(world: World) -> Outcome:
    """Start a second driver on the run directory while the first one labels."""
    outcome, run_dir = Outcome(), world.new_run("two-drivers")
    first = world.start(run_dir)
    first.wait_for((run_dir / "lock.json").exists)
    while outcome.times < 2:
        second = _second(run_dir, world)
        code = second.wait()
        if not first.is_running:
            break
        outcome.times += 1
        outcome.expect(code == 2, f"the second driver's exit code is {code}")
        named = f"in use by process {first.process.pid} on " in second.output()
        outcome.expect(named, f"the second driver does not name the first: {second.last_words()}")
    outcome.expect(first.wait() == 0, first.last_words())
    count(world, run_dir, outcome)
    return outcome


def _second(run_dir: Path, world: World) -> Driver:
    words = ["stage=label", f"config={world.folder}/config.yaml", f"run_dir={run_dir}"]
    return Driver(words, run_dir.with_suffix(".second.log"))


def worker_stop(world: World) -> Outcome:
    """Stop a labeling worker for good (SIGSTOP); twice."""
    outcome, run_dir = Outcome(), world.new_run("worker-stop")
    driver = world.start(run_dir, "label.stall_timeout_s=5", "label.cpus_per_worker=1")
    for share in (1, 2):
        driver.wait_for(lambda share=share: _labeled(run_dir) >= share * NUM_SHARDS // 4)  # type: ignore[misc]
        if driver.wait_for(lambda: _labeling(driver)):
            _labeling(driver)[0].send_signal(signal.SIGSTOP)
            outcome.times += 1
            replaced = driver.wait_for(lambda: driver.output().count("made no progress for 5 s") >= outcome.times)
            outcome.expect(replaced, "a stopped worker was not replaced before the end")
    family = driver.family()
    outcome.expect(driver.wait() == 0, driver.last_words())
    outcome.expect(not left_over(family), "processes are left after the end of a run with stopped workers")
    count(world, run_dir, outcome)
    return outcome


def _labeling(driver: Driver) -> list[psutil.Process]:
    """Workers that label and are not stopped."""
    busy = [worker for worker in driver.workers() if title(worker).startswith("ray::Labeler.label")]
    return [worker for worker in busy if worker.is_running() and worker.status() != psutil.STATUS_STOPPED]
