"""A run directory that an earlier version finished, for the tests that need a whole one.

`run_of_04a8a39.tar.xz` has packed shards of generated 12-px images, and a run of all stages on them by commit 04a8a39, which
recorded no modification times of shards and wrote label files without checksums. Its fields are in its config.yaml. Checkpoints and
report were taken out, for size.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

RUN = "runs/old"  # below the folder
_ARCHIVE = Path(__file__).with_name("run_of_04a8a39.tar.xz")


def unpack_earlier_run(folder: Path) -> Path:
    """Unpack its shards and run directory into `folder`; return that."""
    with tarfile.open(_ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder
