"""Folders of images → WebDataset shards with a manifest, an index per shard and perceptual hashes.

    python -m data.pack images=FOLDER out=FOLDER [labeled=true] [validation=0.02] [samples_per_shard=10000] [seed=0]

Labeled: one folder per class; labels are the positions of the sorted folder names, and `out/labeled` and `out/validation` are
written (stratified). Unlabeled (`labeled=false`): every image below the folder goes to `out/unlabeled`. Image bytes stay as they are.
Images are shuffled by the seed, so that every shard has a bit of everything. Files that are no images, and images that cannot be
decoded, are listed in `rejected.txt` beside the shards; where each key came from is in `sources.parquet`. The same command again
continues after an interruption, split by split.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from data import storage
from data.held_out import Traits, is_outdated, traits, write_hashes
from data.images import DecodeError, decode
from data.manifest import HASHES_NAME, MANIFEST_NAME, DataError, write_table
from data.sample import IMAGE_EXTENSIONS, image_extension
from data.settings import run_command
from data.shards import Members, labeled_members, write_shards

REJECTED_NAME = "rejected.txt"


@dataclass
class _Packed:
    """What packing one split saw, besides the shards."""

    sources: list[str] = field(default_factory=list)
    traits: list[Traits] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)


def pack(
    images: str,
    out: str,
    labeled: bool = True,
    validation: float = 0.02,
    samples_per_shard: int = 10000,
    seed: int = 0,
) -> None:
    """Pack a folder (see the module's text).

    Raises:
        DataError: no folder, no class folders, no images, or `out` in use.
    """
    root = Path(images)
    if not root.is_dir():
        raise DataError(f"images={images}: no such folder")
    if samples_per_shard < 1:
        raise DataError(f"samples_per_shard={samples_per_shard}: expected 1 or more")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if labeled else None
    if labeled and not classes:
        raise DataError(f"images={images}: expected one folder per class; for unlabeled images say labeled=false")
    files, rejected = _find(root)
    if not files:
        raise DataError(f"images={images}: no images ({', '.join(IMAGE_EXTENSIONS)}) below it")
    if empty := sorted(set(classes or ()) - {f.relative_to(root).parts[0] for f in files}):
        raise DataError(
            f"images={images}: no images in {', '.join(empty[:5])}{', …' * (len(empty) > 5)}, and every folder is a class; remove "
            "what is none, and put folders in the place of links to some, which are not followed"
        )
    if classes and (stray := [f for f in files if f.parent == root]):
        raise DataError(f"{stray[0]}: not in a class folder; move it into one, or say labeled=false")
    settings = {"images": images, "labeled": labeled, "validation": validation, "samples_per_shard": samples_per_shard}
    _claim(out, "labeled" if labeled else "unlabeled", settings | {"seed": seed})
    labels = np.array([classes.index(f.relative_to(root).parts[0]) if classes else 0 for f in files])
    for name, chosen in _split(labels, validation if labeled else 0.0, seed).items():
        split = storage.join(out, name if labeled else "unlabeled")
        if storage.exists(storage.join(split, MANIFEST_NAME)):
            print(f"{split}: packed already")
            if is_outdated(split):
                print(
                    f"{split}/{HASHES_NAME} is of an earlier version and cannot be used as data.held_out_hashes; to write it "
                    f"anew, delete {split}/{MANIFEST_NAME} and give this command again: the shards stay the same"
                )
        else:
            _pack_split(split, files, chosen, labels if classes else None, classes, samples_per_shard, rejected)
        rejected = []  # files that are no images are listed once, with the first split


def _claim(out: str, kind: str, settings: Mapping[str, Any]) -> None:
    """Remember how `out` is packed, so that the same command continues and another one is refused."""
    url, text = storage.join(out, f"packing-{kind}.json"), json.dumps(settings) + "\n"
    if storage.exists(url) and storage.read_text(url) != text:
        raise DataError(f"{out} was packed with other settings ({storage.read_text(url).strip()}); choose another out=")
    storage.write_text(url, text)


def _find(root: Path) -> tuple[list[Path], list[str]]:
    entries = sorted(entry for entry in root.rglob("*") if entry.is_file())
    images = [entry for entry in entries if image_extension(entry.suffix)]
    kept = set(images)
    return images, [
        f"{entry}: not an image file ({', '.join(IMAGE_EXTENSIONS)})" for entry in entries if entry not in kept
    ]


def _split(labels: np.ndarray, validation: float, seed: int) -> dict[str, np.ndarray]:
    """Shuffled indices of `labeled` and, stratified by class, `validation`: at least one image of each, but never the only one."""
    if not 0 <= validation < 1:
        raise DataError(f"validation={validation}: expected a fraction from 0 to below 1")
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels) if validation else ():
        members = order[labels[order] == label]
        held_out[members[: min(len(members) - 1, max(1, round(validation * len(members))))]] = True
    splits = {"labeled": order[~held_out[order]], "validation": order[held_out[order]]}
    return {name: indices for name, indices in splits.items() if len(indices)}


def _pack_split(
    folder: str,
    files: Sequence[Path],
    chosen: np.ndarray,
    labels: np.ndarray | None,
    classes: Sequence[str] | None,
    samples_per_shard: int,
    rejected: Sequence[str],
) -> None:
    packed = _Packed(rejected=list(rejected))

    def samples() -> Iterator[tuple[str, Members]]:
        for index in tqdm(chosen, desc=storage.base_name(folder), unit="img"):
            content = files[index].read_bytes()
            try:
                packed.traits.append(traits(decode(content)))
            except DecodeError as error:
                packed.rejected.append(f"{files[index]}: {error}")
                continue
            extension = image_extension(files[index].suffix)
            key = f"{len(packed.sources):09d}"
            packed.sources.append(str(files[index]))
            yield key, labeled_members(extension, content, int(labels[index]) if labels is not None else None)

    def write_sidecars() -> None:
        keys = [f"{number:09d}" for number in range(len(packed.sources))]
        write_table(storage.join(folder, "sources.parquet"), pa.table({"key": keys, "path": packed.sources}))
        if classes:
            write_hashes(folder, packed.traits)
        storage.write_text(
            storage.join(folder, REJECTED_NAME), "".join(line + "\n" for line in sorted(packed.rejected))
        )

    write_shards(samples(), folder, storage.base_name(folder), samples_per_shard, classes, write_sidecars)
    if packed.rejected:
        print(f"{len(packed.rejected)} files were left out; {storage.join(folder, REJECTED_NAME)} says which and why")


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    return run_command(pack, arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
