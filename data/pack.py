"""Pack a folder of images into WebDataset shards with a manifest, an index per shard and perceptual hashes.

    python -m data.pack images=FOLDER out=FOLDER [labeled=true] [validation=0.02] [samples_per_shard=10000] [seed=0] [group=PATTERN]

Labeled: one folder per class. Labels are positions in the sorted folder names; images go to `out/labeled` and, stratified by class,
`out/validation`. Unlabeled (`labeled=false`): all images below the folder go to `out/unlabeled`. Image bytes are not changed.
Images are shuffled with the seed. Byte-identical images stay in one split; so do images whose paths below `images` have the same
text in the parentheses of the regular expression `group`, as in group='^(.*)_view\\d+'.

`rejected.txt` beside the shards lists files that are no images or cannot be decoded; `sources.parquet` has the path of each key.
After an interruption the same command continues with the next split, if the folder has the same files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from data import storage
from data.errors import DataError
from data.images.decode import DecodeError, decode
from data.images.held_out_hashes import HeldOutRow, held_out_row, is_outdated, write_hashes
from data.json_files import read_json
from data.packing.folders import LeftOut
from data.packing.plan import REJECTED_NAME, SOURCES_NAME, Plan, plan_packing, read_sources, require_decodable
from data.packing.summary import print_summary
from data.settings import run_command
from data.shards.samples import printable
from data.shards.split import HASHES_NAME, MANIFEST_NAME
from data.shards.write import Fields, labeled_members, require_ours, write_shards
from data.tables import write_table


@dataclass
class _Packed:
    """Contents of the files beside a split's shards."""

    sources: list[str] = field(default_factory=list)
    hashes: list[HeldOutRow] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)


def pack(
    images: str,
    out: str,
    labeled: bool = True,
    validation: float = 0.02,
    samples_per_shard: int = 10000,
    seed: int = 0,
    group: str = "",
) -> None:
    """Pack a folder; see the module's docstring.

    Raises:
        DataError: there is no such folder or no image in it, its class folders are wrong (see `data.packing.folders.find_classes`), or
            `out` has other files.
    """
    root = Path(images)
    if not root.is_dir():
        raise DataError(f"images={images}: no such folder")
    if samples_per_shard < 1:
        raise DataError(f"samples_per_shard={samples_per_shard}: expected 1 or more")
    if group and not labeled:
        raise DataError(f"group={group}: goes with labeled images, of which some are held out")
    _require_outside(root, out, ("labeled", "validation") if labeled else ("unlabeled",))
    plan = plan_packing(root, out, labeled, validation, seed, group)
    settings = {"images": images, "labeled": labeled, "validation": validation, "samples_per_shard": samples_per_shard}
    _claim(out, settings | {"seed": seed, "group": group}, plan)
    todo = {name: folder for name, folder in _folders(out, plan).items() if not _is_packed(folder)}
    if "labeled" in todo:
        require_decodable(plan)
    left_out: Sequence[LeftOut] = plan.found.left_out
    for name, folder in _folders(out, plan).items():
        if name in todo:
            _pack_split(folder, plan, name, samples_per_shard, left_out)
        else:
            _report_packed(folder)
        left_out = ()  # list them once, with the first split
    print_summary(plan, _folders(out, plan), validation)


def _folders(out: str, plan: Plan) -> dict[str, str]:
    return {name: storage.join(out, name) for name in plan.splits}


def _is_packed(folder: str) -> bool:
    return storage.exists(storage.join(folder, MANIFEST_NAME))


def _report_packed(folder: str) -> None:
    print(f"{folder}: packed already")
    if is_outdated(folder):
        print(
            f"{folder}/{HASHES_NAME} is of an earlier version and cannot be used as data.held_out_hashes; to write it "
            f"anew, remove the folder {folder} and give this command again: it makes the same shards"
        )


