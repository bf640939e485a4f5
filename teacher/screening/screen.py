"""Screen a shard: find the images that no self-supervised training uses, and say why.

An image is left out when the user's list excludes it, when it cannot be read or decoded (the rule of labeling), or when it is a
near-duplicate of a held-out image. Its hash is computed while its pixels are there, so no labels are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import pyarrow as pa

from data.images.clean_view import Decoder, EvalView
from data.images.decode import Pixels
from data.images.held_out_hashes import HeldOutHashes
from data.images.similarity import image_hash
from data.labels.exclusions import ExcludedKeys
from data.shards.split import Shard
from data.storage.redact import redacted
from teacher.labeling.batches import BatchReader, ahead, with_problems
from teacher.near_duplicates.search import NearDuplicateSearch

LEFT_OUT_SCHEMA = pa.schema(
    [
        pa.field("split", pa.string()),  # labeled or unlabeled
        pa.field("shard", pa.string()),
        pa.field("ordinal", pa.int32()),
        pa.field("key", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("kind", pa.string()),
        pa.field("reason", pa.string()),
    ]
)
Kind = Literal["undecodable", "excluded", "held_out_copy"]
IN_GREY = ", compared in grey: that file has no colours"
_BATCH = 256  # images that are decoded at once
_HASH_SIDE = 128  # pixels; large JPEGs are decoded at a scale of at least twice this: the hash takes 64 rows
_SMALLEST = 1  # pixels; without hashes, the smallest scale: it finds the same damage in less time
_NO_PIXELS = np.zeros((1, 1, 3), np.uint8)
NOTHING_CRASHES: Mapping[int, str] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class HashView(EvalView):
    """Decodes an image as labeling does, and keeps its hash alone.

    Attributes:
        hashes: false: 0 instead of the hash.
    """

    image_size: int = 1
    crop_pct: float = 1.0
    interpolation: str = "bilinear"
    mode: Literal["crop", "pad"] = "crop"
    decoder: Decoder = "fast"
    hashes: bool = True

    @property
    def _shorter_side(self) -> int:
        return _HASH_SIDE if self.hashes else _SMALLEST

    def with_hash(self, content: bytes) -> tuple[Pixels, int]:
        """A black pixel, and the image's 64-bit perceptual hash. Raises DecodeError."""
        image = self._decode(content)
        return _NO_PIXELS, image_hash(image) if self.hashes else 0


class Screener:
    """Screens shards, one at a time.

    Args:
        held_out: images whose near-duplicates are left out; None: none.
        min_correlation: of a near-duplicate, see `NearDuplicateSearch`.
        threads: that decode.
        memory_bytes: for files and images; see `ImageBudget`.
    """

    def __init__(
        self,
        exclude: ExcludedKeys,
        held_out: HeldOutHashes | None,
        min_correlation: float,
        threads: int,
        memory_bytes: int,
    ) -> None:
        self._exclude, self._held_out = exclude, held_out
        self._search = NearDuplicateSearch(held_out, min_correlation) if held_out is not None else None
        self.view = HashView(hashes=held_out is not None)
        self._reader = BatchReader(
            self.view, _BATCH, threads, lambda: None, memory_bytes, lambda s: np.empty(s, np.uint8)
        )

    def screen(self, split: str, shard: Shard, crashing: Mapping[int, str] = NOTHING_CRASHES) -> pa.Table:
        """The images of a shard that are left out, in their order: LEFT_OUT_SCHEMA.

        Args:
            split: of the shard, for the table.
            crashing: images that end a process that decodes them; they are not read. Reasons by ordinal.

        Raises:
            DataError, OSError, StorageError: the shard or its index cannot be read, or has changed.
        """
        index = shard.index()
        excluded = np.flatnonzero(self._exclude.mask(shard.name, index.column("key").combine_chunks())).tolist()
        reasons: dict[int, tuple[Kind, str]] = dict.fromkeys(excluded, ("excluded", "in data.exclude"))
        not_read = {row: reason for row, (_, reason) in reasons.items()}
        problems, hashes = self._read(shard, index, {**crashing, **not_read})
        for row, problem in enumerate(problems):
            if problem:
                reasons.setdefault(row, ("undecodable", problem))
        usable = np.array([row for row in range(len(problems)) if row not in reasons], np.int64)
        for row, reason in self._copies(shard, index, usable, hashes):
            reasons[row] = ("held_out_copy", reason)
        return _left_out(split, shard, index, reasons)

    def _read(self, shard: Shard, index: pa.Table, problems: Mapping[int, str]) -> tuple[list[str], np.ndarray]:
        """Why each image cannot be used (empty: it can), and its hash, uint64 [n]; those with problems are not read."""
        found, hashes = list[str](), [np.empty(0, np.uint64)]
        batches = self._reader.batches(shard, with_problems(index, problems))
        with closing(ahead(batches, self._reader.drop)) as batches:
            for batch in batches:
                try:
                    batch.wait()
                finally:
                    self._reader.drop(batch)
                found += batch.problems
                hashes.append(batch.hashes)
        return found, np.concatenate(hashes)

    def _copies(self, shard: Shard, index: pa.Table, rows: np.ndarray, hashes: np.ndarray) -> Iterator[tuple[int, str]]:
        """Those of the rows that are near-duplicates of held-out images, and of which."""
        if self._search is None:
            return
        assert self._held_out is not None
        result = self._search.search_rows(
            hashes[rows], lambda chosen: _places(index, rows[chosen.to_numpy()]), shard.url
        )
        ordinals, matches = result.table.column("ordinal").to_pylist(), result.matches
        for ordinal, image, in_grey in zip(ordinals, matches.image, matches.in_grey, strict=True):
            file = redacted(self._held_out.urls[self._held_out.files[image]])
            how = IN_GREY if in_grey else ""
            yield ordinal, f"near-duplicate of row {self._held_out.rows[image]} of {file}{how}"


def _places(index: pa.Table, rows: np.ndarray) -> pa.Table:
    """PLACE_COLUMNS of rows of an index."""
    chosen = index.take(pa.array(rows))
    names = {"__key__": "key", "offset": "offset", "size": "size"}
    return pa.table({"ordinal": pa.array(rows, pa.int32())} | {name: chosen.column(own) for name, own in names.items()})


def _left_out(split: str, shard: Shard, index: pa.Table, reasons: Mapping[int, tuple[Kind, str]]) -> pa.Table:
    rows = sorted(reasons)
    chosen = index.take(pa.array(rows, pa.int64()))
    columns = {
        "split": [split] * len(rows),
        "shard": [shard.name] * len(rows),
        "ordinal": rows,
        "key": chosen.column("key").to_pylist(),
        "offset": chosen.column("offset").to_pylist(),
        "kind": [reasons[row][0] for row in rows],
        "reason": [reasons[row][1] for row in rows],
    }
    return pa.table(columns, schema=LEFT_OUT_SCHEMA)
