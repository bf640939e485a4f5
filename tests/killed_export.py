"""Kill exports at a step and run them again, in forks of one process, which loads the libraries once.

    python -m tests.killed_export STEP CONFIG [STEP CONFIG …]

Files are written in the forked process, not in Ray tasks, so that the step is reached there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping

from data.shards.split import ShardRecord
from data.storage.failpoint import VARIABLE
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.export import stage as module
from pipeline.export.plan import ExportFile
from pipeline.export.tasks import ExportJob, make_file


def make_here(
    job: ExportJob, files: Iterable[ExportFile], finished: Mapping[str, ShardRecord], total: int
) -> list[ShardRecord]:
    """Do the work of `make_files` in this process."""
    records = [finished.get(file.name) or make_file(job, file) for file in files]
    assert sum(record.num_samples for record in records) == total
    return records


def _status(step: str, config: Config) -> int:
    """Export in a child that is killed at `step` (empty: not killed); return its exit status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    os.environ[VARIABLE] = step
    module.export(config, Layout(config.run_dir))
    os._exit(0)


if __name__ == "__main__":
    module.make_files = make_here
    module.start_ray = lambda address: None
    for step, text in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        config = Config.model_validate_json(text)
        assert _status(step, config) == 9, f"{step} was not reached"
        assert _status("", config) == 0
