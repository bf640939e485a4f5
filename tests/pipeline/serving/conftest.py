"""A run and its servers, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.conftest import make_writer
from tests.label_sources import export_here
from tests.serving import catalog, layout, make_run, server_thread
from tests.small_run import SmallRun

TOKEN = "right-token"
SHARD, LABELS = "shards/unlabeled-000000.tar", "labels/unlabeled-000000.parquet"
TABLE = "labels/pseudo-000000.parquet"


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory, digits: tuple[np.ndarray, np.ndarray]) -> SmallRun:
    """A run with labels, a selection and an export."""
    run = make_run(tmp_path_factory.mktemp("access"), make_writer(digits))
    export_here(run.config(export={"samples_per_shard": 20}), layout(run))
    return run


@pytest.fixture(scope="package")
def joined(run: SmallRun) -> Iterator[str]:
    """URL of a server of the run, without a token."""
    with server_thread(catalog(run)) as url:
        yield url


@pytest.fixture(scope="package")
def locked(run: SmallRun) -> Iterator[str]:
    """URL of a server of the export, with a token."""
    with server_thread(catalog(run, "v1"), token=TOKEN) as url:
        yield url
