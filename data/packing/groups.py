"""Find images that must be in one split (copies of a file, views of an object), and split without separating them."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data.errors import DataError
from data.packing.folders import ImageFile
from data.shards.samples import printable

_PIECE = 16 * 1024  # bytes from the middle of a file; they differ for almost all files of equal size
Indices = NDArray[np.int64]


def same_bytes(images: Sequence[ImageFile]) -> list[list[int]]:
    """Positions of byte-identical images: a list of two or more for each content, in order.

    Reads a piece of a file only if another file has its size, and the whole file only if another has the same piece.
    """
    groups = _refine([list(range(len(images)))], lambda i: images[i].size)
    groups = _refine(
        groups, lambda i: _digest(images[i].read(max(0, (images[i].size - _PIECE) // 2), _PIECE)), "compare"
    )
    return _refine(groups, lambda i: _digest(images[i].read()), "compare copies")


def _refine(groups: list[list[int]], key: Callable[[int], Hashable], description: str = "") -> list[list[int]]:
    """Split each group by key; drop parts with one member."""
    found = []
    total = sum(map(len, groups))
    with tqdm(total=total, desc=description, unit="img", delay=5, leave=False, disable=not description) as bar:
        for group in groups:
            parts = defaultdict(list)
            for member in group:
                parts[key(member)].append(member)
                bar.update()
            found += [part for part in parts.values() if len(part) > 1]
    return sorted(found)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def same_name(names: Sequence[str], pattern: str) -> list[list[int]]:
    """Positions of names with the same text in the group of a regular expression: a list for each text.

    Raises:
        DataError: the pattern is no regular expression with one group, or matches no name.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise DataError(f"group={pattern}: not a regular expression ({error})") from error
    if expression.groups != 1:
        raise DataError(f"group={pattern}: expected one pair of parentheses, around what the views of one object share")
    found = defaultdict(list)
    for position, name in enumerate(names):
        if match := expression.search(name):
            found[match.group(1)].append(position)
    if names and not found:
        raise DataError(
            f"group={pattern}: found in none of the {len(names)} names below images=, such as {printable(names[0])!r}"
        )
    return list(found.values())


def merged(count: int, groups: Iterable[Sequence[int]]) -> Indices:
    """For each position, the first position connected to it by groups, directly or through others: int64 (count,)."""
    parents = list(range(count))

    def first(position: int) -> int:
        while parents[position] != position:
            parents[position] = parents[parents[position]]
            position = parents[position]
        return position

    for group in groups:
        roots = {first(position) for position in group}
        for root in roots:
            parents[root] = min(roots)
    return np.array([first(position) for position in range(count)], np.int64)


def split(labels: Indices, groups: Indices, validation: float, seed: int) -> dict[str, Indices]:
    """Split into `labeled` and `validation`, stratified by class: name → shuffled positions, without an empty split.

    From each class with two or more images, hold out the share `validation`, at least one image, never all. Groups stay together: skip
    a group that would exceed the share; if every group would, hold out the class's smallest group.

    Args:
        labels: int (N,).
        groups: int (N,), equal for images that must be in one split.
        validation: share, ≥ 0 and < 1.

    Raises:
        DataError: the share is out of range.
    """
    if not 0 <= validation < 1:
        raise DataError(f"validation={validation}: expected a fraction from 0 to below 1")
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out = np.zeros(len(labels), bool)
    if validation and len(labels):
        held_out = _held_out(labels, groups, order, validation)
    splits = {"labeled": order[~held_out[order]], "validation": order[held_out[order]]}
    return {name: positions for name, positions in splits.items() if len(positions)}


def _held_out(labels: Indices, groups: Indices, order: Indices, validation: float) -> NDArray[np.bool_]:
    """bool (N,): the images for validation."""
    sizes = np.bincount(labels).tolist()
    wanted = [min(size - 1, max(1, round(validation * size))) for size in sizes]
    members: dict[int, list[int]] = defaultdict(list)
    groups_of: list[dict[int, None]] = [{} for _ in sizes]  # for each class, in shuffled order
    for position in order.tolist():
        members[int(groups[position])].append(position)
        groups_of[labels[position]][int(groups[position])] = None
    chosen, held = np.zeros(len(labels), bool), [0] * len(sizes)

    def take(group: int, limits: Sequence[int]) -> None:
        """Hold a group out, unless a class would exceed its limit."""
        counts = Counter(labels[members[group]].tolist())
        if not chosen[members[group][0]] and all(
            held[label] + count <= limits[label] for label, count in counts.items()
        ):
            chosen[members[group]] = True
            for label, count in counts.items():
                held[label] += count

    for label, candidates in enumerate(groups_of):
        for group in candidates:
            if held[label] >= wanted[label]:
                break
            take(group, wanted)
        for group in sorted(candidates, key=lambda group: len(members[group])):
            if held[label]:
                break
            take(group, [size - 1 for size in sizes])
    return chosen
