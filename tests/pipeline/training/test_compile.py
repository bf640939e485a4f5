"""The network is compiled once: neither DDP's discarded pass, nor what a step does, compiles it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from data.shards.split import Split
from pipeline.inputs.batches import TrainBatches
from pipeline.training.state import freeze_early_layers, new_state
from pipeline.training.step import train_step, training_network
from tests.pipeline.training.test_training import make_job


@pytest.fixture(autouse=True)
def _compiled_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs as on a GPU, run by torch's own kernels."""
    original = nn.Module.compile

    def compile_with(model: nn.Module, **options: Any) -> None:
        original(model, backend="aot_eager", **options)

    monkeypatch.setattr(nn.Module, "compile", compile_with)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """This process as the only one of a group."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def make_steps(labeled: Split, folder: Path, world: int, freeze: bool = False, **changes: Any) -> nn.Module:
    """The network after three steps as rank 0 of `world`."""
    job = make_job(labeled, folder, compile=True, **changes)
    state = new_state(job)
    if freeze:
        freeze_early_layers(state.model)
    network = training_network(state.model, job, world)
    with closing(TrainBatches(job.streams, job.config, 10, 0, rank=0, world_size=world)) as batches:
        for number in range(3):
            train_step(job, state, network, batches[number], rank=0)
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
@pytest.mark.parametrize("case", CASES)
def test_a_training_compiles_one_graph_per_size_of_micro_batches(
    tmp_path: Path, labeled: Split, case: str, world: int
) -> None:
    changes, graphs = CASES[case]
    network = make_steps(labeled, tmp_path / "run", world, **changes)
    assert isinstance(network, DistributedDataParallel) == (world == 2)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert not counters["recompiles"]
