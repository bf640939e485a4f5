"""A teacher with another class order, or at chance, is refused before it labels; a list of its classes reorders its outputs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from data.settings import UsageError
from data.shards.write import Fields, labeled_members, write_shards
from pipeline.core.config import load_config
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import StageError, StageRefusedError, require_done
from pipeline.inference.stage_weights import read_info
from pipeline.models.class_order import reorder_classes
from pipeline.models.registry import build_model
from pipeline.models.resnet_rs import ModelError, set_bn_momentum
from pipeline.planning.status import print_status
from teacher.labeling import stage as label_module
from teacher.labeling.stage import label
from teacher.labeling.teacher_check import check_teacher
from teacher.train import train_teacher
from tests.conftest import png
from tests.digits_run import Digits

NATURAL = [str(number) for number in range(1, 11)]  # as timm sorts the folders 1 … 10
AS_TEXT = sorted(NATURAL)  # as data.pack does: 1, 10, 2, …
ARGS = "{width: 0.25, blocks: [1, 1, 1, 1]}"
NUM_VALIDATION = 200


@pytest.fixture(scope="module")
def weights(digits: Digits) -> dict[str, Tensor]:
    """A classifier of digits, its outputs in timm's order: ridge regression on the features of a random network."""
    torch.manual_seed(0)
    model = build_model("resnetrs26", 10, {"width": 0.25, "blocks": [1, 1, 1, 1]})
    classifier = model.get_submodule("fc")
    assert isinstance(classifier, nn.Linear)
    features: list[Tensor] = []
    classifier.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    images = torch.from_numpy(digits[0][400:1600]).float()[:, None].expand(-1, 3, -1, -1) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = (nn.functional.interpolate(images, (32, 32), mode="bicubic") - mean) / std
    with torch.no_grad():
        set_bn_momentum(model, 1.0)
        model.train()(images)  # sets the statistics to this batch's
        features.clear()
        model.eval()(images)
        inputs = torch.cat([features[0], torch.ones(len(images), 1)], dim=1).double()
        targets = 20.0 * nn.functional.one_hot(torch.from_numpy(digits[1][400:1600]), 10).double()
        solved = torch.linalg.solve(inputs.T @ inputs + 0.1 * torch.eye(inputs.shape[1]).double(), inputs.T @ targets)
        classifier.weight.copy_(solved[:-1].T)
        classifier.bias.copy_(solved[-1])
    return dict(model.state_dict())


class Data:
    """Folders of a run; labels are positions in `names`."""

    def __init__(
        self, folder: Path, digits: Digits, weights: dict[str, Tensor], names: Sequence[str] = AS_TEXT
    ) -> None:
        self.folder = folder
        images, labels = digits[0][:NUM_VALIDATION], digits[1][:NUM_VALIDATION]

        def samples(labeled: bool) -> Iterator[tuple[str, Fields]]:
            for number, (image, digit) in enumerate(zip(images, labels, strict=True)):
                label = list(names).index(NATURAL[digit]) if labeled else None
                yield f"{number:05d}", labeled_members("png", png(image), label)

        write_shards(samples(True), str(folder / "validation"), "validation", 100, list(names))
        write_shards(samples(False), str(folder / "unlabeled"), "unlabeled", 100, None)
        safetensors.torch.save_file(weights, folder / "elsewhere.safetensors")

    def config(self, *words: str) -> tuple[Config, Layout]:
        fixed = [
            f"run_dir={self.folder}/run", f"data.validation=[{self.folder}/validation/*.tar]",
            f"data.unlabeled=[{self.folder}/unlabeled/*.tar]", "teacher.model=resnetrs26", f"teacher.model_args={ARGS}",
            f"teacher.weights={self.folder}/elsewhere.safetensors", "teacher.image_size=32", "teacher.crop_pct=1.0", "device=cpu",
        ]  # fmt: skip
        return load_config(None, [*fixed, *words]), Layout(f"{self.folder}/run")

    def list_classes(self, names: Sequence[str], name: str = "classes.txt") -> str:
        (self.folder / name).write_text("".join(f"{line}\n" for line in names))
        return f"teacher.class_names={self.folder}/{name}"


