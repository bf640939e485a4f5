"""The shards that a run was made from, for counts and pictures; None where they are gone or have changed since."""

from __future__ import annotations

from collections.abc import Sequence

from data import storage
from data.errors import DataError
from data.shards.image_reader import places_in
from data.shards.split import Shard, Split, open_split
from pipeline.report.facts import Facts
from pipeline.report.pictures import thumbnail_at


def open_unchanged(facts: Facts, name: str, digest: str | None) -> Split | None:
    """Open the shards of `data.<name>`, if they are those with this digest."""
    patterns = getattr(facts.config.data, name)
    if not patterns or digest is None:
        return None
    try:
        split = open_split(patterns, facts.generations[0].layout.indexes)
    except (DataError, OSError, storage.StorageError):
        return None
    return split if split.digest() == digest else None


def picture(shards: Sequence[Shard], row: int) -> tuple[str, str | None]:
    """Key and data: URI of an image by its position in a split; None in the place of an image that cannot be read."""
    for shard in shards:
        if row < shard.num_samples:
            (place,) = places_in(shard.index().slice(row, 1), row)
            return place.key, thumbnail_at(shard.url, place)
        row -= shard.num_samples
    raise AssertionError("positions are of the split's images")
