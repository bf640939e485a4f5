"""Sources of the same pseudo-labels, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from data.storage import retry
from tests.label_server import LabelServer, label_server
from tests.label_sources import Sources, export_here, exported_run, said_by_stages


@pytest.fixture(scope="package")
def sources(tmp_path_factory: pytest.TempPathFactory, digits: tuple[np.ndarray, np.ndarray]) -> Sources:
    folder = tmp_path_factory.mktemp("sources")
    run, layout = exported_run(folder, digits)
    export_here(run.config(export={"samples_per_shard": 10, "selected": False}), layout)
    exports = folder / "run/exports"
    assert sorted(path.name for path in exports.glob("v*")) == ["v1", "v2"]
    images = {f"unlabeled-{n // 50:06d}-{n % 50:07d}": digits[0][n] for n in range(120)}
    return Sources(folder / "run", exports / "v1", exports / "v2", said_by_stages(layout), images)


@pytest.fixture
def web(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> Iterator[LabelServer]:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    with label_server(sources.export) as running:
        yield running


@pytest.fixture(params=["run", "export", "exports", "server"])
def source(request: pytest.FixtureRequest, sources: Sources) -> Iterator[str]:
    """Each kind, the same labels in all."""
    with ExitStack() as stack:
        if request.param == "server":
            yield stack.enter_context(label_server(sources.export)).address
        elif request.param == "exports":
            yield str(sources.export.parent)
        else:
            yield str(getattr(sources, request.param))
