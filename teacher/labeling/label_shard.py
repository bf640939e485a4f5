"""One shard: every sample becomes a label or a quarantined row, in order, committed as one file."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch

from data.labels.label_files import LabeledShard, Quarantined, TopK, label_table, top_k_of, write_labels
from data.shards.split import Shard
from pipeline.core.stage import StageError
from pipeline.inference.ensemble import Ensemble
from pipeline.inference.predictor import Predictor
from teacher.labeling.batches import Batch, ImageMemory, Meter, ahead, submitted_batches


@dataclass
class _Rows:
    """What is known of the shard so far; a few dozen bytes an image."""

    ordinals: list[np.ndarray] = field(default_factory=list)
    hashes: list[np.ndarray] = field(default_factory=list)
    top_k: list[TopK] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)


class ShardLabeler:
    """Labels shards, up to two at a time from two threads: the second is read and decoded while the first one's last batches
    are labeled and its file is written, so that the model never waits for the end of a shard.

    Args:
        num_classes: of the predictor's model.
        top_k: probabilities to keep; at most num_classes are.
        threads: of the model on a CPU. Two batches share them, each with half: threads that wait for each other within a batch
            lose a quarter of the time where decoding takes their cores away.
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
    ) -> None:
        self.meter, self._made_by = Meter(), made_by
        self._predictor, self._top_k = predictor, min(top_k, num_classes)
        self._decoding = ThreadPoolExecutor(decode_threads, initializer=torch.set_num_threads, initargs=(1,))
        self._at_once = 2 if predictor.device == "cpu" and threads > 1 else 1
        self._model = ThreadPoolExecutor(
            self._at_once, initializer=torch.set_num_threads, initargs=(max(1, threads // self._at_once),)
        )
        self._reading = threading.Lock()
        self._memory = ImageMemory(predictor.batch_size, predictor.view.image_size)

    def label(self, shard: Shard, url: str, problems: Mapping[int, str] | None = None) -> LabeledShard:
        """Label a shard and commit its label file `url`.

        Args:
            problems: ordinals that are not to be decoded, and why; they are quarantined.

        Raises:
            DataError: the shard or its index is not what it was.
            StageError: the model's output is not finite.
        """
        index, rows, predictor = _with_problems(shard.index(), problems or {}), _Rows(), self._predictor
        submitted = submitted_batches(
            shard, index, predictor.view, predictor.batch_size, self._decoding, self._reading, self.meter, self._memory
        )
        asked: deque[tuple[Batch, Future[np.ndarray]]] = deque()
        for batch in ahead(submitted):
            asked.append((batch, self._model.submit(self._predict, batch)))
            if len(asked) > self._at_once:
                self._take_answer(shard, index, *asked.popleft(), rows)
        while asked:
            self._take_answer(shard, index, *asked.popleft(), rows)
        with self.meter.timing("write"):
            return write_labels(url, shard, _table(index, rows, self._top_k), rows.quarantined, self._made_by)

    def _predict(self, batch: Batch) -> np.ndarray:
        """Probabilities of the batch's good images, float32 (N, C)."""
        batch.wait()
        good = batch.is_good
        if not good.any():
            return np.empty((0, 0), np.float32)
        images = batch.images if good.all() else batch.images[good]
        with self.meter.timing("model"):
            return self._predictor.probabilities(torch.from_numpy(images).permute(0, 3, 1, 2))

    def _take_answer(
        self, shard: Shard, index: pa.Table, batch: Batch, answer: Future[np.ndarray], rows: _Rows
    ) -> None:
        probabilities, good = answer.result(), batch.is_good
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
        self._memory.give_back(batch.images)
        self.meter.add_images(len(good))


def _with_problems(index: pa.Table, problems: Mapping[int, str]) -> pa.Table:
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
