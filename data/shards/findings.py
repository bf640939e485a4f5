"""Problems of a shard, summed up from its index, so that a run can report them before it reads an image."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from .samples import INDEX_RULE, Sample, has_odd_key, is_damage

_MAX_IGNORED_FIELDS = 16  # as many as a satellite image has bands; more are parts of file names
_USUAL = 0.1  # a field that at least this share of samples has is a kind of image (depth.png); images of rarer fields count as stray
_METADATA = b"ignored"


@dataclass(frozen=True)
class Findings:
    """Problems of a shard, by its index.

    Attributes:
        problems: number of samples that cannot be used.
        problem: the problem of the first of them.
        damage: how and at which byte the shard is cut short or damaged; empty for a whole shard.
        ignored: image members that are in no row because their sample has another image (`N.depth.png` beside `N.jpg`).
        stray: those of them that are probably samples of their own.
        ignored_fields: the most frequent of their fields, as in `depth.png, v2.jpg`.
    """

    problems: int = 0
    problem: str = ""
    damage: str = ""
    ignored: int = 0
    stray: int = 0
    ignored_fields: str = ""

    def as_json(self) -> dict[str, int | str]:
        """The fields that are not empty, as arguments of `Findings`."""
        return {name: value for name, value in asdict(self).items() if value}


NO_FINDINGS = Findings()


def index_metadata(samples: Sequence[Sample]) -> dict[str, str]:
    """An index's metadata; see `data.shards.index.build_index`."""
    seen: set[str] = set()
    odd = []
    for sample in samples:
        if not sample.problem and (sample.key in seen or has_odd_key(sample)):
            odd.append(sample.key)
        seen.add(sample.key)
    counts = Counter(name for sample in samples for name in sample.ignored)
    usable = sum(not sample.problem for sample in samples)
    ignored = {"ignored": counts.total(), "stray": _stray(counts, usable), "fields": _few(counts)}
    return {
        "odd_keys": str(len(odd)),
        "odd_key": odd[0] if odd else "",
        "ignored": json.dumps(ignored),
        "rule": INDEX_RULE,
    }


def _stray(counts: Counter[str], num_usable: int) -> int:
    """Number of ignored images with a field that few samples of the shard have."""
    if len(counts) > _MAX_IGNORED_FIELDS:
        return counts.total()
    return sum(count for count in counts.values() if count < _USUAL * num_usable)


def _few(counts: Counter[str]) -> str:
    return ", ".join(sorted(name for name, _ in counts.most_common(3)))


def findings_of(index: pa.Table) -> Findings:
    """The findings of an index. An index of an earlier version counts no ignored images."""
    rows = zip(*(index.column(name).to_pylist() for name in ("key", "offset", "problem")), strict=True)
    bad = [row for row in rows if row[2]]
    damage = ""
    if bad and is_damage(bad[-1][0], bad[-1][2]):
        damage = f"{bad[-1][2]}, at byte {bad[-1][1]}"
    counted = json.loads((index.schema.metadata or {}).get(_METADATA, b"{}"))
    ignored = counted.get("ignored", 0), counted.get("stray", 0), counted.get("fields", "")
    return Findings(len(bad), bad[0][2] if bad else "", damage, *ignored)