@pytest.fixture
def data(tmp_path: Path, digits: Digits, weights: dict[str, Tensor]) -> Data:
    return Data(tmp_path, digits, weights)


def check(config: Config, layout: Layout, accept_chance: bool = False) -> float:
    url = f"{config.run_dir}/validation.parquet"
    found = check_teacher(config, layout, read_info(layout.teacher), url, accept_chance)
    assert found is not None
    return float(found["labels_top1"])


def test_weights_in_timms_order_are_refused_before_labeling_and_the_better_order_is_named(
    data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    config, layout = data.config()
    train_teacher(config, layout)
    out = capsys.readouterr().out
    assert "validation images); least right: " in out
    assert "no better than chance" in out
    with pytest.raises(
        StageError, match=r"top-1 \d\.\d% .*8\d\.\d% when sorted naturally .*from class 1 on: '2', '3', '4'"
    ) as caught:
        check(config, layout)
    assert "teacher.class_names=FILE" in str(caught.value)
    assert "stage=label force=true" in str(caught.value)
    assert check(config, layout, accept_chance=True) < 0.2


def test_a_class_list_reorders_the_weights(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    config, layout = data.config(data.list_classes(NATURAL))
    train_teacher(config, layout)
    assert check(config, layout) > 0.8
    info = read_info(layout.teacher)
    assert info.class_names == AS_TEXT
    assert info.validation_top1 is not None
    assert info.validation_top1 > 0.8
    assert "no better than chance" not in capsys.readouterr().out


def test_a_list_in_another_order_makes_another_teacher_and_one_in_the_datas_order_does_not(data: Data) -> None:
    train_teacher(*data.config())
    train_teacher(*data.config(data.list_classes(AS_TEXT)))  # the same teacher: already done
    with pytest.raises(StageRefusedError, match="class_names: changed upstream"):
        train_teacher(*data.config(data.list_classes(NATURAL)))


@pytest.mark.parametrize("ours", [False, True])
def test_a_weights_folder_with_class_names_needs_no_list(
    data: Data, weights: dict[str, Tensor], ours: bool, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    safetensors.torch.save_file(weights, tmp_path / "folder/model.safetensors")
    content = {"noisy_student": {"class_names": NATURAL}} if ours else {"label_names": NATURAL}
    (tmp_path / "folder/config.json").write_text(json.dumps(content))
    config, layout = data.config(f"teacher.weights={tmp_path}/folder")
    train_teacher(config, layout)
    assert check(config, layout) > 0.8


def test_a_weights_folder_with_unknown_names_keeps_its_order_with_a_warning(
    data: Data, weights: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "folder").mkdir()
    safetensors.torch.save_file(weights, tmp_path / "folder/model.safetensors")
    (tmp_path / "folder/config.json").write_text(json.dumps({"label_names": [f"digit {name}" for name in NATURAL]}))
    train_teacher(*data.config(f"teacher.weights={tmp_path}/folder"))
    assert "label_names are not the data's class names" in caplog.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            [*NATURAL[:9], "ten"],
            r"classes\.txt: the data's classes '10' are missing there, and 'ten' are not in the data",
        ),
        (NATURAL[:9], r"classes\.txt: the data's classes '10' are missing there, and none are not in the data"),
        ([*NATURAL, "1"], r"classes\.txt: '1' is there twice"),
    ],
)
def test_a_list_that_does_not_fit_is_refused_with_the_names(data: Data, names: list[str], message: str) -> None:
    with pytest.raises((ModelError, UsageError), match=message):
        train_teacher(*data.config(data.list_classes(names)))


