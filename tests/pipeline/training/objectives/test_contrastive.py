"""NT-Xent: the formula, and the same loss and gradients on several ranks as in one process."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.training.distributed import Ranks, join_ranks
from pipeline.training.objectives.contrastive import contrast, nt_xent, partners, spread
from pipeline.training.objectives.interface import MicroBatch

IMAGES, FEATURES, WORLD, TEMPERATURE = 6, 5, 2, 0.2


def reference(projections: np.ndarray, temperature: float) -> float:
    """Equation 1 of the paper, term by term, in float64. Rows 2i and 2i + 1 are the views of image i."""
    rows = projections.astype(np.float64)
    losses = []
    for i in range(len(rows)):
        similarity = [
            float(np.dot(rows[i], row) / (np.linalg.norm(rows[i]) * np.linalg.norm(row))) / temperature for row in rows
        ]
        j = i + 1 if i % 2 == 0 else i - 1
        denominator = sum(math.exp(similarity[k]) for k in range(len(rows)) if k != i)
        losses.append(-math.log(math.exp(similarity[j]) / denominator))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])  # of the projections, which are normalized
def test_the_loss_is_the_formula(temperature: float, scale: float) -> None:
    projections = torch.randn(2 * IMAGES, FEATURES, generator=torch.Generator().manual_seed(1)) * scale
    expected = reference(projections.numpy(), temperature)
    assert nt_xent(projections, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_that_of_the_formula() -> None:
    projections = torch.randn(2 * IMAGES, FEATURES, generator=torch.Generator().manual_seed(2), requires_grad=True)
    nt_xent(projections, TEMPERATURE).backward()
    assert projections.grad is not None
    values, step = projections.detach().double().numpy(), 1e-6
    for row, column in [(0, 0), (3, 2), (2 * IMAGES - 1, FEATURES - 1)]:
        shifted = [values.copy(), values.copy()]
        shifted[0][row, column] += step
        shifted[1][row, column] -= step
        slope = (reference(shifted[0], TEMPERATURE) - reference(shifted[1], TEMPERATURE)) / (2 * step)
        assert projections.grad[row, column].item() == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_it_is_computed_in_float32_under_autocast() -> None:
    projections = torch.randn(2 * IMAGES, FEATURES, generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(projections, 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nt_xent(projections.float(), 0.1))


def test_views_of_an_image_are_partners() -> None:
    assert partners(torch.zeros(6, 1)).tolist() == [1, 0, 3, 2, 5, 4]


def test_the_spread_tells_collapse_from_even_features() -> None:
    generator = torch.Generator().manual_seed(4)
    assert spread(torch.randn(4096, 64, generator=generator)).item() == pytest.approx(1, abs=0.02)
    one_direction = torch.ones(4096, 64) + 1e-3 * torch.randn(4096, 64, generator=generator)
    assert spread(one_direction).item() < 0.01


def pictures() -> torch.Tensor:
    return torch.randn(2 * IMAGES, 3, 2, 2, generator=torch.Generator().manual_seed(5))


def small_network() -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, FEATURES))


def rank_of_several(rank: int, meeting_point: str, results: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=WORLD)
    network = DistributedDataParallel(small_network())
    own = pictures().unflatten(0, (IMAGES, 2))[rank::WORLD].flatten(0, 1)  # as ranks take images
    terms = contrast(TEMPERATURE, join_ranks())(network, MicroBatch(own, None))
    terms.loss.backward()
    gradients = [parameter.grad for parameter in network.module.parameters()]
    torch.save(
        {"loss": terms.loss.detach(), "spread": terms.metrics["spread"], "gradients": gradients}, f"{results}-{rank}"
    )
    distributed.destroy_process_group()


def test_ranks_have_the_loss_and_gradients_of_one_process_over_the_whole_batch(tmp_path: Path) -> None:
    arguments = (str(tmp_path / "meeting"), str(tmp_path / "result"))
    multiprocessing.start_processes(rank_of_several, arguments, nprocs=WORLD, start_method="forkserver")
    network = small_network()
    terms = contrast(TEMPERATURE, Ranks())(network, MicroBatch(pictures(), None))
    terms.loss.backward()
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"result-{rank}", weights_only=True)
        torch.testing.assert_close(found["loss"], terms.loss.detach())
        torch.testing.assert_close(found["spread"], terms.metrics["spread"])
        for theirs, parameter in zip(found["gradients"], network.parameters(), strict=True):
            torch.testing.assert_close(theirs, parameter.grad)
            assert theirs.abs().max() > 1e-4, "gradients of zero would say nothing"
