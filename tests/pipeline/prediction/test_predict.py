"""`python -m pipeline.predict`: a row for every image, whatever else lies there; the same in Python; nothing twice after a kill."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.images.clean_view import EvalView
from data.packing.folders import NOT_AN_IMAGE
from data.shards.write import write_shard
from data.storage.failpoint import VARIABLE
from noisy_student import Classifier, DataError, load_image
from pipeline.core.lock import run_lock
from pipeline.models.registry import build_model
from pipeline.models.weights import WeightsInfo, save_weights
from pipeline.predict import main
from pipeline.prediction import inputs
from tests import HANGS_S
from tests.conftest import DIGIT_NAMES, WriteDigits, png
from tests.fragile import CRASHES

NUM_IMAGES = 20


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small network with fresh weights, which crops and has a temperature."""
    folder = str(tmp_path_factory.mktemp("weights"))
    arguments = {"width": 0.125, "blocks": [1, 1, 1, 1]}
    info = WeightsInfo(model="resnetrs26", model_args=arguments, num_classes=10, class_names=DIGIT_NAMES, image_size=32,
                       crop_pct=0.875, interpolation="bicubic", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4),
                       temperature=0.05)  # fmt: skip
    save_weights(folder, build_model("resnetrs26", 10, arguments).state_dict(), info)
    return folder


