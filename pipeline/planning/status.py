"""stage=status: what is done, how far the rest is, who works on it, and what stopped it last. Reads only, but for `note_stop`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pydantic import BaseModel
from tqdm import tqdm

from data import storage
from data.json_files import read_json
from data.labels.label_files import VALIDATION_NAME
from data.settings import UsageError
from data.shards.split import DataError
from data.storage.redact import redacted
from data.tables import read_table
from pipeline.core import console as output
from pipeline.core.config import CONFIG_NAME
from pipeline.core.layout import Layout
from pipeline.core.lock import read_holder
from pipeline.core.schema import Config
from pipeline.core.stage import done_record, is_begun, recorded_seconds
from pipeline.core.timing import duration
from pipeline.evaluation.generations import describe_decision, known_layouts
from pipeline.inference.accuracy import Accuracy
from pipeline.training.progress import read_training_progress
from teacher.labeling.progress import read_progress

WATCH_S = 5.0
_FRESH_S = 60.0
_STOP_NAME = "last_stop.json"
_MAX_REASON = 500  # characters of an error that are shown


def stage_folders(layout: Layout) -> dict[str, str]:
    """Stage → folder, in order."""
    folders = {
        "teacher": layout.teacher,
        "label": layout.labels,
        "select": layout.current_selection() or layout.selections,
    }
    return folders | {"student": layout.student, "evaluate": layout.evaluation}


def last_begun(layouts: Sequence[Layout], stage: str) -> Layout:
    """The last generation in which a stage was begun, or for an export, something was selected; the first when it was in none."""
    own = layouts[:1] if stage == "teacher" else layouts  # later teachers are students
    source = "select" if stage == "export" else stage
    return next((layout for layout in reversed(own) if is_begun(stage_folders(layout)[source])), layouts[0])


def print_status(config: Config, layouts: Sequence[Layout]) -> None:
    """A line per stage, and who works and what stopped last. Raises UsageError when there is no such run."""
    if not storage.exists(storage.join(config.run_dir, CONFIG_NAME)):
        raise UsageError(f"run_dir={config.run_dir}: no run there ({CONFIG_NAME} is missing); check the path")
    print("\n".join(_lines(config, layouts)))


def watch_status(config: Config) -> None:
    """`print_status` again and again, until every stage is done. Raises UsageError when there is no such run."""
    while True:
        layouts = known_layouts(config)
        if sys.stdout.isatty():
            print("\033[H\033[2J", end="")  # to the top of an empty screen
        print_status(config, layouts)
        print(time.strftime("%H:%M:%S"), "Ctrl-C ends watching; the run goes on without it.", flush=True)
        if all(done_record(folder) is not None for layout in layouts for folder in stage_folders(layout).values()):
            return
        if not output.is_read():
            return
        time.sleep(WATCH_S)


def note_stop(run_dir: str, stage: str, error: BaseException | None) -> None:
    """Remember what stopped a stage; `error` None: nothing did, and what did before is forgotten."""
    url = storage.join(run_dir, _STOP_NAME)
    with suppress(OSError, storage.StorageError):  # what stopped the stage is what matters
        if error is not None:
            reason = redacted(f"{type(error).__name__}: {error}")
            storage.write_text(url, json.dumps({"stage": stage, "reason": reason, "at": round(time.time())}) + "\n")
        elif storage.exists(url):
            storage.remove(url)


def _lines(config: Config, layouts: Sequence[Layout]) -> list[str]:
    lines = []
    for layout in layouts:
        for stage, folder in stage_folders(layout).items():
            words = f"generation {layout.generation}  {stage:10}{_state(folder):12}{_details(stage, folder)}"
            lines.append(words.rstrip())
            lines += _trust(folder) if stage == "label" else []
        if config.generations == "auto":
            lines.append(describe_decision(config, layout))
    holder = read_holder(config.run_dir)
    if holder:
        lines.append(f"at work: process {holder.get('pid')} on {holder.get('host')} ({holder.get('command')})")
    elif (stop := _read_stop(config.run_dir)) is not None:
        ago = tqdm.format_interval(max(0.0, time.time() - stop["at"]))
        reason = stop["reason"] if len(stop["reason"]) <= _MAX_REASON else stop["reason"][:_MAX_REASON] + " …"
        lines.append(f"stopped {ago} ago, in stage {stop['stage']}: {reason}")
    return lines


def _trust(labels: str) -> list[str]:
    """How right the teacher's labels of the validation images are, where there are any."""
    url = storage.join(labels, VALIDATION_NAME)
    if not storage.exists(url):
        return []
    try:
        table = read_table(url, "stage=label verify=true finds what else is damaged", ["label", "predicted"])
    except (DataError, OSError, storage.StorageError) as error:
        return [f"    {url}: not readable ({str(error).splitlines()[0]})"]
    if not table.num_rows:
        return []
    found = Accuracy(*(table.column(name).to_numpy() for name in ("label", "predicted")))
    names = (done_record(labels) or {"summary": {}})["summary"].get("class_names")
    lines = [f"    as the teacher labels: {found.describe(names)}"]
    if found.at_chance:
        lines.append(
            f"    NO BETTER THAN CHANCE, which has {found.chance:.1%}: these labels, and what is made of them, are of no use"
        )
    return lines


def _state(folder: str) -> str:
    if done_record(folder) is not None:
        return "done"
    return "begun" if is_begun(folder) else "not begun"


def _details(stage: str, folder: str) -> str:
    if done_record(folder) is not None:
        return f"{duration(recorded_seconds(folder)):>14}  {folder}"
    if stage == "label" and (labeling := read_progress(folder)) is not None:
        shards = f"{labeling.shards_done:,} of {labeling.shards_total:,} shards"
        images = f"{labeling.images_done:,} of {labeling.images_total:,} images"
        return f"{shards}, {images}{_as_of(labeling.written_at)}: {labeling.describe()}"
    if stage in ("teacher", "student") and (training := read_training_progress(folder)) is not None:
        return training.describe() + _as_of(training.written_at)
    return ""


def _as_of(written_at: float) -> str:
    age = time.time() - written_at
    return "" if age < _FRESH_S else f"; as of {tqdm.format_interval(age)} ago"


def _read_stop(run_dir: str) -> dict[str, Any] | None:
    try:
        return read_json(storage.join(run_dir, _STOP_NAME), "", _Stop)
    except (FileNotFoundError, DataError):
        return None


class _Stop(BaseModel):
    """`last_stop.json`."""

    stage: str
    reason: str
    at: float
