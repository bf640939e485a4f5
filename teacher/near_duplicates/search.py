"""Near-duplicates of held-out images among the unlabeled ones: hashes propose, thumbnails confirm.

An unlabeled image is proposed where its perceptual hash is close to that of a held-out image or its mirror image. Only
proposed images are read. One is a near-duplicate when its thumbnail correlates with that of a held-out image it was
proposed for, as it is or mirrored. docs/selection.md says what that finds, and how the two limits were chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data import storage
from data.images.decode import DecodeError, decode_fast
from data.images.held_out_hashes import HeldOutHashes
from data.images.similarity import SIDE, mirrored, normalized, thumbnail
from data.labels.label_files import LabeledShard, read_labels
from data.shards.image_reader import ImageReader, places_of
from teacher.near_duplicates.hash_index import HashIndex, Pairs
from teacher.selection.cutoffs import Int64, UInt64

MAX_DISTANCE = 10
_DECODED_SIDE = 4 * SIDE  # JPEGs are scaled while they are decoded, to twice this or more
_Vectors = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Matches:
    """The best held-out image for each of some label rows; all [n], ascending rows.

    Attributes:
        row: int64, of the label file.
        image: int64, of the held-out images.
        distance: uint8, bits in which the hashes differ.
        correlation: float32; NaN where the unlabeled image was not there to look at.
        flipped: bool, the held-out image's mirror image is the more alike.
    """

    row: Int64
    image: Int64
    distance: NDArray[np.uint8]
    correlation: NDArray[np.float32]
    flipped: NDArray[np.bool_]

    def take(self, chosen: NDArray[np.bool_]) -> Matches:
        """Those where the mask [n] is true."""
        return Matches(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Found:
    """What became of a shard: label rows, rows that were proposed, rows that could not be looked at, near-duplicates.

    `table` has the label file's `ordinal` and `__key__` of the near-duplicates, in the order of `matches`.
    """

    rows: int
    proposed: int
    not_seen: int
    matches: Matches
    table: pa.Table


class Search:
    """Held-out images to look for among unlabeled ones; one for all threads.

    Args:
        min_correlation: of a near-duplicate's thumbnail, from −1 to 1.
        max_distance: bits in which a proposed image's hash may differ.
    """

    def __init__(self, held_out: HeldOutHashes, min_correlation: float, max_distance: int = MAX_DISTANCE) -> None:
        self._num_images = len(held_out.hashes)
        self._max_distance, self._min_correlation = max_distance, min_correlation
        self._index = HashIndex(np.concatenate([held_out.hashes, held_out.hashes_flipped]))
        self._vectors = normalized(held_out.thumbnails)

    def in_shard(self, labels_dir: str, shard: str, shard_url: str | None, entry: LabeledShard | None = None) -> Found:
        """Search the label rows of a shard.

        Args:
            shard: its name.
            shard_url: where the images are; None where they are not there. Then equal hashes count as near-duplicates.
            entry: of the labels' manifest; see `read_labels`.

        Raises:
            StorageError, OSError, DataError: a file that cannot be read.
        """
        url = storage.join(labels_dir, f"{shard}.parquet")
        hashes = read_labels(url, ["image_hash"], entry).column("image_hash").to_numpy()
        proposed = self.proposed(hashes)
        if not len(proposed):
            return Found(len(hashes), 0, 0, _no_matches(0), _ROWS.empty_table())
        table = read_labels(url, ["ordinal", "__key__", "offset", "size"], entry).take(pa.array(proposed))
        pictures, seen = read_thumbnails(shard_url, table)
        matches = self.confirmed(hashes[proposed], pictures, seen)
        kept = table.select(["ordinal", "__key__"]).take(pa.array(matches.row))
        return Found(len(hashes), len(proposed), int((~seen).sum()), matches, kept)

    def proposed(self, hashes: UInt64) -> Int64:
        """Rows whose hash, uint64 [n], is close to a held-out one: int64, ascending."""
        is_close = np.zeros(len(hashes), bool)
        for pairs in self._index.pairs(hashes, self._max_distance):
            is_close[pairs.query] = True
        return np.flatnonzero(is_close)

    def confirmed(self, hashes: UInt64, pictures: NDArray[np.uint8], seen: NDArray[np.bool_]) -> Matches:
        """The near-duplicates among proposed rows.

        Args:
            hashes: uint64 [n].
            pictures: uint8 [n, SIDE, SIDE], thumbnails.
            seen: bool [n], false where there is no thumbnail: an equal hash must do.
        """
        best = _no_matches(len(hashes))
        vectors, turned = normalized(pictures), normalized(mirrored(pictures))
        for pairs in self._index.pairs(hashes, self._max_distance):
            image = pairs.reference.astype(np.int64) % self._num_images
            known = self._vectors[image]
            alike = [np.einsum("ij,ij->i", some[pairs.query], known) for some in (vectors, turned)]
            flipped = np.where(seen[pairs.query], alike[1] > alike[0], pairs.reference >= self._num_images)
            correlation = np.where(seen[pairs.query], np.maximum(*alike), np.where(pairs.distance == 0, 2, -2))
            _keep_best(best, pairs, image, correlation.astype(np.float32), flipped)
        accepted = best.correlation >= np.float32(self._min_correlation)
        best.correlation[~seen] = np.nan
        return best.take(accepted)


def read_thumbnails(shard_url: str | None, table: pa.Table) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Thumbnails of label rows (`ordinal`, `__key__`, `offset`, `size`), uint8 [n, SIDE, SIDE], and which of them there are, bool [n].

    Raises:
        StorageError, OSError, DataError: the shard cannot be read.
    """
    pictures, seen = np.zeros((table.num_rows, SIDE, SIDE), np.uint8), np.zeros(table.num_rows, bool)
    if shard_url is None:
        return pictures, seen
    with ImageReader([shard_url]) as reader:
        for row, place in enumerate(places_of(table)):
            try:
                pictures[row] = thumbnail(decode_fast(reader.image(0, place), _DECODED_SIDE))
                seen[row] = True
            except DecodeError:
                continue  # it could be decoded when it was labeled; the hash says the rest
    return pictures, seen


def _keep_best(best: Matches, pairs: Pairs, image: Int64, correlation: _Vectors, flipped: NDArray[np.bool_]) -> None:
    """Enter pairs that are better than what is there: the more alike, then the nearer, then the earlier image. In place."""
    order = np.lexsort((image, pairs.distance, -correlation, pairs.query))
    _, leading = np.unique(pairs.query[order], return_index=True)
    chosen = order[leading]
    row, rank = pairs.query[chosen], _rank(pairs.distance[chosen], image[chosen])
    more, equal = correlation[chosen] > best.correlation[row], correlation[chosen] == best.correlation[row]
    better = more | (equal & (rank < _rank(best.distance[row], best.image[row])))
    row, chosen = row[better], chosen[better]
    best.image[row], best.distance[row] = image[chosen], pairs.distance[chosen]
    best.correlation[row], best.flipped[row] = correlation[chosen], flipped[chosen]


def _rank(distance: NDArray[np.uint8], image: Int64) -> Int64:
    return (distance.astype(np.int64) << 48) + image


def _no_matches(count: int) -> Matches:
    return Matches(
        row=np.arange(count),
        image=np.zeros(count, np.int64),
        distance=np.full(count, 255, np.uint8),
        correlation=np.full(count, -np.inf, np.float32),
        flipped=np.zeros(count, bool),
    )


_ROWS = pa.schema([("ordinal", pa.int32()), ("__key__", pa.string())])
