"""The stage contract: done, continue or refuse, and the commit of what a stage made. The only module that writes done-markers.

A stage's fingerprint is what its output depends on: its own config fields and the digests of its inputs. The fingerprint is
written before the work starts (`started.json`) and again with the outputs' digests when it is done (`done.json`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel

from data import storage
from data.json_files import read_json
from data.storage.failpoint import failpoint
from pipeline.core.schema import default_fields, resumable_fields
from pipeline.core.timing import EFFORT_NAME, Clock, read_effort

SCHEMA_VERSION = 1
_STARTED, _DONE = "started.json", "done.json"
_READERS = 8  # files read at once: an object store answers each after a while
State = Literal["new", "continue", "done"]
Explain = Callable[
    [str, str | None, str | None], Iterable[str]
]  # input, its digest there and now → lines for a refusal


class StageError(ValueError):
    """A stage that cannot run; the message says why and what to do."""


class _Fingerprint(BaseModel):
    config: dict[str, Any]
    inputs: dict[str, str]


class _Started(BaseModel):
    """What must be in `started.json`."""

    fingerprint: _Fingerprint


class _Output(BaseModel):
    bytes: int
    sha256: str


class _Done(_Started):
    """What must be in `done.json`."""

    outputs: dict[str, _Output]
    summary: dict[str, Any]
    digest: str


class StageRefusedError(StageError):
    """The directory holds output of another configuration or other inputs; the message names each field that differs.

    Attributes:
        fields: of the configuration, those that differ.
    """

    def __init__(self, message: str, fields: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.fields = tuple(fields)


class WorkerError(Exception):
    """An error in the code that a worker ran; the message is its traceback."""


@dataclass(frozen=True)
class Fingerprint:
    """What a stage's output is a function of."""

    config: Mapping[str, Any]  # dotted field → value
    inputs: Mapping[str, str]  # name of an upstream output → its digest

    def as_json(self) -> dict[str, Any]:
        """As it is written and compared."""
        fields = {"schema_version": SCHEMA_VERSION, "config": dict(self.config), "inputs": dict(self.inputs)}
        return dict(json.loads(json.dumps(fields, sort_keys=True, default=str)))

    def digest(self) -> str:
        """Short name of all of it; fields at their defaults are left out, so that a version with more fields names it alike."""
        fields, defaults = self.as_json(), json.loads(json.dumps(default_fields()))
        given = {field: value for field, value in fields["config"].items() if value != defaults.get(field)}
        return digest_of(fields | {"config": given})


def digest_of(value: Any) -> str:
    """Short digest of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Stage:
    """One stage's directory. Made by `open_stage`; `commit` ends it."""

    def __init__(self, folder: str, name: str, fingerprint: Fingerprint, state: State) -> None:
        self.folder = folder
        self.name = name
        self.fingerprint = fingerprint
        self.state = state
        self._clock = Clock()

    @property
    def is_done(self) -> bool:
        """True when the output is there and whole."""
        return self.state == "done"

    def path(self, *parts: str) -> str:
        """A file of this stage."""
        return storage.join(self.folder, *parts)

    def reopen(self, reason: str) -> None:
        """Go on with a stage that was done (a grown corpus, a lost file): the marker goes first, so that a crash is seen."""
        print(f"{self.name}: not done any more: {reason}")
        storage.remove(self.path(_DONE))
        self.state = "continue"

    def commit(self, outputs: Iterable[str], summary: Mapping[str, Any]) -> None:
        """Write the done-marker over `outputs` (names below the folder), which must be there under their final names.

        Args:
            summary: what later stages and the report need to know; a function of config and inputs alone.
        """
        files = _describe_all(self.folder, sorted(outputs))
        record: dict[str, Any] = {"fingerprint": self.fingerprint.as_json(), "outputs": files, "summary": dict(summary)}
        record["digest"] = digest_of([record["fingerprint"], files])
        failpoint(f"before-done/{self.name}")
        self._clock.add_to(self.folder)
        storage.write_text(self.path(_DONE), json.dumps(record, indent=1, sort_keys=True) + "\n")
        failpoint(f"after-done/{self.name}")
        self.state = "done"


_on_acceptance: list[Callable[[], None]] = []  # for the block of `on_acceptance`


