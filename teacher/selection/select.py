"""stage=select: which pseudo-labeled images the student sees, and how often.

Two readings of the label files give the exact cut-offs (one more only where too many rows share a bin); a last one
writes the copies (selection.py). Each reading is a function of some shards whose results merge in any order, so
threads, or tasks on a cluster, may share the shards out as they like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from data.labels.label_files import LabeledShard
from teacher.selection.copies import Selection
from teacher.selection.cutoffs import Int64, SelectError, SelectRule, tie_hash
from teacher.selection.label_reader import Exclusions, LabelSource
from teacher.selection.quota_search import (
    Candidates,
    Histogram,
    Search,
    finish,
    in_question,
    narrow,
    plan_copies,
    start,
)
from teacher.selection.threads import Executor, Progress, Result, in_threads

MAX_CANDIDATES = 2_000_000  # rows held at once to end the search: about 100 MB with the sort


def select_shards(
    labels_dir: str,
    shards: Sequence[str],
    rule: SelectRule,
    exclusions: Exclusions | None = None,
    *,
    entries: Mapping[str, LabeledShard] | None = None,
    num_workers: int = 1,
    executor: Executor = in_threads,
    progress: Progress | None = None,
    max_candidates: int = MAX_CANDIDATES,
) -> Selection:
    """The exact cut-offs over all label files of `shards`: the same for any order, worker count and memory limit.

    Args:
        labels_dir: folder of `<shard name>.parquet`.
        shards: shard names, each once.
        entries: see `LabelSource`.
        executor: what runs the readings in `num_workers` parts: threads here, or tasks on a cluster.
        max_candidates: rows that may be held in memory; more of them cost a further reading.

    Raises:
        SelectError: a shard is named twice, or a label file is missing or broken.
    """
    _check_names(shards)
    source = LabelSource(labels_dir, rule, exclusions or Exclusions(), entries or {})

    def read(doing: str, task: Callable[[Iterable[str]], Result]) -> Iterable[Result]:
        return executor(task, shards, num_workers, doing, progress)

    histogram = _sum(source, read("count", partial(count_rows, source)))
    available = histogram.sum(axis=1)
    base_copies, num_extra = plan_copies(available, rule)
    search = start(histogram, num_extra)
    while search.num_candidates > max_candidates:
        search = narrow(search, _sum(source, read("count finely", partial(count_finely, source, search))))
    rows = Candidates.merge(list(read("collect", partial(collect, source, search))))
    return Selection(rule, finish(search, rows, available, base_copies, num_extra), source.exclusions)


def count_rows(source: LabelSource, shards: Iterable[str]) -> Int64:
    """Eligible rows by label and confidence, int64 [num_classes, bins]; the results of several calls add up."""
    histogram = Histogram(source.rule.num_classes)
    for shard in shards:
        for rows in source.read(shard, needs_ordinals=False):
            histogram.add_coarse(rows.label, rows.confidence, rows.eligible)
    return histogram.counts()


def count_finely(source: LabelSource, search: Search, shards: Iterable[str]) -> Int64:
    """Rows in question by label and part of its interval, int64 [num_classes, bins]; several calls add up."""
    histogram = Histogram(source.rule.num_classes)
    for rows in _candidates(source, search, shards):
        histogram.add_fine(rows, search)
    return histogram.counts()


def collect(source: LabelSource, search: Search, shards: Iterable[str]) -> Candidates:
    """All rows in question; the results of several calls are merged."""
    return Candidates.merge(list(_candidates(source, search, shards)))


def _candidates(source: LabelSource, search: Search, shards: Iterable[str]) -> Iterator[Candidates]:
    low, last = search.key_limits()
    for shard in shards if search.num_candidates else ():
        for rows in source.read(shard):
            label, key = rows.label, rows.key
            inside = np.flatnonzero((key >= low.take(label)) & (key <= last.take(label)) & rows.eligible)
            assert rows.ordinal is not None
            hashes = tie_hash(shard, rows.ordinal[inside])
            yield in_question(Candidates(label[inside], key[inside], hashes), search)


def _check_names(shards: Sequence[str]) -> None:
    seen: set[str] = set()
    for shard in shards:
        if shard in seen:
            raise SelectError(f"shard {shard!r} is named twice; every shard needs a name of its own")
        seen.add(shard)


def _sum(source: LabelSource, histograms: Iterable[Int64]) -> Int64:
    total = Histogram(source.rule.num_classes).counts()  # zeros
    for histogram in histograms:  # one at a time: those of a cluster's tasks need not be here together
        total += histogram
    return total
