"""Errors of models on test images under common corruptions (arXiv 1903.12261), as in Noisy Student's section 3.3.

Images are measured in parts. Each finished part is a file of counts, so that an interrupted measurement continues with the next part.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from data import storage
from data.errors import DataError
from data.images.clean_view import EvalView
from data.images.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from data.images.decode import Pixels, decode
from data.json_files import read_json
from data.progress_bar import ProgressBar
from data.shards.image_reader import ImageReader, Place
from data.shards.split import Split
from pipeline.inference.predictor import Predictor

IMAGES_PER_PART = 100  # also per forward pass
_CLEAN = ("clean", 0)
_CONDITIONS = (_CLEAN, *((name, severity) for name in CORRUPTIONS for severity in SEVERITIES))
_THREADS = 2
Counts = dict[str, list[int]]  # role → number of wrong answers per condition


def measure_robustness(
    test: Split, models: Mapping[str, Predictor], folder: str, num_images: int, seed: int,
    known: Mapping[str, Sequence[list[int]]] | None = None, roles: Sequence[str] = (),
) -> tuple[list[str], dict[str, dict[str, Any]]]:  # fmt: skip
    """Measure on `num_images` test images (at most all), chosen by the seed; continue an interrupted measurement.

    Args:
        models: those to measure, by role.
        folder: of the files of counts.
        known: role → counts of each part, of models that were measured before.
        roles: all roles, in the order of the files; by default those of `models`.

    Returns:
        The names of those files, and the figures per role; see `figures_of`.
    """
    known, roles = known or {}, roles or list(models)
    rows = chosen_rows(test.num_samples, num_images, seed)
    parts = [rows[start : start + IMAGES_PER_PART] for start in range(0, len(rows), IMAGES_PER_PART)]
    names = [f"part-{number:05d}.json" for number in range(len(parts))]
    done = set(storage.list_names(folder))
    skipped = sum(len(part) for part, name in zip(parts, names, strict=True) if name in done)
    bar = ProgressBar(
        total=len(rows) * len(_CONDITIONS), initial=skipped * len(_CONDITIONS), desc="robustness", unit="view"
    )
    with bar, ImageReader([shard.url for shard in test.shards]) as reader, ThreadPoolExecutor(_THREADS) as pool:
        for number, (part, name) in enumerate(zip(parts, names, strict=True)):
            if name not in done:
                new = _count_wrong(_read(test, reader, part), part, models, seed, pool, bar) if models else {}
                counts = {role: known[role][number] if role in known else new[role] for role in roles}
                storage.write_text(storage.join(folder, name), json.dumps(counts) + "\n")
    remedy = "delete it and run stage=evaluate, which makes it again"
    counted = [read_json(storage.join(folder, name), remedy) for name in names]
    for name, counts in zip(names, counted, strict=True):
        if counts.keys() != set(roles) or any(np.shape(wrong) != (len(_CONDITIONS),) for wrong in counts.values()):
            raise DataError(f"{storage.join(folder, name)}: damaged, or of other models; {remedy}")
    return names, figures_of(counted, len(rows))


def chosen_rows(total: int, number: int, seed: int) -> np.ndarray:
    """Choose positions in the split: ascending, (min(number, total),) int64."""
    return np.sort(np.random.default_rng([seed, total]).permutation(total)[:number])


def figures_of(parts: Sequence[Counts], num_images: int) -> dict[str, dict[str, Any]]:
    """Per role: `images`, `clean_error`, `errors` (per corruption, one fraction per severity) and their mean, `mean_corruption_error`.

    The paper (section 4) divides a corruption's error, summed over severities, by AlexNet's, and averages over corruptions. The
    student's `error_against_teacher` does so with the teacher in AlexNet's place: below 1, the student is more robust. It is None when
    the teacher makes no error under some corruption.
    """
    totals = {role: np.sum([part[role] for part in parts], axis=0) for role in parts[0]}
    by_corruption = {role: wrong[1:].reshape(len(CORRUPTIONS), len(SEVERITIES)) for role, wrong in totals.items()}
    figures: dict[str, dict[str, Any]] = {
        role: {
            "images": num_images,
            "clean_error": float(totals[role][0] / num_images),
            "mean_corruption_error": float(wrong.mean() / num_images),
            "errors": dict(zip(CORRUPTIONS, (wrong / num_images).tolist(), strict=True)),
        }
        for role, wrong in by_corruption.items()
    }
    if {"teacher", "student"} <= figures.keys():
        teacher, student = (by_corruption[role].sum(axis=1) for role in ("teacher", "student"))
        figures["student"]["error_against_teacher"] = float((student / teacher).mean()) if teacher.all() else None
    return figures


def _read(test: Split, reader: ImageReader, rows: np.ndarray) -> list[tuple[bytes, int]]:
    """(image bytes, label) per row."""
    ends = np.cumsum([shard.num_samples for shard in test.shards])
    found = []
    for position in np.unique(shards := np.searchsorted(ends, rows, side="right")):
        begin = ends[position] - test.shards[position].num_samples
        ordinals = rows[shards == position] - begin
        wanted = test.shards[position].index().select(["key", "offset", "size", "label"]).take(ordinals).to_pylist()
        rows_of = zip(ordinals.tolist(), wanted, strict=True)
        places = [Place(ordinal, row["key"], row["offset"], row["size"]) for ordinal, row in rows_of]
        images = reader.images(int(position), places)
        found += [(image, row["label"]) for image, row in zip(images, wanted, strict=True)]
    return found


def _count_wrong(
    items: Sequence[tuple[bytes, int]], rows: np.ndarray, models: Mapping[str, Predictor], seed: int,
    pool: ThreadPoolExecutor, bar: ProgressBar,
) -> Counts:  # fmt: skip
    """Count each model's wrong answers per condition. Models with the same view share its images."""
    labels = np.array([label for _, label in items])
    wrong: Counts = {role: [] for role in models}
    views = {view: predictor for predictor in models.values() if isinstance(view := predictor.view, EvalView)}
    images = {view: list(pool.map(lambda item, view=view: _base(view, item[0]), items)) for view in views}
    for name, severity in _CONDITIONS:
        for view, batch in _batches(images, rows, name, severity, seed, pool):
            for role, predictor in models.items():
                if predictor.view == view:
                    wrong[role].append(int((predictor.logits(batch).argmax(axis=1) != labels).sum()))
        bar.update(len(items))
    return wrong


def _batches(
    images: Mapping[EvalView, list[Pixels]], rows: np.ndarray, name: str, severity: int, seed: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[EvalView, torch.Tensor]]:  # fmt: skip
    """Yield (view, images (N, 3, S, S) uint8) under one corruption."""
    for view, bases in images.items():

        def prepare(base: Pixels, row: int, view: EvalView = view) -> torch.Tensor:
            image = corrupt(base, name, severity, [seed, row]) if severity else base
            return torch.from_numpy(view.fit(image) if view.mode == "pad" else image).permute(2, 0, 1)

        yield view, torch.stack(list(pool.map(prepare, bases, rows.tolist())))


def _base(view: EvalView, content: bytes) -> Pixels:
    """The pixels to corrupt: the evaluation view, as in ImageNet-C; with padding the image alone, as padding is no part of it."""
    image = decode(content)
    return image if view.mode == "pad" else view.fit(image)
