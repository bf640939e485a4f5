"""Write clips of moving Fashion-MNIST pictures for self-training: 16 frames of 32 × 32 pixels; the label is the kind of motion.

    python -m data.moving_images out=datasets/moving_images [labeled=200] [unlabeled=3000] [seed=0]

`labeled`, `validation` (200), `development` (500, for choosing a recipe), `unlabeled` (`truth.parquet` has their true labels, only for
report and summary) and `test` (1,000). Each clip has a picture of its own; those of `test` are Fashion-MNIST's test pictures. Ten
motions, equally often: left, right, up, down, zoom in and out, turning each way, still, shaking. Needs the extra [video].
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from . import storage
from .errors import DataError
from .fashion_mnist_files import find_files, read_idx
from .images.held_out_hashes import held_out_row, write_hashes
from .modalities import MODALITIES, require_decoder
from .progress_bar import ProgressBar
from .recipes.split_writing import claim
from .settings import run_command
from .shards.split import MANIFEST_NAME
from .shards.write import Fields, labeled_members, write_shards
from .tables import write_table

VALIDATION, DEVELOPMENT, TEST = 200, 500, 1000
FRAMES, SIDE = 16, 32
_PER_SHARD = 500
_BEGUN, _TRUTH_NAME = "moving_images.json", "truth.parquet"
_BACKGROUND_STEP = 7  # a clip's background is the picture of the clip so many places later


def prepare(out: str, labeled: int = 200, unlabeled: int = 3000, seed: int = 0) -> None:
    """Write all splits under `out`, except those that are complete.

    Raises DataError when PyAV or Fashion-MNIST is not found, there are too few pictures, or `out` has other files under these names.
    """
    require_decoder("clip")
    sizes = {"labeled": labeled, "validation": VALIDATION, "development": DEVELOPMENT, "unlabeled": unlabeled}
    claim(out, _BEGUN, json.dumps({"labeled": labeled, "unlabeled": unlabeled, "seed": seed}), [*sizes, "test"])
    files = find_files()
    pictures, tests = (read_idx(files, part)[0] for part in ("train", "t10k"))
    if min(labeled, unlabeled) < 1 or sum(sizes.values()) > len(pictures):
        raise DataError(
            f"labeled={labeled} unlabeled={unlabeled}: expected 1 or more of each, and at most "
            f"{len(pictures) - VALIDATION - DEVELOPMENT:,} together, a picture for each clip"
        )
    order, start = np.random.default_rng(seed).permutation(len(pictures)), 0
    for name, size in sizes.items():
        _write_split(out, name, pictures[order[start : start + size]], seed)
        start += size
    _write_split(out, "test", tests[:TEST], seed)
    print(f"{out}: {len(tests[:TEST]):,} test clips; " + ", ".join(f"{size:,} {name}" for name, size in sizes.items()))


def _write_split(out: str, name: str, pictures: np.ndarray, seed: int) -> None:
    """Write the shards of a split, unless they are complete."""
    from .clips.motion import MOTIONS

    folder, is_labeled = storage.join(out, name), name != "unlabeled"
    generator = np.random.default_rng([seed, *name.encode()])
    labels = generator.permutation(np.arange(len(pictures)) % len(MOTIONS))
    if not is_labeled:
        _write_truth(storage.join(out, _TRUTH_NAME), labels)
    if storage.exists(storage.join(folder, MANIFEST_NAME)):
        return
    hashes = []

    def samples() -> Iterator[tuple[str, Fields]]:
        for number, label in enumerate(ProgressBar(labels.tolist(), desc=name, unit="clip", delayed=True)):
            clip = make_clip(pictures, number, label, generator)
            if is_labeled:
                hashes.append(held_out_row(MODALITIES["clip"].picture(clip, 0)))
            yield f"{number:06d}", labeled_members("mp4", clip, label if is_labeled else None)

    def write_sidecars() -> None:
        if is_labeled:
            write_hashes(folder, hashes)

    write_shards(samples(), folder, name, _PER_SHARD, MOTIONS if is_labeled else None, write_sidecars)


def make_clip(pictures: np.ndarray, number: int, motion: int, generator: np.random.Generator) -> bytes:
    """Encode the clip of a picture, uint8 (N, 28, 28), that moves over another one."""
    from .clips.encode import encode_mp4
    from .clips.motion import draw_clip

    background = pictures[(number + _BACKGROUND_STEP) % len(pictures)]
    return encode_mp4(draw_clip(pictures[number], background, motion, FRAMES, SIDE, generator))


def _write_truth(url: str, labels: np.ndarray) -> None:
    """Write the true labels of unlabeled clips: `shard`, `ordinal`, `label`."""
    numbers = np.arange(len(labels))
    shards = [f"unlabeled-{shard:06d}" for shard in numbers // _PER_SHARD]
    columns = {"shard": shards, "ordinal": (numbers % _PER_SHARD).astype(np.int32), "label": labels.astype(np.int32)}
    write_table(url, pa.table(columns))


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    return run_command(prepare, arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
