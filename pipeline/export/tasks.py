"""Write the files of an export in Ray tasks. Each file is committed by a record, so that a stopped export continues."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from data import storage
from data.json_files import read_if_usable
from data.labels.overlay import Overlay, RowFilter
from data.progress_bar import ProgressBar
from data.shards.split import ShardRecord
from pipeline.core.ray_runtime import as_finished, num_cpus
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
    names, records, shared = list[str](), dict(finished), ray.put(job)
    with ProgressBar(total=total, desc="export", unit="image") as bar:

        def started() -> Iterator[tuple[Any, str]]:
            for file in files:
                names.append(file.name)
                if file.name in finished:
                    bar.update(file.num_samples)
                else:
                    yield _make_file_task.remote(shared, file), file.name

        for name, record in as_finished(started(), _AHEAD * num_cpus()):
            records[name] = record
            bar.update(record.num_samples)
    return [records[name] for name in names]


@ray.remote(num_cpus=1)
def _make_file_task(job: ExportJob, file: ExportFile) -> ShardRecord:
    return make_file(job, file)


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
    """Read the records of whole files, by file name; left out are damaged records, and files of another size than recorded."""
    records = storage.join(folder, RECORDS_FOLDER)
    sizes = storage.list_sizes(folder)
    found = (read_if_usable(storage.join(records, name), ShardRecord) for name in storage.list_names(records))
    return {record.name: record for record in found if record and sizes.get(record.name) == record.bytes}
