"""Find near-duplicates of held-out images among the unlabeled ones: hashes propose, thumbnails confirm.

1. Propose an unlabeled image if its perceptual hash is close to that of a held-out image or of its mirror image.
2. Read the proposed images only. One is a near-duplicate if its thumbnail, mirrored or not, correlates with the thumbnail of a
   held-out image that it was proposed for, in grey and in colour (`teacher/near_duplicates/thumbnails.py`).

docs/selection.md tells what this finds and how the two limits were chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data import storage
from data.images.decode import DecodeError
from data.images.held_out_hashes import HeldOutHashes
from data.images.similarity import CHROMA_SIDE, SIDE, chroma, thumbnail
from data.labels.label_files import LabeledShard, read_labels
from data.modalities import modality_of
from data.shards.image_reader import PLACE_COLUMNS, ImageReader, places_of
from teacher.near_duplicates.hash_index import HashIndex, Pairs, UInt64
from teacher.near_duplicates.thumbnails import Thumbnails

MAX_DISTANCE = 10
_DECODED_SIDE = 4 * SIDE  # decode JPEGs at a reduced scale, to at least twice this
_ROWS = pa.schema([("ordinal", pa.int32()), ("__key__", pa.string())])
Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Matches:
    """The best held-out image for each of some label rows; all [n], rows ascending.

    Attributes:
        row: int64, row of the label file.
        image: int64, position among the held-out images.
        distance: uint8, number of differing bits of the hashes.
        correlation: float32, of the thumbnails; NaN if the unlabeled image could not be read.
        flipped: bool, the held-out image's mirror image correlates more.
        in_grey: bool, compared in grey though the unlabeled image has colours: those of the held-out one are not known.
    """

    row: Int64
    image: Int64
    distance: NDArray[np.uint8]
    correlation: NDArray[np.float32]
    flipped: NDArray[np.bool_]
    in_grey: NDArray[np.bool_]

    def take(self, chosen: NDArray[np.bool_]) -> Matches:
        """The matches where the mask [n] is true."""
        return Matches(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class ShardResult:
    """The search of one shard.

    Attributes:
        rows: number of label rows.
        proposed: rows that hashes proposed.
        not_seen: proposed rows whose image could not be read.
        matches: the near-duplicates.
        table: the label file's `ordinal` and `__key__` of the near-duplicates, in the order of `matches`.
    """

    rows: int
    proposed: int
    not_seen: int
    matches: Matches
    table: pa.Table


class NearDuplicateSearch:
    """Search for images that resemble held-out ones; several threads may share it.

    Args:
        min_correlation: minimum correlation of a near-duplicate's thumbnail, −1 to 1.
        max_distance: maximum number of bits in which a proposed image's hash differs.
    """

    def __init__(self, held_out: HeldOutHashes, min_correlation: float, max_distance: int = MAX_DISTANCE) -> None:
        self._num_images = len(held_out.hashes)
        self._max_distance, self._min_correlation = max_distance, min_correlation
        self._index = HashIndex(np.concatenate([held_out.hashes, held_out.hashes_flipped]))
        self._held_out = Thumbnails(held_out.thumbnails, held_out.chroma, held_out.has_chroma)

    def search_shard(
        self, labels_dir: str, shard: str, shard_url: str | None, entry: LabeledShard | None = None
    ) -> ShardResult:
        """Search the label rows of a shard.

        Args:
            shard: its name.
            shard_url: the images; None if they are gone: then rows with the hash of a held-out image are near-duplicates.
            entry: the shard's entry in the labels' manifest; see `read_labels`.

        Raises:
            StorageError, OSError, DataError: a file cannot be read.
        """
        url = storage.join(labels_dir, f"{shard}.parquet")
        hashes = read_labels(url, ["image_hash"], entry).column("image_hash").to_numpy()
        return self.search_rows(hashes, lambda rows: read_labels(url, PLACE_COLUMNS, entry).take(rows), shard_url)

    def search_rows(self, hashes: UInt64, places: Callable[[pa.Array], pa.Table], shard_url: str | None) -> ShardResult:
        """Search the images of a shard that have these hashes, uint64 [n].

        Args:
            places: gives PLACE_COLUMNS of some rows, int64; called only if rows are proposed.
            shard_url: see `search_shard`.

        Raises:
            StorageError, OSError, DataError: the shard cannot be read.
        """
        proposed = self.propose(hashes)
        if not len(proposed):
            return ShardResult(len(hashes), 0, 0, _no_matches(0), _ROWS.empty_table())
        table = places(pa.array(proposed))
        thumbnails, seen = read_thumbnails(shard_url, table)
        matches = self.confirm(hashes[proposed], thumbnails, seen)
        rows = table.select(_ROWS.names).take(pa.array(matches.row))
        return ShardResult(len(hashes), len(proposed), int((~seen).sum()), matches, rows)

    def propose(self, hashes: UInt64) -> Int64:
        """Positions of the hashes, uint64 [n], that are close to a held-out one: int64, ascending."""
        is_close = np.zeros(len(hashes), bool)
        for pairs in self._index.pairs(hashes, self._max_distance):
            is_close[pairs.query] = True
        return np.flatnonzero(is_close)

    def confirm(self, hashes: UInt64, thumbnails: Thumbnails, seen: NDArray[np.bool_]) -> Matches:
        """Find the near-duplicates among proposed rows.

        Args:
            hashes: uint64 [n].
            thumbnails: of n images, with colours.
            seen: bool [n], false if a row has no thumbnail: an equal hash makes it a near-duplicate.
        """
        best, mirror_images = _no_matches(len(hashes)), thumbnails.mirrored()
        for pairs in self._index.pairs(hashes, self._max_distance):
            image = pairs.reference.astype(np.int64) % self._num_images
            plain, mirror = (
                seen_as.correlations(pairs.query, self._held_out, image, self._min_correlation)
                for seen_as in (thumbnails, mirror_images)
            )
            flipped = np.where(seen[pairs.query], mirror > plain, pairs.reference >= self._num_images)
            correlation = np.where(seen[pairs.query], np.maximum(plain, mirror), np.where(pairs.distance == 0, 2, -2))
            _keep_best(best, pairs, image, correlation.astype(np.float32), flipped)
        accepted = best.correlation >= np.float32(self._min_correlation)
        best.correlation[~seen] = np.nan
        best.in_grey[:] = seen & ~thumbnails.is_grey & ~self._held_out.has_chroma[best.image]
        return best.take(accepted)


def read_thumbnails(shard_url: str | None, table: pa.Table) -> tuple[Thumbnails, NDArray[np.bool_]]:
    """Read the thumbnails of label rows (PLACE_COLUMNS).

    Returns:
        Thumbnails, n, and whether each could be read, bool [n].

    Raises:
        StorageError, OSError, DataError: the shard cannot be read.
    """
    count = table.num_rows
    grey, colours = np.zeros((count, SIDE, SIDE), np.uint8), np.zeros((count, 2, CHROMA_SIDE, CHROMA_SIDE), np.int8)
    seen = np.zeros(count, bool)
    for row, content in _contents(shard_url, table):
        try:
            image = modality_of(content).picture(content, _DECODED_SIDE)
        except DecodeError:
            continue  # damaged since it was labeled: its hash decides
        grey[row], colours[row], seen[row] = thumbnail(image), chroma(image), True
    return Thumbnails(grey, colours, np.ones(count, bool)), seen


def _contents(shard_url: str | None, table: pa.Table) -> Iterator[tuple[int, bytes]]:
    """Rows and their files; none if there is no shard."""
    if shard_url is None:
        return
    with ImageReader([shard_url]) as reader:
        for (row, _), content in reader.read_ahead([list(enumerate(places_of(table)))], lambda item: (0, item[1])):
            yield row, content


def _keep_best(
    best: Matches, pairs: Pairs, image: Int64, correlation: NDArray[np.float32], flipped: NDArray[np.bool_]
) -> None:
    """Replace matches by better ones: higher correlation, then fewer differing bits, then the earlier image. In place."""
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
        in_grey=np.zeros(count, bool),
    )
