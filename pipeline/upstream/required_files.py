"""Look for the files and shards outside the run directory that a command reads, before anything runs and before config.yaml remembers
their paths."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any

from data import storage
from data.labels.exclusions import read_keys
from data.picture_folders import folder_of
from data.settings import UsageError
from data.shards.split import find_shards
from data.storage.redact import BLANK, redacted
from pipeline.core.config import Loaded
from pipeline.stages import SPLIT_FIELDS, fields_in_force, find

_FILE_FIELDS = (
    "data.held_out_hashes",
    "data.truth",
    "data.exclude",
    "teacher.weights",
    "teacher.ensemble",
    "teacher.init",
    "student.init",
)
_NO_FILES = ("pretrained", "pretrain", "teacher")  # values of these fields that name no file
_ALWAYS = "data.truth"  # every stage writes the summary


def require_inputs(loaded: Loaded, stages: Iterable[str]) -> None:
    """Look for every file and shard that the stages read or that this command's words name. Their content is checked by the stages.

    Raises UsageError, which names the field and where its value is from, when one does not exist or cannot be looked up.
    """
    needed = {_ALWAYS}
    for stage in stages:
        needed.update(fields_in_force(find(stage).reads, loaded.config))
    known = dict.fromkeys([*_FILE_FIELDS, *SPLIT_FIELDS, *sorted(needed)])
    wanted = [field for field in known if field in needed or loaded.is_given(field)]
    _require_filled_in(loaded, wanted)
    for field in wanted:
        if not (urls := _urls(loaded, field)):
            continue
        try:
            _require_existing(field, urls)
        except (ValueError, OSError) as error:
            message = str(error) if field in str(error) else f"{field}: {error}"
            raise UsageError(f"{message} ({loaded.origin(field)})") from error


def _require_existing(field: str, urls: Sequence[str]) -> None:
    if field in SPLIT_FIELDS:
        if not (folder := folder_of(urls)):
            find_shards(urls)
        elif not storage.local_path(folder).is_dir():
            raise UsageError(f"{field}={folder}: no such folder of images, and not a .tar shard; check the path")
        return
    for url in storage.expand(urls):
        if field == "data.exclude":
            read_keys(url)
        elif url not in _NO_FILES and not storage.exists(url):
            raise UsageError(f"{field}={redacted(url)}: no such file; check the path, or leave it out")


def _urls(loaded: Loaded, field: str) -> list[str]:
    value: Any = attrgetter(field)(loaded.config)
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _require_filled_in(loaded: Loaded, wanted: Sequence[str]) -> None:
    """Raise UsageError for a value that the run directory remembers with variables or without its secrets, unless it names data that
    no stage needs."""
    for field, value in _texts(loaded.config.model_dump(mode="json"), ""):
        is_needed = field in wanted or field not in (*_FILE_FIELDS, *SPLIT_FIELDS)
        missing = "variables are filled in" if "${" in value else "secrets are known" if BLANK in value else ""
        if missing and is_needed and loaded.is_remembered(field):
            raise UsageError(
                f"{field}={value}: {missing} only where they are given with the command, but {loaded.origin(field)}; "
                f"name config=FILE again, or give {field}=…"
            )


def _texts(values: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted field, its text)."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _texts(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, str):
        yield prefix, values
    elif isinstance(values, list) and any(isinstance(value, str) for value in values):
        yield prefix, json.dumps(values, ensure_ascii=False)