@contextmanager
def on_acceptance(action: Callable[[], None]) -> Iterator[None]:
    """Inside, call `action` when the first stage is opened: its inputs are there, its checks passed, it does not refuse, and nothing
    of it has been changed yet. Without any, at the end of the block, and not when it raises."""
    _on_acceptance.append(action)
    try:
        yield
        _accept()
    finally:
        _on_acceptance.clear()


def _accept() -> None:
    while _on_acceptance:
        _on_acceptance.pop()()


def open_stage(
    folder: str,
    name: str,
    fingerprint: Fingerprint,
    force: bool = False,
    explain: Explain | None = None,
    check: Callable[[], object] | None = None,
) -> Stage:
    """Decide what to do with a stage's directory.

    Same fingerprint, up to fields that may change on the way: `done` or `continue`. An output that is missing or has another size
    than recorded: `continue`.
    Another fingerprint, but nothing was made yet: `new`.

    Args:
        force: move output of another configuration aside and start over.
        explain: lines for the refusal that say how an input differs.
        check: called unless the stage is done, before anything is changed: what it raises leaves a finished output as it is.

    Raises:
        StageRefusedError: the directory belongs to another configuration or other inputs.
    """
    state: State = "new"
    reason, starts_over = "", force and is_begun(folder)
    if not starts_over:
        state, reason = look(folder, name, fingerprint, explain)
    if state != "done" and check is not None:
        check()
    _accept()
    if starts_over:
        _move_aside(folder, name)
    elif reason:
        print(f"{name}: {reason}; it is made again")
        storage.remove(storage.join(folder, _DONE))
    if state == "done":
        print(f"{name}: done ({folder})")
    if state != "done":
        _tell_changes(folder, name, fingerprint)
        storage.remove_temporary(folder)
        marker = {"fingerprint": fingerprint.as_json()}
        storage.write_text(storage.join(folder, _STARTED), json.dumps(marker, indent=1, sort_keys=True) + "\n")
    return Stage(folder, name, fingerprint, state)


def look(folder: str, name: str, fingerprint: Fingerprint, explain: Explain | None = None) -> tuple[State, str]:
    """What `open_stage` would decide, and why a stage that was done is not; changes nothing. Raises as `open_stage`."""
    recorded = _recorded(folder)
    if recorded is None:
        return "new", ""
    refusal = _difference(folder, name, recorded["fingerprint"], fingerprint.as_json(), explain)
    if refusal and not _has_output(folder):
        return "new", ""  # a typing mistake that was found before anything was made
    if refusal:
        changed = differences(recorded["fingerprint"]["config"], fingerprint.as_json()["config"])
        raise StageRefusedError(refusal, sorted(changed.keys() & fingerprint.config.keys()))
    return _check_outputs(folder)


def refuse_other_config(folder: str, name: str, config: Mapping[str, Any]) -> None:
    """Refuse early, before any stage of a command runs: as `open_stage`, for the config fields alone."""
    recorded = _recorded(folder)
    if recorded is not None:
        look(folder, name, Fingerprint(config, recorded["fingerprint"]["inputs"]))


