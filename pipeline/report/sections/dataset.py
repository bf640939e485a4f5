"""Section on the images that the run was made from: how many per split and class, and some of the labeled ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from data.shards.split import Split
from pipeline.pages.render import Section
from pipeline.report.facts import Facts
from pipeline.report.pictures import sample
from pipeline.report.splits import open_unchanged, picture

MAX_CLASSES = 20
_NAMES = ("labeled", "validation", "test")


def dataset_section(facts: Facts) -> Section | None:
    """Show images per split and class, and a labeled image of each class; None where no shards and no labels are there."""
    splits = {
        name: split for name in _NAMES if (split := open_unchanged(facts, name, _digest(facts, name))) is not None
    }
    counts = {name: _per_class(split, facts.num_classes) for name, split in splits.items()}
    label = next((g.records["label"]["summary"] for g in facts.generations if "label" in g.records), None)
    if not splits:
        return None
    rows = [[name, f"{split.num_samples:,}", f"{len(split.shards):,}"] for name, split in splits.items()]
    if label is not None:
        rows.append(["unlabeled", f"{label['images']:,}", ""])
    shown = _shown(np.sum(list(counts.values()), axis=0))
    values = {
        "rows": rows,
        "header": ["class", *counts],
        "classes": [[facts.class_name(at), *(f"{count[at]:,}" for count in counts.values())] for at in shown],
        "num_classes": facts.num_classes,
        "samples": _samples(facts, splits["labeled"], shown) if "labeled" in splits else [],
    }
    return Section("dataset.html", values)


def _digest(facts: Facts, name: str) -> str | None:
    """Digest of a split in the fingerprint of a stage that read it."""
    for generation in facts.generations:
        for record in generation.records.values():
            if name in record["fingerprint"]["inputs"]:
                return str(record["fingerprint"]["inputs"][name])
    return None


def _per_class(split: Split, num_classes: int) -> np.ndarray:
    """Images of each class, int64 (num_classes,)."""
    labels = [index.column("label").to_numpy() for index in split.indexes()]
    return sum(
        (np.bincount(part[part >= 0], minlength=num_classes)[:num_classes] for part in labels),
        np.zeros(num_classes, np.int64),
    )


def _shown(images: np.ndarray) -> list[int]:
    """Classes to show: all, or of many those with the fewest images."""
    if len(images) <= MAX_CLASSES:
        return list(range(len(images)))
    return np.argsort(images, kind="stable")[:MAX_CLASSES].tolist()


def _samples(facts: Facts, split: Split, classes: list[int]) -> list[dict[str, Any]]:
    """The first image of each class."""
    labels = np.concatenate([index.column("label").to_numpy() for index in split.indexes()])
    found = []
    for label in classes:
        rows = np.flatnonzero(labels == label)
        if len(rows):
            key, source = picture(split.shards, int(rows[0]))
            name = facts.class_name(label)
            found.append(sample(source, None, title=key, alt=f"{key}: labeled {name}", words=name, verdict=""))
    return found
