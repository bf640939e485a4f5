"""The device never waits for the host: one upload for all views and models, nothing asked of the device, only the top k come back.

A model on torch's `meta` device stands in for a GPU's: what goes there from the CPU is counted.
"""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.labels.top_k import TopK, top_k_of
from pipeline.inference.device_flow import DeviceFlow, device_top_k
from tests.cuda.counted import ASKS, FROM_PYTHON, Operations, ensemble, pixels


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
