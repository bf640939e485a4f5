"""The FixMatch that benchmarks compare with: its loss, its schedule, its count of compute, and that it continues to the same bytes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import fixmatch
from benchmarks.bench_fixmatch import our_passes, passes_per_step
from benchmarks.fixmatch import FixMatch, Images, learning_rate, train, unlabeled_loss
from pipeline.core.config import load_config
from pipeline.core.schema import TrainConfig
from tests.digits_run import Digits

MODEL = TrainConfig.model_validate(
    {"model": "resnetrs26", "model_args": {"width": 0.125, "blocks": [1, 1, 1, 1]}, "image_size": 16}
)
SMALL = FixMatch(steps=4, batch_size=4, ratio=2, lr=0.1)


def test_images_of_which_the_weak_view_is_unsure_add_nothing_but_count() -> None:
    weak = torch.tensor([[9.0, 0.0], [1.0, 0.0]])  # 0.9999 and 0.73
    strong = torch.tensor([[0.0, 0.0], [-5.0, 5.0]])
    assert unlabeled_loss(strong, weak, 0.95).item() == pytest.approx(math.log(2) / 2)


def test_the_rate_falls_to_a_fifth_of_its_peak_along_a_cosine() -> None:
    method = FixMatch(steps=100)
    assert learning_rate(0, method) == 0.03
    assert learning_rate(100, method) == pytest.approx(0.03 * math.cos(7 * math.pi / 16))


def test_compute_counts_forward_passes_as_a_third_and_the_teachers_network_by_its_flops() -> None:
    same = load_config("fashion_mnist", ["teacher.model_args={width: 0.25, blocks: [2, 2, 4, 2]}"])
    ours = our_passes(same, num_labeled=500, num_unlabeled=54_000)
    assert ours == pytest.approx({"teacher": 256 * 500, "labels": 54_000 * 4 / 3, "student": 1400 * 256})
    demo = our_passes(load_config("fashion_mnist", []), 500, 54_000)
    assert demo["teacher"] < ours["teacher"]
    assert passes_per_step(FixMatch(steps=1)) == pytest.approx(64 * (1 + 7 + 7 / 3))


def digit_images(digits: Digits, start: int, stop: int) -> Images:
    return Images([np.repeat(image[..., None], 3, axis=2) for image in digits[0][start:stop]], digits[1][start:stop])


def test_a_training_that_was_stopped_continues_to_the_same_bytes(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labeled, unlabeled = digit_images(digits, 0, 10), digit_images(digits, 10, 40)
    monkeypatch.setattr(fixmatch, "_CHECKPOINT_S", 0.0)

    def trained(folder: Path) -> dict[str, torch.Tensor]:
        return train(labeled, unlabeled, MODEL, SMALL, 10, 0, str(folder)).state_dict()

    whole = trained(tmp_path / "whole")
    take_step = fixmatch.take_step

    def stop_at_2(state: fixmatch.TrainState, *arguments: object) -> None:
        if state.step == 2:
            raise KeyboardInterrupt
        take_step(state, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(fixmatch, "take_step", stop_at_2)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "stopped")
    stopped = trained(tmp_path / "stopped")
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
