"""Pseudo-labels of a run directory, joined to the unlabeled shards of its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from omegaconf import OmegaConf

from ... import storage
from ...base_names import read_pointer
from ...errors import DataError
from ...json_files import read_json
from ...picture_folders import shards_or_folder
from ...run_names import (
    CONFIG_NAME,
    CURRENT_NAME,
    DONE_NAME,
    INDEXES,
    LABELS,
    SELECTIONS,
    DoneRecord,
    generation_folder,
    generation_of,
)
from ...shards.image_reader import ImageReader, places_of
from ...shards.split import Split, open_split
from ...storage.redact import redacted
from ..exclusions import exclude_inputs, read_keys
from ..joined_tar import Provenance, Rows
from ..overlay import Overlay, RowFilter, read_committed
from . import PseudoLabeled, as_table

_CHUNK = 64  # images among which neighbours are read together


@dataclass(frozen=True)
class RunLabels:
    """A source of pseudo-labels; see `data.labels.sources.Source`.

    Attributes:
        keep: the labels to hand out.
    """

    overlay: Overlay
    keep: RowFilter

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """In label order; None when unknown."""
        return self.overlay.provenance.class_names

    @property
    def num_shards(self) -> int:
        """Number of unlabeled shards."""
        return len(self.overlay.shards)

    def table(self, shard: int) -> pa.Table:
        """Labels of a shard. Raises DataError when they are not the committed ones."""
        return as_table(self._rows(shard), self.overlay.shards[shard].name)

    def samples(self, shard: int) -> Iterator[PseudoLabeled]:
        """Samples of a shard; seeks to their images. Raises DataError as `table`, and when the shard was cut short or changed."""
        rows = self._rows(shard)
        table = as_table(rows, self.overlay.shards[shard].name)
        fields = (table.column(name).to_pylist() for name in ("__key__", "label", "confidence", "copies"))
        entries = list(zip(places_of(rows.labels), *fields, strict=True))
        with ImageReader([entry.url for entry in self.overlay.shards]) as reader:
            chunks = (entries[start : start + _CHUNK] for start in range(0, len(entries), _CHUNK))
            for entry, image in reader.read_ahead(chunks, lambda entry: (shard, entry[0])):
                _, key, label, confidence, copies = entry
                yield PseudoLabeled(key, image, label, confidence, copies)

    def _rows(self, position: int) -> Rows:
        if not self.overlay.is_as_committed(position):
            labels, copies = map(redacted, self.overlay.files(position))
            raise DataError(
                f"{labels} or {copies}: not as the run committed it; if the run went on, open it again, else "
                "stage=label verify=true finds what is damaged"
            )
        return self.overlay.rows(position, self.keep)


def open_run(run_dir: str, keep: RowFilter) -> RunLabels:
    """Open the labels of a run's last generation with a selection.

    Raises:
        DataError: there is none; the unlabeled shards are not where the configuration says; or labels, selection and shards do not fit.
    """
    generation, selection_dir = _last_selection(run_dir)
    labels_dir = storage.join(run_dir, generation_folder(generation), LABELS)
    labels, selection = _done(labels_dir, "label"), _done(selection_dir, "select")
    exclude = _data_field(run_dir, "exclude")
    made_from = selection["fingerprint"]["inputs"]
    if (made_from["labels"], made_from.get("exclude")) != (labels["digest"], exclude_inputs(exclude).get("exclude")):
        raise DataError(
            f"{redacted(selection_dir)}: selected from other labels or with another data.exclude; run stage=select"
        )
    corpus = _corpus(run_dir)
    if corpus.digest() != labels["summary"]["corpus"]:
        raise DataError(f"{redacted(labels_dir)}: data.unlabeled has changed since it was labeled; run stage=label")
    digests, entries = read_committed(labels_dir, selection)
    names = labels["summary"]["class_names"]
    provenance = Provenance(generation, tuple(names) if names else None)
    excluded = read_keys(exclude)
    return RunLabels(Overlay(corpus.shards, labels_dir, selection_dir, provenance, digests, excluded, entries), keep)


def _last_selection(run_dir: str) -> tuple[int, str]:
    """The last generation with a selection, and the selection's folder."""
    generations = filter(None, map(generation_of, storage.list_names(run_dir)))
    for generation in sorted(generations, reverse=True):
        folder = storage.join(run_dir, generation_folder(generation), SELECTIONS)
        if storage.exists(pointer := storage.join(folder, CURRENT_NAME)):
            return generation, storage.join(folder, read_pointer(pointer))
    raise DataError(f"{redacted(run_dir)}: nothing is labeled and selected there yet; run stage=label")


def _corpus(run_dir: str) -> Split:
    try:
        patterns = shards_or_folder(run_dir, "unlabeled", _data_field(run_dir, "unlabeled"))
        return open_split(patterns, storage.join(run_dir, INDEXES))
    except (DataError, storage.StorageError) as error:
        raise DataError(
            f"{redacted(run_dir)}: data.unlabeled: {error}. A relative path counts from the folder where the run was started: go there"
        ) from error


def _done(folder: str, stage: str) -> dict[str, Any]:
    """A finished stage's done-record. Raises DataError when the stage is not done."""
    url = storage.join(folder, DONE_NAME)
    if not storage.exists(url):
        raise DataError(f"{redacted(folder)}: stage {stage} is not done; run stage={stage}")
    return read_json(url, f"delete it and run stage={stage}", DoneRecord)


def _data_field(run_dir: str, name: str) -> Any:
    """A field of `data` in the run's configuration. Raises DataError when it contains variables, which are never filled in: a run from
    elsewhere could otherwise read this machine's environment."""
    url = storage.join(run_dir, CONFIG_NAME)
    config = OmegaConf.to_container(OmegaConf.create(storage.read_text(url)), resolve=False)
    data = config.get("data") if isinstance(config, dict) else None
    value = data.get(name) if isinstance(data, dict) else None
    if "${" in str(value):
        raise DataError(
            f"{redacted(url)}: data.{name}={value}: variables of a run directory are not filled in; run once more with the value "
            f"written out, as in stage=select data.{name}=…"
        )
    return value
