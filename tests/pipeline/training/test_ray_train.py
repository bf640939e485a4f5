"""Training in two processes under Ray Train."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2.api.exceptions import WorkerGroupError

from data import storage
from data.errors import DataError
from data.shards.split import Split, open_split
from pipeline.core.interrupt import Interrupted, handled
from pipeline.core.ray_runtime import start_ray
from pipeline.inputs.loader import load_batches
from pipeline.inputs.streams import labeled_stream
from pipeline.training import launch
from pipeline.training.job import TrainingError, TrainJob
from pipeline.training.launch import run_training
from pipeline.training.state import load_trained
from tests import HANGS_S
from tests.conftest import WriteDigits, make_writer
from tests.digits_run import Digits
from tests.pipeline.inputs.test_loader import SignalsBlocked
from tests.pipeline.training.test_training import CONFIG
from tests.training_processes import digits_job, train


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    start_ray(None)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> Split:
    folder = tmp_path_factory.mktemp("ray-train")
    make_writer(digits)(folder / "labeled", 0, 100, per_shard=50)
    return open_split(f"{folder}/labeled/*.tar", str(folder / "index"))


def make_job(labeled: Split, folder: Path, **changes: Any) -> TrainJob:
    config = CONFIG.model_copy(
        update={"workers": 2, "epochs": 10, "checkpoint_every_s": 0, "eval_every_epochs": 5} | changes
    )
    streams = (labeled_stream(labeled, config.batch_size),)
    return digits_job(folder, config, streams, labeled.num_samples, validation=labeled)


def saved_step(job: TrainJob) -> int:
    """The newest checkpoint's step."""
    return max((int(name[5:14]) for name in storage.list_names(f"{job.folder}/checkpoints")), default=0)


def kill_a_worker_then_ask_to_stop(job: TrainJob) -> None:
    """Kill one after three steps; send SIGTERM five steps after the restart."""
    import psutil  # Ray brings it

    wait_for_step(job, 3)
    ours = psutil.Process().children(recursive=True)
    workers = [process for process in ours if "RayTrainWorker" in " ".join(process.cmdline())]
    workers[1].kill()
    workers[1].wait()
    wait_for_step(job, saved_step(job) + 5)
    os.kill(os.getpid(), signal.SIGTERM)


def wait_for_step(job: TrainJob, step: int) -> None:
    deadline = time.monotonic() + HANGS_S
    while saved_step(job) < step and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # ray train's own
