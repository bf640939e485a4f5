"""Label one shard: every sample becomes a label or a quarantined row, in order, committed as one file."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from data.labels.label_files import LabeledShard, Quarantined, TopK, label_table, top_k_of, write_labels
from data.shards.split import Shard
from pipeline.core.stage import StageError
from pipeline.inference.ensemble import Ensemble
from pipeline.inference.predictor import Predictor
from teacher.labeling.batches import BatchReader, ImageBatch, Meter, ahead


@dataclass
class _Rows:
    """The shard's results so far; a few dozen bytes per image."""

    ordinals: list[np.ndarray] = field(default_factory=list)
    hashes: list[np.ndarray] = field(default_factory=list)
    top_k: list[TopK] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)


class ShardLabeler:
    """Label shards, up to two at a time from two threads.

    The second shard is read and decoded while the last batches of the first are labeled and its file is written: the model never
    waits for the end of a shard.

    Args:
        num_classes: of the predictor's model.
        top_k: number of probabilities to keep; at most num_classes.
        threads: CPU threads of the model. Two batches run at once with half of them each: threads that wait for each other within a
            batch lose a quarter of the time when decoding takes their cores.
        decode_threads: number of decoding threads.
        made_by: see `LabeledShard`.
        memory_bytes: for files and images; see `ImageBudget`.
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
        self._predictor, self._top_k, self._made_by = predictor, min(top_k, num_classes), made_by
        one_thread = partial(torch.set_num_threads, 1)
        self._reader = BatchReader(predictor.view, predictor.batch_size, decode_threads, one_thread, memory_bytes)
        self._num_batches = 2 if predictor.device == "cpu" and threads > 1 else 1
        model_threads = partial(torch.set_num_threads, max(1, threads // self._num_batches))
        self._model = ThreadPoolExecutor(self._num_batches, initializer=model_threads)

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
        index, rows = _with_problems(shard.index(), problems or {}), _Rows()
        running: deque[tuple[ImageBatch, Future[np.ndarray]]] = deque()
        with closing(ahead(self._reader.batches(shard, index), self._reader.drop)) as batches:
            for batch in batches:
                running.append((batch, self._model.submit(self._predict, batch)))
                if len(running) > self._num_batches:
                    self._collect(shard, index, *running.popleft(), rows)
        while running:
            self._collect(shard, index, *running.popleft(), rows)
        with self.meter.timing("write"):
            return write_labels(url, shard, _table(index, rows, self._top_k), rows.quarantined, self._made_by)

    def _predict(self, batch: ImageBatch) -> np.ndarray:
        """Probabilities of the batch's decoded images, float32 [n, num_classes]. The images' memory is free afterwards."""
        try:
            batch.wait()
            good = batch.is_good
            if not good.any():
                return np.empty((0, 0), np.float32)
            images = batch.images if good.all() else batch.images[good]
            with self.meter.timing("model"):
                return self._predictor.probabilities(torch.from_numpy(images).permute(0, 3, 1, 2))
        finally:
            self._reader.drop(batch)

    def _collect(
        self, shard: Shard, index: pa.Table, batch: ImageBatch, prediction: Future[np.ndarray], rows: _Rows
    ) -> None:
        """Add a batch's labels and quarantined samples to `rows`."""
        probabilities, good = prediction.result(), batch.is_good
        if not np.isfinite(probabilities).all():
            raise StageError(f"{shard.url}: the teacher's probabilities are not finite; its weights are damaged")
        for position in np.flatnonzero(~good).tolist():
            ordinal = batch.start + position
            key, offset = (index.column(name)[ordinal].as_py() for name in ("key", "offset"))
            rows.quarantined.append(Quarantined(shard.name, ordinal, key, offset, batch.problems[position]))
        if good.any():
            rows.top_k.append(top_k_of(probabilities, self._top_k))
            rows.ordinals.append(batch.start + np.flatnonzero(good))
            rows.hashes.append(batch.hashes[good])
        self.meter.add_images(len(batch.problems))


def _with_problems(index: pa.Table, problems: Mapping[int, str]) -> pa.Table:
    """The index with further problems in its column `problem`."""
    if not problems:
        return index
    column = index.column("problem").to_pylist()
    for ordinal, problem in problems.items():
        column[ordinal] = column[ordinal] or problem
    position = index.column_names.index("problem")
    return index.set_column(position, index.field(position), pa.array(column, index.field(position).type))


def _table(index: pa.Table, rows: _Rows, top_k: int) -> pa.Table:
    ordinals = np.concatenate([np.empty(0, np.int64), *rows.ordinals])
    hashes = np.concatenate([np.empty(0, np.uint64), *rows.hashes])
    return label_table(index, ordinals, TopK.concatenate(rows.top_k, top_k), hashes)
