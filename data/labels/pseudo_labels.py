"""Pseudo-labels for other projects' training: images and labels, joined on the fly.

labels = PseudoLabels("http://labels.example:8080", min_confidence=0.8)
for image, label in labels: …  # in order, without torch
for images, classes in DataLoader(labels.dataset(transform, shuffle=1000), batch_size=256, num_workers=8): …
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
from PIL import Image

from .. import storage
from ..base_names import read_pointer
from ..errors import DataError
from ..run_names import CONFIG_NAME
from ..settings import nearest
from ..shards.split import MANIFEST_NAME
from ..storage.http import is_http
from ..storage.redact import redacted
from .overlay import RowFilter
from .sources import Source
from .sources.archives import LATEST_NAME, open_exported
from .sources.run import open_run
from .sources.server import open_served

if TYPE_CHECKING:
    from .torch_dataset import PseudoLabelDataset

_NAMED = 3  # classes in the text of an object
_Result = TypeVar("_Result")


class PseudoLabels:
    """Pseudo-labels of one generation.

    Args:
        source: path or URL of a run directory, an export, a folder of exports (the last one is used), or the address of `stage=serve`.
        min_confidence: only labels with confidence ≥ this, 0 to 1.
        classes: only images with these labels: class numbers, or names.
        selected: only images selected for the student; False: all.
        token: of the server; by default the one that NOISY_STUDENT_TOKEN (`http://HOST:PORT=TOKEN`) has for this address.

    Raises:
        DataError: `source` is something else, or incomplete or damaged; or the filter has impossible values or passes no label.
        StorageError, FileNotFoundError: `source` does not exist or cannot be read.
    """

    def __init__(
        self,
        source: str,
        *,
        min_confidence: float = 0.0,
        classes: Collection[int | str] | None = None,
        selected: bool = True,
        token: str | None = None,
    ) -> None:
        wanted = (classes,) if isinstance(classes, str) else classes
        names = None
        if wanted is not None and any(isinstance(one, str) for one in wanted):
            names = _open(source, RowFilter(selected, min_confidence), token).class_names
        keep = RowFilter(selected, min_confidence, None if wanted is None else _class_numbers(wanted, names))
        self._source = _open(source, keep, token)
        self._length: int | None = None
        self._text = _describe(redacted(source), keep, self._source)
        self.class_names = self._source.class_names
        _check_filter(keep, self.class_names)
        if not self._source.num_shards:
            raise DataError(
                f"{redacted(source)}: no label passes the filter; lower min_confidence, or name more classes"
            )

    def __repr__(self) -> str:
        return self._text

    def __len__(self) -> int:
        """Number of rows of `table`. Reads all labels the first time, and holds those of a few shards at once."""
        if self._length is None:
            self._length = sum(self._of_each_shard(lambda shard: self._source.table(shard).num_rows))
        return self._length

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        """Images (RGB, upright) and labels, in order, decoded in this process. Raises as iterating `dataset()`."""
        for shard in range(self._source.num_shards):
            for sample in self._source.samples(shard):
                yield sample.decoded(), sample.label

    def table(self) -> pa.Table:
        """All labels without images: `data.labels.sources.COLUMNS`. An image that the export repeats has a row for each copy."""
        return pa.concat_tables(self._of_each_shard(self._source.table)).unify_dictionaries()

    def _of_each_shard(self, call: Callable[[int], _Result]) -> Iterator[_Result]:
        return storage.in_parallel(call, range(self._source.num_shards), storage.PARALLEL_REQUESTS)

    def dataset(
        self,
        transform: Callable[[Image.Image], Any] | None = None,
        *,
        shuffle: int = 0,
        seed: int = 0,
        as_dict: bool = False,
    ) -> PseudoLabelDataset:
        """A dataset for torch's DataLoader.

        Args:
            transform: applied to the decoded image (RGB, upright); by default the image itself.
            shuffle: shuffle shards, and samples in a buffer of this many encoded images; 0: in order.
            seed: of the shuffling.
            as_dict: give dicts of `image`, `label`, `confidence`, `copies` and `key` instead of (image, label).

        Raises:
            ModuleNotFoundError: torch is not installed.
        """
        try:
            from .torch_dataset import PseudoLabelDataset
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ModuleNotFoundError(
                "PseudoLabels.dataset needs torch: pip install torch, or 'noisy-student-pipeline[train]' for the whole "
                "pipeline; table() and iteration work without",
                name="torch",
            ) from None
        return PseudoLabelDataset(self._source, transform, shuffle, seed, as_dict)


def _open(source: str, keep: RowFilter, token: str | None) -> Source:
    """Open the source, whichever kind it is."""
    if is_http(source):
        return open_served(source, keep, token)
    if token is not None:
        raise DataError(f"token: {redacted(source)} is no http:// or https:// address; expected no token")
    if storage.exists(storage.join(source, CONFIG_NAME)):
        return open_run(source, keep)
    if storage.exists(latest := storage.join(source, LATEST_NAME)):
        source = storage.join(source, read_pointer(latest))
    if storage.exists(storage.join(source, MANIFEST_NAME)):
        return open_exported(source, keep)
    raise DataError(
        f"{redacted(source)}: expected a run directory ({CONFIG_NAME}), an export ({MANIFEST_NAME}), a folder of exports "
        f"({LATEST_NAME}), or the http:// address of stage=serve"
    )


def _class_numbers(classes: Collection[int | str], names: Sequence[str] | None) -> frozenset[int]:
    """Class numbers, of which some are given by name. Raises DataError for an unknown name."""
    numbers = {int(one) for one in classes if not isinstance(one, str)}
    for name in (one for one in classes if isinstance(one, str)):
        if not names:
            raise DataError(f"classes: {name!r}: these labels have no class names; expected class numbers")
        if name not in names:
            raise DataError(f"classes: no class {name!r} among {len(names)}{nearest(name, names)}")
        numbers |= {number for number, known in enumerate(names) if known == name}
    return frozenset(numbers)


def _describe(source: str, keep: RowFilter, labels: Source) -> str:
    """The text of a `PseudoLabels`: what it was opened with, and what is there."""
    names = labels.class_names
    given = [repr(source)]
    if keep.min_confidence:
        given.append(f"min_confidence={keep.min_confidence}")
    if keep.classes is not None:
        wanted = sorted(keep.classes)
        given.append(f"classes={[names[n] if names and 0 <= n < len(names) else n for n in wanted]}")
    if not keep.selected:
        given.append("selected=False")
    first = ", ".join((names or ())[:_NAMED]) + (", …" if len(names or ()) > _NAMED else "")
    classes = f"{len(names)} classes ({first})" if names else "classes without names"
    return f"PseudoLabels({', '.join(given)}): {labels.num_shards} shards, {classes}"


def _check_filter(keep: RowFilter, class_names: tuple[str, ...] | None) -> None:
    """Raise DataError for a filter with impossible values."""
    if not 0 <= keep.min_confidence <= 1:
        raise DataError(f"min_confidence={keep.min_confidence}: expected 0 to 1")
    num_classes = len(class_names) if class_names else 1 << 31
    if keep.classes is not None and (bad := [c for c in sorted(keep.classes) if not 0 <= c < num_classes]):
        raise DataError(f"classes: {bad[0]}: expected class numbers from 0 to {num_classes - 1}")
