"""Progress of labeling as Prometheus metrics, at the addresses of Ray's own."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import ray

from pipeline.core.ray_runtime import start_ray
from teacher.labeling.progress import LabelProgress
from teacher.labeling.prometheus import Gauges
from tests import HANGS_S

PROGRESS = LabelProgress(
    images_done=50,
    images_total=1000,
    shards_done=1,
    shards_total=10,
    quarantined=2,
    workers=3,
    images_per_s=12.5,
    eta_s=76,
)


@pytest.fixture
def ray_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    start_ray(None)
    yield
    ray.shutdown()


def exposed(address: str) -> dict[str, float]:
    """Our metrics, by name."""
    try:
        with urlopen(f"http://{address}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except URLError:
        return {}
    lines = re.findall(r"^ray_noisy_student_label_(\w+){([^}]*)} (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, labels, value in lines if 'run="runs/mine/gen-1/labels"' in labels}


@pytest.mark.slow
def test_progress_is_exposed_beside_rays_own_metrics(ray_here: None) -> None:
    (node,) = ray.nodes()
    Gauges("runs/mine/gen-1/labels").set(PROGRESS)
    deadline = time.monotonic() + HANGS_S
    while len(found := exposed(f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}")) < 7:
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
    assert found == {name: getattr(PROGRESS, name) for name in found}
