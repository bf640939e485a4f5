"""How many images a forward pass predicts: what the configuration says, so that large models at large sizes fit into a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.inference.predictor import Predictor
from pipeline.run import main
from tests.conftest import WriteDigits

Sizes = set[int]


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> Sizes:
    """The numbers of images of all forward passes."""
    seen: Sizes = set()
    forward = Predictor._forward

    def recorded(self: Predictor, images: torch.Tensor, view: int) -> torch.Tensor:
        seen.add(self.batch_size)
        return forward(self, images, view)

    monkeypatch.setattr(Predictor, "_forward", recorded)
    return seen


@pytest.fixture
def words(tmp_path: Path, write_digits: WriteDigits) -> list[str]:
    for name in ("labeled", "validation", "test"):
        write_digits(tmp_path / name, 0, 60)
    return [
        f"run_dir={tmp_path}/run",
        *(f"data.{name}=[{tmp_path}/{name}/*.tar]" for name in ("labeled", "validation", "test")),
        "teacher.model_args={width: 0.125, blocks: [1, 1, 1, 1]}",
        "teacher.image_size=32",
        "teacher.batch_size=20",
        "teacher.bn_momentum=0.1",
        "teacher.epochs=0.5",
        "teacher.warmup_epochs=0",
        "teacher.loader_workers=0",
    ]


@pytest.mark.slow
def test_evaluation_in_training_calibration_and_the_test_take_the_configured_batches(
    words: list[str], sizes: Sizes
) -> None:
    assert main(["stage=teacher", *words, "teacher.eval_batch_size=7"]) == 0
    assert sizes == {7}
    sizes.clear()
    assert main(["stage=evaluate", words[0], "evaluate.batch_size=9", "evaluate.robustness_images=3"]) == 0
    assert 9 in sizes
    assert max(sizes) == 9  # also of corrupted images and of the measurement of speed


def test_by_default_they_are_256(words: list[str], sizes: Sizes) -> None:
    assert main(["stage=teacher", *words]) == 0
    assert sizes == {256}


@pytest.mark.slow
def test_a_smaller_batch_may_be_given_until_the_stage_is_done(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stage=teacher", *words]) == 0
    assert main(["stage=teacher", words[0], "teacher.eval_batch_size=8"]) == 0
    assert "done" in capsys.readouterr().out
