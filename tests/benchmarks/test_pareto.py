"""The benchmark of the Pareto front: counted figures are the paper's, and a network is timed in the batch that fits."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from benchmarks import bench_pareto, pareto
from benchmarks.pareto import NETWORKS, PAIRS, Counted, Latency, Network, Timer, count_activations
from pipeline.models.registry import build_model, count_flops, count_parameters, on_meta

IN_TABLE_3 = [network for network in NETWORKS if network.tpu_gb]
SMALL = Network("ResNet-RS", "resnetrs26", 32, 50.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def activations() -> Mapping[str, int]:
    """Outputs of convolutions of the networks in table 3, by name."""
    return {n.name: count_activations(_meta(n), n.image_size) for n in IN_TABLE_3}


def _meta(network: Network) -> torch.nn.Module:
    return on_meta(lambda: build_model(network.model, 1000, {}))


@pytest.mark.parametrize("network", IN_TABLE_3, ids=lambda network: network.name)
def test_parameters_and_flops_are_those_of_table_3(network: Network) -> None:
    parameters, flops = {
        "RS-350 @256": (164, 69), "B6 @528": (43, 38), "RS-420 @320": (192, 128), "B7 @600": (66, 74),
    }[network.name]  # fmt: skip
    model = _meta(network)
    assert count_parameters(model) / 1e6 == pytest.approx(parameters, rel=0.02)
    assert count_flops(model, network.image_size) / 1e9 == pytest.approx(flops, rel=0.04)


def test_the_first_pairs_memory_ratio_is_that_of_its_activations(activations: Mapping[str, int]) -> None:
    published = {network.name: network.tpu_gb for network in IN_TABLE_3}
    ours, theirs = "RS-350 @256", "B6 @528"
    assert activations[ours] / activations[theirs] == pytest.approx(published[ours] / published[theirs], rel=0.1)  # type: ignore[operator]


def test_every_network_has_a_name_of_its_own_and_every_pair_is_there() -> None:
    names = [network.name for network in NETWORKS]
    assert len(set(names)) == len(names) == 19
    assert {name for pair in PAIRS for name in pair} <= set(names)


def test_a_batch_that_does_not_fit_is_halved_and_its_time_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pareto, "build_model", lambda *_: Hungry())
    clock = iter(range(100))
    timer = Timer(SMALL, "cpu", 8)
    timer.warm_up()
    monkeypatch.setattr(pareto.time, "perf_counter", lambda: float(next(clock)))
    for _ in range(3):
        timer.turn()
    assert timer.result() == Latency(training_s=4.0, training_batch=2, inference_s=2.0, inference_batch=4)


class Hungry(torch.nn.Module):
    """Takes two images in training, four without."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) → (N, 1000). Raises torch.OutOfMemoryError for more images."""
        if len(x) > (2 if self.training else 4):
            raise torch.OutOfMemoryError
        return self.fc(x.mean((2, 3)))


def test_the_table_says_what_is_only_counted_and_pairs_are_compared_where_both_are_timed() -> None:
    counted = {network.name: Counted(10**6, 10**9, 10**6, 1e6) for network in NETWORKS}
    timed = {"RS-152 @256": Latency(2.0, 4, 0.5, 4), "B4 @380": Latency(1.0, 4, 0.25, 4)}
    lines = bench_pareto.table(counted, timed)
    assert len(lines) == 2 + len(NETWORKS)
    assert [line.count("| counted | counted |") for line in lines[2:]].count(1) == len(NETWORKS) - 2
    (line,) = bench_pareto.pair_lines(timed, 4)
    assert line.startswith("4 images, B4 @380 ÷ RS-152 @256: training step 0.50, forward pass 0.50")
    assert bench_pareto.record(timed, "cpu", 4)["peers"] == {"timm B4 @380": 1.0}
    assert bench_pareto.record({}, "cpu", 4)["ours"] is None
    assert bench_pareto._series(timed)[0][2:] == ([2.0], [83.0])
