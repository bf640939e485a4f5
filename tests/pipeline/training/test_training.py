"""fit(): exact continuation, exact mixture, noise only in training, and errors that name shard and key."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from data import storage
from data.errors import DataError
from data.labels.label_files import read_labels
from data.shards.split import Split
from data.tables import write_table
from pipeline.core.schema import TrainConfig
from pipeline.inference.predictor import Predictor
from pipeline.inference.preprocessing import Preprocessing
from pipeline.inputs.batches import TrainBatches
from pipeline.inputs.streams import StreamSpec, labeled_stream
from pipeline.models.registry import build_model
from pipeline.training import loop
from pipeline.training.checkpoint import CheckpointError, load_newest, save_checkpoint
from pipeline.training.job import TrainingError, TrainJob
from pipeline.training.loop import fit
from pipeline.training.state import load_trained
from tests.conftest import png
from tests.training_processes import digits_job

MODEL = {"model": "resnetrs26", "model_args": {"width": 0.125, "blocks": [1, 1, 1, 1]}}
CONFIG = TrainConfig.model_validate(
    MODEL
    | {
        "image_size": 16, "epochs": 2, "batch_size": 20, "warmup_epochs": 0.5, "lr": 0.5, "ema_decay": 0.9,
        "dropout": 0.2, "stochastic_depth": 0.2, "loader_workers": 0, "log_every_steps": 3, "eval_every_epochs": 1,
        "augment": {"crop": "pad_crop", "num_ops": 1, "magnitude": 5},
    }
)  # fmt: skip


def make_job(labeled: Split, folder: Path, **changes: Any) -> TrainJob:
    config = CONFIG.model_copy(update=changes)
    streams = (labeled_stream(labeled, config.batch_size),)
    return digits_job(folder, config, streams, labeled.num_samples, validation=labeled)


def final_files(folder: Path) -> dict[str, bytes]:
    job_files = ["metrics.jsonl", f"checkpoints/{storage.list_names(str(folder / 'checkpoints'))[-1]}"]
    return {name: (folder / name).read_bytes() for name in job_files}


def test_a_finished_training_is_not_trained_further(
    tmp_path: Path, labeled: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(labeled, tmp_path / "run")
    fit(job)
    before = final_files(tmp_path / "run")
    monkeypatch.setattr(loop, "train_step", lambda *args: pytest.fail("a step was made"))
    fit(job)
    assert final_files(tmp_path / "run") == before


def test_intervals_of_logging_and_measuring_change_no_weights_also_when_they_change_on_the_way(
    tmp_path: Path, labeled: Split
) -> None:
    def stops_at_third(asked: Iterator[int], is_last: bool) -> bool:
        return not is_last and next(asked) == 3

    def trained(name: str, *intervals: tuple[int, float]) -> dict[str, torch.Tensor]:
        for number, (log_every, eval_every) in enumerate(intervals, start=1):
            job = make_job(labeled, tmp_path / name, log_every_steps=log_every, eval_every_epochs=eval_every)
            asked = iter(range(1, 1000))
            fit(job, partial(stops_at_third, asked, number == len(intervals)))
        checkpoint = load_newest(job.checkpoints)
        assert checkpoint is not None
        return {"step": torch.tensor(checkpoint["step"])} | load_trained(job)[0]

    often, seldom, changed = (
        trained("often", (1, 0.1)),
        trained("seldom", (50, 9)),
        trained("changed", (1, 0.3), (7, 2)),
    )
    assert all(torch.equal(often[name], seldom[name]) and torch.equal(often[name], changed[name]) for name in often)


def checkpoints(folder: Path, steps: Sequence[int]) -> list[Path]:
    """Save checkpoints of these steps; two are kept."""
    for step in steps:
        save_checkpoint(str(folder), step, {"step": step, "w": torch.full((999,), float(step))})
    return sorted(folder.iterdir())


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in range(1, 8):
        save_checkpoint(str(tmp_path), step, {"step": step}, keep=3)
    assert storage.list_names(str(tmp_path)) == [f"step-00000000{step}.pt" for step in (5, 6, 7)]


def test_a_damaged_later_checkpoint_does_not_outlive_new_ones(tmp_path: Path) -> None:
    (tmp_path / "step-000000009.pt").write_bytes(b"damaged")  # the training has gone back to step 4
    for step in (5, 6):
        save_checkpoint(str(tmp_path), step, {"step": step}, keep=1)
        assert storage.list_names(str(tmp_path)) == [f"step-00000000{step}.pt"]


def cut_short(content: bytes) -> bytes:
    return content[:100]


def one_bit_flipped(content: bytes) -> bytes:
    middle = content.index(b"\x00\x00\x00\x40" * 50)  # among the 2.0s of the tensor
    return content[: middle + 70] + bytes([content[middle + 70] ^ 1]) + content[middle + 71 :]


@pytest.mark.parametrize("damage", [cut_short, one_bit_flipped])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    *_, newest = checkpoints(tmp_path, [1, 2])
    newest.write_bytes(damage(newest.read_bytes()))
    found = load_newest(str(tmp_path))
    assert found is not None
    assert found["step"] == 1
    assert "step-000000002.pt is damaged" in caplog.text


def test_with_all_checkpoints_damaged_the_training_does_not_start_over(tmp_path: Path) -> None:
    for path in checkpoints(tmp_path, [1, 2]):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints can be read; delete them to start over"):
        load_newest(str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


class Malicious:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    *_, newest = checkpoints(tmp_path / "checkpoints", [1, 2])
    torch.save({"step": 2, "w": Malicious(tmp_path / "owned")}, newest)
    found = load_newest(str(tmp_path / "checkpoints"))
    assert found is not None
    assert found["step"] == 1
    assert not (tmp_path / "owned").exists()
    assert "more than tensors and plain values" in caplog.text
    torch.load(newest, weights_only=False)
    assert (tmp_path / "owned").exists(), "the checkpoint was harmless"


def test_training_learns_and_reports_learning_rate_loss_and_validation(tmp_path: Path, labeled: Split) -> None:
    plain = CONFIG.augment.model_copy(update={"num_ops": 0, "hflip": 0.0, "pad": 0})
    job = make_job(
        labeled, tmp_path / "run", epochs=30, lr=4.0, bn_momentum=0.1, dropout=0.0, stochastic_depth=0.0, augment=plain
    )
    fit(job)
    _, metrics = load_trained(job)
    losses = [line["loss"] for line in metrics if "loss" in line]
    accuracies = [line["validation_top1"] for line in metrics if "validation_top1" in line]
    assert job.total_steps == 150
    assert losses[-1] < losses[0] - 0.5
    assert len(accuracies) == 30
    assert accuracies[-1] > 0.8


def test_a_loss_that_is_not_finite_stops_with_step_rate_and_keys(tmp_path: Path, labeled: Split) -> None:
    job = make_job(labeled, tmp_path / "run", lr=1e30)
    with pytest.raises(
        TrainingError,
        match=r"loss is (nan|inf) at step \d+ \(learning rate .*20 images are listed in .*labeled-00000\d\.tar, key '\d+'",
    ) as caught:
        fit(job)
    step = int(str(caught.value).partition("at step ")[2].split()[0])
    batches = TrainBatches(job.streams, job.config, 10, job.seed)
    assert (tmp_path / "run/non_finite_batch.txt").read_text().splitlines() == batches.keys(step - 1)
    batches.close()


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_an_image_that_cannot_be_decoded_stops_training_with_shard_and_key(
    tmp_path: Path, labeled: Split, loader_workers: int
) -> None:
    shard = labeled.shards[0]
    row = shard.index().to_pylist()[4]
    content = bytearray(Path(shard.url).read_bytes())
    content[row["offset"] : row["offset"] + 8] = b"destroyd"
    Path(shard.url).write_bytes(content)
    with pytest.raises(DataError, match=rf"^{shard.url}, key '{row['key']}': .*repair or remove the image$"):
        fit(make_job(labeled, tmp_path / "run", loader_workers=loader_workers))


def pseudo_spec(tmp_path: Path, labeled: Split, copies: Sequence[int]) -> StreamSpec:
    """The labeled shards as if pseudo-labeled, with this many copies of their first rows."""
    spec = replace(labeled_stream(labeled, 12), name="pseudo_labeled")
    urls = []
    for shard in labeled.shards:
        column = np.zeros(shard.num_samples, np.uint16)
        column[: len(copies)] = copies[: shard.num_samples]
        urls.append(str(tmp_path / f"copies-{shard.name}.parquet"))

        write_table(urls[-1], pa.table({"copies": column}))
    return replace(spec, copies_urls=tuple(urls))


def test_every_batch_has_the_exact_number_of_each_stream(tmp_path: Path, labeled: Split) -> None:
    specs = (labeled_stream(labeled, 4), pseudo_spec(tmp_path, labeled, [1, 0, 3]))
    batches = TrainBatches(specs, CONFIG, 10, seed=0)
    assert batches.order(1).num_entries == 4 * len(labeled.shards)
    seen: dict[str, int] = {}
    for step in range(4):  # 48 pseudo-labeled entries: three epochs of 16
        batch = batches[step]
        assert batch.images.shape == (16, 3, 16, 16)
        assert batch.targets is not None
        assert batch.targets.dense().shape == (16, 10)
        for key in batches.keys(step)[4:]:
            seen[key] = seen.get(key, 0) + 1
    batches.close()
    assert sorted(seen.values()) == [3] * 4 + [9] * 4


def test_ranks_share_the_global_batch_without_overlap(labeled: Split) -> None:
    specs = (labeled_stream(labeled, 8),)
    whole = TrainBatches(specs, CONFIG, 10, seed=0)
    ranks = [TrainBatches(specs, CONFIG, 10, seed=0, rank=rank, world_size=2) for rank in (0, 1)]
    batch, parts = whole[3], [rank[3] for rank in ranks]
    for batches in (whole, *ranks):
        batches.close()
    for values in (lambda batch: batch.images, lambda batch: batch.targets.dense()):
        assert torch.equal(torch.stack([values(part) for part in parts], 1).flatten(0, 1), values(batch))


def test_copies_of_an_image_are_augmented_differently_and_reproducibly(tmp_path: Path, labeled: Split) -> None:
    specs = (labeled_stream(labeled, 4), pseudo_spec(tmp_path, labeled, [3]))
    first, second = (TrainBatches(specs, CONFIG, 10, seed=0) for _ in range(2))
    images = [first[step].images for step in range(3)]
    assert all(torch.equal(images[step], second[step].images) for step in range(3))
    by_key: dict[str, list[torch.Tensor]] = {}
    for step in range(3):
        for key, image in zip(first.keys(step)[4:], images[step][4:], strict=True):
            by_key.setdefault(key, []).append(image)
    first.close()
    second.close()
    views = next(iter(by_key.values()))
    assert any(not torch.equal(views[0], view) for view in views[1:])


def test_model_noise_changes_training_outputs_and_never_inference() -> None:
    torch.manual_seed(0)
    model = build_model(CONFIG.model, 10, CONFIG.model_args, dropout=0.5, stochastic_depth=0.5)
    for module in model.modules():  # fresh blocks end in a zero gain, which would hide dropped blocks
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    predictor = Predictor(model, Preprocessing.of_training(CONFIG), "cpu", 8)
    assert np.array_equal(predictor.logits(images), predictor.logits(images))
    predictor.model.train()
    assert not np.array_equal(predictor.logits(images), predictor.logits(images))


def test_labeling_sees_the_image_without_noise(digits: tuple[np.ndarray, np.ndarray]) -> None:
    model = build_model(CONFIG.model, 10, CONFIG.model_args)
    image = np.repeat(digits[0][0][..., None], 3, axis=2)
    prepared = Predictor(model, Preprocessing.of_training(CONFIG), "cpu").view(png(image))
    assert np.array_equal(prepared[4:12, 4:12], image)
    assert prepared.astype(np.int64).sum() == image.astype(np.int64).sum()


def test_copies_that_do_not_fit_the_labels_are_refused(tmp_path: Path, labeled: Split) -> None:
    spec = pseudo_spec(tmp_path, labeled, [1])
    assert spec.copies_urls is not None
    table = read_labels(spec.copies_urls[0])
    write_table(spec.copies_urls[0], table.slice(1))
    with pytest.raises(DataError, match="run stage=select again"):
        TrainBatches((spec,), CONFIG, 10, seed=0)
