"""What `data.labels` reads in a run directory and `pipeline.core` writes: names, and the shape of `done.json`, once for both."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel

CONFIG_NAME = "config.yaml"
DONE_NAME = "done.json"  # in the folder of a finished stage
CURRENT_NAME = "current"  # in SELECTIONS: names the selection in use
LABELS, SELECTIONS, INDEXES = (
    "labels",
    "selections",
    "index",
)  # folders; the last one of the run, the others of a generation
_GENERATION = re.compile(r"gen-([1-9]\d*)")


def generation_folder(generation: int) -> str:
    """Name of the folder of a generation (1, 2, …)."""
    return f"gen-{generation}"


def generation_of(folder: str) -> int | None:
    """The generation whose folder has this name; None for any other folder."""
    match = _GENERATION.fullmatch(folder)
    return int(match[1]) if match else None


class FingerprintRecord(BaseModel):
    """What a stage's output depends on: its configuration's fields, and the digests of its inputs."""

    config: dict[str, Any]
    inputs: dict[str, str]


class OutputRecord(BaseModel):
    """A committed file."""

    bytes: int
    sha256: str


class DoneRecord(BaseModel):
    """Required content of `done.json`; `outputs` by name below the stage's folder."""

    fingerprint: FingerprintRecord
    outputs: dict[str, OutputRecord]
    summary: dict[str, Any]
    digest: str
