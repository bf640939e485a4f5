"""A step in micro-batches, and with activations computed twice, is the step of the whole batch."""

from __future__ import annotations

import copy
import json
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data.settings import UsageError
from data.shards.split import Split
from pipeline.core.config import load_config
from pipeline.core.schema import Config
from pipeline.core.stage import Fingerprint
from pipeline.inputs.batches import TrainBatches
from pipeline.models.registry import build_model
from pipeline.models.resnet_rs import set_bn_momentum
from pipeline.models.shared_batch_norm import share_statistics
from pipeline.planning.memory import training_memory
from pipeline.training.activations import checkpoint_activations
from pipeline.training.checkpoint import load_newest
from pipeline.training.distributed import Ranks, join_ranks
from pipeline.training.job import TrainingError, TrainJob
from pipeline.training.loop import fit
from pipeline.training.objectives.cross_entropy import classify
from pipeline.training.state import load_trained, new_state
from pipeline.training.step import device_settings, micro_batches, train_step, training_network
from tests.pipeline.training.test_training import make_job

QUIET: dict[str, Any] = {"dropout": 0.0, "stochastic_depth": 0.0, "log_every_steps": 1, "mixup": 0.5}
MODELS: list[dict[str, Any]] = [{}, {"model": "test_efficientnet", "model_args": {}, "image_size": 32}]


def stay_frozen(module: nn.Module, mode: bool = True) -> nn.Module:
    """Replaces `train` of batch norms, whose statistics would be those of a micro-batch."""
    return nn.Module.train(module, False)


def job_in(labeled: Split, folder: Path, **changes: Any) -> TrainJob:
    return replace(make_job(labeled, folder, **changes), validation=None)


@pytest.mark.parametrize("accumulate_steps", [2, 3])  # of 10 images; of 7, 7 and 6
def test_with_frozen_batch_norms_micro_batches_train_the_same_to_rounding(
    tmp_path: Path, labeled: Split, monkeypatch: pytest.MonkeyPatch, accumulate_steps: int
) -> None:
    monkeypatch.setattr(_BatchNorm, "train", stay_frozen)
    jobs = [job_in(labeled, tmp_path / f"{n}", accumulate_steps=n, **QUIET) for n in (1, accumulate_steps)]
    for job in jobs:
        fit(job)
    one, parts = (
        [json.loads(line)["loss"] for line in (Path(job.folder) / "metrics.jsonl").read_text().splitlines()]
        for job in jobs
    )
    assert max(one) > min(one) + 0.02, "nothing was learned: equal losses would say little"
    assert parts == pytest.approx(one, rel=1e-5)
    whole, accumulated = (load_trained(job)[0] for job in jobs)
    for name, weights in whole.items():
        torch.testing.assert_close(accumulated[name], weights, rtol=1e-4, atol=1e-5, msg=name)


def test_every_micro_batch_has_its_share_of_labeled_images() -> None:
    labeled = torch.arange(32) < 8  # labeled images come first in a batch
    parts = [labeled[rows] for rows in micro_batches(4)]
    assert [(len(part), int(part.sum())) for part in parts] == [(8, 2)] * 4
    uneven = [labeled[rows] for rows in micro_batches(3)]
    assert sorted((len(part), int(part.sum())) for part in uneven) == [(10, 2), (11, 3), (11, 3)]


