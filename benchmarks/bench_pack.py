"""Packing a folder of photos into shards, beside `tar`, beside webdataset as img2dataset uses it, and beside decoding alone.

    python -m benchmarks.bench_pack [rounds=5] [images=20000] [processes=N] [out=runs/bench_pack]

JPEG photos of 50 kB in folders of 1,000, in the page cache; shards of 1,000. All but `tar` have `processes` processes (default: one per
core). A contender's time includes the start of its processes and `sync`; its output is removed and synced before the next starts.
Medians over rounds; contenders take turns. Memory is that of ours' largest process.

    ours        data.pack labeled=false: shuffled, every image decoded, shards with index and SHA-256, list of files, sources
    labeled     data.pack labeled=true: also compared with the others for copies, hashed and thumbnailed; two splits
    floor       the images decoded as in ours, and the SHA-256 of their bytes, in folder order; nothing is written
    floor_labeled  the same with the hashes and thumbnails of labeled images
    webdataset  a process per core with a webdataset.TarWriter each: images decoded, .jpg and .json with the SHA-256 written, in folder
                order, as img2dataset writes what it has downloaded; no index, nothing to continue from
    tar         one process: GNU tar of each folder; nothing is decoded
"""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from statistics import median

from benchmarks.scratch import seconds_to_disk
from data.images.decode import decode_fast
from data.packing.pack_folder import pack
from data.packing.screening import check_image
from data.packing.workers import available_cores, workers
from data.settings import run_command

PER_FOLDER, DISTINCT = 1000, 2000
_PIECE = 250  # images of a task of the floor


def bench(rounds: int = 5, images: int = 20000, processes: int = 0, out: str = "runs/bench_pack") -> None:
    """Print images per second of each contender."""
    number = processes or available_cores()
    photos = _make_folders(Path(out) / f"photos-{images}", images, out)
    paths = sorted(photos.glob("*/*.jpg"))
    contenders: dict[str, Callable[[Path], None]] = {
        "ours": lambda folder: _pack(photos, folder, labeled=False, processes=number),
        "labeled": lambda folder: _pack(photos, folder, labeled=True, processes=number),
        "floor": lambda _: _in_processes(number, _decode, [(part, False) for part in _parts(paths, _PIECE)]),
        "floor_labeled": lambda _: _in_processes(number, _decode, [(part, True) for part in _parts(paths, _PIECE)]),
        "webdataset": lambda folder: _webdataset(paths, folder, number),
        "tar": lambda folder: _tar(photos, folder),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    memory = 0
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            found = seconds_to_disk(run, Path(out) / "packed")
            if turn:  # the first round is warm-up
                seconds[name].append(found)
            elif name == "ours":  # so far, no other contender had processes
                memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    rates = {name: round(len(paths) / median(times)) for name, times in seconds.items()}
    print("\n".join(f"{name:14} {rate:8,} images/s" for name, rate in rates.items()))
    print(
        f"of the floor: {rates['ours'] / rates['floor']:.2f}, labeled {rates['labeled'] / rates['floor_labeled']:.2f}"
    )
    peers = {name: rates[name] for name in ("webdataset", "tar")}
    print(
        json.dumps(
            {
                "bench": "pack", "unit": "images/s up", "ours": rates["ours"], "peers": peers, "floor": rates["floor"],
                "labeled": rates["labeled"], "floor_labeled": rates["floor_labeled"], "memory_mb": memory, "seeds": rounds,
            }
        )
    )  # fmt: skip


def _make_folders(folder: Path, images: int, out: str) -> Path:
    """Folders of photos: up to DISTINCT different ones; copies end in other bytes, which JPEG readers skip."""
    if folder.exists():
        return folder
    from benchmarks.photos import make_photos  # imports scikit-image, as above

    shards = Path(make_photos(f"{out}/shards", 1, min(images, DISTINCT))).parent
    with tarfile.open(next(shards.glob("*.tar"))) as tar:
        contents = [file.read() for member in tar if (file := tar.extractfile(member))]
    for number in range(images):
        path = folder.with_suffix(".making") / f"{number // PER_FOLDER:03d}" / f"{number:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[number % len(contents)] + number.to_bytes(8, "little"))
    return folder.with_suffix(".making").rename(folder)


def _pack(photos: Path, folder: Path, labeled: bool, processes: int) -> None:
    pack(str(photos), str(folder), labeled=labeled, samples_per_shard=PER_FOLDER, processes=processes)


def _decode(paths: Sequence[Path], is_labeled: bool) -> None:
    for path in paths:
        content = path.read_bytes()
        check_image(content, is_labeled)
        hashlib.sha256(content).digest()


def _webdataset(paths: Sequence[Path], folder: Path, processes: int) -> None:
    shards = [(part, str(folder / f"{number:05d}.tar")) for number, part in enumerate(_parts(paths, PER_FOLDER))]
    _in_processes(processes, _write_with_webdataset, shards)


def _write_with_webdataset(paths: Sequence[Path], target: str) -> None:
    import webdataset as wds  # imports torch, which the other contenders' processes need not wait for

    with wds.TarWriter(target) as writer:
        for path in paths:
            content = path.read_bytes()
            height, width = decode_fast(content).shape[:2]
            facts = {"sha256": hashlib.sha256(content).hexdigest(), "height": height, "width": width}
            writer.write({"__key__": path.stem, "jpg": content, "json": facts})


def _tar(photos: Path, folder: Path) -> None:
    for source in sorted(photos.iterdir()):
        target = (folder / f"{source.name}.tar").absolute()
        subprocess.run(["tar", "--create", "--file", target, "--directory", source, "."], check=True)


def _parts(paths: Sequence[Path], size: int) -> list[Sequence[Path]]:
    return [paths[start : start + size] for start in range(0, len(paths), size)]


def _in_processes(number: int, task: Callable[..., None], arguments: Sequence[tuple[object, ...]]) -> None:
    executor: Executor
    with workers(number) as executor:
        for future in [executor.submit(task, *words) for words in arguments]:
            future.result()


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))
