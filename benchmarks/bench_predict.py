"""`pipeline.predict` beside labeling and beside what people write themselves: a folder of JPEG files to a table.

    python -m benchmarks.bench_predict [rounds=3] [images=4000] [only=NAME]

The photos and the model that costs nothing of `bench_label`, two threads or two worker processes each. Each measurement is a process of
its own; medians over rounds; contenders take turns.

    files     predict, loose files
    shards    predict, the same images in shards
    label     labeling the shards
    timm      timm's dataset of a folder and its evaluation transform, in a DataLoader
"""

from __future__ import annotations

import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from timm.data import create_dataset, create_transform
from torch.utils.data import DataLoader

from benchmarks.bench_label import BATCH, CROP_PCT, PER_SHARD, SIZE, THREADS, StubPredictor, loader_rate, measured
from benchmarks.bench_label import ours as label
from benchmarks.photos import make_photos
from data.settings import run_command
from pipeline.core.timing import peak_memory
from pipeline.prediction.inputs import find_images
from pipeline.prediction.parts import Parts
from pipeline.prediction.tables import write_predictions
from pipeline.prediction.work import predict_pieces
from teacher.labeling.label_shard import BatchLabeler

_TOP_K = 5


def shards(pattern: str) -> float:
    """Return images per second of `predict` on shards, from the list of images to the table."""
    return _predict(pattern)


def files(pattern: str) -> float:
    """As `shards`, of the folder with the same images."""
    return _predict(_folder(pattern))


def _predict(images: str) -> float:
    labeler = BatchLabeler(StubPredictor(), _TOP_K, 1, THREADS)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        out = f"{folder}/predictions.csv"
        parts = Parts(out, "stub")
        found = find_images(images, parts.index_folder)
        predict_pieces(labeler, BATCH, parts, found.pieces, found.number)
        write_predictions(out, parts.read(found.pieces), None, _TOP_K)
        return found.number / (time.perf_counter() - started)


def timm(pattern: str) -> float:
    """Return images per second of timm's transform in a DataLoader over the folder."""
    dataset = create_dataset("", root=_folder(pattern))
    dataset.transform = create_transform((3, SIZE, SIZE), crop_pct=CROP_PCT, interpolation="bicubic")
    return loader_rate(images for images, _ in DataLoader(dataset, batch_size=64, num_workers=THREADS))


def _folder(pattern: str) -> str:
    """The folder with the images of the shards, made once."""
    home = Path(pattern).parent.with_name(Path(pattern).parent.name + "-files")
    if not home.exists():
        for shard in sorted(Path(pattern).parent.glob("*.tar")):
            with tarfile.open(shard) as archive:
                archive.extractall(home / "new" / shard.stem, filter="data")
        (home / "new").rename(home / "photos")
    return str(home / "photos")


CONTENDERS: dict[str, Callable[[str], float]] = {"files": files, "shards": shards, "label": label, "timm": timm}


def bench(rounds: int = 3, images: int = 4000, only: str = "", out: str = "runs/bench_label") -> None:
    """Run all contenders in turn and print their rates; with `only`, run one contender once, in this process."""
    pattern = make_photos(f"{out}/photos-{images}", images // PER_SHARD, PER_SHARD)
    if only:
        print(json.dumps({"rate": CONTENDERS[only](pattern), "memory_mb": (peak_memory() or 0) / 2**20}))
        return
    _folder(pattern)
    runs = measured("benchmarks.bench_predict", CONTENDERS, rounds, images, out)
    rates = {name: round(median(run["rate"] for run in found), 1) for name, found in runs.items()}
    ours = rates["files"]
    print(f"\nmedians of {rounds} rounds: files are predicted at {ours / rates['label']:.2f} of labeling's rate, shards at "
          f"{rates['shards'] / rates['label']:.2f}, {ours / rates['timm']:.1f} times as fast as timm's")  # fmt: skip
    memory = round(max(run["memory_mb"] for run in runs["files"]))
    peers = {name: rates[name] for name in ("label", "timm")}
    print(json.dumps({"bench": "predict", "unit": "img/s up", "ours": ours, "peers": peers, "shards": rates["shards"],
                      "memory_mb": memory, "seeds": 1}))  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))
