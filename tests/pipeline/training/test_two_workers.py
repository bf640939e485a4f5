"""Two training processes train the same model as one, with the same global batch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.shards.split import Split
from pipeline.inputs.train_transform import normalize
from pipeline.training import step
from pipeline.training.job import TrainJob
from pipeline.training.loop import fit
from pipeline.training.state import load_trained
from tests.pipeline.training.test_training import make_job
from tests.training_processes import in_group


def fit_in_float64(rank: int, job: TrainJob) -> None:
    """In a process of its own. In float32, batch norms of a few values each would amplify rounding."""
    torch.set_default_dtype(torch.float64)
    step.normalize = lambda *args: normalize(*args).double()
    fit(job)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_loss_curve_and_weights_of_two_workers_equal_those_of_one_within_rounding(
    tmp_path: Path, labeled: Split
) -> None:
    def job(name: str) -> TrainJob:
        changes: dict[str, Any] = {"dropout": 0, "stochastic_depth": 0, "log_every_steps": 1, "epochs": 4}
        return replace(make_job(labeled, tmp_path / name, **changes), validation=None)

    in_group(tmp_path / "meeting", fit_in_float64, job("one"), world=1)
    in_group(tmp_path / "meeting-of-two", fit_in_float64, job("two"))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 20
    assert min(one) < max(one) - 0.05, "nothing was learned: equal losses would say little"
    assert two == pytest.approx(one, rel=1e-6)
    trained = [load_trained(job(name))[0] for name in ("one", "two")]
    for name, weights in trained[0].items():
        torch.testing.assert_close(trained[1][name], weights, rtol=1e-5, atol=1e-6, msg=name)
