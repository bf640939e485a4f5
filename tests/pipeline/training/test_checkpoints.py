"""Damaged checkpoint and weights files: every damage is found, and the file is named."""

from __future__ import annotations

import errno
import io
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch

from data import storage
from data.storage import StorageError
from pipeline.core.stage import Fingerprint, open_stage
from pipeline.inference.stage_weights import load_predictor, read_info
from pipeline.models.external_weights import load_external
from pipeline.models.registry import build_model
from pipeline.models.resnet_rs import ModelError
from pipeline.models.weights import WeightsInfo, load_weights, save_weights
from pipeline.training import checkpoint
from pipeline.training.checkpoint import load_newest, save_checkpoint

CONTENT = {
    "step": 2, "w": torch.arange(40.0), "metrics": [{"step": 1, "loss": 0.5}],
    "model": {"a.weight": torch.ones(3, 2), "n": torch.tensor(7)},
    "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(5)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
}  # fmt: skip
Damage = Callable[[bytearray, random.Random], bytes]


def flip(content: bytearray, random: random.Random) -> bytes:
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    return bytes(content)


def flip_in_directory(content: bytearray, random: random.Random) -> bytes:
    start = content.rindex(b"PK\x01\x02", 0, content.rindex(b"PK\x01\x02")) // 2 * 2
    content[random.randrange(start, len(content))] ^= 1 << random.randrange(8)
    return bytes(content)


def cut(content: bytearray, random: random.Random) -> bytes:
    return bytes(content[: random.randrange(len(content))])


def overwrite(content: bytearray, random: random.Random) -> bytes:
    start = random.randrange(len(content))
    content[start : start + 200] = random.randbytes(min(200, len(content) - start))
    return bytes(content)


def blank(content: bytearray, random: random.Random) -> bytes:
    """A block that the file system never wrote."""
    start = random.randrange(len(content))
    content[start : start + 512] = bytes(min(512, len(content) - start))
    return bytes(content)


def longer(content: bytearray, random: random.Random) -> bytes:
    return bytes(content) + random.randbytes(random.randrange(1, 100))


def same(one: object, two: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    return one == two


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints."""
    save_checkpoint(str(tmp_path), 1, CONTENT | {"step": 1})
    save_checkpoint(str(tmp_path), 2, CONTENT)
    return tmp_path


@pytest.mark.parametrize("damage", [flip, flip_in_directory, cut, overwrite, blank, longer])
def test_a_damaged_checkpoint_is_never_loaded(folder: Path, damage: Damage, caplog: pytest.LogCaptureFixture) -> None:
    """Without the digest, one such file in 66 ended in a traceback, and some flipped bits of the zip's directory gave other values."""
    newest = folder / "step-000000002.pt"
    whole, generator = newest.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = damage(bytearray(whole), generator)
        newest.write_bytes(damaged)
        found = load_newest(str(folder))
        assert found is not None
        assert found["step"] == (2 if damaged == whole else 1)
    assert f"{newest} is damaged (" in caplog.text


def test_a_checkpoint_is_read_back_and_torch_reads_the_file_too(folder: Path) -> None:
    assert same(load_newest(str(folder)), CONTENT)
    assert same(torch.load(folder / "step-000000002.pt", weights_only=True), CONTENT)


def without_digest(folder: Path) -> Path:
    buffer = io.BytesIO()
    torch.save(CONTENT, buffer)
    (folder / "step-000000002.pt").write_bytes(buffer.getvalue())
    return folder / "step-000000002.pt"


def test_a_checkpoint_without_a_digest_stays_readable(folder: Path) -> None:
    without_digest(folder)
    assert same(load_newest(str(folder)), CONTENT)


@pytest.mark.parametrize("damage", [flip, cut, overwrite, blank, longer])
def test_a_damaged_checkpoint_without_a_digest_ends_in_no_traceback(folder: Path, damage: Damage) -> None:
    newest, generator = without_digest(folder), random.Random(1)
    whole = newest.read_bytes()
    for _ in range(300):
        newest.write_bytes(damage(bytearray(whole), generator))
        assert load_newest(str(folder)) is not None


@pytest.mark.parametrize(
    "error", [StorageError("s3://b/step-000000002.pt: 503, tried six times"), PermissionError(13, "no")]
)
def test_an_outage_of_the_storage_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Going back to an older checkpoint would remove the newest one at the next save."""

    def fail(url: str) -> bytes:
        raise error

    monkeypatch.setattr(storage, "read_bytes", fail)
    with pytest.raises(type(error)):
        load_newest(str(folder))


def test_a_lost_block_on_the_disk_is_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = storage.read_bytes

    def fail(url: str) -> bytes:
        if url.endswith("2.pt"):
            raise OSError(errno.EIO, "Input/output error")
        return read(url)

    monkeypatch.setattr(checkpoint.storage, "read_bytes", fail)
    found = load_newest(str(folder))
    assert found is not None
    assert found["step"] == 1


MODEL = {"width": 0.125, "blocks": [1, 1, 1, 1]}


@contextmanager
def suppress_named(path: Path) -> Iterator[None]:
    """A refusal is fine if it names the path; every other error fails the test."""
    refusals: list[str] = []
    try:
        yield
    except ModelError as error:
        refusals.append(str(error))
    assert all(str(path) in refusal for refusal in refusals)


@pytest.fixture
def stage(tmp_path: Path) -> str:
    """A finished stage's folder with weights."""
    opened = open_stage(str(tmp_path / "teacher"), "teacher", Fingerprint({}, {}))
    info = WeightsInfo(
        model="resnetrs26", model_args=MODEL, num_classes=3, image_size=32, crop_pct=1.0, interpolation="bicubic",
        mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2),
    )  # fmt: skip
    save_weights(opened.path("weights"), build_model("resnetrs26", 3, MODEL).state_dict(), info)
    opened.commit(["weights/model.safetensors", "weights/config.json"], {})
    return opened.folder


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", [flip, cut, overwrite])
def test_damaged_weights_of_a_stage_are_refused_with_the_file(stage: str, name: str, damage: Damage) -> None:
    file = Path(stage, "weights", name)
    whole, generator = file.read_bytes(), random.Random(2)
    load_predictor(stage, "cpu")
    for _ in range(30):
        file.write_bytes(damage(bytearray(whole), generator))
        with pytest.raises(ModelError, match=rf"{name}.*(damaged|not )"):
            load_predictor(stage, "cpu")


