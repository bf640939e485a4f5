"""The result of a disturbed training: images of each step, repeated steps, and whether the bytes are the same."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.training.checkpoint import load_newest
from tests.chaos import suite
from tests.chaos_train.world import World, notes_of

Keys = dict[tuple[int, int], list[str]]  # (rank, step) → keys of the images
COLUMNS = ("times", "steps", "steps lost", "images", "repeated", "skipped", "same bytes", "back s", "seconds")


@dataclass
class Outcome(suite.Outcome):
    """Sums over the runs under one fault."""

    steps: int = 0
    steps_lost: int = 0  # repeated after a kill
    images: int = 0
    repeated: int = 0
    skipped: int = 0
    back_s: float = 0.0  # longest time from the start of a continued `fit` to its first step

    @property
    def is_good(self) -> bool:
        """No image repeated or skipped, the same bytes, and the fault did happen."""
        return self.same and not (self.repeated or self.skipped or self.problems) and self.times > 0

    def row(self) -> list[object]:
        """The values of COLUMNS."""
        numbers = [self.times, self.steps, self.steps_lost, self.images, self.repeated, self.skipped]
        return [*numbers, "yes" if self.same else "NO", round(self.back_s, 2), self.seconds]


def count(world: World, run_dir: Path, workers: int, outcome: Outcome) -> None:
    """Add a finished run to the outcome."""
    found, made, seconds = _read(run_dir)
    expected, _, _ = _read(world.reference(workers))
    seen, wanted = (Counter(key for part in keys.values() for key in part) for keys in (found, expected))
    outcome.steps += len(found) // workers
    outcome.steps_lost += made - len(found) // workers
    outcome.images += seen.total()
    outcome.repeated += (seen - wanted).total()
    outcome.skipped += (wanted - seen).total()
    outcome.back_s = max([outcome.back_s, *seconds])
    outcome.expect(found == expected, f"{run_dir.name}: a step saw other images than in the undisturbed run")
    different = different_parts(run_dir, world.reference(workers))
    outcome.same = outcome.same and not different
    outcome.expect(not different, f"{run_dir.name}: not the undisturbed run's bytes: {', '.join(different)}")


def _read(run_dir: Path) -> tuple[Keys, int, list[float]]:
    """Keys of each step's last execution; steps of rank 0, repeated ones too; seconds to the first step of each continued training."""
    keys: Keys = {}
    made, seconds = 0, list[float]()
    for path in sorted(notes_of(run_dir).glob("rank-*.jsonl")):
        rank = int(path.stem.removeprefix("rank-"))
        for line in _whole_lines(path):
            keys[rank, line["step"]] = line["keys"]
            made += rank == 0
            if line["seconds_to_first_step"] is not None and line["step"] > 0:
                seconds.append(line["seconds_to_first_step"])
    return keys, made, seconds


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # the process was killed while writing
            continue
    return lines


def different_parts(run_dir: Path, reference: Path) -> list[str]:
    """Names of those among weights, EMA, momentum and metrics that are not the same bytes."""
    parts, expected = _parts(run_dir), _parts(reference)
    return sorted(name for name in {*parts, *expected} if parts.get(name) != expected.get(name))


def _parts(run_dir: Path) -> dict[str, bytes]:
    student = run_dir / "gen-1/student"
    files = {name: (student / name).read_bytes() for name in ("weights/model.safetensors", "metrics.jsonl")}
    checkpoint = load_newest(str(student / "checkpoints"))
    assert checkpoint is not None, f"{run_dir.name} has no checkpoint"
    momentum = {str(number): values for number, values in checkpoint["optimizer"]["state"].items()}
    groups = {"model": checkpoint["model"], "ema": checkpoint["ema"]["module"]}
    return files | {name: _bytes(group) for name, group in (groups | {"momentum": momentum}).items()}


def _bytes(value: Any) -> bytes:
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    return b"".join(name.encode() + _bytes(value[name]) for name in sorted(value)) if isinstance(value, dict) else b""
