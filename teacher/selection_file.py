"""selection.json: what was selected and why, and enough to compute the copies of any label row again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from data import storage
from teacher.cutoffs import NO_CUT, Cutoffs, SelectError, SelectRule, confidence_key, key_confidence
from teacher.label_rows import Exclusions
from teacher.selection import Selection, ShardCounts

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


def load_selection(url: str, exclusions: Exclusions | None = None) -> Selection:
    """The selection in a selection.json; `exclusions` must be those it was made with.

    Raises:
        SelectError: not a selection.json of this version, or other exclusions.
        FileNotFoundError: no such file.
    """
    exclusions = exclusions or Exclusions()
    try:
        content = json.loads(storage.read_text(url))
        version, digest = content["schema_version"], content["exclusions"]["digest"]
        if version != SCHEMA_VERSION:
            raise SelectError(f"{url}: schema_version must be {SCHEMA_VERSION} but is {version}; select again")
        selection = Selection(_rule(content["rule"]), _cutoffs(content["classes"]), exclusions)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise SelectError(f"{url}: not a selection.json ({error!r}); select again") from error
    if digest != exclusions.digest():
        raise SelectError(f"{url}: was made with other exclusions; give those, or select again")
    return selection


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


def _rule(content: dict[str, Any]) -> SelectRule:
    return SelectRule(**content | {"class_thresholds": tuple(content["class_thresholds"])})


def _position(cutoffs: Cutoffs, index: int) -> dict[str, Any] | None:
    """Where a class's cut is; the hash in hex, as JSON numbers are not exact above 2**53."""
    if cutoffs.cut_key[index] == NO_CUT:
        return None
    confidence = key_confidence(cutoffs.cut_key[index : index + 1])[0]
    return {"confidence": float(confidence), "hash": f"{int(cutoffs.cut_hash[index]):#018x}"}


def _cutoffs(classes: list[dict[str, Any]]) -> Cutoffs:
    cuts = [entry["one_more_from"] for entry in classes]
    confidence = np.array([cut["confidence"] if cut else 0 for cut in cuts], np.float32)
    has_cut = np.array([cut is not None for cut in cuts], bool)
    return Cutoffs(
        available=np.array([entry["available"] for entry in classes], np.int64),
        base_copies=np.array([entry["base_copies"] for entry in classes], np.uint16),
        num_extra=np.array([entry["num_one_more"] for entry in classes], np.int64),
        cut_key=np.where(has_cut, confidence_key(confidence), np.uint32(NO_CUT)),
        cut_hash=np.array([int(cut["hash"], 16) if cut else 0 for cut in cuts], np.uint64),
    )


def _add_names(classes: list[dict[str, Any]], class_names: Sequence[str]) -> None:
    if len(class_names) != len(classes):
        raise SelectError(f"class names: expected {len(classes)}, one per class, but got {len(class_names)}")
    for entry, name in zip(classes, class_names, strict=True):
        entry["name"] = name


def _exclusions_json(exclusions: Exclusions) -> dict[str, Any]:
    return {
        "held_out_samples": sum(len(set(ordinals)) for ordinals in exclusions.held_out_samples.values()),
        "keys": len(exclusions.keys),
        "samples": sum(len(set(ordinals)) for ordinals in exclusions.samples.values()),
        "crowds": len(exclusions.crowds.hash) if exclusions.crowds else 0,
        "digest": exclusions.digest(),
    }
