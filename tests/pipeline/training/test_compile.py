"""The network is compiled once: neither DDP's discarded pass, nor what a step does, compiles it again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from data.shards.split import Split
from pipeline.inputs.batches import TrainBatches
from pipeline.training.state import freeze_early_layers, new_state
from pipeline.training.step import train_step, training_network
from tests.pipeline.training.test_training import make_job
from tests.training_processes import in_group

LARGE = {
    "width": 0.25,
    "blocks": [1, 1, 1, 1],
}  # more than a bucket of DDP, at whose bounds a graph is cut after it is made


compile_module = nn.Module.compile


def compile_without_a_compiler(model: nn.Module, **options: Any) -> None:
    compile_module(model, backend="aot_eager", **options)


@pytest.fixture(autouse=True)
def _compiled_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs as on a GPU, run by torch's own kernels."""
    monkeypatch.setattr(nn.Module, "compile", compile_without_a_compiler)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_steps(
    labeled: Split, folder: Path, world: int, freeze: bool = False, rank: int = 0, **changes: Any
) -> nn.Module:
    """The network after three steps as one of `world` processes."""
    job = make_job(labeled, folder, **{"compile": True} | changes)
    state = new_state(job)
    if freeze:
        freeze_early_layers(state.model)
    network = training_network(state.model, job, world)
    with closing(TrainBatches(job.streams, job.config, 10, 0, rank=rank, world_size=world)) as batches:
        for number in range(3):
            train_step(job, state, network, batches[number], rank)
    return network


CASES: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 1),
    "channels last and mixed": ({"channels_last": True, "mixup": 0.5}, 1),
    "bf16": ({"channels_last": True, "precision": "bf16"}, 1),
    "equal micro-batches": ({"channels_last": True, "accumulate_steps": 2}, 1),
    "micro-batches of two sizes": ({"accumulate_steps": 3}, 2),
    "checkpointed activations": ({"channels_last": True, "checkpoint_activations": True}, 1),
    "frozen layers": ({"channels_last": True, "freeze": True}, 1),
}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "plain" else [pytest.mark.slow]) for case in CASES]
)
def test_a_training_compiles_one_graph_per_size_of_micro_batches(
    tmp_path: Path, labeled: Split, case: str, world: int
) -> None:
    changes, graphs = CASES[case]
    network = make_steps(labeled, tmp_path / "run", world, **changes)
    assert isinstance(network, DistributedDataParallel) == (world == 2)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert not counters["recompiles"]


def steps_of_two(
    rank: int, labeled: Split, folder: Path, cases: list[str]
) -> dict[str, tuple[dict[str, int], dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """For each case what was compiled, and the network's state, compiled and not."""
    nn.Module.compile = compile_without_a_compiler  # type: ignore[method-assign, assignment]  # in this process alone
    warnings.simplefilter("ignore")
    found = {}
    for case in cases:
        states = []
        for compiles in (False, True):
            torch._dynamo.reset()
            counters.clear()
            changes = CASES[case][0] | {"compile": compiles, "model_args": LARGE}
            network = make_steps(labeled, folder / case, 2, rank=rank, **changes)
            states.append({name: value.numpy() for name, value in network.state_dict().items()})
        counts = {
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": sum(counters["graph_break"].values()),
            "again": sum(counters["recompiles"].values()),
        }
        found[case] = counts, states[0], states[1]
    return found


@pytest.mark.slow
def test_two_processes_compile_one_graph_each_that_computes_what_the_model_does(tmp_path: Path, labeled: Split) -> None:
    cases = ["plain", "bf16", "micro-batches of two sizes", "checkpointed activations"]
    for found in in_group(tmp_path / "meeting", steps_of_two, labeled, tmp_path, cases):
        for case, (counts, eager, compiled) in found.items():
            assert counts == {"graphs": CASES[case][1], "breaks": 0, "again": 0}, case
            for name, expected in eager.items() if case != "bf16" else ():
                np.testing.assert_allclose(compiled[name], expected, 1e-3, 1e-4, err_msg=f"{case}: {name}")
