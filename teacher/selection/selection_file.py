"""selection.json: what was selected and why; enough to compute the copies of any label row again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from teacher.selection.copies import ShardCounts
from teacher.selection.label_reader import Exclusions
from teacher.selection.quota_search import Selection
from teacher.selection.reuse import ReusedClasses, every_row
from teacher.selection.rule import NO_CUT, Cutoffs, SelectError, SelectRule, key_confidence

SCHEMA_VERSION = 1
REASONS = ("held_out_duplicate", "excluded_by_user", "below_threshold", "near_duplicate", "over_quota")
_NO_HASH = f"{0:#018x}"


def selection_json(
    selection: Selection, counts: Mapping[str, ShardCounts], class_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """The content of selection.json: rule, cut-offs and counts per class, totals, counts by reason and per shard.

    A row's copies: 0 if excluded or below the threshold; else its class's `base_copies`, and one more if its
    (confidence, `rule.tie_hash`) is at or above `one_more_from`. Only rows at or above `cut_off` are kept.

    Args:
        counts: of `write_all_copies`, by shard name.
        class_names: [num_classes], for readers.

    Raises:
        SelectError: the number of class names is not the rule's number of classes.
    """
    rule = selection.source.rule
    classes = [_class_json(rule, selection.cutoffs, index) for index in range(rule.num_classes)]
    exclusions = _exclusions_json(selection.source.exclusions)
    return {"schema_version": SCHEMA_VERSION} | _content(rule, exclusions, classes, counts, class_names)


def reused_json(
    reuse_from: str,
    exclusions: Exclusions,
    classes: ReusedClasses,
    counts: Mapping[str, ShardCounts],
    class_names: Sequence[str] | None,
) -> dict[str, Any]:
    """The content of selection.json for reused images: as `selection_json`, where it applies; `over_quota` counts images that the
    selection before did not choose.

    Args:
        reuse_from: folder of the selection before.
        classes, counts: of `reuse_images`.

    Raises:
        SelectError: as `selection_json`.
    """
    rule = every_row(len(classes.available))
    entries = [_reused_class_json(classes, index) for index in range(rule.num_classes)]
    content = _content(rule, {"digest": exclusions.digest()}, entries, counts, class_names)
    return {"schema_version": SCHEMA_VERSION, "kept_from": reuse_from} | content


def _content(
    rule: SelectRule,
    exclusions: dict[str, Any],
    classes: list[dict[str, Any]],
    counts: Mapping[str, ShardCounts],
    class_names: Sequence[str] | None,
) -> dict[str, Any]:
    if class_names is not None:
        if len(class_names) != len(classes):
            raise SelectError(f"class names: expected {len(classes)}, one per class, but got {len(class_names)}")
        classes = [entry | {"name": name} for entry, name in zip(classes, class_names, strict=True)]
    totals = {name: sum(getattr(shard, name) for shard in counts.values()) for name in ShardCounts.__annotations__}
    reasons = {name: totals.pop(name) for name in REASONS}
    return {
        "rule": asdict(rule),
        "exclusions": exclusions,
        "totals": {**totals, "shortfall": sum(entry["shortfall"] for entry in classes)},
        "reasons": reasons,
        "empty_classes": [entry["class"] for entry in classes if not entry["kept"]],
        "classes": classes,
        "shards": [{"shard": shard, **asdict(shard_counts)} for shard, shard_counts in counts.items()],
    }


def _class_json(rule: SelectRule, cutoffs: Cutoffs, index: int) -> dict[str, Any]:
    copies, base = int(cutoffs.copies[index]), int(cutoffs.base_copies[index])
    one_more_from = _cut_off(cutoffs, index)
    threshold = {"confidence": float(rule.thresholds[index]), "hash": _NO_HASH}
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


def _cut_off(cutoffs: Cutoffs, index: int) -> dict[str, Any] | None:
    """A class's cut-off; the hash in hex, as JSON numbers are not exact above 2**53."""
    if cutoffs.cut_key[index] == NO_CUT:
        return None
    confidence = key_confidence(cutoffs.cut_key[index : index + 1])[0]
    return {"confidence": float(confidence), "hash": f"{int(cutoffs.cut_hash[index]):#018x}"}


def _reused_class_json(classes: ReusedClasses, index: int) -> dict[str, Any]:
    key = classes.lowest_key[index : index + 1]
    lowest = 1.0 if key[0] == NO_CUT else float(key_confidence(key.astype(np.uint32))[0])
    return {
        "class": index,
        "available": int(classes.available[index]),
        "kept": int(classes.kept[index]),
        "copies": int(classes.copies[index]),
        "cut_off": {"confidence": lowest, "hash": _NO_HASH},
        "shortfall": 0,
    }


def _exclusions_json(exclusions: Exclusions) -> dict[str, Any]:
    return {
        "held_out_samples": sum(len(set(ordinals)) for ordinals in exclusions.held_out_samples.values()),
        "keys": len(exclusions.keys),
        "crowds": len(exclusions.hash_groups.hash) if exclusions.hash_groups else 0,
        "digest": exclusions.digest(),
    }
