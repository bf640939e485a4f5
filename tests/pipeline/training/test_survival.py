"""A training that is killed and started again makes the same bytes as an undisturbed one; at another world size, it continues the same
order. Without Ray; with Ray, see tests/pipeline/training/test_ray_train.py and `make chaos-train`."""

import hashlib
import json
import signal
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from data.shards.image_reader import ImageReader
from data.shards.split import Split, open_split
from data.tables import write_table
from pipeline.inference.predictor import Predictor, count_right
from pipeline.inference.preprocessing import Preprocessing
from pipeline.inputs.batches import TrainBatches
from pipeline.inputs.streams import StreamSpec, labeled_stream
from pipeline.inputs.train_transform import TrainTransform
from pipeline.models.registry import build_model
from pipeline.training import evaluation
from pipeline.training.checkpoint import load_newest
from pipeline.training.job import TrainJob
from pipeline.training.loop import fit
from pipeline.training.state import load_trained
from tests.conftest import make_writer
from tests.digits_run import Digits
from tests.pipeline.training.test_training import CONFIG
from tests.training_processes import digits_job, killed_for_memory, out_of_memory, terminated, train

LABELED, PSEUDO_LABELED = 6, 6  # images per step
EPOCH = 4  # steps per epoch of the labeled stream, and between evaluations
TOTAL = 3 * EPOCH


@dataclass(frozen=True)
class Data:
    """A folder, its split of 24 labeled images in three shards, and the streams of a student."""

    folder: Path
    split: Split
    streams: tuple[StreamSpec, ...]

    def job(self, name: str, **changes: Any) -> TrainJob:
        """A student that saves at every step."""
        fields = {
            "epochs": TOTAL / EPOCH,
            "batch_size": LABELED + PSEUDO_LABELED,
            "checkpoint_every_s": 0,
            "mixup": 0.2,
        }
        config = CONFIG.model_copy(update=fields | {"log_every_steps": 5, "eval_every_epochs": 1} | changes)
        return digits_job(self.folder / name, config, self.streams, 24, name="student", validation=self.split)

    def result(self, name: str) -> tuple[int, dict[str, bytes], bytes]:
        """Step, bytes of each tensor of weights, EMA and momentum, and metrics."""
        checkpoint = load_newest(str(self.folder / name / "checkpoints"))
        assert checkpoint is not None
        state = checkpoint["optimizer"]["state"]
        parts = {"model": checkpoint["model"], "ema": checkpoint["ema"]["module"]}
        parts |= {f"momentum {number}": values for number, values in state.items()}
        tensors = {f"{part} {key}": value for part, values in parts.items() for key, value in values.items()}
        return (
            checkpoint["step"],
            {key: value.numpy().tobytes() for key, value in tensors.items() if isinstance(value, torch.Tensor)},
            (self.folder / name / "metrics.jsonl").read_bytes(),
        )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> Data:
    folder = tmp_path_factory.mktemp("survival")
    make_writer(digits)(folder / "labeled", 0, 24, per_shard=8)
    split = open_split(f"{folder}/labeled/*.tar", str(folder / "index"))
    labeled, urls = labeled_stream(split, LABELED), []
    for shard in split.shards:  # the same images as if pseudo-labeled, some of them twice, some never
        urls.append(str(folder / f"copies-{shard.name}.parquet"))
        write_table(urls[-1], pa.table({"copies": np.array([1, 2, 0, 1, 3, 1, 0, 2], np.uint16)}))
    pseudo_labeled = replace(labeled, name="pseudo_labeled", images_per_step=PSEUDO_LABELED, copies_urls=tuple(urls))
    return Data(folder, split, (labeled, pseudo_labeled))


@pytest.fixture(scope="module")
def whole(data: Data) -> tuple[int, dict[str, bytes], bytes]:
    """The result of an undisturbed training in one process."""
    assert train(data.job("whole")) == [0]
    return data.result("whole")


STEP = "step-{}/student/rank-0"