@pytest.fixture
def photos(tmp_path: Path, digits: tuple[np.ndarray, np.ndarray]) -> Path:
    """Images in folders, one of them transparent; two that cannot be decoded; and files of other kinds."""
    folder = tmp_path / "photos"
    for number in range(NUM_IMAGES):
        home = folder / f"day-{number % 3}"
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{number:02d}.png").write_bytes(png(np.kron(digits[0][number], np.ones((5, 5), np.uint8))))
    Image.new("RGBA", (50, 40), (0, 0, 0, 0)).save(folder / "empty, but white.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    (folder / "day-1/text.png").write_text("text")
    (folder / "notes.txt").write_text("notes")
    (folder / ".DS_Store").write_text("")
    return folder


def predict(weights: str, images: object, out: Path, *words: str) -> int:
    return main(
        [f"weights={weights}", f"images={images}", f"out={out}", "device=cpu", "batch_size=8", "threads=2", *words]
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_image_of_a_folder_is_a_row_or_a_reject(
    weights: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "predictions.csv"
    assert predict(weights, photos, out) == 0
    paths = sorted(str(path) for path in photos.rglob("*.*") if path.suffix in (".png", ".jpg"))
    bad = [str(photos / "broken.jpg"), str(photos / "day-1/text.png")]
    rows, rejects = rows_of(out), rows_of(tmp_path / "predictions.rejected.csv")
    assert sorted(row["path"] for row in rows) == [path for path in paths if path not in bad]
    assert [row["path"] for row in rejects] == bad
    assert rejects[1]["reason"].startswith("not a JPEG, PNG or WebP file")
    assert list(rows[0]) == ["path", "label", "class_name", "confidence",
                             *(f"{name}_{n}" for n in range(2, 6) for name in ("class", "confidence"))]  # fmt: skip
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"{out}: 21 images; 2 could not be read or decoded, see {tmp_path}/predictions.rejected.csv"
    assert f"passed over 1 file: {NOT_AN_IMAGE}" in printed
    assert not (tmp_path / "predictions.csv.partial").exists()


def test_in_python_the_same(weights: str, photos: Path, tmp_path: Path) -> None:
    predict(weights, photos, tmp_path / "predictions.csv")
    rows = rows_of(tmp_path / "predictions.csv")
    classifier = Classifier(weights, batch_size=8)
    for found, row in zip(classifier([row["path"] for row in rows]), rows, strict=True):
        assert (found.label, found.class_name) == (int(row["label"]), row["class_name"])
        confidences = [float(row["confidence"]), *(float(row[f"confidence_{n}"]) for n in range(2, 6))]
        np.testing.assert_allclose([prob for _, prob in found.top_k], confidences, atol=1e-5)
        assert [name for name, _ in found.top_k[1:]] == [row[f"class_{n}"] for n in range(2, 6)]
    assert len({row["confidence"] for row in rows}) > 10, "a model that sees the images"


def test_in_python_a_wrong_argument_is_named(weights: str, photos: Path) -> None:
    with pytest.raises(ValueError, match="decoder='slow': expected 'fast' or 'pillow'"):
        Classifier(weights, decoder="slow")
    with pytest.raises(ValueError, match="top_k=0 and batch_size=64: expected 1 or more"):
        Classifier(weights, top_k=0)
    classifier = Classifier(weights, device="cpu")
    for image in (str(photos / "day-0/00.png"), photos / "day-0/00.png", b"\x89PNG"):
        with pytest.raises(TypeError, match="expected a list of images"):
            classifier(image)  # type: ignore[arg-type]


def test_a_pattern_passes_over_other_files_and_one_name_is_taken_as_it_is(
    weights: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "no-ending").write_bytes((photos / "day-0/00.png").read_bytes())
    assert predict(weights, photos / "*", tmp_path / "all.csv") == 0
    assert NOT_AN_IMAGE in capsys.readouterr().out
    assert [row["path"] for row in rows_of(tmp_path / "all.csv")] == [str(photos / "empty, but white.png")]
    assert [row["path"] for row in rows_of(tmp_path / "all.rejected.csv")] == [str(photos / "broken.jpg")]
    assert predict(weights, photos / "no-ending", tmp_path / "one.csv") == 0
    assert len(rows_of(tmp_path / "one.csv")) == 1


def test_a_transparent_image_is_white_for_the_model(weights: str, photos: Path) -> None:
    classifier, path = Classifier(weights), photos / "empty, but white.png"
    (white,) = classifier([Image.new("RGB", (50, 40), "white")])
    assert classifier([path]) == classifier([path.read_bytes()]) == classifier([load_image(path)]) == [white]
    with Image.open(path) as image:
        assert white != classifier([image.convert("RGB")])[0]
        with pytest.raises(DataError, match=r"an image of mode RGBA: expected RGB; noisy_student\.load_image"):
            classifier([image])
    with pytest.raises(DataError, match=r"broken\.jpg cannot be decoded"):
        classifier([photos / "broken.jpg"])


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_all_formats_say_the_same(weights: str, photos: Path, tmp_path: Path, ending: str) -> None:
    predict(weights, photos, tmp_path / "a.csv")
    predict(weights, photos, tmp_path / f"a.{ending}")
    path = tmp_path / f"a.{ending}"
    found = (
        pq.read_table(path).to_pylist()
        if ending == "parquet"
        else [json.loads(x) for x in path.read_text().splitlines()]
    )
    for row, expected in zip(found, rows_of(tmp_path / "a.csv"), strict=True):
        assert [row["path"], str(row["label"]), row["class_name"]] == [
            expected[n] for n in ("path", "label", "class_name")
        ]
        assert np.float32(row["confidence"]) == np.float32(expected["confidence"])
        second = row["topk_prob"][1] if ending == "parquet" else row["top_k"][1]["confidence"]
        assert np.float32(second) == np.float32(expected["confidence_2"])


def test_shards_and_patterns_are_read_too(
    weights: str, tmp_path: Path, write_digits: WriteDigits, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    write_digits(tmp_path / "shards", 0, NUM_IMAGES, labeled=False, per_shard=15)
    (tmp_path / "files").mkdir()
    for number in range(NUM_IMAGES):
        (tmp_path / f"files/{number:05d}.png").write_bytes(png(digits[0][number]))
    assert predict(weights, f"{tmp_path}/shards/*.tar", tmp_path / "of-shards.csv") == 0
    assert predict(weights, f"{tmp_path}/files/0*.png", tmp_path / "of-files.csv", "top_k=1") == 0
    of_shards, of_files = rows_of(tmp_path / "of-shards.csv"), rows_of(tmp_path / "of-files.csv")
    assert [row["confidence"] for row in of_shards] == [row["confidence"] for row in of_files]
    assert [row["class_name"] for row in of_shards] == [row["class_name"] for row in of_files]
    assert of_shards[0]["path"] == f"{tmp_path}/shards/shards-000000.tar/00000"
    assert of_shards[19]["path"] == f"{tmp_path}/shards/shards-000001.tar/00019"
    assert list(of_files[0]) == ["path", "label", "class_name", "confidence"]


@pytest.mark.slow
def test_after_a_kill_nothing_is_predicted_twice(
    weights: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inputs, "PIECE", 8)
    predict(weights, photos, tmp_path / "undisturbed.csv")
    out, code = (
        tmp_path / "out.csv",
        "import sys; from pipeline.prediction import inputs; inputs.PIECE = 8; from pipeline.predict import main",
    )
    words = [f"weights={weights}", f"images={photos}", f"out={out}", "device=cpu", "batch_size=8", "threads=2"]
    killed = subprocess.run(
        [sys.executable, "-c", f"{code}; main(sys.argv[1:])", *words],
        env=os.environ | {VARIABLE: "after-rename/*.parquet:2"}, capture_output=True, timeout=HANGS_S, check=False,
    )  # fmt: skip
    assert killed.returncode == -9
    assert not out.exists()
    (photos / "zzz.png").write_bytes((photos / "day-2/17.png").read_bytes())  # after all others: two pieces stay
    decoded: list[bytes] = []
    with_hash = EvalView.with_hash

    def counted(view: EvalView, content: bytes) -> tuple[np.ndarray, int]:
        decoded.append(content)
        return with_hash(view, content)

    monkeypatch.setattr(EvalView, "with_hash", counted)
    capsys.readouterr()
    assert predict(weights, photos, out) == 0
    assert "16 of 24 images are predicted already" in capsys.readouterr().out
    assert len(decoded) == 8
    assert out.read_text().startswith((tmp_path / "undisturbed.csv").read_text())
    assert not (tmp_path / "out.csv.partial").exists()


@pytest.mark.slow  # each process loads torch
@pytest.mark.parametrize("kind", ["files", "shards"])
def test_an_image_that_ends_the_process_is_a_reject_of_the_next_command(
    weights: str, tmp_path: Path, kind: str
) -> None:
    contents = [png(np.zeros((8, 8), np.uint8)), png(np.ones((8, 8), np.uint8)) + CRASHES]
    if kind == "files":
        for number, content in enumerate(contents):
            (tmp_path / f"{number}.png").write_bytes(content)
    else:
        write_shard(
            f"{tmp_path}/images.tar", [(str(number), {"png": content}) for number, content in enumerate(contents)]
        )
    images = f"{tmp_path}/*.{'png' if kind == 'files' else 'tar'}"
    words = [f"weights={weights}", f"images={images}", f"out={tmp_path}/out.csv", "device=cpu"]
    codes = [
        subprocess.run([sys.executable, "-m", "tests.fragile", "predict", *words], check=False).returncode
        for _ in range(2)
    ]
    assert codes == [-signal.SIGSEGV, 0]
    assert len(rows_of(tmp_path / "out.csv")) == 1
    (reject,) = rows_of(tmp_path / "out.rejected.csv")
    assert reject["reason"] == "decoding it ended the process (SIGSEGV)"


def test_a_file_that_was_replaced_is_predicted_again(
    weights: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise OSError("stop")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.predict.write_predictions", stop)
        assert predict(weights, photos, tmp_path / "a.csv") == 2
    Image.new("RGB", (50, 40), "red").save(photos / "day-0/00.png")
    predict(weights, photos, tmp_path / "a.csv")
    predict(weights, photos, tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()


def test_what_makes_no_sense_is_told_in_a_sentence(
    weights: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.csv"

    def error(*words: str, images: object = photos, name: Path = out, where: str = weights) -> str:
        assert predict(where, images, name, *words) == 2
        return capsys.readouterr().err

    assert "out=" in error(name=tmp_path / "a.txt")
    assert "expected a name that ends in .csv, .parquet, .jsonl" in error(name=tmp_path / "a.txt")
    assert "not a weights folder" in error(where=str(photos))
    assert "matches no file" in error(images=photos / "*.gif")
    assert "no image there" in error(images=photos / "*.txt")
    assert "images= is empty" in error(images="")
    assert "weights= is empty" in error(where="")
    (tmp_path / "none").mkdir()
    assert "no image there" in error(images=tmp_path / "none")
    assert "No such file" in error(images=tmp_path / "nowhere.png")
    assert "top_k=0: expected 1 or more" in error("top_k=0")
    assert "views=11: expected 1 to 10" in error("views=11")
    assert "decoder=slow: expected fast or pillow" in error("decoder=slow")
    assert "did you mean 'top_k'" in error("topk=3")
    with run_lock(f"{out}.partial", "the other"):
        assert "the other" in error()
    out.write_text("")
    assert "it is there already; delete it, or give another name" in error()
    assert main(["--help"]) == 0
    assert "python -m pipeline.predict weights=" in capsys.readouterr().out


def test_the_page_says_what_works(weights: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs/predict.md").read_text()
    page = page.replace("runs/mine/gen-1/student/weights", weights).replace("photos/new", str(photos))
    monkeypatch.chdir(tmp_path)
    (command,) = (
        line.split() for line in page.splitlines() if line.startswith("    python -m pipeline.predict weights")
    )
    assert main(command[3:]) == 0
    (tmp_path / "photo.png").write_bytes((photos / "day-0/00.png").read_bytes())
    exec(page.partition("```python\n")[2].partition("```")[0])
    assert len(rows_of(tmp_path / "predictions.csv")) == 21
