"""Label one shard: every sample becomes a label or a quarantined row, in order, committed as one file."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from data.labels.label_files import LabeledShard, Quarantined, label_table, write_labels
from data.labels.top_k import TopK
from data.shards.split import Shard
from pipeline.core.stage import StageError
from pipeline.inference.device_flow import DeviceFlow, PendingTopK
from pipeline.inference.ensemble import Ensemble
from pipeline.inference.predictor import Predictor
from teacher.labeling.batches import BatchReader, ImageBatch, Meter, ahead, with_problems


@dataclass
class _Rows:
    """The shard's results so far; a few dozen bytes per image."""

    ordinals: list[np.ndarray] = field(default_factory=list)
    hashes: list[np.ndarray] = field(default_factory=list)
    top_k: list[TopK] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)


class BatchLabeler:
    """Label batches of images: read and decoded ahead in threads, in order.

    Args:
        predictor: on the device where batches are computed.
        top_k: number of probabilities to keep; at most the number of classes.
        threads: CPU threads of the model. Two batches run at once with half of them each: threads that wait for each other within a
            batch lose a quarter of the time when decoding takes their cores. On a GPU one thread keeps two batches in flight.
        decode_threads: number of decoding threads.
        memory_bytes: for files and images; see `ImageBudget`.
    """

    def __init__(
        self,
        predictor: Predictor | Ensemble,
        top_k: int,
        threads: int,
        decode_threads: int,
        memory_bytes: int = 2 << 30,
    ) -> None:
        self._flow = DeviceFlow(predictor, top_k)
        one_thread = partial(torch.set_num_threads, 1)
        self.reader = BatchReader(
            predictor.view, predictor.batch_size, decode_threads, one_thread, memory_bytes, self._flow.allocate
        )
        self._in_flight = 2 if self._flow.is_gpu or threads > 1 else 1
        model_threads = partial(torch.set_num_threads, max(1, threads // self._in_flight))
        self._model = ThreadPoolExecutor(1 if self._flow.is_gpu else self._in_flight, initializer=model_threads)

    def labeled(
        self, batches: Generator[ImageBatch, None, None]
    ) -> Generator[tuple[ImageBatch, TopK | None], None, None]:
        """Yield each batch with the labels of its decoded images, None if it has none. Closes `batches` at the end.

        Raises:
            StageError: the model's output is not finite.
        """
        running: deque[tuple[ImageBatch, Future[PendingTopK | TopK | None]]] = deque()
        with closing(ahead(batches, self.reader.drop)) as ready:
            for batch in ready:
                running.append((batch, self._model.submit(self._predict, batch)))
                if len(running) > self._in_flight:
                    yield self._finished(*running.popleft())
        while running:
            yield self._finished(*running.popleft())

    def _predict(self, batch: ImageBatch) -> PendingTopK | TopK | None:
        """The labels of the batch's decoded images, if it has any. The images' memory is free afterwards."""
        try:
            batch.wait()
            images = batch.decoded()
            if not len(images):
                return None
            with self.reader.meter.timing("model"):
                return self._flow.start(images)
        finally:
            self.reader.drop(batch)

    def _finished(
        self, batch: ImageBatch, prediction: Future[PendingTopK | TopK | None]
    ) -> tuple[ImageBatch, TopK | None]:
        found = prediction.result()
        if isinstance(found, PendingTopK):
            with self.reader.meter.timing("model"):
                found = found.result()
        # a row of probabilities is finite as a whole or not at all
        if found is not None and not np.isfinite(found.prob).all():
            raise StageError("the model's probabilities are not finite; its weights are damaged")
        self.reader.meter.add_images(len(batch.problems))
        return batch, found


class ShardLabeler:
    """Label shards, up to two at a time from two threads.

    The second shard is read and decoded while the last batches of the first are labeled and its file is written: the model never
    waits for the end of a shard.

    Args:
        num_classes: of the predictor's model.
        top_k: number of probabilities to keep; at most num_classes.
        threads, decode_threads, memory_bytes: see `BatchLabeler`.
        made_by: see `LabeledShard`.
    """

    def __init__(
        self,
        predictor: Predictor | Ensemble,
        num_classes: int,
        top_k: int,
        threads: int,
        decode_threads: int,
        made_by: str,
        memory_bytes: int = 2 << 30,
    ) -> None:
        self._top_k, self._made_by = min(top_k, num_classes), made_by
        self._batches = BatchLabeler(predictor, self._top_k, threads, decode_threads, memory_bytes)
        self._reader = self._batches.reader

    @property
    def meter(self) -> Meter:
        """Images and seconds so far, of all shards."""
        return self._reader.meter

    @property
    def peak_bytes(self) -> int:
        """Maximum bytes of files and images held so far, as the budget counts them."""
        return self._reader.peak_bytes

    def label(self, shard: Shard, url: str, problems: Mapping[int, str] | None = None) -> LabeledShard:
        """Label a shard and commit its label file `url`.

        Args:
            problems: reasons by ordinal of samples to quarantine without decoding them.

        Raises:
            DataError: the shard or its index has changed.
            StageError: the model's output is not finite.
        """
        index, rows = with_problems(shard.index(), problems or {}), _Rows()
        try:
            with closing(self._batches.labeled(self._reader.batches(shard, index))) as labeled:
                for batch, found in labeled:
                    _collect(shard, index, batch, found, rows)
        except StageError as error:
            raise StageError(f"{shard.url}: {error}") from error
        with self.meter.timing("write"):
            return write_labels(url, shard, _table(index, rows, self._top_k), rows.quarantined, self._made_by)


def _collect(shard: Shard, index: pa.Table, batch: ImageBatch, found: TopK | None, rows: _Rows) -> None:
    """Add a batch's labels and quarantined samples to `rows`."""
    good = batch.is_good
    for position in np.flatnonzero(~good).tolist():
        ordinal = batch.start + position
        key, offset = (index.column(name)[ordinal].as_py() for name in ("key", "offset"))
        rows.quarantined.append(Quarantined(shard.name, ordinal, key, offset, batch.problems[position]))
    if found is not None:
        rows.top_k.append(found)
        rows.ordinals.append(batch.start + np.flatnonzero(good))
        rows.hashes.append(batch.hashes[good])


def _table(index: pa.Table, rows: _Rows, top_k: int) -> pa.Table:
    ordinals = np.concatenate([np.empty(0, np.int64), *rows.ordinals])
    hashes = np.concatenate([np.empty(0, np.uint64), *rows.hashes])
    return label_table(index, ordinals, TopK.concatenate(rows.top_k, top_k), hashes)
