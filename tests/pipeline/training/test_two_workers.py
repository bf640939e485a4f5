"""Two training processes train the same model as one, with the same global batch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data.shards.split import Split
from pipeline.training.job import TrainJob
from pipeline.training.loop import fit
from pipeline.training.state import load_trained
from tests.pipeline.training.test_training import make_job


def stay_frozen(module: nn.Module, mode: bool = True) -> nn.Module:
    """Replaces `train` of batch norms, because ranks would have different statistics, and SyncBatchNorm refuses CPU tensors."""
    return nn.Module.train(module, False)


def fit_one_of_two(rank: int, job: TrainJob, meeting_point: str) -> None:
    _BatchNorm.train = stay_frozen  # type: ignore[method-assign, assignment]  # in this process alone
    distributed.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    fit(job)
    distributed.destroy_process_group()


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_loss_curve_and_weights_of_two_workers_equal_those_of_one_within_rounding(
    tmp_path: Path, labeled: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(name: str) -> TrainJob:
        changes: dict[str, Any] = {"dropout": 0, "stochastic_depth": 0, "log_every_steps": 1, "epochs": 4}
        return replace(make_job(labeled, tmp_path / name, **changes), validation=None)

    with monkeypatch.context() as patch:
        patch.setattr(_BatchNorm, "train", stay_frozen)
        fit(job("one"))
    multiprocessing.spawn(fit_one_of_two, (job("two"), str(tmp_path / "meeting")), nprocs=2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 20
    assert min(one) < max(one) - 0.05, "nothing was learned: equal losses would say little"
    assert two == pytest.approx(one, rel=1e-5)
    trained = [load_trained(job(name))[0] for name in ("one", "two")]
    for name, weights in trained[0].items():
        torch.testing.assert_close(trained[1][name], weights, rtol=1e-4, atol=1e-5, msg=name)
