"""Check that a stage's upstream outputs are done and belong together; a mixture of old and new outputs is refused."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any
from unicodedata import normalize

from data import storage
from data.labels.exclusions import exclude_inputs, read_keys
from data.labels.joined_tar import Provenance
from data.labels.overlay import Overlay, read_committed
from data.shards.split import Split, open_split
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import (
    Explain,
    Fingerprint,
    StageError,
    config_differences,
    differences,
    done_record,
    is_begun,
    require_done,
)
from pipeline.stages import find, maker_of

_SHOWN = 5  # class names in a message


def require_test(config: Config) -> None:
    """Raise StageError when data.test is empty."""
    if not config.data.test:
        raise StageError("data.test is empty; give labeled test shards to evaluate on")


def require_same_classes(names: Sequence[str] | None, whose: str, other: Sequence[str] | None, field: str) -> None:
    """Raise StageError, which names the first difference, when two lists of class names differ; None matches any list.

    Names are compared in Unicode NFC, because macOS and Linux may encode an accent in two ways.
    """
    if not names or not other:
        return
    ones, twos = ([normalize("NFC", name) for name in group] for group in (names, other))
    if ones == twos:
        return
    lacks = "".join(
        f"; {place} lacks {_some(missing)}"
        for place, missing in ((field, set(ones) - set(twos)), (whose, set(twos) - set(ones)))
        if missing
    )
    for position, (one, two) in enumerate(zip(ones, twos, strict=False)):
        if one != two:
            raise StageError(
                f"class {position} is {one!r} for {whose} and {two!r} in {field}{lacks}; give both the same classes in the same order"
            )
    raise StageError(f"{whose} has {len(ones)} classes, {field} {len(twos)}{lacks}")


def _some(names: Collection[str]) -> str:
    return ", ".join(map(repr, sorted(names)[:_SHOWN])) + ", …" * (len(names) > _SHOWN)


def require_labels(config: Config, layout: Layout) -> dict[str, Any]:
    """The done-record of the labels.

    Raises:
        StageError: the labels are not done, are of another teacher than the run's, or have another number of classes than configured.
            A run without a teacher is fine: labels may be copied alone.
    """
    labels = require_done(layout.labels, "label")
    if config.data.num_classes not in (None, labels["summary"]["num_classes"]):
        raise StageError(
            f"data.num_classes={config.data.num_classes}, but {layout.labels} has {labels['summary']['num_classes']} classes; "
            "give that number, or train a teacher for yours in another run_dir="
        )
    if is_begun(layout.teacher):
        teacher = require_done(layout.teacher, layout.teacher_stage)["digest"]
        if labels["fingerprint"]["inputs"]["teacher"] != teacher:
            raise StageError(
                f"{layout.labels}: the labels are of another teacher than the one in {layout.teacher} now; "
                "run stage=label force=true (the old labels are moved aside)"
            )
    return labels


def require_labeled_corpus(corpus: Split, labels: Mapping[str, Any]) -> None:
    """Raise StageError when the labels (given their done-record) are of other unlabeled shards."""
    if corpus.digest() != labels["summary"]["corpus"]:
        raise StageError("data.unlabeled has changed since it was labeled; run stage=label first")


def keeps_images(config: Config, layout: Layout) -> bool:
    """Whether this generation reuses the selection of the generation before."""
    return config.select.keep_images and layout.generation > 1


def require_selection(config: Config, layout: Layout, labels: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Folder and done-record of the current selection.

    Raises:
        StageError: there is none, or it was made from other labels, settings or excluded keys.
        DataError: data.exclude cannot be read.
    """
    folder = layout.current_selection()
    if folder is None:
        raise StageError(f"{layout.selections}: nothing is selected yet; run stage=select first")
    selection = require_done(folder, "select")
    if selection["fingerprint"]["inputs"]["labels"] != labels["digest"]:
        raise StageError(f"{folder}: selected from other labels than {layout.labels} has now; run stage=select first")
    if changed := config_differences(selection["fingerprint"]["config"], config.stage_fields("select")):
        lines = (f"  {field}: {before!r} there, {after!r} now" for field, (before, after) in changed.items())
        raise StageError(
            "\n".join(
                [f"{folder}: the current selection was made with other settings:", *lines, "Run stage=select first."]
            )
        )
    if ("kept" in selection["fingerprint"]["inputs"]) != keeps_images(config, layout):
        raise StageError(
            f"{folder}: the current selection was not made with select.keep_images={str(config.select.keep_images).lower()}; "
            "run stage=select first"
        )
    if selection["fingerprint"]["inputs"].get("exclude") != exclude_inputs(config.data.exclude).get("exclude"):
        raise StageError(f"{folder}: the current selection was made with another data.exclude; run stage=select first")
    return folder, selection


def open_overlay(config: Config, layout: Layout) -> tuple[Overlay, dict[str, Any], dict[str, Any]]:
    """Open labels and selection over the unlabeled shards, for export and server; with their done-records.

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


def fingerprint_of(config: Config, layout: Layout, stage: str) -> Fingerprint:
    """The fingerprint of a stage that depends on nothing but its row's `fingerprint` and `upstream`.

    Raises StageError when an upstream stage is not done.
    """
    upstream = find(stage).upstream
    inputs = {name: require_done(layout.folder_of(maker), maker)["digest"] for name, maker in upstream.items()}
    return Fingerprint(config.stage_fields(stage), inputs)


def explain_inputs(layout: Layout) -> Explain:
    """A function for `open_stage` that says in which fields and inputs the old and the new output of an upstream stage differ.

    It says nothing when one of the two is gone.
    """

    def explain(name: str, before: str | None, after: str | None) -> Iterator[str]:
        records = list(_records(layout, name))
        old, new = (next((r for r in records if r["digest"] == digest), None) for digest in (before, after))
        if old is None or new is None:
            return
        fields = config_differences(old["fingerprint"]["config"], new["fingerprint"]["config"])
        for field, (there, now) in fields.items():
            yield f"    {field}: {there!r} there, {now!r} now"
        for upstream in differences(old["fingerprint"]["inputs"], new["fingerprint"]["inputs"]):
            yield f"    {upstream}: another one"
        if name == "selection" and fields:
            words = [f"{field}={json.dumps(there)}" for field, (there, _) in fields.items()]
            yield f"    To go back to it: {shlex.join(['stage=select', *words])}"

    return explain


def _records(layout: Layout, name: str) -> Iterator[dict[str, Any]]:
    """Yield the done-records of an input's present output and of those that force=true moved aside."""
    if name == "selection":
        folders = [storage.join(layout.selections, entry) for entry in storage.list_names(layout.selections)]
    else:
        maker = maker_of(name)
        parent, _, base = (layout.folder_of(maker) if maker else "").rpartition("/")
        names = storage.list_names(parent) if maker else []
        folders = [storage.join(parent, entry) for entry in names if entry == base or entry.startswith(f"{base}.old-")]
    yield from (record for folder in folders if (record := done_record(folder)) is not None)
