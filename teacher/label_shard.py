"""One shard: every sample becomes a label or a quarantined row, in order."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch

from data.images import DecodeError, decode, image_hash
from data.labels import LabeledShard, Quarantined, label_table, write_labels
from data.manifest import Shard
from data.reader import ImageReader
from pipeline.training.inference import Predictor

_Prepared = tuple[torch.Tensor, int]  # model input, image hash


@dataclass
class _Results:
    """What is known of the shard so far."""

    ordinals: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    probabilities: list[np.ndarray] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)


def label_shard(shard: Shard, url: str, predictor: Predictor, top_k: int, decode_threads: int) -> LabeledShard:
    """Label a shard and commit its label file `url`.

    Batches are made of consecutive samples and never cross shards, so the file is a function of shard, model and batch size.
    While the model works on one batch, threads decode the next.
    """
    index = shard.index()
    results = _Results()
    with ThreadPoolExecutor(decode_threads) as pool, ImageReader([shard.url]) as reader:
        for start, prepared in _prepared_batches(index, predictor, pool, reader):
            _label_batch(shard, index, start, prepared, predictor, results)
    empty = np.empty((0, top_k), np.float32)
    probabilities = np.concatenate(results.probabilities) if results.ordinals else empty
    top_k = min(top_k, probabilities.shape[1])
    ordinals, hashes = np.array(results.ordinals, np.int64), np.array(results.hashes, np.uint64)
    table = label_table(index, ordinals, probabilities, hashes, top_k)
    return write_labels(url, shard, table, results.quarantined)


def _prepared_batches(
    index: pa.Table, predictor: Predictor, pool: ThreadPoolExecutor, reader: ImageReader
) -> Iterator[tuple[int, list[_Prepared | str]]]:
    """(first ordinal, one entry per sample: the prepared image, or why there is none); the next batch is decoded meanwhile."""
    columns = [index.column(name).to_pylist() for name in ("offset", "size", "problem")]
    samples = list(zip(*columns, strict=True))

    def prepare(content: bytes) -> _Prepared | str:
        try:
            image = decode(content)
        except DecodeError as error:
            return str(error)
        return predictor.prepare(image), image_hash(image)

    def submit(start: int) -> list[Future[_Prepared | str] | str]:
        batch = samples[start : start + predictor.batch_size]
        return [problem or pool.submit(prepare, reader.read(0, offset, size)) for offset, size, problem in batch]

    ahead = submit(0)
    for start in range(0, len(samples), predictor.batch_size):
        current, ahead = ahead, submit(start + predictor.batch_size)
        yield start, [entry if isinstance(entry, str) else entry.result() for entry in current]


def _label_batch(
    shard: Shard, index: pa.Table, start: int, prepared: list[_Prepared | str], predictor: Predictor, results: _Results
) -> None:
    images = []
    for ordinal, entry in enumerate(prepared, start):
        if isinstance(entry, str):
            key, offset = index.column("key")[ordinal].as_py(), index.column("offset")[ordinal].as_py()
            results.quarantined.append(Quarantined(shard.name, ordinal, key, offset, entry))
        else:
            images.append(entry[0])
            results.ordinals.append(ordinal)
            results.hashes.append(entry[1])
    if images:
        results.probabilities.append(predictor.probabilities(torch.stack(images)))
