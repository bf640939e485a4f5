"""Decoding threads follow the cores that a worker has; the plan says what a worker takes."""

from __future__ import annotations

import pytest

from pipeline.core.schema import LabelConfig
from teacher.labeling.worker_needs import WorkerNeeds, decode_threads

MIB = 1 << 20


@pytest.mark.parametrize(
    ("fields", "device", "cores", "gpus", "threads"),
    [
        ({"workers": 8}, "cuda", 96, 8, 12),
        ({"workers": 64}, "cuda", 96, 8, 12),  # on eight such machines
        ({"workers": 8, "gpus_per_worker": 0.5}, "cuda", 96, 4, 12),
        ({"workers": 1}, "cuda", 96, 8, 96),
        ({"workers": "2..64"}, "cuda", 16, 1, 16),
        ({}, "cpu", 2, 0, 2),
        ({"workers": 2}, "cpu", 2, 0, 1),
        ({"workers": 64}, "cpu", 16, 0, 1),
        ({"workers": 64, "cpus_per_worker": 4}, "cpu", 16, 0, 4),
        ({"workers": 3, "cpus_per_worker": 0}, "cpu", 2, 0, 1),
        ({"workers": 8, "decode_threads": 5}, "cuda", 96, 8, 5),
        ({"workers": 8}, "cuda", 96, 0, 96),  # planned on a machine without GPUs
    ],
)
def test_each_worker_decodes_on_its_share_of_the_cores(
    fields: dict[str, object], device: str, cores: int, gpus: int, threads: int
) -> None:
    assert decode_threads(LabelConfig.model_validate(fields), device, cores, gpus) == threads


def test_needs_count_two_large_batches_although_the_budget_is_small() -> None:
    config = LabelConfig(memory_mb=512, workers=8)
    needs = WorkerNeeds.of(config, "cuda", 96, 8, 3 * 800**2, 480_000_000)
    batches = 2 * 256 * 800**2 * 3
    assert batches < needs.image_bytes < batches + 512 * MIB
    assert needs.other_bytes > 4 * 480_000_000
    text = needs.describe()
    assert "12 decoding threads" in text
    assert "1.1 GB for files and images" in text