def _require_outside(root: Path, out: str, splits: Sequence[str]) -> None:
    """Raise DataError when `out` is inside `images`, where packed files would count as images of the next packing."""
    if not storage.is_local(out):
        return
    images = root.resolve()
    for folder in (out, *(storage.join(out, name) for name in splits)):
        target = storage.local_path(folder).resolve()
        if images in (target, *target.parents):
            raise DataError(
                f"out={out}: {folder} lies inside images={root}, where packed files would count as its files; give an out= outside"
            )


def _claim(out: str, settings: Mapping[str, Any], plan: Plan) -> None:
    """Record settings and files of the packing in `out`, so that the same command continues and another is refused."""
    url = storage.join(out, f"packing-{'labeled' if plan.classes else 'unlabeled'}.json")
    folders = _folders(out, plan)
    files = {"count": len(plan.images), "digest": plan.digest}
    if not storage.exists(url):
        for name, folder in folders.items():
            if _is_packed(folder):
                raise DataError(f"{folder} holds shards of another packing; choose another out=")
            require_ours(folder, name)
    else:
        before = read_json(url, "choose another out=")
        if {"group": "", **before, "files": None} != {**settings, "files": None}:
            raise DataError(f"{out} was packed with other settings ({json.dumps(before)}); choose another out=")
        if "files" in before:
            _require_same_files(out, before["files"], files, plan)
            return
        if not _has_splits_left(out, plan):
            return
    storage.write_text(url, json.dumps({**settings, "files": files}) + "\n")


def _require_same_files(out: str, before: Any, now: Mapping[str, Any], plan: Plan) -> None:
    if before != now:
        then = (
            f"{before['count']:,} images then"
            if isinstance(before, dict) and "count" in before
            else "other images then"
        )
        parts = " and ".join(f"{out}/{name}" for name in plan.splits)
        raise DataError(
            f"images={plan.root}: other files than when packing into {out} began ({then}, {now['count']:,} now, or other names, sizes "
            "or copies), so images could be in two splits; choose another out=, or remove "
            f"{parts} and {out}/packing-{'labeled' if plan.classes else 'unlabeled'}.json to begin again"
        )


def _has_splits_left(out: str, plan: Plan) -> bool:
    """Whether a packing of an earlier version, which did not record its files, has splits left to pack.

    Raises:
        DataError: a finished split has images that would now be in another split.
    """
    folders = _folders(out, plan)
    if all(_is_packed(folder) for folder in folders.values()):
        return False
    for name, folder in folders.items():
        planned = {printable(str(plan.images[position].path)) for position in plan.splits[name].tolist()}
        if _is_packed(folder) and (others := sorted(read_sources(folder) - planned)):
            raise DataError(
                f"{folder}: {others[0]} was packed into it, but images={plan.root} has changed since and would be split another way, "
                "so images could be in two splits; choose another out="
            )
    return True


def _pack_split(folder: str, plan: Plan, name: str, samples_per_shard: int, left_out: Sequence[LeftOut]) -> None:
    packed = _Packed(rejected=[str(entry) for entry in left_out])

    def samples() -> Iterator[tuple[str, Fields]]:
        for position in tqdm(plan.splits[name].tolist(), desc=name, unit="img"):
            image = plan.images[position]
            content = image.read()
            try:
                packed.hashes.append(held_out_row(decode(content)))
            except DecodeError as error:
                packed.rejected.append(str(LeftOut(image.path, str(error))))
                continue
            key = f"{len(packed.sources):09d}"
            packed.sources.append(printable(str(image.path)))
            yield key, labeled_members(image.field, content, int(plan.labels[position]) if plan.classes else None)

    def write_sidecars() -> None:
        keys = [f"{number:09d}" for number in range(len(packed.sources))]
        write_table(storage.join(folder, SOURCES_NAME), pa.table({"key": keys, "path": packed.sources}))
        if plan.classes:
            write_hashes(folder, packed.hashes)
        storage.write_text(
            storage.join(folder, REJECTED_NAME), "".join(line + "\n" for line in sorted(packed.rejected))
        )

    write_shards(samples(), folder, name, samples_per_shard, plan.classes, write_sidecars)


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    return run_command(pack, arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
