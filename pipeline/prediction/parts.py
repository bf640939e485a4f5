"""Finished pieces of a prediction, kept beside its table until all are there, so that a continued command does nothing twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import pyarrow as pa

from data import storage
from data.tables import read_table, write_table
from pipeline.core.stage import digest_of
from pipeline.prediction.inputs import Piece
from pipeline.prediction.tables import ROWS

_REMEDY = "delete it; the same command makes it again"


class Parts:
    """The folder `OUT.partial`, with a file for each piece that is done.

    Args:
        settings: what predictions depend on besides the images; a file of other settings is never used.
    """

    def __init__(self, out: str, settings: object) -> None:
        self.folder = f"{out}.partial"
        self._settings = digest_of(settings)

    @property
    def index_folder(self) -> str:
        """Where indexes of shards may be kept meanwhile."""
        return storage.join(self.folder, "index")

    def is_done(self, piece: Piece) -> bool:
        """Whether the piece was finished before this object was made, or was written by it."""
        return self._name(piece) in self._there

    def write(self, piece: Piece, rows: Sequence[pa.Table]) -> None:
        """Commit a piece: tables of ROWS."""
        name = self._name(piece)
        write_table(storage.join(self.folder, name), pa.concat_tables(rows).combine_chunks())
        self._there.add(name)

    def read(self, pieces: Sequence[Piece]) -> Iterator[pa.Table]:
        """Rows of finished pieces, in order. Raises DataError for a damaged file."""
        for piece in pieces:
            yield read_table(storage.join(self.folder, self._name(piece)), _REMEDY, schema=ROWS)

    def remove(self) -> None:
        """Delete the folder, when the table is there."""
        storage.remove(self.folder)

    @cached_property
    def _there(self) -> set[str]:
        return set(storage.list_names(self.folder))

    def _name(self, piece: Piece) -> str:
        return f"{digest_of([self._settings, piece.digest()])}.parquet"
