"""A stage refuses a mixture of old and new outputs, and says which earlier stage to run."""

from pathlib import Path
from typing import Any

import pytest

from data import storage
from data.errors import DataError
from pipeline.core.config import load_config
from pipeline.core.layout import CURRENT_NAME, Layout
from pipeline.core.schema import Config
from pipeline.core.stage import Fingerprint, StageError, StageRefusedError, open_stage, require_done
from pipeline.upstream.stage_inputs import explain_inputs, require_labels, require_selection
from student.warm_start import begin_student, warn_of_smaller_student
from teacher.selection.stage import select

CLASSES = {"num_classes": 10, "class_names": None}


def make(folder: str, name: str, config: dict[str, Any], inputs: dict[str, str], force: bool = False) -> dict[str, Any]:
    """A stage that is done; its one output says what it was made of."""
    stage = open_stage(folder, name, Fingerprint(config, inputs), force)
    storage.write_text(stage.path("output"), str([config, inputs]))
    stage.commit(["output"], CLASSES)
    return require_done(folder, name)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(str(tmp_path / "run"))


def make_teacher(layout: Layout, epochs: int = 3, force: bool = False) -> dict[str, Any]:
    return make(layout.teacher, "teacher", {"teacher.epochs": epochs}, {"labeled": "abc"}, force)


def make_labels(layout: Layout, force: bool = False) -> dict[str, Any]:
    inputs = {"teacher": require_done(layout.teacher, "teacher")["digest"]}
    return make(layout.labels, "label", {"label.views": 1}, inputs, force)


def make_selection(layout: Layout, config: Config) -> dict[str, Any]:
    fingerprint = Fingerprint(
        config.stage_fields("select"), {"labels": require_done(layout.labels, "label")["digest"], "exclusions": "none"}
    )
    name = fingerprint.digest()
    record = make(f"{layout.selections}/{name}", "select", dict(fingerprint.config), dict(fingerprint.inputs))
    storage.write_text(f"{layout.selections}/{CURRENT_NAME}", name)
    return record


def open_student(config: Config, layout: Layout) -> None:
    labels = require_labels(config, layout)
    _, selection = require_selection(config, layout, labels)
    inputs = {"labels": labels["digest"], "selection": selection["digest"]}
    open_stage(layout.student, "student", Fingerprint({}, inputs), explain=explain_inputs(layout))
    storage.write_text(storage.join(layout.student, "output"), "")


def test_labels_of_an_earlier_teacher_are_refused_until_they_are_made_again(layout: Layout) -> None:
    config = load_config(None, [f"run_dir={layout.run_dir}"])
    make_teacher(layout)
    make_labels(layout)
    make_selection(layout, config)
    open_student(config, layout)
    make_teacher(layout, epochs=4, force=True)
    for stage in (select, open_student):
        with pytest.raises(StageError, match=r"labels are of another teacher .* run stage=label force=true"):
            stage(config, layout)
    make_labels(layout, force=True)
    with pytest.raises(StageError, match=r"selected from other labels .* run stage=select first"):
        open_student(config, layout)


def test_while_a_teacher_is_made_anew_nothing_uses_the_old_ones_labels(layout: Layout) -> None:
    config = load_config(None, [f"run_dir={layout.run_dir}"])
    make_teacher(layout)
    make_labels(layout)
    open_stage(layout.teacher, "teacher", Fingerprint({"teacher.epochs": 4}, {}), force=True)
    with pytest.raises(StageError, match="run stage=teacher first"):
        select(config, layout)


def test_held_out_hashes_that_are_something_else_are_named(layout: Layout, tmp_path: Path) -> None:
    make_teacher(layout)
    make_labels(layout)
    (tmp_path / "hashes.parquet").write_bytes(b"not Parquet")
    config = load_config(None, [f"data.held_out_hashes=[{tmp_path}/hashes.parquet]"])
    with pytest.raises(DataError, match=r"hashes\.parquet: expected a hashes\.parquet as data\.pack writes it"):
        select(config, layout)
    config = load_config(None, [f"data.held_out_hashes=[{tmp_path}/nowhere.parquet]"])
    with pytest.raises(DataError, match=r"nowhere\.parquet is not there; data\.pack writes it"):
        select(config, layout)


def test_labels_without_any_teacher_can_be_used(layout: Layout) -> None:
    make_teacher(layout)
    labels = make_labels(layout)
    storage.remove(layout.teacher)
    assert require_labels(load_config(None, []), layout) == labels
    assert begin_student(load_config(None, []), layout, 3, None) is None
    warn_of_smaller_student(load_config(None, []), layout, 3)
    with pytest.raises(StageError, match=r"student\.init=teacher: \S+teacher has no weights; bring them, or"):
        begin_student(load_config(None, ["student.init=teacher"]), layout, 3, None)


def test_a_student_of_another_selection_is_told_the_fields_and_how_to_go_back(layout: Layout) -> None:
    first = load_config(None, ["select.per_class=60", "select.confidence_threshold=0.3"])
    tried = load_config(None, ["select.per_class=null", "select.confidence_threshold=0.5"])
    make_teacher(layout)
    make_labels(layout)
    make_selection(layout, first)
    open_student(first, layout)
    make_selection(layout, tried)
    with pytest.raises(StageRefusedError) as caught:
        open_student(tried, layout)
    message = str(caught.value)
    for part in (
        "selection: changed upstream",
        "select.per_class: 60 there, None now",
        "select.confidence_threshold: 0.3 there, 0.5 now",
        "To go back to it: stage=select select.confidence_threshold=0.3 select.per_class=60",
        "stage=student force=true",
    ):
        assert part in message
    make_selection(layout, first)
    open_student(first, layout)


def test_a_student_never_trains_on_another_selection_than_the_configuration_says(layout: Layout) -> None:
    make_teacher(layout)
    make_labels(layout)
    make_selection(layout, load_config(None, ["select.per_class=60"]))
    with pytest.raises(StageError, match=r"select\.per_class: 60 there, 20 now\nRun stage=select first"):
        open_student(load_config(None, ["select.per_class=20"]), layout)


def test_a_student_never_trains_on_a_selection_of_other_excluded_keys(layout: Layout, tmp_path: Path) -> None:
    make_teacher(layout)
    make_labels(layout)
    make_selection(layout, load_config(None, []))
    (tmp_path / "exclude.txt").write_text("000012\n")
    with pytest.raises(StageError, match=r"made with another data\.exclude; run stage=select first"):
        open_student(load_config(None, [f"data.exclude={tmp_path}/exclude.txt"]), layout)


def test_a_student_of_other_labels_is_told_what_made_them_other(layout: Layout) -> None:
    config = load_config(None, [])
    make_teacher(layout)
    make_labels(layout)
    make_selection(layout, config)
    open_student(config, layout)
    make_teacher(layout, epochs=4, force=True)
    make_labels(layout, force=True)
    make_selection(layout, config)
    with pytest.raises(StageRefusedError, match=r"labels: changed upstream .*\n    teacher: another one"):
        open_student(config, layout)


def test_another_number_of_classes_than_the_labels_have_is_refused(layout: Layout) -> None:
    make_teacher(layout)
    make_labels(layout)
    assert require_labels(load_config(None, ["data.num_classes=10"]), layout)
    with pytest.raises(StageError, match=r"data\.num_classes=7, but .* has 10 classes"):
        require_labels(load_config(None, ["data.num_classes=7"]), layout)
