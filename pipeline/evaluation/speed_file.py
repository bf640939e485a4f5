"""Read and write `speed.json`, the speed of teacher and student. Apart from speed.py, so that status and summary need no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from data import storage
from data.json_files import read_json

SPEED_NAME = "speed.json"  # beside the figures of stage=evaluate


def write_speed(evaluation: str, speed: Mapping[str, Any]) -> None:
    """Write the result of `measure_speed` into the folder of stage=evaluate."""
    storage.write_text(storage.join(evaluation, SPEED_NAME), json.dumps(speed, indent=1) + "\n")


def read_speed(evaluation: str) -> dict[str, Any] | None:
    """Read what `write_speed` wrote; None for an evaluation of an earlier version."""
    url = storage.join(evaluation, SPEED_NAME)
    return read_json(url, "delete it: the report does without", _Speed) if storage.exists(url) else None


class _Speed(BaseModel):
    models: dict[str, dict[str, Any]]
    where: str
