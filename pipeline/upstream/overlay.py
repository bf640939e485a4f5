"""Open the overlay of a generation (labels and selection over the unlabeled shards), for export and server."""

from __future__ import annotations

from typing import Any

from data.labels.exclusions import read_keys
from data.labels.joined_tar import Provenance
from data.labels.overlay import Overlay, read_committed
from data.shards.split import open_split
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.upstream.stage_inputs import require_labeled_corpus, require_labels, require_selection


def open_overlay(config: Config, layout: Layout) -> tuple[Overlay, dict[str, Any], dict[str, Any]]:
    """Returns the overlay, and the done-records of labels and selection.

    Raises:
        StageError: labels or selection are not done, do not belong together, or are of other unlabeled shards.
        DataError: unlabeled shards are missing or cut short.
    """
    labels = require_labels(config, layout)
    folder, selection = require_selection(config, layout, labels)
    corpus = open_split(config.data.unlabeled, layout.indexes)
    require_labeled_corpus(corpus, labels)
    names = labels["summary"]["class_names"]
    digests, entries = read_committed(layout.labels, selection)
    provenance = Provenance(layout.generation, tuple(names) if names else None)
    excluded = read_keys(config.data.exclude)
    return Overlay(corpus.shards, layout.labels, folder, provenance, digests, excluded, entries), labels, selection