def test_two_workers_killed_and_stopped_make_the_same_bytes_as_two_undisturbed_processes(
    tmp_path: Path, labeled: Split, ray_here: None, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, broken = make_job(labeled, tmp_path / "whole"), make_job(labeled, tmp_path / "broken", loader_workers=1)
    assert train(whole, world=2) == [0, 0]
    trouble = threading.Thread(target=kill_a_worker_then_ask_to_stop, args=(broken,))
    trouble.start()
    with pytest.raises(Interrupted) as caught, handled():
        run_training(broken, None)
    trouble.join()
    assert caught.value.exit_code == 143
    assert "all are started again from the last checkpoint (1 of teacher.max_failures=3)" in capfd.readouterr().out
    assert 8 <= saved_step(broken) < whole.total_steps, "it did not save and stop"
    run_training(broken, None)
    printed = capfd.readouterr()
    lines = [line for line in printed.out.splitlines() if "validation top-1" in line]
    assert [line.rpartition(": validation")[0] for line in lines] == [
        "teacher: step 25 of 50", "teacher: step 50 of 50",
    ]  # fmt: skip
    assert printed.err.count("teacher: 50 of 50 steps (100 %)") == 1, "one process reports, not both"
    (weights, metrics), (expected, expected_metrics) = (load_trained(job) for job in (broken, whole))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert metrics == expected_metrics
    assert [line["step"] for line in metrics if "validation_top1" in line] == [25, 50]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # ray train's own
def test_a_damaged_image_is_reported_as_in_one_process(
    tmp_path: Path, write_digits: WriteDigits, ray_here: None
) -> None:
    write_digits(tmp_path / "labeled", 0, 40)
    split = open_split(f"{tmp_path}/labeled/*.tar", str(tmp_path / "index"))
    row = split.shards[0].index().to_pylist()[7]
    content = bytearray(storage.read_bytes(split.shards[0].url))
    content[row["offset"] : row["offset"] + 8] = b"no image"
    storage.write_bytes(split.shards[0].url, bytes(content))
    config = CONFIG.model_copy(update={"workers": 2})
    streams = (labeled_stream(split, config.batch_size),)
    job = digits_job(tmp_path / "run", config, streams, split.num_samples)
    with pytest.raises(DataError, match=rf"^{split.shards[0].url}, key '{row['key']}': "):
        run_training(job, None)


def test_more_workers_than_ray_has_processors_are_refused_at_once(
    tmp_path: Path, write_digits: WriteDigits, ray_here: None
) -> None:
    write_digits(tmp_path / "labeled", 0, 10)
    split = open_split(f"{tmp_path}/labeled/*.tar", str(tmp_path / "index"))
    config = CONFIG.model_copy(update={"workers": 1000})
    streams = (labeled_stream(split, config.batch_size),)
    job = digits_job(tmp_path / "run", config, streams, split.num_samples)
    with pytest.raises(TrainingError, match=r"teacher\.workers=1000, but Ray has \d+ CPUs"):
        run_training(job, None)


class Answering:
    def ping(self) -> str:
        return "here"


ANSWERING: Any = ray.remote(num_cpus=0)(Answering)


@pytest.mark.slow
def test_loading_processes_do_not_disturb_the_connection_to_ray(labeled: Split, ray_here: None) -> None:
    """A fork would drop another thread's actor handle, and write to the connection."""
    local, held, done = threading.local(), threading.Event(), threading.Event()

    def hold() -> None:
        local.actor = ANSWERING.remote()
        ray.get(local.actor.ping.remote())
        held.set()
        done.wait()

    threading.Thread(target=hold, daemon=True).start()
    held.wait()
    streams = (labeled_stream(labeled, CONFIG.batch_size),)
    for _ in range(3):
        with closing(SignalsBlocked(streams, CONFIG, 10, seed=0)) as batches:
            blocked = [batch.images.tolist() for batch in load_batches(batches, range(2), 1, False)]
        assert blocked == 2 * [[signal.SIGINT, signal.SIGTERM]]
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(ray.get(ANSWERING.remote().ping.remote())), daemon=True)
    asking.start()
    asking.join(60)
    done.set()
    assert answers == ["here"]


def failing(monkeypatch: pytest.MonkeyPatch, failures: dict[int, Exception]) -> list[TrainJob]:
    """Let every group of processes fail in this way; return the list of their jobs."""
    begun: list[TrainJob] = []

    def run_once(job: TrainJob) -> WorkerGroupError:
        begun.append(job)
        return WorkerGroupError("as Ray tells", failures)

    monkeypatch.setattr(launch, "_run_once", run_once)
    return begun


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        (WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError()), "ActorDiedError"),
        (WorkerHealthCheckTimeoutError("A worker health check timed out."), "WorkerHealthCheckTimeoutError"),
    ],
)
def test_repeated_losses_end_in_an_error_with_their_number(
    tmp_path: Path, labeled: Split, ray_here: None, monkeypatch: pytest.MonkeyPatch, loss: Exception, named: str
) -> None:
    begun = failing(monkeypatch, {0: RuntimeError("Connection closed by peer"), 1: loss})
    with pytest.raises(TrainingError, match=rf"lost \({named}: .*\), 3 times now, and teacher\.max_failures=2; "):
        run_training(make_job(labeled, tmp_path / "run", max_failures=2), None)
    assert len(begun) == 3


def test_an_error_that_would_come_again_is_not_retried(
    tmp_path: Path, labeled: Split, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = failing(monkeypatch, {0: RuntimeError("Connection closed by peer"), 1: DataError("labeled-3.tar, key '7'")})
    with pytest.raises(DataError, match=r"labeled-3\.tar"):
        run_training(make_job(labeled, tmp_path / "run"), None)
    assert len(begun) == 1
