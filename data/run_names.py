"""Names in a run directory that `data.labels` reads and `pipeline.core` writes, defined once, below both."""

from __future__ import annotations

import re

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
