"""selection.json: what was selected and why, and enough to compute the copies of any label row again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from teacher.selection.copies import Selection, ShardCounts
from teacher.selection.cutoffs import NO_CUT, Cutoffs, SelectError, key_confidence
from teacher.selection.label_reader import Exclusions

SCHEMA_VERSION = 1
REASONS = ("held_out_duplicate", "excluded_by_user", "below_threshold", "near_duplicate", "over_quota")


def selection_json(
    selection: Selection, counts: Mapping[str, ShardCounts], class_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """What selection.json holds: the rule, cut-offs and counts per class, totals, counts by reason and per shard.

    A row's copies: none if excluded or below the threshold; else its class's `base_copies`, and one more when its
    (confidence, `cutoffs.tie_hash`) is at or above `one_more_from`. Only rows at or above `cut_off` are kept.

    Args:
        counts: of `write_all_copies`, by shard name.
        class_names: [num_classes], for readers.

    Raises:
        SelectError: the number of class names is not the rule's number of classes.
    """
    classes = [_class_json(selection, index) for index in range(selection.rule.num_classes)]
    if class_names is not None:
        _add_names(classes, class_names)
    totals = {name: sum(getattr(shard, name) for shard in counts.values()) for name in ShardCounts.__annotations__}
    reasons = {name: totals.pop(name) for name in REASONS}
    return {
        "schema_version": SCHEMA_VERSION,
        "rule": asdict(selection.rule),
        "exclusions": _exclusions_json(selection.exclusions),
        "totals": {**totals, "shortfall": sum(entry["shortfall"] for entry in classes)},
        "reasons": reasons,
        "empty_classes": [entry["class"] for entry in classes if not entry["available"]],
        "classes": classes,
        "shards": [{"shard": shard, **asdict(shard_counts)} for shard, shard_counts in counts.items()],
    }


def _class_json(selection: Selection, index: int) -> dict[str, Any]:
    rule, cutoffs = selection.rule, selection.cutoffs
    copies, base = int(cutoffs.copies[index]), int(cutoffs.base_copies[index])
    one_more_from = _position(cutoffs, index)
    threshold = {"confidence": float(rule.thresholds[index]), "hash": f"{0:#018x}"}
    return {
        "class": index,
        "available": int(cutoffs.available[index]),
        "kept": int(cutoffs.kept[index]),
        "copies": copies,
        "cut_off": one_more_from if one_more_from and not base else threshold,
        "base_copies": base,
        "num_one_more": int(cutoffs.num_extra[index]),
        "one_more_from": one_more_from,
        "max_copies": base + (one_more_from is not None),
        "shortfall": 0 if rule.per_class is None else rule.per_class - copies,
    }


def _position(cutoffs: Cutoffs, index: int) -> dict[str, Any] | None:
    """Where a class's cut is; the hash in hex, as JSON numbers are not exact above 2**53."""
    if cutoffs.cut_key[index] == NO_CUT:
        return None
    confidence = key_confidence(cutoffs.cut_key[index : index + 1])[0]
    return {"confidence": float(confidence), "hash": f"{int(cutoffs.cut_hash[index]):#018x}"}


def _add_names(classes: list[dict[str, Any]], class_names: Sequence[str]) -> None:
    if len(class_names) != len(classes):
        raise SelectError(f"class names: expected {len(classes)}, one per class, but got {len(class_names)}")
    for entry, name in zip(classes, class_names, strict=True):
        entry["name"] = name


def _exclusions_json(exclusions: Exclusions) -> dict[str, Any]:
    return {
        "held_out_samples": sum(len(set(ordinals)) for ordinals in exclusions.held_out_samples.values()),
        "keys": len(exclusions.keys),
        "crowds": len(exclusions.crowds.hash) if exclusions.crowds else 0,
        "digest": exclusions.digest(),
    }
