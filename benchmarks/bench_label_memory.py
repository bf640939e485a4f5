"""Memory of a labeling worker: large files against `label.memory_mb`, and what decoding takes for each kind of image.

    python -m benchmarks.bench_label_memory [files=256] [megabytes=10] [memory_mb=512] [threads=4]

A process labels a shard of `files` PNGs of random pixels, `megabytes` each, after a shard of small ones; its growth in between is
printed beside the bytes that the budget counted and the bytes of the files. Then a process for each kind of image makes one
labeling view of 10 megapixels; its growth per pixel is what `data/images/decoding_memory.py` rounds up.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.bench_label import CROP_PCT, NUM_CLASSES, SIZE, StubPredictor
from data.images.clean_view import Decoder, EvalView
from data.settings import run_command
from data.shards.split import open_split
from data.shards.write import labeled_members, write_shards
from pipeline.core.timing import peak_memory
from teacher.labeling.label_shard import ShardLabeler

_DISTINCT, _SIDE = 4, 3200
_MIB = 1 << 20


def bench(
    files: int = 256, megabytes: float = 10.0, memory_mb: int = 512, threads: int = 4, only: str = "", view: str = ""
) -> None:
    """Print the figures. `only`: label the shards of that folder in this process; `view`: decode that file."""
    if only:
        print(json.dumps(_grow(only, memory_mb, threads)))
        return
    if view:
        print(_bytes_per_pixel(*view.split(":", 1)))
        return
    with tempfile.TemporaryDirectory() as folder:
        total = make_noise(folder, files, megabytes)
        found = labeling_memory(folder, memory_mb, threads)
        print(
            f"{files} files of {total / files / 1e6:.1f} MB, {threads} decoding threads, label.memory_mb={memory_mb}: the process grew "
            f"by {found['grown_mb']:,} MiB, the budget counted {found['counted_mb']:,} MiB, the files have {total >> 20:,} MiB"
        )
        for name, content in _kinds():
            _print_kind(folder, name, content())
    print(json.dumps({"bench": "label_memory", "unit": "MiB down", "ours": found["grown_mb"], "seeds": 1} | found))


def make_noise(folder: str, files: int, megabytes: float) -> int:
    """Write the shards small.tar's and large.tar's files of random pixels to `folder`; return the bytes of the large ones."""
    generator, side = np.random.default_rng(0), int((megabytes * 1e6 / 3) ** 0.5)
    large = [_png(generator.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(_DISTINCT)]
    small = [_png(generator.integers(0, 256, (300, 300, 3), np.uint8))]
    for name, contents in (("small", small), ("large", large)):
        samples = ((f"{n:05d}", labeled_members("png", contents[n % len(contents)], None)) for n in range(files))
        write_shards(samples, f"{folder}/{name}", name, files, None)
    return sum(len(large[number % _DISTINCT]) for number in range(files))


def labeling_memory(folder: str, memory_mb: int, threads: int) -> dict[str, int]:
    """Label what `make_noise` wrote, in a process of its own: MiB by which it grew, and MiB that the budget counted."""
    words = [f"only={folder}", f"memory_mb={memory_mb}", f"threads={threads}"]
    return dict(json.loads(_in_process(words)))


def _in_process(words: list[str]) -> str:
    command = [sys.executable, "-m", "benchmarks.bench_label_memory", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


def _grow(folder: str, memory_mb: int, threads: int) -> dict[str, int]:
    labeler, peaks = ShardLabeler(StubPredictor(), NUM_CLASSES, 10, 1, threads, "", memory_mb << 20), []
    for name in ("small", "large"):
        (shard,) = open_split(f"{folder}/{name}/*.tar", folder).shards
        labeler.label(shard, f"{folder}/{name}.parquet")
        peaks.append(peak_memory() or 0)
    return {"grown_mb": (peaks[1] - peaks[0]) >> 20, "counted_mb": labeler.peak_bytes >> 20}


def _png(image: np.ndarray, **options: Any) -> bytes:
    return _encoded(Image.fromarray(image), "PNG", compress_level=1, **options)


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _kinds() -> list[tuple[str, Callable[[], bytes]]]:
    """Files of each kind, 10 megapixels, made when asked for."""
    random = np.random.default_rng(0).integers(0, 256, (_SIDE // 8, _SIDE // 8, 4), np.uint8)
    rgba = Image.fromarray(np.repeat(np.repeat(random, 8, 0), 8, 1))
    rgb, turned = rgba.convert("RGB"), Image.Exif()
    turned[0x0112] = 6
    return [
        ("JPEG", lambda: _encoded(rgb, "JPEG")),
        ("progressive JPEG", lambda: _encoded(rgb, "JPEG", progressive=True)),
        ("JPEG to be turned", lambda: _encoded(rgb, "JPEG", exif=turned)),
        ("CMYK JPEG", lambda: _encoded(rgb.convert("CMYK"), "JPEG")),
        ("PNG", lambda: _encoded(rgb, "PNG")),
        ("PNG with alpha", lambda: _encoded(rgba, "PNG")),
        ("grey PNG with alpha", lambda: _encoded(rgba.convert("LA"), "PNG")),
        ("WebP", lambda: _encoded(rgb, "WEBP")),
        ("WebP with alpha", lambda: _encoded(rgba, "WEBP")),
    ]


def _print_kind(folder: str, name: str, content: bytes) -> None:
    url, cells = Path(folder, "image"), []
    url.write_bytes(content)
    for decoder in ("fast", "pillow"):
        counted = _view(decoder).decoding_bytes(content) / _SIDE**2
        cells.append(f"{decoder} {float(_in_process([f'view={decoder}:{url}'])):5.1f}, counted {counted:4.1f}")
    print(f"{name:20} bytes a pixel: {'; '.join(cells)}", flush=True)


def _view(decoder: str) -> EvalView:
    kind: Decoder = "fast" if decoder == "fast" else "pillow"
    return EvalView(SIZE, CROP_PCT, "bicubic", "crop", kind)


def _bytes_per_pixel(decoder: str, url: str) -> float:
    """Growth of this process by one view, after small ones."""
    view, content = _view(decoder), Path(url).read_bytes()
    small = Image.new("RGB", (300, 300))
    for kind in ("PNG", "JPEG", "WEBP"):
        view.with_hash(_encoded(small, kind))
    before = peak_memory() or 0
    view.with_hash(content)
    return max(0, (peak_memory() or 0) - before) / _SIDE**2


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))
