"""The summary of a packing: classes, splits, what was left out, copies, and lines for the configuration."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from .. import storage
from ..shards.index import read_index
from ..shards.samples import printable
from ..shards.split import HASHES_NAME, MANIFEST_NAME, Manifest, index_url
from .folders import natural_order
from .plan import Plan
from .sidecars import REJECTED_NAME, read_sources

_SHOWN = 5


def summary_lines(plan: Plan, folders: Mapping[str, str], validation: float) -> list[str]:
    """Classes, splits, what was left out, copies.

    Args:
        folders: split → folder of its shards.
        validation: the requested share.
    """
    manifests = {name: _manifest(folder) for name, folder in folders.items()}
    return [
        *_classes(plan, folders, manifests),
        *_splits(plan, manifests, validation),
        *_left_out(plan, folders, manifests),
        *_copies(plan),
        *_in_two_splits(plan, folders),
    ]


def _manifest(folder: str) -> Manifest:
    return Manifest.model_validate_json(storage.read_bytes(storage.join(folder, MANIFEST_NAME)))


def _count(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + ", …" * (len(names) > _SHOWN)


def _images(manifest: Manifest) -> int:
    return sum(shard.num_samples for shard in manifest.shards)


def _per_class(folder: str, manifest: Manifest, num_classes: int) -> np.ndarray:
    counts = np.zeros(num_classes, np.int64)
    for shard in manifest.shards:
        table = read_index(index_url(folder, shard.name), shard.index_sha256)
        counts += np.bincount(table.column("label").to_numpy(), minlength=num_classes)
    return counts


def _classes(plan: Plan, folders: Mapping[str, str], manifests: Mapping[str, Manifest]) -> Iterator[str]:
    if not plan.classes:
        return
    counts = {name: _per_class(folders[name], manifest, len(plan.classes)) for name, manifest in manifests.items()}
    total = sum(counts.values(), np.zeros(len(plan.classes), np.int64))
    smallest, largest = int(total.argmin()), int(total.argmax())
    yield (
        f"{_count(len(plan.classes), 'class')}, {int(total.sum()):,} images: {total[smallest]:,} ({plan.classes[smallest]!r}) to "
        f"{total[largest]:,} ({plan.classes[largest]!r}) in a class"
    )
    if len(plan.classes) == 1:
        yield "  one class alone teaches nothing; is images= the folder that holds the class folders?"
    if "validation" in counts and (without := np.flatnonzero(counts["validation"] == 0).tolist()):
        names = _some([plan.classes[label] for label in without])
        yield f"  no validation image of {_count(len(without), 'class')} ({names}): their only images, or groups, are for training"


def _splits(plan: Plan, manifests: Mapping[str, Manifest], validation: float) -> Iterator[str]:
    for name, manifest in manifests.items():
        yield f"  {name:10} {_images(manifest):,} images in {_count(len(manifest.shards), 'shard')}"
    if plan.classes and validation and "validation" not in manifests:
        yield (
            f"  validation none, though validation={validation}: no class has two images, or groups of images, so that one could be "
            "held out. Without validation images, confidences are not calibrated"
        )


def _left_out(plan: Plan, folders: Mapping[str, str], manifests: Mapping[str, Manifest]) -> Iterator[str]:
    reasons = Counter(plan.found.reasons)
    for name, order in plan.splits.items():
        reasons["cannot be decoded"] += max(0, len(order) - _images(manifests[name]))
    if total := sum(reasons.values()):
        files = " and ".join(storage.join(folder, REJECTED_NAME) for folder in folders.values())
        yield f"left out: {total:,} ({files} {'say' if len(folders) > 1 else 'says'} which and why)"
        yield from (f"  {number:,} × {reason}" for reason, number in reasons.most_common() if number)


def _copies(plan: Plan) -> Iterator[str]:
    if plan.copies:
        pairs = [" = ".join(_name(plan, position) for position in group[:2]) for group in plan.copies]
        images = sum(map(len, plan.copies))
        yield (
            f"byte-identical: {_count(len(plan.copies), 'group')} of {images:,} images in all, each kept in one split: {_some(pairs)}"
        )
    if mixed := [group for group in plan.copies if len({plan.label(position) for position in group}) > 1]:
        found = [" = ".join(_name(plan, position) for position in group[:_SHOWN]) for group in mixed]
        yield f"  {_count(len(mixed), 'group')} in more than one class, so that some labels are wrong: {_some(found)}"


def _name(plan: Plan, position: int) -> str:
    return printable(plan.images[position].path.relative_to(plan.root).as_posix())


def _in_two_splits(plan: Plan, folders: Mapping[str, str]) -> Iterator[str]:
    """Warn about images in both splits: an earlier version separated copies, and continued although the folder had changed."""
    if len(folders) != 2:
        return
    paths = [[printable(str(plan.images[position].path)) for position in group] for group in plan.copies]
    first_copy = {path: group[0] for group in paths for path in group}
    held_out = {first_copy.get(path, path): path for path in sorted(read_sources(folders["validation"]))}
    training = (first_copy.get(path, path) for path in read_sources(folders["labeled"]))
    if both := sorted({held_out[image] for image in training if image in held_out}):
        yield (
            f"WRONG: {len(both):,} of {len(held_out):,} validation images are in {folders['labeled']} too ({_some(both)}): "
            "accuracy on them says nothing. Pack into another out="
        )


def _natural_order(classes: Sequence[str]) -> Iterator[str]:
    """Warn when timm's folder reader would number the classes differently."""
    natural = natural_order(classes)
    differing = [number for number, name in enumerate(natural) if name != classes[number]]
    if differing:
        number = differing[0]
        yield (
            f"labels follow plain sorting, as torchvision's ImageFolder does: class {number} is {classes[number]!r}. timm's reader of "
            f"folders sorts numbers by value and ignores case: there it is {natural[number]!r}, and {len(differing):,} of "
            f"{len(classes):,} classes differ. A teacher that was trained in that order mislabels these images: say the order of its "
            "outputs by teacher.class_names=FILE (one name a line), or rename the folders so that both orders are one (01, 02, …, 10)"
        )


def configuration_lines(plan: Plan, folders: Mapping[str, str], validation: float) -> Iterator[str]:
    """Lines for the configuration of a run; arguments as `summary_lines`."""
    yield from _natural_order(plan.classes or ())
    yield "in the configuration:"
    yield "  data:"
    shards = {name: json.dumps([storage.join(folder, "*.tar")], ensure_ascii=False) for name, folder in folders.items()}
    if not plan.classes:
        yield f"    unlabeled: {shards['unlabeled']}"
        return
    held_out = json.dumps(
        [storage.join(folder, HASHES_NAME) for folder in list(folders.values())[-1:]], ensure_ascii=False
    )
    yield f"    labeled: {shards['labeled']}"
    if "validation" in shards:
        yield f"    validation: {shards['validation']}"
        yield f"    held_out_hashes: {held_out}"
    elif not validation:
        yield "  or, if these are the test images:"
        yield f"    test: {shards['labeled']}"
        yield f"    held_out_hashes: {held_out}"