@pytest.mark.usefixtures("group")
def test_gradients_are_sent_once_per_step(tmp_path: Path, labeled: Split) -> None:
    assert join_ranks() == Ranks(0, 1)
    sent: Counter[int] = Counter()

    def send(bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent[bucket.index()] += 1
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    job = job_in(labeled, tmp_path / "run", accumulate_steps=4)
    state = new_state(job)
    network = training_network(state.model, job, world=2)  # wrapped, as with several processes
    network.register_comm_hook(None, lambda _, bucket: send(bucket))  # type: ignore[operator]
    with closing(TrainBatches(job.streams, job.config, 10, 0)) as batches:
        for step in range(3):
            train_step(job, state, network, batches[step], rank=0)
    assert set(sent.values()) == {3}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("accumulate_steps", [1, 4])
def test_gradients_of_several_processes_are_in_memory_once(
    tmp_path: Path, labeled: Split, accumulate_steps: int
) -> None:
    """In DDP's buckets: also between micro-batches, which add theirs there."""
    job = job_in(labeled, tmp_path / "run", accumulate_steps=accumulate_steps)
    state = new_state(job)
    network = training_network(state.model, job, world=2)  # wrapped, as with several processes
    seen: set[tuple[int, int]] = set()

    def see(*args: Any) -> Any:
        terms = classify(*args)  # whose first forward pass rebuilds the buckets
        for parameter in state.model.parameters():
            assert parameter.grad is not None
            storage = parameter.grad.untyped_storage()
            seen.add((storage.data_ptr(), storage.nbytes()))
        return terms

    with closing(TrainBatches(job.streams, job.config, 10, 0)) as batches:
        for step in range(3):
            train_step(job, state, network, batches[step], 0, see)
    counted = training_memory(job.config.model_copy(update={"workers": 2}), 10).gradients
    assert sum(size for _, size in seen) == counted
    assert len(seen) < len(list(state.model.parameters()))


def test_more_micro_batches_than_images_of_a_process_are_refused() -> None:
    words = ["teacher.batch_size=32", "teacher.workers=4", "teacher.accumulate_steps=9"]
    with pytest.raises(
        UsageError, match=r"teacher\.accumulate_steps=9: expected at most 8, the images per process and step"
    ):
        load_config(None, words)
    load_config(None, [*words[:2], "teacher.accumulate_steps=8"])


def test_micro_batches_are_in_the_fingerprint_and_leave_earlier_ones_as_they_were() -> None:
    now = Config().stage_fields("teacher")
    before = {name: value for name, value in now.items() if name != "teacher.accumulate_steps"}
    assert now.keys() - before.keys() == {"teacher.accumulate_steps"}
    assert Fingerprint(now, {}).digest() == Fingerprint(before, {}).digest()
    other = Fingerprint(now | {"teacher.accumulate_steps": 2}, {})
    assert other.digest() != Fingerprint(now, {}).digest()
    assert "teacher.checkpoint_activations" not in now


@pytest.mark.parametrize("model", MODELS)
def test_checkpointed_activations_change_no_bit(tmp_path: Path, labeled: Split, model: dict[str, Any]) -> None:
    """With dropout and stochastic depth drawn twice, and statistics that a second update would change."""
    trained = []
    for again in (False, True):
        changes = model | {"checkpoint_activations": again, "bn_momentum": 0.1, "epochs": 1, "dropout": 0.2}
        job = job_in(labeled, tmp_path / str(again), **changes)
        fit(job)
        checkpoint = load_newest(job.checkpoints)
        assert checkpoint is not None
        trained.append(checkpoint["model"] | checkpoint["ema"]["module"])
    one, two = trained
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_checkpointed_activations_update_shared_statistics_once(compiled: bool) -> None:
    plain = build_model("resnetrs26", 10, {"width": 0.125, "blocks": [1, 1, 1, 1]}).train()
    set_bn_momentum(plain, 0.1)
    share_statistics(plain)
    model, images = copy.deepcopy(plain), torch.rand(4, 3, 32, 32)
    checkpoint_activations(model, "teacher", compiled)
    torch._dynamo.reset()
    if compiled:
        model.compile(backend="aot_eager", dynamic=False)
    for network in (plain, model):
        network(images).sum().backward()
    torch._dynamo.reset()
    for name, value in plain.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("model", MODELS)
def test_checkpointed_activations_take_less_memory(model: dict[str, Any]) -> None:
    def saved_bytes(checkpointed: bool) -> int:
        network = build_model(model.get("model", "resnetrs50"), 10, model.get("model_args", {"width": 0.25})).train()
        if checkpointed:
            checkpoint_activations(network, "teacher")
        found: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = network(torch.rand(4, 3, 32, 32))
        weights = {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values()}
        del output
        return sum(size for place, size in found.items() if place not in weights)

    assert saved_bytes(True) < 0.6 * saved_bytes(False)


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_what_a_training_sets_for_a_gpu_holds_inside_alone(tmp_path: Path, labeled: Split, precision: str) -> None:
    def settings() -> tuple[bool, bool]:
        return torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32

    job = replace(job_in(labeled, tmp_path / "run", precision=precision), device="cuda")
    before = settings()
    assert before == (False, False)
    with device_settings(job):
        assert settings() == (True, precision == "tf32")
    assert settings() == before


def test_a_model_that_cannot_checkpoint_is_named() -> None:
    class Plain(nn.Module):
        pass

    with pytest.raises(TrainingError, match=r"student\.checkpoint_activations=true: timm cannot do so for Plain; give"):
        checkpoint_activations(Plain(), "student")