def test_a_missing_list_one_not_in_utf8_and_one_without_weights_are_refused(data: Data, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"teacher\.class_names=.*/no\.txt: no such file"):
        train_teacher(*data.config(f"teacher.class_names={tmp_path}/no.txt"))
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin\.txt: not a text file in UTF-8"):
        train_teacher(*data.config(f"teacher.class_names={tmp_path}/latin.txt"))
    with pytest.raises(UsageError, match=r"teacher\.class_names=x: belongs to teacher\.weights, which is not given"):
        load_config(None, ["teacher.class_names=x"])
    (tmp_path / "crlf.txt").write_bytes("\ufeff".encode() + "\r\n".join(NATURAL).encode() + b"\r\n")
    train_teacher(*data.config(f"teacher.class_names={tmp_path}/crlf.txt"))
    assert read_info(f"{tmp_path}/run/gen-1/teacher").validation_top1 > 0.8  # type: ignore[operator]


def test_two_swapped_classes_are_found_although_most_labels_are_right(
    tmp_path: Path, digits: Digits, weights: dict[str, Tensor]
) -> None:
    """Data sorted naturally, but for 2 before 1, as some manifests are: two thirds are right, which is far from chance."""
    data = Data(tmp_path, digits, weights, ["2", "1", *NATURAL[2:]])
    config, layout = data.config()
    train_teacher(config, layout)
    with pytest.raises(StageError, match=r"6\d\.\d% as they are, 8\d\.\d% when sorted naturally"):
        check(config, layout)


class Loop:
    """Stands in for the pool; stops as on Ctrl-C."""

    images_in_flight, num_ready, replaced = 0, 1, 0

    def __init__(self, make: object, options: object, todo: Sequence[object], urls: Sequence[str]) -> None:
        self.todo = todo

    def run(self) -> Iterator[None]:
        yield from ()
        raise KeyboardInterrupt

    def seconds(self) -> dict[str, float]:
        return {}


def test_force_is_needed_once_to_label_with_a_teacher_at_chance(
    data: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(label_module, "ShardPool", Loop)
    monkeypatch.setattr(label_module, "start_ray", lambda address: None)
    config, layout = data.config()
    train_teacher(config, layout)
    with pytest.raises(StageError, match="stage=label force=true"):
        label(config, layout)
    for force in (True, False):
        with pytest.raises(KeyboardInterrupt):
            label(config, layout, force)
    out = capsys.readouterr().out
    assert out.count("accepted, as asked for") == 1
    print_status_of(config, layout)
    status = capsys.readouterr().out
    assert "    as the teacher labels: top-1" in status
    assert "NO BETTER THAN CHANCE" in status


def print_status_of(config: Config, layout: Layout) -> None:
    Path(config.run_dir, "config.yaml").touch()
    print_status(config, [layout])


def test_a_teacher_at_chance_is_refused_with_what_to_check(data: Data, weights: dict[str, Tensor]) -> None:
    safetensors.torch.save_file(
        weights | {"fc.weight": torch.zeros_like(weights["fc.weight"])}, data.folder / "elsewhere.safetensors"
    )
    config, layout = data.config()
    train_teacher(config, layout)
    with pytest.raises(
        StageError,
        match=r"no better than chance: top-1 .* of 200 .*teacher\.image_size, crop_pct.*teacher\.class_names",
    ):
        check(config, layout)
    record = require_done(layout.teacher, "teacher")
    assert record["summary"]["validation_images"] == NUM_VALIDATION


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnetrs26", 32),
        ("efficientnet_b0", 32),
        *(
            pytest.param(name, size, marks=pytest.mark.slow)
            for name, size in {
                "convnext_atto": 32, "vit_tiny_patch16_224": 224, "densenet121": 32, "ghostnet_100": 32, "levit_128s": 224
            }.items()
        ),
    ],
)  # fmt: skip
def test_outputs_of_any_family_are_reordered(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = build_model(name, 7, {}).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.shape[0] == 7:
            nn.init.normal_(module.weight)
            assert module.bias is not None
            nn.init.normal_(module.bias)
    order = [3, 0, 6, 1, 2, 5, 4]
    other = build_model(name, 7, {}).eval()
    other.load_state_dict(reorder_classes(name, {}, model.state_dict(), order, size))
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[:, order], other(images), rtol=1e-4, atol=1e-4)
