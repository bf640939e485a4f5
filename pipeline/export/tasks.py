"""Write the files of an export in Ray tasks. Each file is committed by a record, so that a stopped export continues."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from pydantic import ValidationError
from ray.exceptions import RayError
from tqdm import tqdm

from data import storage
from data.errors import DataError
from data.json_files import read_json
from data.labels.overlay import Overlay, RowFilter
from data.shards.split import ShardRecord
from pipeline.core.ray_runtime import num_cpus, user_error
from pipeline.core.schema import ExportConfig
from pipeline.export.plan import ExportFile, RowRefs
from pipeline.export.shards import write_image_shard
from pipeline.export.tables import write_label_file

RECORDS_FOLDER = "records"
_AHEAD = 2  # tasks waiting for each CPU


@dataclass(frozen=True)
class ExportJob:
    """What all tasks share."""

    overlay: Overlay
    config: ExportConfig
    folder: str


def make_files(
    job: ExportJob, files: Iterable[ExportFile], finished: Mapping[str, ShardRecord], total: int
) -> list[ShardRecord]:
    """Write all files; return their records, in order.

    Args:
        finished: records of files that are whole already, by name.
        total: samples in all files, for the progress bar.

    Raises:
        ValueError, OSError: as `make_file` raises them; OSError also if a task was lost again and again.
        RayTaskError: any other error of a task, with its traceback.
    """
    names: list[str] = []
    records: dict[str, ShardRecord] = {}
    running: dict[ray.ObjectRef[Any], str] = {}
    shared, max_running = ray.put(job), _AHEAD * num_cpus()
    with tqdm(total=total, desc="export", unit="image", unit_scale=True, mininterval=1) as bar:
        try:
            for file in files:
                names.append(file.name)
                if file.name in finished:
                    records[file.name] = finished[file.name]
                    bar.update(file.num_samples)
                    continue
                running[_make_file_task.remote(shared, file)] = file.name
                while len(running) >= max_running:
                    _collect_one(running, records, bar)
            while running:
                _collect_one(running, records, bar)
        except RayError as error:
            raise user_error(error) from None
    return [records[name] for name in names]


@ray.remote(num_cpus=1)
def _make_file_task(job: ExportJob, file: ExportFile) -> ShardRecord:
    return make_file(job, file)


def _collect_one(running: dict[ray.ObjectRef[Any], str], records: dict[str, ShardRecord], bar: tqdm[Any]) -> None:
    (ended,), _ = ray.wait(list(running), num_returns=1)
    record = ray.get(ended)
    records[running.pop(ended)] = record
    bar.update(record.num_samples)


def make_file(job: ExportJob, file: ExportFile) -> ShardRecord:
    """Write one file of the export, then its record. Raises DataError as `write_image_shard` and `write_label_file`."""
    if isinstance(file.rows, RowRefs):
        record = write_image_shard(job.overlay, file.rows, job.folder, file.name.removesuffix(".tar"))
    else:
        row_filter = RowFilter(selected=job.config.selected)
        record = write_label_file(job.overlay, file.rows, row_filter, job.config.format, job.folder)
    write_record(job.folder, record)
    return record


def write_record(folder: str, record: ShardRecord) -> None:
    """Record that a file of the export is whole; written last."""
    storage.write_text(storage.join(folder, RECORDS_FOLDER, f"{record.name}.json"), record.model_dump_json() + "\n")


def read_records(folder: str) -> dict[str, ShardRecord]:
    """Read the records of whole files, by file name; a file of another size than recorded is left out."""
    records = storage.join(folder, RECORDS_FOLDER)
    sizes = storage.list_sizes(folder)
    found = (_read_record(storage.join(records, name)) for name in storage.list_names(records))
    return {record.name: record for record in found if record and sizes.get(record.name) == record.bytes}


def _read_record(url: str) -> ShardRecord | None:
    """Return None for a damaged record: its file is made again."""
    try:
        return ShardRecord.model_validate(read_json(url, ""))
    except (DataError, ValidationError):
        return None
