"""Views for self-supervised training, distorted on a GPU. On a CPU, whole batches against each view by itself."""

from __future__ import annotations

import random

import torch
from torch.nn import functional as F

from pipeline.core.schema import ViewsConfig
from pipeline.inputs.distortion import distort, draw_distortion
from tests.cuda.setting import on_each_device

SIZE, VIEWS = 48, 400
ALL = ViewsConfig(solarize=(0.3,))


def smooth_images() -> torch.Tensor:
    """Random images with large areas of similar colours, uint8 (N, 3, S, S)."""
    coarse = torch.rand(VIEWS, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 255
    return F.interpolate(coarse, (SIZE, SIZE), mode="bilinear").round().to(torch.uint8)


@on_each_device
def test_views_distorted_on_a_device_are_those_of_the_host(device: str) -> None:
    views, rounds = smooth_images(), [draw_distortion(ALL, SIZE, random.Random(seed)) for seed in range(VIEWS)]
    found = distort(views.to(device, copy=True), rounds).cpu()
    expected = torch.cat([distort(view[None].clone(), [each]) for view, each in zip(views, rounds, strict=True)])
    difference = (found.float() - expected.float()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3
