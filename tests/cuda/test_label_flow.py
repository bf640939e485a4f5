"""Batches in flight: what a device is sent, and that batches share no memory. On a CPU the same code runs, batch after batch."""

from __future__ import annotations

import numpy as np
import torch

from data.labels.top_k import TopK, top_k_of
from pipeline.inference.device_flow import DeviceFlow, PendingTopK
from tests.cuda.counted import ASKS, BATCH, FROM_PYTHON, SIZE, Operations, ensemble, pixels
from tests.cuda.setting import on_each_device, only_on_cuda


@on_each_device
def test_batches_in_flight_give_what_single_ones_give(device: str) -> None:
    flow = DeviceFlow(ensemble(device), 5)
    memory = [flow.allocate((BATCH, SIZE, SIZE, 3)) for _ in range(2)]
    pending = []
    for number in range(20):  # the memory is filled again as soon as `start` returns
        there = memory[number % 2]
        there[:] = np.random.default_rng(number).integers(0, 256, there.shape, np.uint8)
        pending.append(flow.start(there))
    for number, batch in enumerate(pending):
        assert isinstance(batch, PendingTopK if device == "cuda" else TopK)
        images = np.random.default_rng(number).integers(0, 256, memory[0].shape, np.uint8)
        expected = top_k_of(ensemble(device).probabilities(torch.from_numpy(images).permute(0, 3, 1, 2)), 5)
        found = batch.result() if isinstance(batch, PendingTopK) else batch
        np.testing.assert_array_equal(found.index, expected.index)
        np.testing.assert_allclose(found.prob, expected.prob, rtol=1e-6)


@only_on_cuda
def test_a_batch_makes_one_upload_and_two_downloads_and_waits_for_nothing_else(device: str) -> None:
    flow = DeviceFlow(ensemble(device), 5)
    flow.start(pixels(BATCH))
    with Operations() as seen:
        flow.start(pixels(BATCH))
    assert seen.count["cpu→cuda"] == 1
    assert seen.count["cuda→cpu"] == 2
    assert seen.count[FROM_PYTHON] == 1, "the pixels"
    assert not seen.count[ASKS]
