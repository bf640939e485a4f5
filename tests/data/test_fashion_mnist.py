"""The demo's data: packed into a folder of its own, stopped and continued; what is not its own stays."""

from pathlib import Path

import numpy as np
import pytest

from data import fashion_mnist
from data.errors import DataError
from data.shards.split import open_split


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Fashion-MNIST of 60 training and 20 test images."""
    generator = np.random.default_rng(0)

    def read(_: object, part: str) -> tuple[np.ndarray, np.ndarray]:
        count = 60 if part == "train" else 20
        return generator.integers(0, 255, (count, 28, 28)).astype(np.uint8), np.arange(count).astype(np.uint8) % 10

    monkeypatch.setattr(fashion_mnist, "find_files", lambda: {})
    monkeypatch.setattr(fashion_mnist, "VALIDATION_PER_CLASS", 1)
    monkeypatch.setattr(fashion_mnist, "DEVELOPMENT_PER_CLASS", 1)
    monkeypatch.setattr(fashion_mnist, "read_idx", read)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize(
    "name",
    ["labeled/thesis.txt", "validation/labeled-000000.tar", "test/manifest.json", "truth.parquet", "unlabeled/a/b.jpg"],
)
def test_what_lies_under_the_names_of_splits_is_refused_and_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(DataError, match=r"choose another out="):
        fashion_mnist.prepare(str(tmp_path), labeled_per_class=1)
    assert files(tmp_path) == {name: b"mine"}


def test_other_files_in_the_folder_are_nobodys_business(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/notes.txt").write_text("mine")
    fashion_mnist.prepare(str(tmp_path), labeled_per_class=1)
    assert (tmp_path / "runs/notes.txt").exists()
    assert open_split(f"{tmp_path}/unlabeled/*.tar", f"{tmp_path}/index").num_samples == 30


def test_packing_that_was_stopped_continues_split_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, encode = [0], fashion_mnist.encode_png

    def stop(image: np.ndarray) -> bytes:
        encoded[0] += 1
        if encoded[0] == 25:
            raise KeyboardInterrupt
        return encode(image)

    monkeypatch.setattr(fashion_mnist, "encode_png", stop)
    with pytest.raises(KeyboardInterrupt):
        fashion_mnist.prepare(str(tmp_path), labeled_per_class=1, samples_per_shard=4)
    first = files(tmp_path / "validation")
    assert "manifest.json" in first
    with pytest.raises(DataError, match="another split was begun there"):
        fashion_mnist.prepare(str(tmp_path), labeled_per_class=2, samples_per_shard=4)
    fashion_mnist.prepare(str(tmp_path), labeled_per_class=1, samples_per_shard=4)
    assert files(tmp_path / "validation") == first
    sizes = {
        name: open_split(f"{tmp_path}/{name}/*.tar", f"{tmp_path}/index").num_samples for name in fashion_mnist._SPLITS
    }
    assert sizes == {"labeled": 10, "validation": 10, "development": 10, "unlabeled": 30, "test": 20}
    assert (tmp_path / "truth.parquet").exists()
    assert (tmp_path / "split.json").exists()
