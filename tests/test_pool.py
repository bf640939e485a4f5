"""Labeling actors under Ray: a worker that dies costs nothing, an error in the code stops everything at once."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from data.manifest import Shard
from pipeline.cluster import start_ray
from pipeline.stage import StageError
from teacher.pool import run_on_actors


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[None]:
    start_ray(None)
    yield
    ray.shutdown()


@ray.remote(num_cpus=0)
class Worker:
    """Counts the attempts at each shard in files; dies or fails where its shard's name says so."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def label(self, shard: Shard, url: str) -> str:
        attempts = self._folder / f"{shard.name}-{len(list(self._folder.glob(f'{shard.name}-*')))}"
        attempts.touch()
        if attempts.name == "dies-once-0":
            os._exit(1)
        if shard.name.startswith("always-dies"):
            os._exit(1)
        if shard.name.startswith("fails"):
            raise StageError(f"{shard.url} is wrong")
        return url


def shards(*names: str) -> list[Shard]:
    return [Shard(f"{name}.tar", 0, 0, "", "") for name in names]


def results(folder: Path, *names: str) -> list[str]:
    return sorted(run_on_actors(lambda: Worker.remote(str(folder)), 2, shards(*names), names))  # type: ignore[attr-defined]


def test_every_shard_is_labeled_once(tmp_path: Path) -> None:
    names = [f"s{number}" for number in range(7)]
    assert results(tmp_path, *names) == names
    assert len(list(tmp_path.iterdir())) == 7


def test_a_dead_workers_shard_goes_to_another(tmp_path: Path) -> None:
    assert results(tmp_path, "a", "dies-once", "b") == ["a", "b", "dies-once"]
    assert len(list(tmp_path.glob("dies-once-*"))) == 2


def test_a_shard_that_kills_every_worker_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"always-dies\.tar: 4 labeling workers died"):
        results(tmp_path, "a", "always-dies")


def test_an_error_in_a_worker_stops_the_run_at_once_and_is_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"fails\.tar is wrong"):
        results(tmp_path, "fails", "a")
    assert len(list(tmp_path.glob("fails-*"))) == 1
