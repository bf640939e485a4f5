"""Overhead of Ray Train per training step: `fit()` in a bare process and in a TorchTrainer, alternating every few seconds.

    python -m benchmarks.bench_ray_train [turns=60] [seconds=10]

The training of bench_train (one thread trains, one process loads) runs twice at once; one of the two is always stopped, with all
its child processes (Ray's own, too). So drift of the machine's speed, a tenth within minutes, affects both alike. A turn's rate is
measured between its first and last step; Ray's start is not counted.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from unittest import mock

import torch

from benchmarks.bench_train import CONFIG, NUM_SHARDS, PER_SHARD, in_ray_train
from benchmarks.photos import PHOTOS, make_photos
from benchmarks.trainings import training_job
from data.settings import UsageError, run_command
from data.shards.split import open_split
from pipeline.core.ray_runtime import start_ray
from pipeline.training.job import TrainJob
from pipeline.training.loop import fit
from pipeline.training.progress import TrainingDisplay

KINDS = ("bare", "ray_train")
_STEPS = 1_000_000  # more steps than there is time for
_START_S, _SETTLE_S = 300, 30
_TIMES = "times.txt"


def bench(turns: int = 60, seconds: float = 10, only: str = "", out: str = "runs/bench_ray_train") -> None:
    """Run both in turns and print their rates; with `only`, train as that one until killed."""
    pattern = make_photos(f"{out}/photos", NUM_SHARDS, PER_SHARD, labeled=True)
    if only:
        _train(pattern, only, f"{out}/{only}")
        return
    if turns < 2:
        raise UsageError(f"turns={turns}: expected at least 2, for their standard error")
    with tempfile.TemporaryDirectory(dir=out) as folder:
        _take_turns(folder, turns, seconds)
        rates = {kind: _rates(Path(folder) / kind / _TIMES, seconds / 2) for kind in KINDS}
    pairs = list(zip(*(rates[kind] for kind in KINDS), strict=False))[:turns]
    costs = [1 - ray_train / bare for bare, ray_train in pairs]
    cost, error = mean(costs), stdev(costs) / math.sqrt(len(costs))
    for number, kind in enumerate(KINDS):
        print(f"  {kind:10} {median(pair[number] for pair in pairs):7.3f} steps/s, median of {len(pairs)} turns")
    print(
        f"Ray Train costs {cost:.2%} ± {error:.2%} (mean of the pairs of turns, standard error), median {median(costs):.2%}"
    )
    record = {
        "bench": "ray_train",
        "unit": "share of a step",
        "ours": round(cost, 4),
        "error": round(error, 4),
        "turns": len(pairs),
    }
    print(json.dumps(record))


def _train(pattern: str, kind: str, folder: str) -> None:
    torch.set_num_threads(1)
    Path(folder).mkdir()
    job = training_job(open_split(pattern, "/nonexistent"), CONFIG, _STEPS, len(PHOTOS), "cpu", folder)
    if kind == "ray_train":
        start_ray(None)
        in_ray_train(job, _timed_fit)
    else:
        _timed_fit(job)


def _timed_fit(job: TrainJob) -> None:
    """Run `fit()`; write each step's time at once and display nothing."""
    torch.set_num_threads(1)
    with (Path(job.folder) / _TIMES).open("w") as file:

        def show(_display: TrainingDisplay, _step: int, _loss: float) -> None:
            print(time.monotonic(), file=file, flush=True)

        with mock.patch.object(TrainingDisplay, "show", show):
            fit(job)


def _take_turns(folder: str, turns: int, seconds: float) -> None:
    """Let the trainings alternate; each writes its step times below `folder`."""
    (Path(folder) / "photos").symlink_to(Path(folder).parent.resolve() / "photos")
    trainings: list[subprocess.Popen[bytes]] = []
    try:
        for kind in KINDS:
            command = [sys.executable, "-m", "benchmarks.bench_ray_train", f"only={kind}", f"out={folder}"]
            with (Path(folder) / f"{kind}.txt").open("wb") as file:
                trainings.append(subprocess.Popen(command, start_new_session=True, stdout=file, stderr=file))
            _wait_for_steps(trainings[-1], folder, kind)
            _signal(trainings[-1], signal.SIGSTOP)
        for turn in range(turns + 1):
            for training, kind in zip(trainings, KINDS, strict=True):
                _signal(training, signal.SIGCONT)
                time.sleep(seconds)
                _signal(training, signal.SIGSTOP)
                _expect_running(training, folder, kind)
            print(f"turn {turn} of {turns}", flush=True)
    finally:
        for training in trainings:
            _signal(training, signal.SIGKILL)
            training.wait()


def _wait_for_steps(training: subprocess.Popen[bytes], folder: str, kind: str) -> None:
    """Wait until a training has passed its start-up."""
    times, deadline = Path(folder) / kind / _TIMES, time.monotonic() + _START_S
    while not (times.exists() and times.stat().st_size):
        _expect_running(training, folder, kind)
        if time.monotonic() > deadline:
            raise RuntimeError(f"{kind} made no step in {_START_S} s")
        time.sleep(1)
    time.sleep(_SETTLE_S)


def _expect_running(training: subprocess.Popen[bytes], folder: str, kind: str) -> None:
    if training.poll() is not None:
        messages = (Path(folder) / f"{kind}.txt").read_text()
        raise RuntimeError(f"{kind} ended with {training.returncode}:\n{messages[-2000:]}")


def _signal(training: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to a process and its descendants."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        children.setdefault(int(fields[1]), []).append(int(status.parent.name))
    todo = [training.pid]
    for process in todo:
        todo += children.get(process, [])
    for process in todo:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue


def _rates(file: Path, pause: float) -> list[float]:
    """Return steps per second of each turn but the first and last; a step that took at least `pause` seconds separates turns."""
    times = [float(line) for line in file.read_text().splitlines()]
    turns: list[list[float]] = [[times[0]]]
    for before, now in pairwise(times):
        if now - before >= pause:
            turns.append([])
        turns[-1].append(now)
    return [(len(turn) - 1) / (turn[-1] - turn[0]) for turn in turns[1:-1] if len(turn) > 1]


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))
