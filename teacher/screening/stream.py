"""The images of a self-supervised training: labeled and unlabeled shards in one order, without those that cannot or must not be used.

shards ── screened once, in parts ──► left_out.parquet ──► one stream: every other image once an epoch, labels ignored
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import pyarrow as pa

from data import storage
from data.errors import DataError
from data.images.held_out_hashes import HeldOutHashes, read_held_out_hashes
from data.labels.exclusions import ExcludedKeys, exclude_inputs, read_keys
from data.shards.split import Shard, Split
from data.tables import read_table, write_table
from pipeline.core.schema import Config
from pipeline.core.stage import StageError
from pipeline.inputs.streams import StreamSpec
from teacher.executors import Executor, RayTasks, Threads, processes, progress_bars
from teacher.labeling.batches import Meter
from teacher.labeling.corpus import check_damage
from teacher.labeling.crash_isolation import crashing_images, noting_loss, open_shard
from teacher.screening.screen import IN_GREY, LEFT_OUT_SCHEMA, NOTHING_CRASHES, Screener

LEFT_OUT_NAME = "left_out.parquet"
_PARTS = "left_out"
_REMEDY = "delete it and run the same command again, which screens the images again"
_MANY_IMAGES = 50_000  # from here on, processes save more than their start takes
_MEMORY = 1 << 30  # bytes, over all local processes, for files and images
_TASK_MEMORY = 1 << 27  # bytes of a Ray task for them
_EXAMPLES = 3  # in a message
_MIN_IMAGES = 2


class PretrainStream(NamedTuple):
    """A stream, and counts of images: `images`, of which `used`, `undecodable`, `excluded` and `held_out_copies`."""

    spec: StreamSpec
    summary: dict[str, int]


def pretrain_inputs(config: Config, labeled: Split | None, unlabeled: Split | None) -> dict[str, str]:
    """What the images are, for a fingerprint: digests of the splits, of data.exclude and of data.held_out_hashes.

    Raises:
        StageError: there are no shards.
        DataError: data.exclude or data.held_out_hashes cannot be read.
    """
    if labeled is None and unlabeled is None:
        raise StageError("data.labeled and data.unlabeled are empty; give the shards whose images to train on")
    splits = {"labeled": labeled, "unlabeled": unlabeled}
    inputs = {name: split.digest() if split else "none" for name, split in splits.items()}
    held_out = {"held_out": _held_out(config).digest} if config.data.held_out_hashes else {}
    return inputs | exclude_inputs(config.data.exclude) | held_out


def pretrain_stream(
    config: Config, labeled: Split | None, unlabeled: Split | None, folder: str, images_per_step: int, views: int = 2
) -> PretrainStream:
    """Screen the images, once, and print counts; return the stream of those to use.

    An interrupted screening continues with the shards that are left. The result is `LEFT_OUT_NAME` in `folder`, which the caller
    commits.

    Args:
        folder: of the stage, opened with the fingerprint of `pretrain_inputs`.
        images_per_step: over all ranks; `views` of each.

    Raises:
        StageError: more images cannot be decoded than label.max_quarantined allows, or too many shards are damaged.
        DataError: a shard cannot be read or has changed, or fewer than two images are left.
    """
    splits = {name: split for name, split in (("labeled", labeled), ("unlabeled", unlabeled)) if split is not None}
    for split in splits.values():
        check_damage(split, config.label)
    url = storage.join(folder, LEFT_OUT_NAME)
    if not storage.exists(url):
        _screen_all(config, splits, folder)
    storage.remove(storage.join(folder, _PARTS))
    left_out = read_table(url, _REMEDY, schema=LEFT_OUT_SCHEMA)
    summary = _count(splits, left_out)
    _report(summary, left_out, url)
    _check(config, summary, left_out, url)
    return PretrainStream(_spec(splits, left_out, images_per_step, views), summary)


def _held_out(config: Config) -> HeldOutHashes:
    return read_held_out_hashes(storage.expand(config.data.held_out_hashes))


def _screen_all(config: Config, splits: Mapping[str, Split], folder: str) -> None:
    """Screen all shards that have no part yet; write the listing of all."""
    shards = {f"{name}/{shard.name}": (name, shard) for name, split in splits.items() for shard in split.shards}
    parts = storage.join(folder, _PARTS)
    done = {f"{name}/{file}" for name in splits for file in storage.list_names(storage.join(parts, name))}
    todo = [name for name in shards if f"{name}.parquet" not in done]
    held_out = tuple(storage.expand(config.data.held_out_hashes)) if config.data.held_out_hashes else ()
    correlation = config.select.copy_correlation
    images = sum(shards[name][1].num_samples for name in todo)
    with _executor(config.ray_address, images) as (executor, threads, memory):
        exclude = read_keys(config.data.exclude)
        patience_s = config.label.patience_s
        task = _Screening(shards, parts, exclude, held_out, correlation, threads, memory, patience_s)
        for _ in executor(task, todo, "screen"):
            pass
    urls = (storage.join(parts, f"{name}.parquet") for name in shards)
    tables = storage.in_parallel(lambda url: read_table(url, _REMEDY, schema=LEFT_OUT_SCHEMA), urls)
    write_table(storage.join(folder, LEFT_OUT_NAME), pa.concat_tables(tables))


@dataclass(frozen=True)
class _Screening:
    """A task of an executor: screen shards, and commit the images left out of each as a part.

    Attributes:
        shards: `split/shard` → its split and shard.
        parts: folder of the parts.
        held_out: URLs of hashes.
        patience_s: to decode one image, in a shard at which a process was lost.
    """

    shards: Mapping[str, tuple[str, Shard]]
    parts: str
    exclude: ExcludedKeys
    held_out: tuple[str, ...]
    min_correlation: float
    threads: int
    memory_bytes: int
    patience_s: float

    def __call__(self, names: Iterable[str]) -> None:
        """Screen the shards of these names."""
        held_out = _read_once(self.held_out) if self.held_out else None
        screener = Screener(self.exclude, held_out, self.min_correlation, self.threads, self.memory_bytes)
        for name in names:
            split, shard = self.shards[name]
            with noting_loss(storage.join(self.parts, f"{name}.begun")) as was_lost:
                crashing = self._crashing(shard, screener) if was_lost else NOTHING_CRASHES
                write_table(storage.join(self.parts, f"{name}.parquet"), screener.screen(split, shard, crashing))

    def _crashing(self, shard: Shard, screener: Screener) -> dict[int, str]:
        images = partial(open_shard, shard)
        return crashing_images(shard.url, shard.num_samples, images, screener.view, self.patience_s, Meter())


@lru_cache(maxsize=1)  # a process gets several parts of the shards
def _read_once(urls: tuple[str, ...]) -> HeldOutHashes:
    return read_held_out_hashes(urls)


@contextmanager
def _executor(ray_address: str | None, num_images: int) -> Iterator[tuple[Executor, int, int]]:
    """An executor, and the decoding threads and bytes for images of each of its workers.

    Ray tasks on a cluster; here processes if there are many images.
    """
    cores, progress = os.cpu_count() or 1, progress_bars("pretrain")
    if ray_address is not None:
        from pipeline.core.ray_runtime import num_cpus, start_ray  # takes longer than many a screening

        start_ray(ray_address)
        yield RayTasks(num_cpus(), progress), 1, _TASK_MEMORY
    elif num_images < _MANY_IMAGES or cores == 1:
        yield Threads(1, progress), cores, _MEMORY
    else:
        with processes(cores, progress) as executor:
            yield executor, 1, _MEMORY // cores


def _count(splits: Mapping[str, Split], left_out: pa.Table) -> dict[str, int]:
    kinds = Counter(left_out.column("kind").to_pylist())
    images = sum(split.num_samples for split in splits.values())
    return {
        "images": images,
        "used": images - left_out.num_rows,
        "undecodable": kinds["undecodable"],
        "excluded": kinds["excluded"],
        "held_out_copies": kinds["held_out_copy"],
    }


def _report(summary: Mapping[str, int], left_out: pa.Table, url: str) -> None:
    reasons = {
        "cannot be decoded": summary["undecodable"],
        "in data.exclude": summary["excluded"],
        "near-duplicates of held-out images": summary["held_out_copies"],
    }
    why = ", ".join(f"{number:,} {reason}" for reason, number in reasons.items() if number)
    listed = f"; left out: {why}, listed in {url}" if why else ""
    print(f"pretrain: {summary['used']:,} of {summary['images']:,} labeled and unlabeled images{listed}", flush=True)
    if in_grey := sum(reason.endswith(IN_GREY) for reason in left_out.column("reason").to_pylist()):
        print(
            f"pretrain: {in_grey:,} of these near-duplicates have colours and were compared in grey: data.held_out_hashes has no "
            "colours of the held-out image. Where these images have colours, an earlier version packed them: pack that split again"
        )


def _check(config: Config, summary: Mapping[str, int], left_out: pa.Table, url: str) -> None:
    bad, limit = summary["undecodable"], config.label.max_quarantined
    if bad > limit * summary["images"]:
        rows = [row for row in left_out.to_pylist() if row["kind"] == "undecodable"][:_EXAMPLES]
        lines = [f"\n  {row['shard']}, key {row['key']!r}: {row['reason']}" for row in rows]
        raise StageError(
            f"{bad} of {summary['images']} images cannot be decoded, more than label.max_quarantined={limit}; {url} names each and "
            f"says why: repair the shards or raise the limit{''.join(lines)}"
        )
    if summary["used"] < _MIN_IMAGES:
        raise DataError(
            f"{summary['used']} of {summary['images']} images are left to train on, and {_MIN_IMAGES} are needed; {url} says why the "
            "others are left out"
        )


def _spec(splits: Mapping[str, Split], left_out: pa.Table, images_per_step: int, views: int) -> StreamSpec:
    rows: dict[tuple[str, str], array[int]] = {}
    columns = (left_out.column(name).to_pylist() for name in ("split", "shard", "ordinal"))
    for split, shard, ordinal in zip(*columns, strict=True):
        rows.setdefault((split, shard), array("i")).append(ordinal)
    shards = [(name, shard) for name, split in splits.items() for shard in split.shards]
    return StreamSpec(
        name="pretrain",
        shard_urls=tuple(shard.url for _, shard in shards),
        table_urls=tuple(shard.index_url for _, shard in shards),
        num_rows=tuple(shard.num_samples for _, shard in shards),
        images_per_step=images_per_step,
        targets="none",
        excluded=tuple(rows.get((name, shard.name), array("i")) for name, shard in shards),
        table_digests=tuple(shard.index_sha256 for _, shard in shards),
        views=views,
    )