@pytest.mark.parametrize("damage", [flip, cut, overwrite])
def test_damaged_weights_without_a_stage_end_in_no_traceback(stage: str, damage: Damage) -> None:
    """They have no digest: a flipped bit in a tensor is another number; all other damage is refused."""
    Path(stage, "done.json").unlink()
    generator = random.Random(3)
    for name in ("model.safetensors", "config.json"):
        file = Path(stage, "weights", name)
        whole = file.read_bytes()
        for _ in range(40):
            file.write_bytes(damage(bytearray(whole), generator))
            with suppress_named(file.parent):
                load_predictor(stage, "cpu")
        file.write_bytes(whole)


@pytest.mark.parametrize("content", ["null", "[]", "3", '{"noisy_student": []}', '{"noisy_student": null}', "{"])
def test_a_config_json_of_another_shape_is_refused_with_its_name(stage: str, content: str) -> None:
    Path(stage, "weights/config.json").write_text(content)
    for read in (
        read_info,
        lambda folder: load_weights(f"{folder}/weights"),
        lambda folder: load_predictor(folder, "cpu"),
    ):
        with pytest.raises(ModelError, match=r"weights/config\.json: "):
            read(stage)


def test_weights_of_another_model_than_config_json_says_are_refused_with_the_folder(stage: str) -> None:
    Path(stage, "done.json").unlink()
    config = Path(stage, "weights/config.json")
    content = json.loads(config.read_text())
    content["noisy_student"]["num_classes"] = 4
    config.write_text(json.dumps(content))
    with pytest.raises(
        ModelError, match=r"teacher/weights: its model\.safetensors does not fit the model of its config\.json"
    ):
        load_predictor(stage, "cpu")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", [flip, cut, *(pytest.param(d, marks=pytest.mark.slow) for d in (overwrite, blank))])
def test_damaged_weights_from_elsewhere_end_in_no_traceback(tmp_path: Path, suffix: str, damage: Damage) -> None:
    state = {name: tensor.clone() for name, tensor in build_model("resnetrs26", 3, MODEL).state_dict().items()}
    file = tmp_path / f"w{suffix}"
    torch.save(state, file) if suffix == ".pth" else safetensors.torch.save_file(state, file)
    whole, generator = file.read_bytes(), random.Random(4)
    for _ in range(60):
        file.write_bytes(damage(bytearray(whole), generator))
        with suppress_named(file):
            load_external("resnetrs26", MODEL, 3, str(file))
