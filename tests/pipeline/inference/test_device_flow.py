"""The device never waits for the host: one upload for all views and models, nothing asked of the device, only the top k come back.

A model on torch's `meta` device stands in for a GPU's: what goes there from the CPU is counted.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from data.labels.top_k import TopK, top_k_of
from pipeline.inference.device_flow import DeviceFlow, PendingTopK, device_top_k
from pipeline.inference.ensemble import Ensemble
from pipeline.inference.predictor import Predictor
from pipeline.inference.preprocessing import Preprocessing

SIZE, CLASSES, BATCH = 8, 20, 6
FROM_PYTHON = "aten.lift_fresh.default"  # a tensor from Python's or NumPy's values
ASKS = "aten._local_scalar_dense.default"  # the value of one number, for which a device would be waited for


class Linear(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = torch.nn.Linear(3 * SIZE**2, CLASSES)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch.flatten(1))


class Operations(TorchDispatchMode):
    """Counts operations, and copies from one device to another as `cpu→meta`."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count[str(func)] += 1
        if isinstance(result, torch.Tensor) and args and isinstance(args[0], torch.Tensor):
            before, after = args[0].device.type, result.device.type
            self.count[f"{before}→{after}"] += before != after
        return result


def ensemble(device: str, views: int = 4, members: int = 3, temperature: float = 0.7) -> Ensemble:
    preprocessing = Preprocessing(SIZE, 1.0, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    models = (Predictor(Linear(seed), preprocessing, device, BATCH, 1.5, views) for seed in range(members))
    return Ensemble(list(models), temperature)


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (number, SIZE, SIZE, 3), np.uint8)


def test_all_views_and_models_share_one_upload() -> None:
    model, images = ensemble("meta"), torch.from_numpy(pixels(4)).permute(0, 3, 1, 2)
    with Operations() as seen:
        index, prob = device_top_k(model.device_probabilities(images.to("meta")), 5)
    assert seen.count["cpu→meta"] == 1
    assert not any(seen.count[name] for name in (FROM_PYTHON, ASKS, "meta→cpu"))
    assert (index.device.type, index.shape, prob.shape) == ("meta", (4, 5), (4, 5))


def test_nothing_is_asked_of_the_device_and_no_constant_is_made() -> None:
    flow = DeviceFlow(ensemble("cpu"), 5)
    with Operations() as seen:
        flow.start(pixels(4))
    assert seen.count["aten.mean.dim"] == 3
    assert seen.count["aten.softmax.int"] + seen.count["aten._softmax.default"] == 3 * 4 + 1
    assert seen.count[FROM_PYTHON] == 1, "the pixels"
    assert not seen.count[ASKS]


@given(st.integers(1, 6), st.integers(2, 9), st.data())
def test_the_device_finds_the_same_top_k_as_the_host(rows: int, classes: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.sampled_from([0.0, 0.125, 0.25, 1e-30, 0.9999]), min_size=rows * classes,
                                max_size=rows * classes))  # fmt: skip
    probabilities = np.array(values, np.float32).reshape(rows, classes)
    top_k = data.draw(st.integers(1, classes))
    found, expected = (
        TopK.of(*(part.numpy() for part in device_top_k(torch.from_numpy(probabilities), top_k))),
        top_k_of(probabilities, top_k),
    )
    for name in ("index", "prob", "rest"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_what_comes_back_is_the_top_k_of_the_probabilities() -> None:
    model, images = ensemble("cpu"), pixels(4)
    found = DeviceFlow(model, 5).start(images)
    assert isinstance(found, TopK)
    expected = top_k_of(model.probabilities(torch.from_numpy(images).permute(0, 3, 1, 2)), 5)
    np.testing.assert_array_equal(found.index, expected.index)
    np.testing.assert_array_equal(found.prob, expected.prob)


@pytest.mark.cuda
def test_batches_in_flight_on_a_gpu_give_what_single_ones_give() -> None:
    flow = DeviceFlow(ensemble("cuda"), 5)
    memory = [flow.allocate((BATCH, SIZE, SIZE, 3)) for _ in range(2)]
    pending = []
    for number in range(20):  # the memory is filled again as soon as `start` returns
        there = memory[number % 2]
        there[:] = np.random.default_rng(number).integers(0, 256, there.shape, np.uint8)
        pending.append(flow.start(there))
    for number, batch in enumerate(pending):
        assert isinstance(batch, PendingTopK)
        images = np.random.default_rng(number).integers(0, 256, memory[0].shape, np.uint8)
        expected = top_k_of(ensemble("cuda").probabilities(torch.from_numpy(images).permute(0, 3, 1, 2)), 5)
        found = batch.result()
        np.testing.assert_array_equal(found.index, expected.index)
        np.testing.assert_allclose(found.prob, expected.prob, rtol=1e-6)


@pytest.mark.cuda
def test_a_gpus_batch_makes_one_upload_and_two_downloads_and_waits_for_nothing_else() -> None:
    flow = DeviceFlow(ensemble("cuda"), 5)
    flow.start(pixels(BATCH))
    with Operations() as seen:
        flow.start(pixels(BATCH))
    assert seen.count["cpu→cuda"] == 1
    assert seen.count["cuda→cpu"] == 2
    assert seen.count[FROM_PYTHON] == 1, "the pixels"
    assert not seen.count[ASKS]
