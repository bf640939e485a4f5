"""stage=status: which stages are done, the progress of the others, which process works, and what stopped the last. Needs no lock."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from pydantic import BaseModel

from data import console, storage
from data.errors import DataError
from data.json_files import read_if_usable
from data.labels.label_files import VALIDATION_NAME
from data.picture_folders import PACKED
from data.progress_bar import format_interval
from data.settings import UsageError
from data.storage.redact import redacted
from data.tables import read_table
from pipeline.core.config import CONFIG_NAME
from pipeline.core.layout import Layout
from pipeline.core.lock import read_holder
from pipeline.core.schema import Config
from pipeline.core.stage import done_record, is_begun
from pipeline.core.timing import duration, read_timing
from pipeline.evaluation.generations import describe_decision, known_layouts
from pipeline.inference.accuracy import Accuracy
from pipeline.stages import StageRow, find, rows_of
from pipeline.training.progress import read_training_progress
from pipeline.upstream.picture_folders import describe_packed
from teacher.labeling.progress import read_progress

WATCH_S = 5.0
_FRESH_S = 60.0  # older progress is shown with its age
_STOP_NAME = "last_stop.json"
_MAX_REASON = 500  # shown characters of an error


def last_begun(layouts: Sequence[Layout], stage: str) -> Layout:
    """The last generation in which a stage, or for one without a folder its first upstream stage, was begun; else the first."""
    row = find(stage)
    own = layouts[:1] if row.only_first or row.once else layouts
    source = stage if row.folder else next(iter(row.upstream.values()))
    return next((layout for layout in reversed(own) if is_begun(layout.folder_of(source))), layouts[0])


def print_status(config: Config, layouts: Sequence[Layout]) -> None:
    """Print a line per stage, and the process that works or the last stop. Raises UsageError when there is no such run."""
    if not storage.exists(storage.join(config.run_dir, CONFIG_NAME)):
        if storage.exists(storage.join(config.run_dir, PACKED)):
            raise UsageError(
                f"run_dir={config.run_dir}: nothing has begun there but the packing of its folders of images"
            )
        raise UsageError(f"run_dir={config.run_dir}: no run there ({CONFIG_NAME} is missing); check the path")
    print("\n".join(_lines(config, layouts)))


def watch_status(config: Config) -> None:
    """Print the status every WATCH_S seconds until every stage is done. Raises UsageError when there is no such run."""
    while True:
        layouts = known_layouts(config)
        if sys.stdout.isatty():
            print("\033[H\033[2J", end="")  # clear the screen
        print_status(config, layouts)
        print(time.strftime("%H:%M:%S"), "Ctrl-C ends watching; the run goes on without it.", flush=True)
        if all(
            done_record(layout.folder_of(row.name)) is not None for layout in layouts for row in _rows(config, layout)
        ):
            return
        if not console.has_reader():
            return
        time.sleep(WATCH_S)


def _rows(config: Config, layout: Layout) -> list[StageRow]:
    """The stages of a generation: those of stage=all, and those that were begun besides."""
    rows = rows_of(layout.generation)
    return [row for row in rows if row.is_in_all(config) or is_begun(layout.folder_of(row.name))]


def note_stop(run_dir: str, stage: str, error: BaseException | None) -> None:
    """Record the error that stopped a stage; None removes the record."""
    url = storage.join(run_dir, _STOP_NAME)
    with suppress(OSError, storage.StorageError):  # must not hide the error that stopped the stage
        if error is not None:
            reason = redacted(f"{type(error).__name__}: {error}")
            storage.write_text(url, json.dumps({"stage": stage, "reason": reason, "at": round(time.time())}) + "\n")
        elif storage.exists(url):
            storage.remove(url)


def _lines(config: Config, layouts: Sequence[Layout]) -> list[str]:
    lines = list(describe_packed(config.run_dir))
    for layout in layouts:
        for row in _rows(config, layout):
            stage, folder = row.name, layout.folder_of(row.name)
            words = f"generation {layout.generation}  {stage:10}{_state(folder):12}{_details(stage, folder)}"
            lines.append(words.rstrip())
            lines += _label_accuracy(folder) if stage == "label" else []
        if config.generations == "auto":
            lines.append(describe_decision(config, layout))
    holder = read_holder(config.run_dir)
    if holder:
        lines.append(f"at work: process {holder.get('pid')} on {holder.get('host')} ({holder.get('command')})")
    elif (stop := read_if_usable(storage.join(config.run_dir, _STOP_NAME), _Stop)) is not None:
        ago = format_interval(max(0.0, time.time() - stop.at))
        reason = stop.reason if len(stop.reason) <= _MAX_REASON else stop.reason[:_MAX_REASON] + " …"
        lines.append(f"stopped {ago} ago, in stage {stop.stage}: {reason}")
    return lines


def _label_accuracy(labels: str) -> list[str]:
    """Lines about the teacher's accuracy on the validation images, where it was measured."""
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
            f"    NO BETTER THAN CHANCE, which has {found.chance:.1%}: these labels, and all that is trained on them, are useless"
        )
    return lines


def _state(folder: str) -> str:
    if done_record(folder) is not None:
        return "done"
    return "begun" if is_begun(folder) else "not begun"


def _details(stage: str, folder: str) -> str:
    if done_record(folder) is not None:
        return f"{duration(read_timing(folder).seconds):>14}  {folder}"
    if stage == "label" and (labeling := read_progress(folder)) is not None:
        shards = f"{labeling.shards_done:,} of {labeling.shards_total:,} shards"
        images = f"{labeling.images_done:,} of {labeling.images_total:,} images"
        return f"{shards}, {images}{_as_of(labeling.written_at)}: {labeling.describe()}"
    if stage in ("pretrain", "teacher", "student") and (training := read_training_progress(folder)) is not None:
        return training.describe() + _as_of(training.written_at)
    return ""


def _as_of(written_at: float) -> str:
    age = time.time() - written_at
    return "" if age < _FRESH_S else f"; as of {format_interval(age)} ago"


class _Stop(BaseModel):
    """The content of `last_stop.json`."""

    stage: str
    reason: str
    at: float
