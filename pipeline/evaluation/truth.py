"""The true labels of unlabeled images (`data.truth`), where they are known: for report and summary alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from unicodedata import normalize

import numpy as np

from data import storage
from data.packing.sidecars import read_sources
from data.settings import nearest
from data.shards.samples import printable
from data.shards.split import MANIFEST_NAME, Manifest
from data.tables import read_table
from pipeline.core.schema import DataConfig
from pipeline.core.stage import StageError

Truth = Mapping[str, tuple[np.ndarray, np.ndarray]]  # shard → ordinals, labels
_SHOWN = 5
_REMEDY = "data.truth must be Parquet of (shard, ordinal, label), or null"


def read_truth(data: DataConfig, class_names: Sequence[str] | None) -> Truth:
    """Read data.truth by shard; empty if none is configured.

    Args:
        class_names: in label order; a CSV names classes.

    Raises:
        StageError: it does not exist, or does not fit the unlabeled images and classes.
    """
    url = data.truth
    if url is None:
        return {}
    if not storage.exists(url):
        raise StageError(
            f"data.truth={url}: no such file; expected CSV of (path, class), a folder of classes, Parquet of (shard, ordinal, label), "
            "or data.truth=null"
        )
    if storage.is_local(url) and storage.local_path(url).is_dir():
        return _by_folder(url, data.unlabeled, class_names)
    if url.lower().endswith(".csv"):
        return _by_path(url, data.unlabeled, class_names)
    table = read_table(url, _REMEDY, ["shard", "ordinal", "label"]).sort_by("shard")
    ordinals, labels = table.column("ordinal").to_numpy(), table.column("label").to_numpy()
    names, starts = np.unique(table.column("shard").to_numpy(zero_copy_only=False).astype(str), return_index=True)
    ends = [*starts[1:], len(labels)]
    return {str(name): (ordinals[a:b], labels[a:b]) for name, a, b in zip(names, starts, ends, strict=True)}


def _by_folder(folder: str, unlabeled: Sequence[str], class_names: Sequence[str] | None) -> Truth:
    """The truth from the folders of classes that packed images lie in; images elsewhere are unknown."""
    root, numbers = Path(folder).absolute(), _numbers(class_names)

    def label(path: str) -> int:
        parents = [parent for parent in Path(path).absolute().parents if parent.parent == root]
        return numbers.get(normalize("NFC", parents[0].name), -1) if parents else -1

    found = {}
    for shard, paths in _packed_paths(unlabeled):
        labels = np.array([label(path) for path in paths], np.int64)
        found[shard] = np.flatnonzero(labels >= 0), labels[labels >= 0]
    if not any(len(labels) for _, labels in found.values()):
        raise StageError(
            f"data.truth={folder}: no unlabeled image lies in a folder there that has the name of one of the {len(numbers)} classes"
        )
    return found


def _numbers(class_names: Sequence[str] | None) -> dict[str, int]:
    """Class name, as Unicode NFC → label."""
    return {normalize("NFC", name): label for label, name in enumerate(class_names or ())}


def _by_path(url: str, unlabeled: Sequence[str], class_names: Sequence[str] | None) -> Truth:
    """The truth from a CSV of paths and classes, by the paths that packing recorded beside the shards.

    A path of the CSV is the end of one packed path. An empty class says nothing.
    """
    rows = _read_csv(url, class_names)
    used = dict[str, str]()
    found = {}
    for shard, paths in _packed_paths(unlabeled):
        ordinals, labels = list[int](), list[int]()
        for ordinal, path in enumerate(paths):
            name = next((end for end in _endings(path) if end in rows), None)
            if name is None:
                continue
            if name in used:
                raise StageError(
                    f"data.truth={url}: {name} names {used[name]} and {path}; give paths that name one image"
                )
            used[name] = path
            if (label := rows[name]) >= 0:
                ordinals.append(ordinal)
                labels.append(label)
        found[shard] = np.array(ordinals, np.int64), np.array(labels, np.int64)
    if not used:
        raise StageError(
            f"data.truth={url}: none of its {len(rows):,} paths, such as {next(iter(rows), '')!r}, is an unlabeled image; expected "
            "paths below the folder that was packed"
        )
    return found


def _endings(path: str) -> Iterator[str]:
    """The path, and its ends after each slash, the longest first."""
    yield path
    for place, sign in enumerate(path):
        if sign == "/":
            yield path[place + 1 :]


def _read_csv(url: str, class_names: Sequence[str] | None) -> dict[str, int]:
    """Path → label; −1 for an empty class."""
    numbers = _numbers(class_names)
    reader = csv.DictReader(io.StringIO(storage.read_text(url), newline=""))
    if not {"path", "class"} <= set(reader.fieldnames or ()):
        raise StageError(
            f"data.truth={url}: expected a first line with the columns path and class, not {reader.fieldnames}"
        )
    rows = dict[str, int]()
    for row in reader:
        path, name = printable((row["path"] or "").removeprefix("./")), normalize("NFC", (row["class"] or "").strip())
        if name and name not in numbers:
            known = ", ".join(list(numbers)[:_SHOWN]) + ", …" * (len(numbers) > _SHOWN)
            raise StageError(
                f"data.truth={url}: line {reader.line_num}: {name!r} is none of the {len(numbers)} classes ({known}); leave it empty "
                f"where the class is not known{nearest(name, list(numbers))}"
            )
        if path in rows:
            raise StageError(f"data.truth={url}: line {reader.line_num}: {path} is there twice")
        rows[path] = numbers.get(name, -1)
    return rows


def _packed_paths(unlabeled: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each packed shard's name, and the paths of its images in order."""
    for folder in dict.fromkeys(storage.parent(url) for url in storage.expand(unlabeled)):
        url = storage.join(folder, MANIFEST_NAME)
        if not storage.exists(url):
            raise StageError(
                f"data.truth: a CSV names images by path, which only packed shards know; {folder} has no {MANIFEST_NAME}"
            )
        paths = read_sources(folder)
        for shard in Manifest.model_validate_json(storage.read_bytes(url)).shards:
            yield shard.name.removesuffix(".tar"), list(islice(paths, shard.num_samples))


def true_labels(truth: Truth, shard: str, ordinal: np.ndarray) -> np.ndarray:
    """The true label of each ordinal of a shard, int64 (N,); −1 if unknown."""
    if shard not in truth or not len(truth[shard][0]):
        return np.full(len(ordinal), -1, np.int64)
    known, labels = truth[shard]
    order = np.argsort(known, kind="stable")
    ordinals, labels = known[order], labels[order]
    place = np.minimum(np.searchsorted(ordinals, ordinal), len(ordinals) - 1)
    return np.where(ordinals[place] == ordinal, labels[place], -1)
