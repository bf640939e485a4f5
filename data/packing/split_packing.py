"""Pack one split: processes screen its images piece by piece and write its shards; this process gives out the work, in order.

Where a shard begins depends on how many images before it could not be decoded. So a piece is screened before anyone knows its shard,
its bytes wait in a temporary file, and a shard is written when all pieces before its end are screened. Images are read once, and the
shards do not depend on the number of processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path

from ..progress_bar import ProgressBar
from ..shards.split import ShardRecord
from ..shards.write import mark_begun, write_manifest
from .packed_shards import Finished, Part, PlannedShard, find_finished, remove_records, write_planned
from .screening import Screened, SplitJob, screen
from .sidecars import write_sidecars

PIECE = 500  # images: a second or less of one process


def pack_split(
    job: SplitJob, executor: Executor, processes: int, classes: tuple[str, ...] | None, left_out: Iterable[str]
) -> None:
    """Write a split's shards, the files beside them and, last, its manifest. Skips shards that an earlier run finished.

    Args:
        processes: of the executor.
        left_out: lines for `rejected.txt`.

    Raises:
        DataError: the folder has files of no packing; or as `screen`.
    """
    finished = find_finished(job)
    records = [shard.record for shard in finished]
    start = finished[-1].end if finished else 0
    cutter = _Cutter(job.samples_per_shard, len(records))
    with ProgressBar(total=len(job.order), initial=start, desc=job.name, unit="image") as bar:
        writing = _Writing(job, executor, processes)
        for screened in _screen(job, executor, processes, start):
            for shard in cutter.add(screened):
                records += writing.begin(shard)
            bar.update(screened.num_images)
        for shard in cutter.rest(len(job.order)):
            records += writing.begin(shard)
        records += writing.finish()
    write_sidecars(job, len(records), cutter.rejected(), left_out)
    write_manifest(job.folder, records, classes)
    remove_records(job)


def _screen(job: SplitJob, executor: Executor, processes: int, start: int) -> Iterator[Screened]:
    """The pieces from place `start` on, in order; screens a few of them ahead."""
    pending: deque[Future[Screened]] = deque()
    for first in range(start, len(job.order), PIECE):
        pending.append(executor.submit(screen, job, first, min(first + PIECE, len(job.order))))
        if len(pending) >= (2 * processes if processes > 1 else 1):
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@dataclass
class _Cutter:
    """Cut the stream of screened images into shards."""

    samples_per_shard: int
    number: int  # of the next shard
    _parts: list[Part] = field(default_factory=list)
    _count: int = 0
    _rejected: list[tuple[int, str]] = field(default_factory=list)

    def add(self, screened: Screened) -> Iterator[PlannedShard]:
        """Take a piece; yield the shards that it completes."""
        self._rejected += screened.rejected
        images, offset = screened.images, 0
        if not images:
            Path(screened.spool).unlink()
        while images:
            taken, images = (
                images[: self.samples_per_shard - self._count],
                images[self.samples_per_shard - self._count :],
            )
            self._parts.append(Part(screened.spool, offset, taken, is_last=not images))
            self._count += len(taken)
            offset += sum(image.size for image in taken)
            if self._count == self.samples_per_shard:
                yield self._cut(taken[-1].place + 1)

    def rest(self, end: int) -> Iterator[PlannedShard]:
        """The last shard, of fewer images, when all are screened."""
        if self._parts:
            yield self._cut(end)

    def rejected(self) -> list[str]:
        """What was rejected after the last shard."""
        return [line for _, line in self._rejected]

    def _cut(self, end: int) -> PlannedShard:
        rejected = [line for place, line in self._rejected if place < end]
        shard = PlannedShard(self.number, end, self._parts, rejected)
        self._rejected = self._rejected[len(rejected) :]
        self.number, self._parts, self._count = self.number + 1, [], 0
        return shard


class _Writing:
    """Shards that are being written, a few at once, in order."""

    def __init__(self, job: SplitJob, executor: Executor, maximum: int) -> None:
        self._job, self._executor, self._maximum = job, executor, maximum
        self._pending: deque[tuple[PlannedShard, Future[Finished]]] = deque()

    def begin(self, shard: PlannedShard) -> list[ShardRecord]:
        """Begin a shard; return the records of those that are finished since, in order."""
        mark_begun(self._job.folder, self._job.name, shard.number + 1)
        self._pending.append((shard, self._executor.submit(write_planned, self._job, shard)))
        ended = []
        while self._pending and (len(self._pending) > self._maximum or self._pending[0][1].done()):
            ended.append(self._end())
        return ended

    def finish(self) -> list[ShardRecord]:
        """Wait for the others; return their records."""
        return [self._end() for _ in range(len(self._pending))]

    def _end(self) -> ShardRecord:
        shard, future = self._pending.popleft()
        finished = future.result()
        for part in shard.parts:
            if part.is_last:  # shards end in order, so none before needs it
                Path(part.spool).unlink()
        return finished.record
