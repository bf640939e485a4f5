"""Check that shards are those that a run was made from: for force=true, which reads all headers again, and for verify=true."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

from data.errors import DataError
from data.shards.split import Split, check_packed, has_recorded_bytes, open_split
from data.storage import StorageError
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import StageError, done_record
from pipeline.stages import SPLIT_FIELDS, fields_in_force, find


def reindex(config: Config, layout: Layout, stage: str) -> None:
    """Read the headers of all shards that a stage reads, indexed or not.

    Raises:
        DataError: a packed shard has changed, or shards are missing.
        StorageError: a pattern matches nothing.
    """
    for field in fields_in_force(find(stage).reads, config):
        if field in SPLIT_FIELDS and (patterns := attrgetter(field)(config)):
            check_packed(open_split(patterns, layout.indexes, reindex=True))


def verify_splits(config: Config, layouts: Sequence[Layout]) -> None:
    """Check that data.labeled, data.validation and data.test are the shards that a run's models and figures were made from.

    Raises StageError, which names each shard that has changed.
    """
    problems: list[str] = []
    for name in ("labeled", "validation", "test"):
        patterns, users = getattr(config.data, name), dict(_users(layouts, name))
        if not (patterns and users):
            continue
        try:
            split = open_split(patterns, layouts[0].indexes, reindex=True)
        except (DataError, StorageError) as error:  # a run may be verified where it has no access to these shards
            print(f"data.{name}: not checked: {error}")
            continue
        found = [f"data.{name}: {problem}" for problem in _problems(split, users)]
        print(f"data.{name}: {describe_recorded_bytes(split)}")
        problems += found
    if problems:
        raise StageError("\n".join(["shards have changed since the run was made:", *problems]))


def describe_recorded_bytes(split: Split) -> str:
    """Say of how many shards all bytes were checked, and what goes unnoticed in the others."""
    packed = sum(bool(shard.sha256) for shard in split.shards)
    words = [f"{packed:,} packed shards compared with their recorded SHA-256"] if packed else []
    if foreign := len(split.shards) - packed:
        words.append(
            f"{foreign:,} shards were not packed here and have no recorded SHA-256: their names, sizes and labels were read again, "
            "but an image replaced by another of the same name and size goes unnoticed"
        )
    return "; ".join(words)


def _users(layouts: Sequence[Layout], name: str) -> Iterator[tuple[str, str]]:
    """Yield (folder, digest of the shards) of each finished output that was made from `data.<name>`."""
    folders = [layouts[0].teacher] + [f for layout in layouts for f in (layout.student, layout.evaluation)]
    for folder in folders:
        record: dict[str, Any] = done_record(folder) or {"fingerprint": {"inputs": {}}}
        if (digest := record["fingerprint"]["inputs"].get(name, "none")) != "none":
            yield folder, digest


def _problems(split: Split, users: dict[str, str]) -> Iterator[str]:
    for folder, digest in users.items():
        if digest != split.digest():
            yield f"{folder} was made from other shards; restore them, or make it again with force=true"
    for shard in split.shards:
        if shard.sha256 and not has_recorded_bytes(shard):
            yield f"{shard.url}: its bytes have changed since it was packed (SHA-256); restore it, or pack it again"
