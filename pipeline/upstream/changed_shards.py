"""Are the shards still those that a run was made from? For force=true, which starts from what is there, and for verify=true."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

from data.shards.split import DataError, Split, check_packed, has_recorded_bytes, open_split
from data.storage import StorageError
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import StageError, done_record
from pipeline.stages import SPLIT_FIELDS, fields_in_force, find


def reindex(config: Config, layout: Layout, stage: str) -> None:
    """Read the headers of all shards that a stage reads, also of those that are indexed.

    Raises:
        DataError: a packed shard that has changed; shards that are missing.
        StorageError: a pattern that matches nothing.
    """
    for field in fields_in_force(find(stage).reads, config):
        if field in SPLIT_FIELDS and (patterns := attrgetter(field)(config)):
            check_packed(open_split(patterns, layout.indexes, reindex=True))


def verify_splits(config: Config, layouts: Sequence[Layout]) -> None:
    """Check that data.labeled, data.validation and data.test are what models and figures of a run were made from.

    Raises:
        StageError: what has changed.
    """
    problems: list[str] = []
    for name in ("labeled", "validation", "test"):
        patterns, users = getattr(config.data, name), dict(_users(layouts, name))
        if not (patterns and users):
            continue
        try:
            split = open_split(patterns, layouts[0].indexes, reindex=True)
        except (DataError, StorageError) as error:  # a run may be verified where these shards are not
            print(f"data.{name}: not checked: {error}")
            continue
        found = [f"data.{name}: {problem}" for problem in _problems(split, users)]
        print(f"data.{name}: {describe_recorded_bytes(split)}")
        problems += found
    if problems:
        raise StageError("\n".join(["shards have changed since the run was made:", *problems]))


def describe_recorded_bytes(split: Split) -> str:
    """Of how many shards all bytes are checked, and what is not noticed of the others."""
    packed = sum(bool(shard.sha256) for shard in split.shards)
    words = [f"{packed:,} packed shards compared with the SHA-256 that is recorded of each"] if packed else []
    if foreign := len(split.shards) - packed:
        words.append(
            f"no SHA-256 is recorded of {foreign:,} shards that were not packed here: their names, sizes and labels were read again, "
            "but an image that was replaced by another of the same name and size is not noticed"
        )
    return "; ".join(words)


def _users(layouts: Sequence[Layout], name: str) -> Iterator[tuple[str, str]]:
    """Folder of each finished output that was made from `data.<name>`, and the digest of the shards that it was made from."""
    folders = [layouts[0].teacher] + [f for layout in layouts for f in (layout.student, layout.evaluation)]
    for folder in folders:
        record: dict[str, Any] = done_record(folder) or {"fingerprint": {"inputs": {}}}
        if (digest := record["fingerprint"]["inputs"].get(name, "none")) != "none":
            yield folder, digest


def _problems(split: Split, users: dict[str, str]) -> Iterator[str]:
    for folder, digest in users.items():
        if digest != split.digest():
            yield f"the shards are not those that {folder} was made from; restore them, or make it again with force=true"
    for shard in split.shards:
        if shard.sha256 and not has_recorded_bytes(shard):
            yield f"{shard.url}: its bytes are not those that were packed (other SHA-256); restore it, or pack it again"
