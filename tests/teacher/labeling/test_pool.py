"""The pool of labeling actors: a worker that dies or hangs is replaced; an error in the code stops the run at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import ray

from data.labels.label_files import LabeledShard
from data.shards.split import Shard
from pipeline.core import interrupt
from pipeline.core.ray_runtime import start_ray
from pipeline.core.stage import StageError, WorkerError
from teacher.labeling import pool as pool_module
from teacher.labeling.pool import PoolOptions, ShardPool, _Worker, here
from tests.conftest import Clock


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[object]:
    """Start Ray; yield the SIGTERM handler from before."""
    handler = signal.getsignal(signal.SIGTERM)
    start_ray(None)
    yield handler
    ray.shutdown()


def test_ray_does_not_take_sigterm_away(ray_here: object) -> None:
    assert signal.getsignal(signal.SIGTERM) == ray_here


@ray.remote(num_cpus=0, concurrency_groups={"labeling": 2, "asking": 1})  # type: ignore[call-overload]
class Worker:
    """Count the attempts at each shard in files; die, hang or fail as the shard's name says."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._images = 0

    @ray.method(concurrency_group="asking")
    def place(self) -> tuple[str, int]:
        return here()

    def prepare(self) -> None:
        if (self._folder / "no-start").exists():
            os._exit(1)
        with suppress(FileExistsError):
            (self._folder / "hangs-in-prepare").touch(exist_ok=False)
            threading.Event().wait()
        (self._folder / f"worker-{os.getpid()}").touch()

    @ray.method(concurrency_group="labeling")
    def label(self, shard: Shard, url: str, careful: bool) -> LabeledShard:
        if careful:
            (self._folder / f"careful-{shard.name}").touch()
        if shard.name == "dies-unless-careful" and not careful:
            os._exit(1)
        attempt = len(list(self._folder.glob(f"{shard.name}-*")))
        (self._folder / f"{shard.name}-{attempt}").touch()
        if shard.name.startswith("always-dies") or (shard.name == "dies-once" and attempt == 0):
            time.sleep(0.2)
            os._exit(1)
        if shard.name == "hangs-once" and attempt == 0:
            threading.Event().wait()
        if shard.name == "stops-once" and attempt == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            threading.Event().wait()  # another thread may have to take the signal first
        if shard.name == "wrong":
            raise StageError(f"{shard.url} is wrong")
        if shard.name == "bug":
            raise KeyError("a bug")
        if shard.name.startswith("waits-for-two"):
            while len(list(self._folder.glob("worker-*"))) < 2:
                time.sleep(0.1)
        if shard.name == "slow":
            for _ in range(20):
                time.sleep(0.2)
                self._images += 1
        self._images += 10
        return LabeledShard(shard.name, 0, url, 10, 0, 0, "", "")

    @ray.method(concurrency_group="asking")
    def progress(self) -> tuple[int, dict[str, float]]:
        return self._images, {"model": 1.0}


def pool(
    folder: Path, *names: str, least: int = 2, most: int = 2, stall: float = 60.0, cpus: float = 0, start: float = 300,
    hangs: bool = False,
) -> ShardPool:  # fmt: skip
    """Make a pool; with `hangs`, the first worker that starts hangs in `prepare`."""
    if not hangs:
        (folder / "hangs-in-prepare").touch()
    options = PoolOptions(least, most, {"CPU": cpus}, stall_timeout_s=stall, start_timeout_s=start)
    shards = [Shard(f"{name}.tar", 0, 10, "", "") for name in names]
    make = Worker.options(num_cpus=cpus).remote  # type: ignore[attr-defined]
    return ShardPool(lambda: make(str(folder)), options, shards, [f"{name}.parquet" for name in names])


def results(some: ShardPool) -> list[str]:
    return sorted(result.name for result in some.run() if result is not None)


def attempts(folder: Path, name: str) -> int:
    return len(list(folder.glob(f"{name}-*")))


def test_every_shard_is_labeled_once(tmp_path: Path) -> None:
    names = [f"s{number}" for number in range(20)]
    assert results(pool(tmp_path, *names)) == sorted(names)
    assert all(attempts(tmp_path, name) == 1 for name in names)


def test_a_dead_workers_shards_go_to_another(tmp_path: Path) -> None:
    names = ["a", "dies-once", *(f"s{number}" for number in range(8))]
    some = pool(tmp_path, *names)
    assert results(some) == sorted(names)
    assert attempts(tmp_path, "dies-once") == 2
    assert some.replaced == 1


