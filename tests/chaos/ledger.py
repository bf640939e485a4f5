"""Count the images of a run from its files: each must occur once, as a label or as a quarantined row."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from tests.chaos import suite
from tests.chaos.world import DAMAGED, PER_SHARD, World
from tests.digits_run import label_and_selection_bytes

Identity = tuple[str, int]  # shard, ordinal


COLUMNS = ("times", "images", "labels", "quarantined", "lost", "duplicated")


@dataclass
class Outcome(suite.Outcome):
    """Counts over the runs under one fault; `skipped`: why it was not injected."""

    images: int = 0
    labels: int = 0
    quarantined: int = 0
    lost: int = 0
    duplicated: int = 0
    skipped: str = ""

    @property
    def is_good(self) -> bool:
        """Whether no image is lost or duplicated, the bytes are the same, and the fault did happen."""
        fine = self.same and not (self.lost or self.duplicated or self.problems)
        return bool(self.skipped) or (fine and self.times > 0)

    def row(self) -> list[object]:
        """The values of COLUMNS, whether the bytes are the same, and the seconds."""
        if self.skipped:
            return [f"skipped: {self.skipped}"]
        return [*(getattr(self, column) for column in COLUMNS), "yes" if self.same else "NO", self.seconds]


def count(world: World, run_dir: Path, outcome: Outcome) -> None:
    """Add a finished run to the outcome."""
    expected, labeled, quarantined = _images(world), _labeled(run_dir), _quarantined(run_dir)
    found = labeled + quarantined
    outcome.images += len(expected)
    outcome.labels += labeled.total()
    outcome.quarantined += quarantined.total()
    outcome.lost += len(expected - found.keys())
    outcome.duplicated += found.total() - len(found)
    damaged = {(f"unlabeled-{number // PER_SHARD:06d}", number % PER_SHARD) for number in DAMAGED}
    outcome.expect(quarantined.keys() == damaged, f"{run_dir.name}: the quarantined images are not the damaged ones")
    outcome.expect(found.keys() <= expected, f"{run_dir.name}: labels of images that do not exist")
    different = _different(world.expected(), label_and_selection_bytes(run_dir))
    outcome.same = outcome.same and not different
    outcome.expect(
        not different,
        f"{run_dir.name}: not the undisturbed run's bytes: {', '.join(different[:4])}, {len(different)} files in all",
    )


def check_whole(world: World, run_dir: Path, outcome: Outcome) -> None:
    """Check that every file of a stopped run is whole if it has its final name."""
    expected = world.expected()
    for path in run_dir.rglob("*"):
        if not path.is_file() or path.name.startswith(".tmp-"):
            continue
        name = str(path.relative_to(run_dir))
        if path.suffix == ".parquet":
            outcome.expect(path.read_bytes() == expected.get(name), f"{run_dir.name}: {name} is not whole")
        elif path.suffix == ".json":
            outcome.expect(_is_json(path), f"{run_dir.name}: {name} is not whole")


def _images(world: World) -> set[Identity]:
    indexes = sorted((world.folder / "unlabeled/index").glob("*.parquet"))
    return {(path.stem, ordinal) for path in indexes for ordinal in range(pq.read_metadata(path).num_rows)}


def _labeled(run_dir: Path) -> Counter[Identity]:
    files = (run_dir / "gen-1/labels").glob("unlabeled-*.parquet")
    ordinals = ((path.stem, pq.read_table(path, columns=["ordinal"]).column(0).to_pylist()) for path in files)
    return Counter((shard, ordinal) for shard, column in ordinals for ordinal in column)


def _quarantined(run_dir: Path) -> Counter[Identity]:
    path = run_dir / "gen-1/labels/quarantine.parquet"
    rows = pq.read_table(path).to_pylist() if path.exists() else []
    return Counter((row["shard"], row["ordinal"]) for row in rows)


def _different(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    return sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True
