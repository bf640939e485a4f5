"""The stage contract: done, continue or refuse, and the commit of a stage's outputs. Only this module writes done-markers.

A stage's fingerprint is all that its output depends on: its own config fields and the digests of its inputs. It is written before
the work starts (`started.json`), and again with the outputs' digests when the stage is done (`done.json`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel

from data import storage
from data.json_files import read_json
from data.run_names import DONE_NAME, DoneRecord, FingerprintRecord
from data.storage.failpoint import failpoint
from pipeline.core.devices import UNKNOWN_DEVICE
from pipeline.core.schema import accepted_changes, default_fields, fields_marked
from pipeline.core.timing import SECONDS_NAME, Clock

SCHEMA_VERSION = 1
_STARTED = "started.json"
_NEW_NAMES = {"student.from_teacher": "student.init=teacher"}  # in fingerprints under the name of earlier versions
State = Literal["new", "continue", "done"]
Explain = Callable[
    [str, str | None, str | None], Iterable[str]
]  # (input, recorded digest, present digest) → lines for a refusal


class StageError(ValueError):
    """A stage cannot run; the message says why and what to do."""


class _Started(BaseModel):
    """Required content of `started.json`."""

    fingerprint: FingerprintRecord


class StageRefusedError(StageError):
    """The folder holds output of another configuration or of other inputs; the message names each difference.

    Attributes:
        fields: the configuration fields that differ.
    """

    def __init__(self, message: str, fields: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.fields = tuple(fields)


class WorkerError(Exception):
    """A bug in code that a worker ran; the message is the worker's traceback."""


@dataclass(frozen=True)
class Fingerprint:
    """All that a stage's output depends on."""

    config: Mapping[str, Any]  # dotted field → value
    inputs: Mapping[str, str]  # name of an upstream output → its digest

    def as_json(self) -> dict[str, Any]:
        """The JSON object that is written and compared."""
        fields = {"schema_version": SCHEMA_VERSION, "config": dict(self.config), "inputs": dict(self.inputs)}
        return dict(json.loads(json.dumps(fields, sort_keys=True, default=str)))

    def digest(self) -> str:
        """16 hex digits of the fingerprint. Fields at their defaults are left out, so that a new field changes no digest."""
        fields, defaults = self.as_json(), json.loads(json.dumps(default_fields()))
        given = {field: value for field, value in fields["config"].items() if value != defaults.get(field)}
        return digest_of(fields | {"config": given})


