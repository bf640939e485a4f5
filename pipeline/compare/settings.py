"""The settings in which runs differ: those that their stages were made with, and the images that they were made from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from data.storage.redact import redacted
from pipeline.compare.runs import Run
from pipeline.core.schema import default_fields

_LONGEST = 60  # characters of a value
_IMAGES = (
    "labeled",
    "validation",
    "unlabeled",
    "test",
    "exclude",
)  # inputs that are images of `data`, not outputs of stages
_FOR_THE_REPORT = {"data.truth"}


def different_settings(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of (field, value in each run) for the fields that differ, then those for images that differ under the same name.

    Fields that change no output, as the number of workers, are left out; so are paths that lead to the same images.
    """
    images = [_images(run) for run in runs]
    same = {f"data.{name}" for name in _IMAGES if len({side.get(name) for side in images}) == 1 and name in images[0]}
    rows = [row for row in _differing([_fields(run) for run in runs]) if row[0] not in same | _FOR_THE_REPORT]
    shown = {row[0] for row in rows}
    return rows + [
        [f"images of data.{name}", *cells] for name, *cells in _differing(images) if f"data.{name}" not in shown
    ]


def _differing(sides: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    names = sorted({name for side in sides for name in side})
    rows = [[name, *(_written(side.get(name)) for side in sides)] for name in names]
    values = {name: {json.dumps(side.get(name), sort_keys=True) for side in sides} for name in names}
    return [row for row in rows if len(values[row[0]]) > 1]


def _fields(run: Run) -> dict[str, Any]:
    """The fields that count in fingerprints: of a finished stage as it was made, of others as config.yaml has them."""
    config = run.facts.config
    fields = config.fingerprint("", every=True) | {"device": config.known_device()}
    for generation in run.facts.generations:
        for stage, record in generation.records.items():
            made = record["fingerprint"]["config"]
            newer = {name: value for name, value in default_fields().items() if name.startswith(f"{stage}.")}
            fields |= newer | made
    return dict(json.loads(json.dumps(fields, default=str)))


def _images(run: Run) -> dict[str, str]:
    """Digests of the images that the run's stages read, by the field of `data`."""
    found: dict[str, str] = {}
    for generation in run.facts.generations:
        for record in generation.records.values():
            inputs = record["fingerprint"]["inputs"]
            found |= {name: inputs[name] for name in _IMAGES if name in inputs}
            if "corpus" in record["summary"]:
                found["unlabeled"] = record["summary"]["corpus"]
    return found


def _written(value: Any) -> str:
    text = redacted(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
