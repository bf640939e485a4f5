"""Pack Fashion-MNIST for self-training, with few labeled and many unlabeled images, into WebDataset shards.

    python -m data.fashion_mnist out=datasets/fashion_mnist [labeled_per_class=50] [seed=0]

The 60,000 training images become `labeled` (50 per class), `validation` (50 per class), `development` (500 per class, only for
benchmarks) and `unlabeled` (the rest; `truth.parquet` has their true labels, only for report and summary). `test` has the 10,000
others.
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
from .images.held_out_hashes import held_out_row, is_outdated, write_hashes
from .progress_bar import ProgressBar
from .recipes.split_writing import claim, encode_png
from .settings import run_command
from .shards.split import MANIFEST_NAME
from .shards.write import Fields, labeled_members, write_shards
from .tables import write_table

CLASS_NAMES = (
    "t-shirt_top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot",
)  # fmt: skip
VALIDATION_PER_CLASS, DEVELOPMENT_PER_CLASS = 50, 500
_SPLITS = ("labeled", "validation", "development", "unlabeled", "test")
_TRUTH_NAME, _BEGUN = "truth.parquet", "packing-fashion_mnist.json"


def split_indices(labels: np.ndarray, labeled_per_class: int, seed: int) -> dict[str, np.ndarray]:
    """Split name → shuffled indices of `labeled`, `validation`, `development` (equal counts per class) and `unlabeled` (the rest).

    Raises DataError when a class has too few images.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    sizes = {"validation": VALIDATION_PER_CLASS, "development": DEVELOPMENT_PER_CLASS, "labeled": labeled_per_class}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in [*sizes, "unlabeled"]}
    for label in np.unique(labels):
        members = order[labels[order] == label]
        if len(members) <= sum(sizes.values()):
            raise DataError(f"labeled_per_class={labeled_per_class}: class {label} has only {len(members)} images")
        start = 0
        for name, size in sizes.items():
            parts[name].append(members[start : start + size])
            start += size
        parts["unlabeled"].append(members[start:])
    return {name: generator.permutation(np.concatenate(part)) for name, part in parts.items()}


def prepare(out: str, labeled_per_class: int = 50, seed: int = 0, samples_per_shard: int = 6000) -> None:
    """Write all splits under `out`, except those that are complete.

    Raises DataError when Fashion-MNIST is not found, or `out` has another packing or other files under these names.
    """
    settings = json.dumps({"labeled_per_class": labeled_per_class, "seed": seed}) + "\n"
    marker = storage.join(out, "split.json")
    if storage.exists(marker):
        if storage.read_text(marker) == settings:
            print(f"{out}: packed already")
            if is_outdated(storage.join(out, "test")):
                print(
                    f"its hashes.parquet files are of an earlier version and cannot be used as data.held_out_hashes; to write "
                    f"them anew, remove {marker}, {_TRUTH_NAME} and the folders {', '.join(_SPLITS)} beside it, and give this "
                    "command again: it makes the same shards"
                )
            return
        raise DataError(f"{out} holds another split ({storage.read_text(marker).strip()}); choose another out= folder")
    begun = {"labeled_per_class": labeled_per_class, "seed": seed, "samples_per_shard": samples_per_shard}
    if not storage.exists(storage.join(out, _BEGUN)) and storage.exists(storage.join(out, _TRUTH_NAME)):
        raise DataError(f"{out}/{_TRUTH_NAME} is there, and no packing wrote it; choose another out=")
    claim(out, _BEGUN, json.dumps(begun), _SPLITS)
    files = find_files()
    images, labels = read_idx(files, "train")
    test_images, test_labels = read_idx(files, "t10k")
    for name, indices in split_indices(labels, labeled_per_class, seed).items():
        _write_split(storage.join(out, name), images[indices], labels[indices], samples_per_shard, name != "unlabeled")
        if name == "unlabeled":
            _write_truth(storage.join(out, _TRUTH_NAME), labels[indices], samples_per_shard)
    _write_split(storage.join(out, "test"), test_images, test_labels, samples_per_shard, labeled=True)
    storage.write_text(marker, settings)


def _write_split(folder: str, images: np.ndarray, labels: np.ndarray, samples_per_shard: int, labeled: bool) -> None:
    if storage.exists(storage.join(folder, MANIFEST_NAME)):
        return
    name = storage.base_name(folder)

    def samples() -> Iterator[tuple[str, Fields]]:
        for number, image in enumerate(ProgressBar(images, desc=name, unit="image", delayed=True)):
            yield f"{number:06d}", labeled_members("png", encode_png(image), int(labels[number]) if labeled else None)

    def write_sidecars() -> None:
        if labeled:
            write_hashes(folder, (held_out_row(np.repeat(image[..., None], 3, axis=2)) for image in images))

    write_shards(samples(), folder, name, samples_per_shard, CLASS_NAMES if labeled else None, write_sidecars)


def _write_truth(url: str, labels: np.ndarray, samples_per_shard: int) -> None:
    """Write the true labels of unlabeled images: `shard`, `ordinal`, `label`."""
    numbers = np.arange(len(labels))
    shards = [f"unlabeled-{shard:06d}" for shard in numbers // samples_per_shard]
    write_table(
        url,
        pa.table(
            {
                "shard": shards,
                "ordinal": (numbers % samples_per_shard).astype(np.int32),
                "label": labels.astype(np.int32),
            }
        ),
    )


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    return run_command(prepare, arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