@pytest.mark.slow
def test_a_shard_that_kills_every_worker_is_named_and_not_the_ones_beside_it(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"^always-dies\.tar: 7 labeling workers .* were lost at it"):
        results(pool(tmp_path, "a", "always-dies", *(f"s{number}" for number in range(30))))


@pytest.mark.slow
def test_a_shard_that_workers_were_lost_at_is_tried_with_care(tmp_path: Path) -> None:
    names = ["a", "dies-once", "dies-unless-careful"]
    assert results(pool(tmp_path, *names)) == names
    assert [path.name for path in tmp_path.glob("careful-*")] == ["careful-dies-unless-careful"]


@pytest.mark.slow
def test_a_worker_that_ray_ended_for_its_memory_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [
        ray.exceptions.OutOfMemoryError("the node ran low on memory")
    ]  # neither a dead actor's error nor a task's

    def get(ref: ray.ObjectRef) -> object:
        answer = ray_get(ref)
        if isinstance(answer, LabeledShard) and errors:
            raise errors.pop()
        return answer

    ray_get = ray.get
    monkeypatch.setattr("teacher.labeling.pool.ray.get", get)
    some = pool(tmp_path, "a", "b", "c")
    assert results(some) == ["a", "b", "c"]
    assert some.replaced == 1


def test_no_worker_is_started_for_a_shard_that_another_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = pool(tmp_path, "a", "b", least=2, most=2)
    busy = _Worker(actor="busy", starting=None, jobs={"a": some._queue.pop(), "b": some._queue.pop()})  # type: ignore[arg-type,dict-item]
    some._workers.append(busy)
    monkeypatch.setattr(some, "_make_actor", lambda: pytest.fail("it would have nothing to do"))
    some._resize()
    assert some._workers == [busy]


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results(pool(tmp_path, "a", "hangs-once", stall=2)) == ["a", "hangs-once"]
    assert attempts(tmp_path, "hangs-once") >= 2  # on a busy machine, a later one may seem to hang
    assert "made no progress for 2 s" in capsys.readouterr().out


@pytest.mark.slow
def test_a_stopped_worker_is_ended_and_its_room_is_another_ones(tmp_path: Path) -> None:
    some = pool(tmp_path, "stops-once", "a", least=1, most=1, stall=2, cpus=ray.cluster_resources()["CPU"])
    assert results(some) == ["a", "stops-once"]
    assert attempts(tmp_path, "stops-once") >= 2


def signalled(some: ShardPool, folder: Path, number: signal.Signals) -> None:
    """Run the pool, and send this process a signal while it waits for the first shard."""
    for _ in some.run():
        if attempts(folder, "slow") == 1:
            threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
            (folder / "slow-signalled").touch()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_at_once_and_as_what_it_is(tmp_path: Path, number: signal.Signals) -> None:
    with interrupt.handled(), pytest.raises(interrupt.Interrupted, match=number.name):
        signalled(pool(tmp_path, "slow"), tmp_path, number)


def wrapped() -> None:
    """Raise what Ray's compiled calls raise if a signal arrives while they run."""
    with interrupt.handled():
        raise SystemError("returned a result with an exception set") from interrupt.Interrupted(signal.SIGTERM)


def test_a_signal_inside_of_rays_compiled_calls_is_still_a_signal() -> None:
    with pytest.raises(interrupt.Interrupted, match="SIGTERM"):
        wrapped()


def test_a_users_error_in_a_worker_stops_the_run_at_once_and_is_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"^wrong\.tar is wrong$"):
        results(pool(tmp_path, "wrong", "a"))
    assert attempts(tmp_path, "wrong") == 1


def test_a_bug_stops_the_run_with_its_traceback_once(tmp_path: Path) -> None:
    with pytest.raises(WorkerError) as caught:
        results(pool(tmp_path, "bug", "a"))
    assert str(caught.value).count("KeyError: 'a bug'") == 1
    assert "test_pool.py" in str(caught.value)


@pytest.mark.slow
def test_workers_that_never_start_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "no-start").touch()
    with pytest.raises(StageError, match="3 labeling workers in a row died"):
        results(pool(tmp_path, "a"))


def test_a_pool_uses_the_room_there_is_and_no_more(tmp_path: Path) -> None:
    cpus = ray.cluster_resources()["CPU"]
    names = [f"waits-for-two-{number}" for number in range(6)]
    some = pool(tmp_path, *names, least=1, most=9, cpus=cpus / 2)
    assert results(some) == sorted(names)
    assert len(list(tmp_path.glob("worker-*"))) == 2


