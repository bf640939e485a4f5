"""The data sets of stage=transfer: labeled shards of three splits, checked before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.errors import DataError
from data.settings import UsageError
from data.shards.image_reader import check_labeled
from data.shards.split import Split, open_split
from data.storage import StorageError
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.schema.transfer import SPLITS
from pipeline.upstream.stage_inputs import require_same_classes


@dataclass(frozen=True)
class LabeledSet:
    """A data set: `labeled` trains, `validation` chooses, `test` is measured once."""

    name: str
    labeled: Split
    validation: Split
    test: Split
    num_classes: int

    def digests(self) -> dict[str, str]:
        """Split → digest."""
        return {name: getattr(self, name).digest() for name in SPLITS}


def open_set(config: Config, name: str) -> LabeledSet:
    """Open the splits of a set; indexes of shards without manifest are kept in the run directory.

    Raises:
        UsageError: shards are missing; names the field.
        StageError: the splits have different classes.
        DataError: a shard is damaged.
    """
    splits = {split: _open(config, name, split) for split in SPLITS}
    first = splits[SPLITS[0]]
    for other in SPLITS[1:]:
        fields = [f"transfer.sets.{name}.{split}" for split in (SPLITS[0], other)]
        require_same_classes(first.class_names, fields[0], splits[other].class_names, fields[1])
    return LabeledSet(name, **splits, num_classes=_num_classes(name, first))


def check_set(found: LabeledSet) -> None:
    """Check that every image has a valid label. Raises DataError, which names the sample."""
    for split in SPLITS:
        check_labeled(getattr(found, split), found.num_classes)


def _open(config: Config, name: str, split: str) -> Split:
    try:
        return open_split(config.transfer.sets[name].patterns(split), Layout(config.run_dir).indexes)
    except (DataError, StorageError) as error:
        raise UsageError(f"transfer.sets.{name}, {split}: {error}") from error


def _num_classes(name: str, labeled: Split) -> int:
    """As many as class names; without these, up to the highest label. Raises DataError where all images are of one class."""
    labels = np.concatenate([table.column("label").drop_null().to_numpy() for table in labeled.indexes()])
    if len(np.unique(labels)) < 2:
        raise DataError(
            f"transfer.sets.{name}: its labeled images are of fewer than two classes; nothing can be learned"
        )
    return len(labeled.class_names) if labeled.class_names else int(labels.max()) + 1
