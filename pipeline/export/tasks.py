"""The files of an export as Ray tasks, some at a time, with a progress bar; what is there already is not made again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from tqdm import tqdm

from data.shards.split import ShardRecord
from pipeline.core.ray_runtime import num_cpus, user_error
from pipeline.export.todo import File, Job, make_file

_AHEAD = 2  # tasks waiting for each CPU


def make_files(job: Job, files: Iterable[File], there: Mapping[str, ShardRecord], total: int) -> list[ShardRecord]:
    """The records of all files, in order.

    Args:
        there: files that are whole already, by name.
        total: samples in all files.

    Raises:
        what `make_file` raises, when that is a ValueError or an OSError; of a bug, all that Ray tells.
    """
    records: list[ShardRecord | None] = []
    running: dict[ray.ObjectRef[Any], int] = {}
    shared, most = ray.put(job), _AHEAD * num_cpus()
    with tqdm(total=total, desc="export", unit="image", unit_scale=True, mininterval=1) as bar:
        try:
            for file in files:
                records.append(there.get(file.name))
                if records[-1] is not None:
                    bar.update(file.num_samples)
                    continue
                running[_run.remote(shared, file)] = len(records) - 1
                while len(running) >= most:
                    _take_one(running, records, bar)
            while running:
                _take_one(running, records, bar)
        except RayError as error:
            raise user_error(error) from None
    return list(_all(records))


@ray.remote(num_cpus=1)
def _run(job: Job, file: File) -> ShardRecord:
    return make_file(job, file)


def _take_one(running: dict[ray.ObjectRef[Any], int], records: list[ShardRecord | None], bar: tqdm[Any]) -> None:
    (ended,), _ = ray.wait(list(running), num_returns=1)
    record = ray.get(ended)
    records[running.pop(ended)] = record
    bar.update(record.num_samples)


def _all(records: Iterable[ShardRecord | None]) -> Iterator[ShardRecord]:
    for record in records:
        assert record is not None, "every file was made or there"
        yield record
