"""Find images that must be in one split (copies of a file, views of an object), and split without separating them."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..progress_bar import ProgressBar
from ..shards.samples import printable
from .folders import ImageFile

_PIECE = 16 * 1024  # bytes from the middle of a file; they differ for almost all files of equal size
_READERS = 16  # threads; most of their time is the disk's
_AT_ONCE = 10_000  # images
Indices = NDArray[np.int64]


def same_bytes(images: Sequence[ImageFile], sizes: Indices | None = None) -> list[list[int]]:
    """Positions of byte-identical images: a list of two or more for each content, in order.

    Reads a piece of a file only if another file has its size, and the whole file only if another has the same piece. Several threads
    read. Takes 40 bytes of memory an image.

    Args:
        sizes: bytes of each image, if they are known: int64 (N,).
    """
    if sizes is None:
        sizes = np.fromiter((image.size for image in images), np.int64, len(images))
    positions = _shared(np.arange(len(images)), sizes)
    pieces = _digests(images, positions, _middle, "compare")
    keys = np.empty(len(positions), [("size", np.int64), ("piece", np.uint64)])
    keys["size"], keys["piece"] = sizes[positions], pieces
    positions = _shared(positions, keys)
    found = defaultdict[bytes, list[int]](list)
    for position, digest in zip(positions.tolist(), _map(images, positions, _whole, "compare copies"), strict=True):
        found[digest].append(position)
    return sorted(group for group in found.values() if len(group) > 1)


def _shared(positions: Indices, keys: NDArray[Any]) -> Indices:
    """The positions whose key another one has."""
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return positions[counts[inverse] > 1]


def _digests(
    images: Sequence[ImageFile], positions: Indices, digest: Callable[[ImageFile], bytes], doing: str
) -> NDArray[np.uint64]:
    first_bytes = (value[:8] for value in _map(images, positions, digest, doing))
    return np.fromiter((int.from_bytes(value, "little") for value in first_bytes), np.uint64, len(positions))


def _map(
    images: Sequence[ImageFile], positions: Indices, digest: Callable[[ImageFile], bytes], doing: str
) -> Iterator[bytes]:
    """`digest` of each of these images, in order, by several threads."""
    with (
        ThreadPoolExecutor(_READERS) as pool,
        ProgressBar(total=len(positions), desc=doing, unit="image", delayed=True) as bar,
    ):
        for start in range(0, len(positions), _AT_ONCE):
            yield from pool.map(lambda position: digest(images[position]), positions[start : start + _AT_ONCE].tolist())
            bar.update(min(_AT_ONCE, len(positions) - start))


def _middle(image: ImageFile) -> bytes:
    return _digest(image.read(max(0, (image.size - _PIECE) // 2), _PIECE))


def _whole(image: ImageFile) -> bytes:
    return _digest(image.read())


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def same_name(names: Sequence[str], pattern: str) -> list[list[int]]:
    """Positions of names with the same text in a regular expression's parentheses, or without any in its match: a list for each text.

    Raises:
        DataError: the pattern is no regular expression with at most one group, or matches no name.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise DataError(f"group={pattern}: not a regular expression ({error})") from error
    if expression.groups > 1:
        raise DataError(
            f"group={pattern}: expected one pair of parentheses, around what the views of one object share; others begin with (?:"
        )
    found = defaultdict(list)
    for position, name in enumerate(names):
        if match := expression.search(name):
            found[match.group(expression.groups)].append(position)
    if names and not found:
        raise DataError(
            f"group={pattern}: found in none of the {len(names)} names below images=, such as {printable(names[0])!r}"
        )
    return list(found.values())


def merged(count: int, groups: Iterable[Sequence[int]]) -> Indices:
    """For each position, the first position connected to it by groups, directly or through others: int64 (count,)."""
    parents: dict[int, int] = {}

    def first(position: int) -> int:
        while (parent := parents.setdefault(position, position)) != position:
            parents[position] = parents[parent]
            position = parents[position]
        return position

    for group in groups:
        roots = {first(position) for position in group}
        for root in roots:
            parents[root] = min(roots)
    found = np.arange(count, dtype=np.int64)
    for position in parents:
        found[position] = first(position)
    return found


def members(firsts: Indices) -> list[list[int]]:
    """The positions of each group of two or more, from the first position of each one's group."""
    others = np.flatnonzero(firsts != np.arange(len(firsts)))
    found = defaultdict[int, list[int]](list)
    for position in others.tolist():
        found[int(firsts[position])].append(position)
    return [[first, *found[first]] for first in sorted(found)]


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
    members_of = _Members(groups[order], order)
    by_class = _Members(labels[order], groups[order])
    chosen, held = np.zeros(len(labels), bool), [0] * len(sizes)

    def take(group: int, limits: Sequence[int]) -> None:
        """Hold a group out, unless a class would exceed its limit."""
        members = members_of[group]
        counts = Counter(labels[members].tolist())
        if not chosen[members[0]] and all(held[label] + count <= limits[label] for label, count in counts.items()):
            chosen[members] = True
            for label, count in counts.items():
                held[label] += count

    for label in range(len(sizes)):
        candidates = list(dict.fromkeys(by_class[label].tolist()))  # in shuffled order
        for group in candidates:
            if held[label] >= wanted[label]:
                break
            take(group, wanted)
        if held[label]:
            continue
        for group in sorted(candidates, key=lambda group: len(members_of[group])):
            if held[label]:
                break
            take(group, [size - 1 for size in sizes])
    return chosen


class _Members:
    """The values of each key, in order: one array of them, sorted by key."""

    def __init__(self, keys: Indices, values: Indices) -> None:
        self._values = values[np.argsort(keys, kind="stable")]
        self._ends = np.cumsum(np.bincount(keys))

    def __getitem__(self, key: int) -> Indices:
        return self._values[self._ends[key - 1] if key else 0 : self._ends[key]]
