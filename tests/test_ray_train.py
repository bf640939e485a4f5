"""Training in two processes under Ray Train."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from data import storage
from data.manifest import DataError, open_split
from pipeline.cluster import start_ray
from pipeline.training.checkpoint import load_newest
from pipeline.training.fit import TrainingError, TrainJob, load_trained
from pipeline.training.inputs import labeled_stream
from pipeline.training.launch import run_training
from tests.conftest import WriteDigits
from tests.test_training import CONFIG


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    start_ray(None)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # ray train's own
def test_two_workers_train_one_model_on_halves_of_each_batch(
    tmp_path: Path, write_digits: WriteDigits, ray_here: None
) -> None:
    write_digits(tmp_path / "labeled", 0, 100, per_shard=50)
    split = open_split(f"{tmp_path}/labeled/*.tar", str(tmp_path / "index"))
    config = CONFIG.model_copy(update={"workers": 2, "epochs": 4})
    streams = (labeled_stream(split, config.batch_size),)
    job = TrainJob("teacher", str(tmp_path / "run"), config, streams, 10, split.num_samples, 0, 1, "cpu", split)
    handler = signal.getsignal(signal.SIGINT)
    run_training(job, None)
    assert signal.getsignal(signal.SIGINT) is handler, "Ctrl-C no longer stops the command"
    weights, metrics = load_trained(job.folder, job.total_steps)
    checkpoint = load_newest(f"{job.folder}/checkpoints")
    assert checkpoint is not None
    assert checkpoint["step"] == 20
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert [line["step"] for line in metrics if "validation_top1" in line] == [5, 10, 15, 20]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # ray train's own
def test_what_is_wrong_with_an_image_is_told_as_in_one_process(
    tmp_path: Path, write_digits: WriteDigits, ray_here: None
) -> None:
    write_digits(tmp_path / "labeled", 0, 40)
    split = open_split(f"{tmp_path}/labeled/*.tar", str(tmp_path / "index"))
    row = split.shards[0].index().to_pylist()[7]
    content = bytearray(storage.read_bytes(split.shards[0].url))
    content[row["offset"] : row["offset"] + 8] = b"no image"
    storage.write_bytes(split.shards[0].url, bytes(content))
    config = CONFIG.model_copy(update={"workers": 2})
    streams = (labeled_stream(split, config.batch_size),)
    job = TrainJob("teacher", str(tmp_path / "run"), config, streams, 10, split.num_samples, 0, 1, "cpu")
    with pytest.raises(DataError, match=rf"^{split.shards[0].url}, key '{row['key']}': "):
        run_training(job, None)


def test_more_workers_than_ray_has_room_for_are_refused_at_once(
    tmp_path: Path, write_digits: WriteDigits, ray_here: None
) -> None:
    write_digits(tmp_path / "labeled", 0, 10)
    split = open_split(f"{tmp_path}/labeled/*.tar", str(tmp_path / "index"))
    config = CONFIG.model_copy(update={"workers": 1000})
    streams = (labeled_stream(split, config.batch_size),)
    job = TrainJob("teacher", str(tmp_path / "run"), config, streams, 10, split.num_samples, 0, 1, "cpu")
    with pytest.raises(TrainingError, match=r"teacher\.workers=1000, but Ray has \d+ CPUs"):
        run_training(job, None)
