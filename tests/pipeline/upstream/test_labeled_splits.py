"""Labeled, validation and test images fit together, or the command says so before it computes anything, and so does its plan."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.shards.split import open_split
from data.shards.write import labeled_members, write_shards
from pipeline.core.config import load_config
from pipeline.core.stage import StageError
from pipeline.run import main
from pipeline.upstream.labeled_splits import check_splits
from pipeline.upstream.stage_inputs import require_same_classes
from tests.conftest import png
from tests.data.shards.test_shards import write_raw_tar

IMAGE = png(np.zeros((8, 8), np.uint8))
NAMES = ["one", "three", "two"]
E_ACUTE, E_AND_ACUTE = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


def write(folder: Path, labels: Sequence[int], names: Sequence[str] | None = NAMES) -> str:
    samples = ((f"{n}", labeled_members("png", IMAGE, label)) for n, label in enumerate(labels))
    write_shards(samples, str(folder), folder.name, 100, names)
    return f"{folder}/*.tar"


class Splits:
    """The words for a command on labeled, validation and test shards; what is not given is a good one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_raw_tar(folder / "unlabeled/u.tar", [("a.png", IMAGE)])

    def words(self, stages: str = "all", **patterns: str) -> list[str]:
        good = {
            name: patterns.get(name) or write(self.folder / name, [0, 1, 2])
            for name in ("labeled", "validation", "test")
        }
        fields = [f"data.{name}=[{pattern}]" for name, pattern in good.items() if pattern != "none"]
        model = [
            "teacher.model=resnetrs26",
            "teacher.image_size=16",
            "student.model=resnetrs26",
            "student.image_size=16",
        ]
        return [
            f"stage={stages}",
            f"run_dir={self.folder}/run",
            f"data.unlabeled=[{self.folder}/unlabeled/*.tar]",
            *fields,
            *model,
        ]


@pytest.fixture
def splits(tmp_path: Path) -> Splits:
    return Splits(tmp_path)


def refusal(capsys: pytest.CaptureFixture[str], words: list[str], folder: Path) -> str:
    """What both the plan and the command itself say; neither has computed anything."""
    said = []
    for ending in (["plan=true"], []):
        assert main([*words, *ending]) == 2
        said.append(capsys.readouterr().err)
        assert not list((folder / "run").glob("gen-*"))
        assert not (folder / "run/config.yaml").exists()
    assert said[0] == said[1]
    return said[0]


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_split_that_lacks_a_class_is_named_at_once(
    splits: Splits, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    short = write(splits.folder / "short", [0, 1], ["one", "two"])
    error = refusal(capsys, splits.words(**{name: short}), splits.folder)
    assert f"class 1 is 'three' for data.labeled and 'two' in data.{name}; data.{name} lacks 'three'" in error


def test_one_class_alone_is_refused(splits: Splits, capsys: pytest.CaptureFixture[str]) -> None:
    patterns = {name: write(splits.folder / f"{name}-1", [0, 0], ["one"]) for name in ("labeled", "validation", "test")}
    error = refusal(capsys, splits.words(**patterns), splits.folder)
    assert "data.labeled: all 2 images are of one class" in error


def test_images_of_one_of_several_classes_are_refused(splits: Splits, capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(capsys, splits.words(labeled=write(splits.folder / "same", [2, 2])), splits.folder)
    assert "all 2 images are of one class" in error


@pytest.mark.parametrize("name", ["labeled", "validation", "test"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat", ".cls holds 'cat'; expected a class index (0, 1, …)"),
        (b"3", "label 3 is out of range; expected 0 to 2"),
    ],
)
def test_a_wrong_label_in_any_split_is_shown(
    splits: Splits, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    write_raw_tar(
        splits.folder / "foreign/x.tar", [("a.png", IMAGE), ("a.cls", b"1"), ("b.png", IMAGE), ("b.cls", content)]
    )
    words = splits.words(**{name: f"{splits.folder}/foreign/x.tar"})
    assert main([*words, "plan=true"]) == 2
    assert f"x.tar, sample 1 (key 'b'): {message}" in capsys.readouterr().err
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not list((splits.folder / "run").glob("gen-*"))


def test_classes_without_images_and_no_validation_are_said_in_the_plan(
    splits: Splits, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.planning.plan.print_estimate", lambda *arguments: None)  # it times models
    words = splits.words(validation="none", test=write(splits.folder / "partial", [0, 2]))
    assert main([*words, "plan=true"]) == 0
    plan = capsys.readouterr().out
    assert "data.test has no image of 1 of 3 classes: three" in plan
    assert "validation  none: confidences are not calibrated" in plan


@pytest.mark.parametrize("name", ["validation", "test"])
def test_the_same_name_in_two_unicode_forms_is_one_class(splits: Splits, name: str) -> None:
    labeled = write(splits.folder / "a", [0, 1], ["b", E_ACUTE])
    other = write(splits.folder / "b", [0, 1], ["b", E_AND_ACUTE])
    opened = {"labeled": labeled, name: other}
    assert (
        check_splits(load_config(None, []), {n: open_split(p, str(splits.folder / "index")) for n, p in opened.items()})
        == []
    )
    both = open_split([labeled, other], str(splits.folder / "index"))
    assert both.class_names is not None


def test_two_unicode_forms_that_sort_otherwise_are_another_order(splits: Splits) -> None:
    with pytest.raises(
        StageError, match=r"class 0 is 'z' for a and 'é' in b; give both the same classes in the same order"
    ):
        require_same_classes(["z", E_ACUTE], "a", [E_AND_ACUTE, "z"], "b")


def test_a_finished_run_is_not_checked_again(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.core.layout import Layout
    from pipeline.upstream import labeled_splits as labeled
    from tests.pipeline.upstream.test_stage_inputs import make

    words = splits.words()
    config = load_config(None, words[1:])
    layout = Layout(config.run_dir)
    assert labeled.splits_to_check(config, [layout], ["teacher", "evaluate"]) == ["labeled", "validation", "test"]
    assert labeled.splits_to_check(config, [layout], ["label", "select"]) == []
    make(layout.teacher, "teacher", {}, {})
    assert labeled.splits_to_check(config, [layout], ["teacher", "evaluate"]) == ["test"]
    make(layout.evaluation, "evaluate", {}, {})
    assert labeled.splits_to_check(config, [layout], ["teacher", "evaluate"]) == []


def nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


name_lists = st.lists(st.sampled_from(["a", "b", E_ACUTE, E_AND_ACUTE, "z"]), max_size=4, unique_by=nfc)


@settings(max_examples=60, deadline=None)
@given(name_lists, name_lists)
def test_lists_agree_if_and_only_if_their_names_are_the_same_text(ones: list[str], twos: list[str]) -> None:
    same = list(map(nfc, ones)) == list(map(nfc, twos))
    if same or not ones or not twos:
        require_same_classes(ones, "one", twos, "two")
    else:
        with pytest.raises(StageError):
            require_same_classes(ones, "one", twos, "two")