@pytest.mark.slow
def test_more_workers_than_there_is_room_for_do_not_keep_the_others_waiting(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    assert results(pool(tmp_path, *names, least=3, most=3, cpus=ray.cluster_resources()["CPU"])) == names


@pytest.mark.slow
def test_a_worker_that_hangs_as_it_gets_ready_does_not_stop_the_pools_growth(tmp_path: Path) -> None:
    names = [f"waits-for-two-{number}" for number in range(4)]
    some = pool(tmp_path, *names, least=1, most=4, hangs=True)
    assert results(some) == sorted(names)
    assert some.replaced == 0
    assert len(list(tmp_path.glob("worker-*"))) >= 2


class Unready:
    """An actor that is never ready."""

    class _Method:
        def remote(self) -> str:
            return f"reference {id(self)}"

    def __init__(self) -> None:
        self.place, self.prepare = self._Method(), self._Method()


@pytest.fixture
def unready(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> ShardPool:
    """A pool on a cluster with unlimited room; its workers are placed at once and never ready."""
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1000.0})
    monkeypatch.setattr(pool_module, "_end_process", lambda worker: None)
    some = pool(tmp_path, *(f"s{number}" for number in range(32)), least=1, most=16, start=600)
    monkeypatch.setattr(some, "_make_actor", Unready)
    return some


def get_ready(some: ShardPool, worker: _Worker) -> None:
    assert worker.starting is not None
    some._accept(worker, worker.starting, None)


def place_all(some: ShardPool) -> None:
    for worker in some._workers:
        if worker.placing is not None:
            some._accept(worker, worker.placing, ("node", 1))


def test_the_pool_grows_to_its_size_whether_others_are_ready_or_not(unready: ShardPool) -> None:
    for number in range(1, 17):
        unready._resize()
        assert len(unready._workers) == number, "one at a time: what is free is known only once it is placed"
        unready._resize()
        place_all(unready)
    unready._resize()
    assert len(unready._workers) == 16


def test_a_worker_that_says_nothing_of_its_place_keeps_others_waiting_for_a_minute_only(
    unready: ShardPool, clock: Clock
) -> None:
    unready._resize()
    clock.now += 59
    unready._resize()
    assert len(unready._workers) == 1
    clock.now += 2
    unready._resize()
    assert len(unready._workers) == 2


def test_a_worker_that_is_never_ready_is_replaced_while_others_work(
    unready: ShardPool, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    unready._resize()
    place_all(unready)
    (ready,) = unready._workers
    get_ready(unready, ready)
    for number in range(1, 6):
        unready._resize()
        place_all(unready)
        clock.now = unready._ticked_at = clock.now + 601
        unready._replace_unready()
        assert unready._workers == [ready]
        assert unready.replaced == number
        if number >= 3:  # in a row: not at once again
            unready._resize()
            assert unready._workers == [ready]
            clock.now += 601
    assert "ran for 600 s (label.start_timeout_s) before it had loaded the model; another" in capsys.readouterr().out


def test_without_one_that_is_ready_those_that_never_are_stop_the_run(unready: ShardPool, clock: Clock) -> None:
    unready._resize()
    place_all(unready)
    unready._resize()
    place_all(unready)
    unready._resize()
    place_all(unready)
    clock.now += 601
    with pytest.raises(
        StageError, match=r"3 labeling workers in a row ran for 600 s .* before they had loaded the model"
    ):
        unready._replace_unready()


@pytest.mark.parametrize(("seconds", "is_lost"), [(59, False), (61, True)])
@pytest.mark.parametrize("makes_progress", [False, True])
def test_a_worker_without_progress_for_the_timeout_is_replaced(
    unready: ShardPool, clock: Clock, seconds: float, is_lost: bool, makes_progress: bool
) -> None:
    unready._resize()
    (worker,) = unready._workers
    get_ready(unready, worker)
    worker.jobs["a"] = unready._queue.popleft()  # type: ignore[index]
    for _ in range(4):
        worker.progress_request = "requested"  # type: ignore[assignment]
        clock.now = unready._ticked_at = clock.now + seconds / 4
        if makes_progress:
            assert worker.progress_request is not None
            unready._accept(worker, worker.progress_request, (worker.images + 1, {"model": 1.0}))
        unready._replace_stalled()
    assert (unready._workers == []) == (is_lost and not makes_progress)