def is_begun(folder: str) -> bool:
    """True when a stage was opened there, done or not."""
    return _recorded(folder) is not None


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`{field: (before, after)}` of the fields whose values differ as JSON (there a tuple is a list); None where there is none."""
    before, after = (json.loads(json.dumps(dict(fields), default=str)) for fields in (before, after))
    fields = sorted({*before, *after})
    return {f: (before.get(f), after.get(f)) for f in fields if before.get(f) != after.get(f)}


def config_differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """As `differences`, of config fields: one that was not recorded was added since and had its default."""
    added = {field: default for field, default in default_fields().items() if field in now}
    return differences({**added, **recorded}, now)


def done_record(folder: str) -> dict[str, Any] | None:
    """What `commit` wrote, or None when the stage is not done."""
    return _read_json(storage.join(folder, _DONE), _Done)


def require_done(folder: str, name: str) -> dict[str, Any]:
    """As `done_record`; raises StageError, naming the stage to run, when it is not done."""
    record = done_record(folder)
    if record is None:
        raise StageError(f"{folder}: stage {name} is not done; run stage={name} first")
    return record


def recorded_seconds(folder: str) -> float:
    """Wall-clock seconds spent in a stage so far, over all its runs."""
    return read_effort(folder).seconds


def add_effort(folder: str, clock: Clock) -> None:
    """Account for a run that stopped before its stage was done; nothing happens when the stage was not begun or is done."""
    if storage.exists(storage.join(folder, _STARTED)) and done_record(folder) is None:
        clock.add_to(folder)


def _describe_all(folder: str, names: list[str]) -> dict[str, dict[str, Any]]:
    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(names, pool.map(lambda name: _describe(storage.join(folder, name)), names), strict=True))


def _describe(url: str) -> dict[str, Any]:
    digest, num_bytes = hashlib.sha256(), 0
    with storage.open_read(url) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            num_bytes += len(block)
    return {"bytes": num_bytes, "sha256": digest.hexdigest()}


def _read_json(url: str, shape: type[BaseModel]) -> dict[str, Any] | None:
    if not storage.exists(url):
        return None
    return read_json(url, "delete it and run the stage again", shape, StageError)


def _recorded(folder: str) -> dict[str, Any] | None:
    return done_record(folder) or _read_json(storage.join(folder, _STARTED), _Started)


def _has_output(folder: str) -> bool:
    return any(name not in (_STARTED, EFFORT_NAME) for name in storage.list_names(folder))


def _check_outputs(folder: str) -> tuple[State, str]:
    record = done_record(folder)
    if record is None:
        return "continue", ""
    list_sizes = cache(storage.list_sizes)  # one listing, not thousands of questions to an object store
    for output, expected in record["outputs"].items():
        url = storage.join(folder, output)
        if list_sizes(url.rpartition("/")[0]).get(storage.base_name(url)) != expected["bytes"]:
            return "continue", f"{url} is missing or cut short"
    return "done", ""


def _difference(
    folder: str, name: str, old: Mapping[str, Any], new: Mapping[str, Any], explain: Explain | None
) -> str | None:
    """The refusal, or None when the fingerprints are equal."""
    added = {
        field: default for field, default in default_fields().items() if field in new["config"]
    }  # since it was made
    config = differences(added | old.get("config", {}), new["config"])
    config = {field: values for field, values in config.items() if field not in resumable_fields()}
    inputs = differences(old.get("inputs", {}), new["inputs"])
    lines = [f"  {field}: {before!r} there, {after!r} now" for field, (before, after) in config.items()]
    if old.get("schema_version") != new["schema_version"]:
        lines.append(f"  schema_version: {old.get('schema_version')} there, {new['schema_version']} now")
    for field, (before, after) in inputs.items():
        lines.append(f"  {field}: changed upstream (digest {before} there, {after} now)")
        lines += explain(field, before, after) if explain else ()
    if not lines:
        return None
    if list(inputs) and not config:
        head = f"stage {name}: {folder} was made from other inputs:"
        advice = (
            f"stage={name} force=true moves this stage's output aside and makes it again; another run_dir= starts anew."
        )
    else:
        head = f"stage {name}: {folder} was made with other settings:"
        advice = (
            "Give the old values to continue, another run_dir= to start anew, "
            f"or stage={name} force=true to move this stage's output aside."
        )
    return "\n".join([head, *lines, advice])


def _tell_changes(folder: str, name: str, fingerprint: Fingerprint) -> None:
    """Say which fields a stage that is continued has other values of; unless nothing was made with the old ones yet."""
    recorded = _recorded(folder)
    if recorded is None or not _has_output(folder):
        return
    changes = config_differences(recorded["fingerprint"]["config"], fingerprint.config)
    for field, (before, after) in changes.items():
        if field in resumable_fields():
            print(
                f"{name}: continues with {field}={after}, {before} before: the same images in the same order, but batch-norm "
                "statistics and rounding differ, so the result is not byte for byte that of a run with one value"
            )


def _move_aside(folder: str, name: str) -> None:
    number = 1
    while storage.exists(f"{folder}.old-{number}"):
        number += 1
    storage.move(folder, f"{folder}.old-{number}")
    print(f"{name}: moved the old output to {folder}.old-{number}")