def digest_of(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Stage:
    """An open stage: `open_stage` makes it, `commit` ends it."""

    def __init__(self, folder: str, name: str, fingerprint: Fingerprint, state: State) -> None:
        self.folder = folder
        self.name = name
        self.fingerprint = fingerprint
        self.state = state
        self._clock = Clock()

    @property
    def is_done(self) -> bool:
        """True when the output is complete."""
        return self.state == "done"

    def path(self, *parts: str) -> str:
        """The URL of a file of this stage."""
        return storage.join(self.folder, *parts)

    def reopen(self, reason: str) -> None:
        """Continue a stage that was done (a grown corpus, a lost file): remove its marker first, in case of a crash."""
        accept()
        print(f"{self.name}: not done any more: {reason}")
        storage.remove(self.path(DONE_NAME))
        self.state = "continue"

    def commit(self, outputs: Iterable[str], summary: Mapping[str, Any]) -> None:
        """Write the done-marker.

        Args:
            outputs: names below the folder, all written under their final names.
            summary: facts for later stages and the report; a function of config and inputs alone.
        """
        names = sorted(outputs)
        files = dict(zip(names, storage.in_parallel(lambda name: _describe(self.path(name)), names), strict=True))
        record: dict[str, Any] = {"fingerprint": self.fingerprint.as_json(), "outputs": files, "summary": dict(summary)}
        record["digest"] = digest_of([record["fingerprint"], files])
        failpoint(f"before-done/{self.name}")
        self._clock.add_to(self.folder)
        storage.write_text(self.path(DONE_NAME), json.dumps(record, indent=1, sort_keys=True) + "\n")
        failpoint(f"after-done/{self.name}")
        self.state = "done"


_on_acceptance: list[Callable[[], None]] = []  # the action of the running `on_acceptance` block


@contextmanager
def on_acceptance(action: Callable[[], None]) -> Iterator[None]:
    """Call `action` once: when the first stage inside that is not done has passed its checks, before it writes; or at the end, if
    there is no such stage and the block does not raise."""
    _on_acceptance.append(action)
    try:
        yield
        accept()
    finally:
        _on_acceptance.clear()


def accept() -> None:
    """Call the action of the running `on_acceptance` block, if it was not called yet: all checks have passed."""
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
    """Open a stage's folder in the state that `inspect_stage` finds.

    Args:
        force: move the output there aside and start over.
        explain: makes the lines of a refusal that say how an input differs.
        check: called unless the stage is done, before anything changes, so that its error leaves a finished output as it is.

    Raises:
        StageRefusedError: the folder holds output of another configuration or of other inputs.
    """
    state: State = "new"
    reason, starts_over = "", force and is_begun(folder)
    if not starts_over:
        state, reason = inspect_stage(folder, name, fingerprint, explain)
    if state != "done":
        if check is not None:
            check()
        if fingerprint.config.get("device") == UNKNOWN_DEVICE:
            raise StageError(
                f"stage {name}: device=auto is unknown while no cluster answers at ray_address; give device=cpu"
            )
        accept()
    if starts_over:
        _move_aside(folder, name)
    elif reason:
        print(f"{name}: {reason}; it is made again")
        storage.remove(storage.join(folder, DONE_NAME))
    if state == "done":
        print(f"{name}: done ({folder})")
    else:
        _report_changes(folder, name, fingerprint)
        storage.remove_temporary(folder)
        marker = {"fingerprint": fingerprint.as_json()}
        storage.write_text(storage.join(folder, _STARTED), json.dumps(marker, indent=1, sort_keys=True) + "\n")
    return Stage(folder, name, fingerprint, state)


def inspect_stage(
    folder: str, name: str, fingerprint: Fingerprint, explain: Explain | None = None
) -> tuple[State, str]:
    """Find a stage's state, and why a stage with a done-marker is not done. Changes nothing.

    `done` or `continue`: the fingerprints are equal, up to `accepted_changes`; `continue` also when an output is missing or has
    another size than recorded. `new`: nothing was made yet, whatever the fingerprint. Raises StageRefusedError when the folder
    holds output of another configuration or of other inputs.
    """
    recorded = _recorded(folder)
    if recorded is None:
        return "new", ""
    fingerprint = with_recorded_device(fingerprint, folder)
    refusal = _difference(folder, name, recorded["fingerprint"], fingerprint.as_json(), explain)
    if refusal and not _has_output(folder):
        return "new", ""  # a mistyped field, noticed before anything was made
    if refusal:
        changed = config_differences(recorded["fingerprint"]["config"], fingerprint.as_json()["config"])
        known = changed.keys() & (fingerprint.config.keys() | default_fields().keys())
        raise StageRefusedError(refusal, sorted(_NEW_NAMES.get(field, field).partition("=")[0] for field in known))
    return _check_outputs(folder)


def refuse_other_config(folder: str, name: str, config: Mapping[str, Any]) -> None:
    """Raise StageRefusedError when only the config fields already differ, before any stage of a command runs."""
    recorded = _recorded(folder)
    if recorded is not None:
        inspect_stage(folder, name, Fingerprint(config, recorded["fingerprint"]["inputs"]))


def with_recorded_device(fingerprint: Fingerprint, folder: str) -> Fingerprint:
    """The same; an unknown device is taken to be that of the output there, so that what is done stays done."""
    recorded = _recorded(folder)
    if recorded is None or fingerprint.config.get("device") != UNKNOWN_DEVICE:
        return fingerprint
    device = recorded["fingerprint"]["config"].get("device", UNKNOWN_DEVICE)
    return replace(fingerprint, config={**fingerprint.config, "device": device})


def is_begun(folder: str) -> bool:
    """Whether a stage was opened there, done or not."""
    return _recorded(folder) is not None


def recorded_inputs(folder: str) -> dict[str, str] | None:
    """The inputs in the fingerprint of the output that is there, done or not; None without output."""
    recorded = _recorded(folder)
    if recorded is None or not _has_output(folder):
        return None
    inputs: dict[str, str] = recorded["fingerprint"]["inputs"]
    return inputs


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`{field: (before, after)}` of the fields whose JSON values differ (a tuple equals a list); None stands for a missing field."""
    before, after = (json.loads(json.dumps(dict(fields), default=str)) for fields in (before, after))
    fields = sorted({*before, *after})
    return {f: (before.get(f), after.get(f)) for f in fields if before.get(f) != after.get(f)}


def config_differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`differences` of config fields. A field that one side lacks has its default there: it is newer than the record, or ADDED."""
    lacking = {field: default for field, default in default_fields().items() if field in recorded or field in now}
    return differences({**lacking, **recorded}, {**lacking, **now})


def done_record(folder: str) -> dict[str, Any] | None:
    """The content of `done.json`, or None when the stage is not done. Raises StageError when it is damaged."""
    return _read_json(storage.join(folder, DONE_NAME), DoneRecord)


def require_done(folder: str, name: str) -> dict[str, Any]:
    """The content of `done.json`. Raises StageError, which names the stage to run, when the stage is not done."""
    record = done_record(folder)
    if record is None:
        raise StageError(f"{folder}: stage {name} is not done; run stage={name} first")
    return record


def record_stopped_run(folder: str, clock: Clock) -> None:
    """Add the time of a run that stopped to its stage, if the stage is begun and not done."""
    if storage.exists(storage.join(folder, _STARTED)) and done_record(folder) is None:
        clock.add_to(folder)


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
    return any(name not in (_STARTED, SECONDS_NAME) for name in storage.list_names(folder))


def _check_outputs(folder: str) -> tuple[State, str]:
    record = done_record(folder)
    if record is None:
        return "continue", ""
    list_sizes = cache(storage.list_sizes)  # one listing per folder, not one request per file
    for output, expected in record["outputs"].items():
        url = storage.join(folder, output)
        if list_sizes(url.rpartition("/")[0]).get(storage.base_name(url)) != expected["bytes"]:
            return "continue", f"{url} is missing or has another size"
    return "done", ""


def _difference(
    folder: str, name: str, old: Mapping[str, Any], new: Mapping[str, Any], explain: Explain | None
) -> str | None:
    """The refusal, or None when the fingerprints are equal."""
    changed = config_differences(old.get("config", {}), new["config"])
    old_device, device = (of.get("config", {}).get("device") for of in (old, new))
    accepted = accepted_changes(device if device == old_device else None)
    config = {field: values for field, values in changed.items() if field not in accepted}
    inputs = differences(old.get("inputs", {}), new["inputs"])
    lines = [
        f"  {_NEW_NAMES.get(field, field)}: {before!r} there, {after!r} now"
        for field, (before, after) in config.items()
    ]
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


def _report_changes(folder: str, name: str, fingerprint: Fingerprint) -> None:
    """Print the RESUMABLE fields whose values differ from those that the stage's output so far was made with."""
    recorded = _recorded(folder)
    if recorded is None or not _has_output(folder):
        return
    changes = config_differences(recorded["fingerprint"]["config"], fingerprint.config)
    for field, (before, after) in changes.items():
        if field in fields_marked("resumable"):
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
