"""The benchmark of the Pareto front: counted figures are the paper's, and a network is timed in the batch that fits."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_pareto, pareto
from benchmarks.pareto import NETWORKS, PAIRS, Counted, Latency, Network, Timer, count_activations
from pipeline.models.registry import build_model, count_flops, count_parameters, on_meta

SMALL = Network("ResNet-RS", "resnetrs26", 32, 50.0, 1.0, 1.0)
KNOWN = {network.name: network for network in NETWORKS}
FIRST, SECOND = PAIRS[-2:]  # of table 3


def check(name: str, millions: float, billions: float) -> int:
    """Compare a network with table 3; return its activations."""
    network = KNOWN[name]
    model = on_meta(lambda: build_model(network.model, 1000, {}))
    assert count_parameters(model) / 1e6 == pytest.approx(millions, rel=0.02)
    assert count_flops(model, network.image_size) / 1e9 == pytest.approx(billions, rel=0.04)
    return count_activations(model, network.image_size)


def test_the_first_pair_is_that_of_table_3_and_its_memory_ratio_that_of_its_activations() -> None:
    assert FIRST == ("RS-350 @256", "B6 @528")
    ours, theirs = check(FIRST[0], 164, 69), check(FIRST[1], 43, 38)
    assert ours / theirs == pytest.approx(7.3 / 16.6, rel=0.1)


@pytest.mark.slow
def test_the_second_pair_is_that_of_table_3() -> None:
    assert check(SECOND[0], 192, 128) < check(SECOND[1], 66, 74)


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