@pytest.mark.parametrize(
    "optimizer", ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nesterov", "rmsprop", "lars"))]
)
def test_a_training_with_any_optimizer_continues_to_the_same_bytes(data: Data, optimizer: str) -> None:
    """Stopped after steps 1, 5 and 6, each time with a new state. `momentum` is what all other tests have."""
    changes: dict[str, Any] = {"optimizer": optimizer, "lr": 0.01}
    fit(data.job(f"whole-{optimizer}", **changes))
    parts = data.job(f"parts-{optimizer}", **changes)
    for steps in (1, 4, 1):
        fit(parts, partial(next, iter([False] * (steps - 1) + [True])))
    assert data.result(parts.folder.rpartition("/")[2])[0] == 6
    fit(parts)
    ours, whole = (data.result(f"{name}-{optimizer}") for name in ("parts", "whole"))
    assert ours == whole
    assert whole[0] == TOTAL
    assert any(key.startswith("momentum") for key in whole[1])


def test_one_process_killed_at_any_moment_makes_the_same_bytes(data: Data, whole: tuple[Any, ...]) -> None:
    kills = [
        *(STEP.format(step) for step in (0, 1, EPOCH, EPOCH + 2)),  # after so many steps
        f"evaluation-{2 * EPOCH}/*",
        "after-write/step-000000008.pt",
        "before-rename/step-000000009.pt",
        "before-rename/metrics.jsonl",
        f"after-rename/step-0000000{TOTAL}.pt",  # between the last checkpoint and its metrics
    ]
    job = data.job("killed")
    for at in kills:
        assert train(job, at=at) == [-signal.SIGKILL], f"not killed at {at}"
    assert train(job) == [0]
    assert data.result("killed") == whole


@pytest.mark.slow
def test_micro_batches_with_activations_computed_twice_continue_to_the_same_bytes(data: Data) -> None:
    changes: dict[str, Any] = {"accumulate_steps": 5, "checkpoint_activations": True}  # micro-batches of 3 and 2 images
    assert train(data.job("whole-parts", **changes)) == [0]
    killed = data.job("killed-parts", **changes)
    assert train(killed, at=STEP.format(EPOCH + 2)) == [-signal.SIGKILL]
    assert train(killed) == [0]
    assert data.result("killed-parts") == data.result("whole-parts")


def test_one_process_out_of_memory_or_stopped_makes_the_same_bytes(data: Data, whole: tuple[Any, ...]) -> None:
    job = data.job("stopped", checkpoint_every_s=1000)
    assert train(job, at=STEP.format(2), fault=out_of_memory) == [1]
    assert train(job, at=STEP.format(3), fault=killed_for_memory) == [137]
    assert not (data.folder / "stopped/checkpoints").exists()
    assert train(job, at=STEP.format(5), fault=terminated) == [128 + signal.SIGTERM]
    assert data.result("stopped")[0] == 6, "not saved at the step in which the signal came"
    assert train(job) == [0]
    assert data.result("stopped") == whole


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_killed_or_stopped_make_the_same_bytes(data: Data, world: int) -> None:
    """With three, the bytes depend on the order in which gradients are added."""
    assert train(data.job(f"whole-{world}"), world) == [0] * world
    job = data.job(f"killed-{world}")
    for at in ("step-0/student/rank-1", "step-1/*", f"step-{EPOCH}/student/rank-1", f"evaluation-{2 * EPOCH}/*"):
        assert -signal.SIGKILL in train(job, world, at=at)
    codes = train(job, world, at=f"step-{2 * EPOCH + 1}/student/rank-1", fault=terminated)  # of one process alone
    assert codes[1] == 128 + signal.SIGTERM
    assert data.result(f"killed-{world}")[0] == 2 * EPOCH + 2
    assert train(job, world) == [0] * world
    assert data.result(f"killed-{world}") == data.result(f"whole-{world}")


def note_share() -> None:
    """At the first step: let each evaluation write a file with this rank's share, and the statistics that it predicts with."""
    count = evaluation.count_right

    def noted(split: Split, predictor: Predictor, threads: int, rank: int, world: int) -> tuple[int, int]:
        right, images = count(split, predictor, threads, rank, world)
        digest = hashlib.sha256(b"".join(buffer.numpy().tobytes() for buffer in predictor.model.buffers())).hexdigest()
        line = {"right": right, "images": images, "threads": threads, "statistics": digest}
        Path(f"{split.shards[0].url}.rank-{rank}-of-{world}").write_text(json.dumps(line))
        return right, images

    evaluation.count_right = noted


