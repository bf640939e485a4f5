"""What `select.per_class` does to the classes, in sentences: for a plan, the console and the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_NAMED = 3  # classes in a sentence


def describe_planned_quota(per_class: int | None, num_classes: int, unlabeled: int, max_copies: int) -> str:
    """A sentence if there are not as many unlabeled images as the quota asks for; else empty."""
    if per_class is None or not num_classes or not unlabeled or per_class * num_classes <= unlabeled:
        return ""
    whole = min(unlabeled // per_class, num_classes - 1)
    asked, choice = per_class * num_classes, max(1, unlabeled // num_classes // 2)
    return (
        f"select.per_class={per_class:,} for {num_classes:,} classes asks for {asked:,} images, but {unlabeled:,} are unlabeled: at "
        f"most {whole:,} classes can have so many. Others are filled with copies, at most {max_copies:,} of an image "
        f"(select.max_copies); select.per_class={choice:,}, half of the mean, leaves a choice"
    )


def describe_quota(selection: Mapping[str, Any]) -> str:
    """A sentence if the quota cuts common classes while it fills rare ones with copies; else empty.

    Args:
        selection: the content of selection.json.
    """
    per_class, classes = selection["rule"]["per_class"], selection["classes"]
    if per_class is None or "kept_from" in selection:
        return ""
    common = sorted((one for one in classes if one["available"] > per_class), key=lambda one: -one["available"])
    rare = sorted((one for one in classes if 0 < one["available"] < per_class), key=lambda one: one["available"])
    if not common or not rare:
        return ""
    cut = _some([f"{_name(one)} {one['available']:,}" for one in common])
    filled = _some([f"{_name(one)} {one['available']:,} in {one['copies']:,} copies" for one in rare])
    return (
        f"select.per_class={per_class:,}: {_classes(common, classes)} more labels and lose{'s' * (len(common) == 1)} the least sure "
        f"ones ({cut}); {len(rare):,} {'has' if len(rare) == 1 else 'have'} fewer and {'is' if len(rare) == 1 else 'are'} filled with "
        f"copies ({filled})"
    )


def describe_shortfall(selection: Mapping[str, Any]) -> str:
    """A sentence if some classes do not reach the quota, even with copies; else empty.

    Args:
        selection: the content of selection.json.
    """
    rule, classes = selection["rule"], selection["classes"]
    short = sorted((one for one in classes if one["shortfall"]), key=lambda one: -one["shortfall"])
    if not short:
        return ""
    missing = _some([f"{_name(one)} has {one['copies']:,}" for one in short])
    return (
        f"select.per_class={rule['per_class']:,} is not met for {len(short):,} of {len(classes):,} classes, with at most "
        f"{rule['max_copies']:,} copies of an image ({missing})"
    )


def quota_sentences(selection: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is to be said of a selection's quota."""
    yield from filter(None, (describe_quota(selection), describe_shortfall(selection)))


def _classes(some: Sequence[object], every: Sequence[object]) -> str:
    return f"{len(some):,} of {len(every):,} classes {'has' if len(some) == 1 else 'have'}"


def _name(entry: Mapping[str, Any]) -> str:
    return repr(entry["name"]) if "name" in entry else f"class {entry['class']}"


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:_NAMED], *(["…"] if len(names) > _NAMED else [])])