def test_all_ranks_evaluate_each_its_share_to_the_accuracy_that_one_would_measure(data: Data) -> None:
    job = data.job("evaluated", checkpoint_every_s=1000, eval_batch_size=5)  # batches of 5, 3, 5, 3, 5 and 3 images
    assert train(job, 2, at="step-0/*", fault=note_share) == [0, 0]
    first = data.split.shards[0].url
    shares = [json.loads(Path(f"{first}.rank-{rank}-of-2").read_text()) for rank in range(2)]
    assert [share["images"] for share in shares] == [15, 9]
    assert [share["threads"] for share in shares] == [2, 2]
    assert shares[0]["statistics"] == shares[1]["statistics"], "rank 1 predicts with statistics of its own images"
    state = load_trained(job)[0]
    model = build_model(job.config.model, 10, job.config.model_args)
    model.load_state_dict(state)
    right, images = count_right(data.split, Predictor(model, Preprocessing.of_training(job.config), "cpu", 5), 2, 0, 1)
    last = json.loads((data.folder / "evaluated/metrics.jsonl").read_text().splitlines()[-1])
    assert last == {"step": TOTAL, "validation_top1": right / images}
    assert images == 24


def step_images(data: Data, step: int, world: int) -> list[bytes]:
    """The noised images of a step in the global order, from the batches of `world` ranks."""
    ranks = [TrainBatches(data.streams, CONFIG, 10, 0, rank, world) for rank in range(world)]
    parts = [[image.numpy().tobytes() for image in batches[step].images] for batches in ranks]
    for batches in ranks:
        batches.close()
    share = LABELED // world
    streams = ([part[:share] for part in parts], [part[share:] for part in parts])
    return [image for stream in streams for images in zip(*stream, strict=True) for image in images]


def step_keys(data: Data) -> list[list[str]]:
    """Shard and key of the images of each step."""
    with closing(TrainBatches(data.streams, CONFIG, 10, 0)) as batches:
        return [batches.keys(step) for step in range(TOTAL)]


def test_another_world_size_continues_the_same_global_order(data: Data) -> None:
    alone = [step_images(data, step, world=1) for step in range(TOTAL)]
    changing = [step_images(data, step, world=1 + step % 3) for step in range(TOTAL)]
    assert changing == alone
    labeled = [key for keys in step_keys(data) for key in keys[:LABELED]]
    assert sorted(labeled) == sorted([key for key in set(labeled) for _ in range(TOTAL // EPOCH)])
    assert len(set(labeled)) == 24


def test_a_training_continued_in_more_processes_notes_it_in_the_metrics(data: Data) -> None:
    job = data.job("grown")
    assert train(job, at=STEP.format(5)) == [-signal.SIGKILL]
    assert train(job, world=2) == [0, 0]
    step, _, metrics = data.result("grown")
    assert step == TOTAL
    notes = [line for line in metrics.splitlines() if b'"workers"' in line]
    assert notes in (
        [b'{"step": 4, "workers": 2}'],
        [b'{"step": 5, "workers": 2}'],
    )  # the last checkpoint may not be written yet


def test_one_shard_is_enough_for_many_ranks_and_loading_processes(tmp_path: Path, digits: Digits) -> None:
    make_writer(digits)(tmp_path / "labeled", 0, 24, per_shard=24)
    split = open_split(f"{tmp_path}/labeled/*.tar", str(tmp_path / "index"))
    only = Data(tmp_path, split, (labeled_stream(split, LABELED),))
    assert len(split.shards) == 1
    images = [image for step in range(EPOCH) for image in step_images(only, step, world=6)]
    assert len(images) == len(set(images)) == 24


def test_continuing_reads_and_decodes_only_the_next_batch(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours of a shard are read at once, so there are at most as many reads as images."""
    read: list[int] = []
    original = ImageReader.read

    def counted(reader: ImageReader, shard: int, offset: int, size: int) -> bytes:
        read.append(size)
        return original(reader, shard, offset, size)

    monkeypatch.setattr(ImageReader, "read", counted)
    batches = TrainBatches(data.streams, CONFIG, 10, 0)
    decode, decoded = TrainTransform.views, []

    def noted(transform: TrainTransform, content: bytes, seeds: Sequence[int]) -> Any:
        decoded.append(len(content))
        return decode(transform, content, seeds)

    monkeypatch.setattr(TrainTransform, "views", noted)
    assert len(batches[1_000_000].images) == LABELED + PSEUDO_LABELED
    batches.close()
    assert len(decoded) == LABELED + PSEUDO_LABELED
    assert len(read) <= LABELED + PSEUDO_LABELED
    assert sum(read) < 3 * sum(decoded) + 512 * 3 * len(decoded)  # images, the tar headers before them, and small gaps
