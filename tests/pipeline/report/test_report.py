"""The report shows what the records hold, for any part of a run; it leaks no secret, and changes no other file."""

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from data import storage
from data.images.corruptions import CORRUPTIONS
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import Fingerprint, StageError, open_stage
from pipeline.evaluation.summary import write_summary
from pipeline.models.registry import build_model, count_parameters
from pipeline.models.weights import WeightsInfo, save_weights
from pipeline.report.build import REPORT_NAME, write_report
from teacher.selection.stage import select
from tests.conftest import WriteDigits
from tests.small_run import NUM_TEST, REASON, SmallRun


def first(count: int) -> np.ndarray:
    return np.arange(NUM_TEST) < count


def whole_run(run: SmallRun, **options: Any) -> tuple[Config, Layout]:
    """Make teacher, labels, selection, student and test results; of 400 images the teacher has 300 right, the student 320."""
    config = run.config(**options)
    layout = Layout(config.run_dir)
    run.write_truth()
    run.model(layout.teacher, "teacher")
    run.label(config, layout)
    select(config, layout)
    run.model(layout.student, "student")
    student = first(330)
    student[:10] = False  # loses 10 that the teacher has, gains 30
    run.evaluate(layout, {"teacher": first(300), "student": student})
    return config, layout


def report_of(config: Config, layouts: Sequence[Layout]) -> str:
    write_report(config, layouts)
    return (Path(config.run_dir) / REPORT_NAME).read_text()


def cells(html: str, row: str) -> list[str]:
    """Cells of the first table row named `row`."""
    found = re.search(rf'<th scope="row">{re.escape(row)}</th>(.*?)</tr>', html)
    assert found, row
    return re.findall(r"<td[^>]*>(.*?)</td>", found[1])


def figures_in(html: str) -> list[ElementTree.Element]:
    """Parse the page's SVG figures."""
    return [
        ElementTree.fromstring(base64.b64decode(code))
        for code in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", html)
    ]


def test_the_page_has_the_figures_of_the_records(run: SmallRun) -> None:
    config, layout = whole_run(run)
    html = report_of(config, [layout])
    # 20 of 400 images more; variance of the paired differences: 40/400 − 0.05²
    assert "The student is 5.00 ± 1.56 points better than the teacher on 400 test images" in html
    assert cells(html, "student − teacher") == ["+5.00 ± 1.56", "30", "10"]
    assert cells(html, "top-1") == ["75.00 ± 2.17 %", "80.00 ± 2.00 %"]
    assert cells(html, "top-5") == ["98.75 %", "98.75 %"]
    assert cells(html, "parameters") == ["1.23 M", "1.23 M"]
    assert cells(html, "top-1, validation") == ["62.50 %", "62.50 %"]
    assert cells(html, "unlabeled images") == ["120", "100.0 %"]
    assert cells(html, "quarantined: not usable") == ["3", "2.5 %"]
    assert cells(html, "3") == [REASON]


def test_the_page_shows_the_selection_and_the_fraction_that_is_right(run: SmallRun) -> None:
    config, layout = whole_run(run)
    html = report_of(config, [layout])
    folder = layout.current_selection()
    assert folder is not None
    selection = json.loads(storage.read_text(storage.join(folder, "selection.json")))
    assert cells(html, "kept")[0] == str(selection["totals"]["kept"])
    entry = selection["classes"][3]
    assert cells(html[html.index("Classes before") :], "digit_3")[:2] == [str(entry["available"]), str(entry["kept"])]
    assert "74.36 % of the pseudo-labels are right" in html  # 117 labels, the first 30 wrong
    assert html.count('<div class="verdict">✗ is') == html.count('class="sample is-wrong"') > 0


def test_the_table_prints_accuracies_parameters_labels_time_and_path(
    run: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    config, layout = whole_run(run)
    capsys.readouterr()
    write_report(config, [layout])
    printed = capsys.readouterr().out
    assert re.search(r"teacher +75\.00 % +98\.75 % +1\.23 M\n", printed)
    assert re.search(r"student +80\.00 % +98\.75 % +1\.23 M +\+5\.00 ± 1\.56\n", printed)
    assert re.search(r"pseudo-labels: \d+ of 117 kept; [\d.]+ % of the kept and 74\.36 % of all are right", printed)
    assert "teacher 12.0 s" in printed
    assert f"report: {config.run_dir}/report.html" in printed


def test_the_same_run_gives_the_same_page_and_nothing_else_changes(run: SmallRun) -> None:
    config, layout = whole_run(run)

    def files() -> dict[str, bytes]:
        found = [path for path in run.folder.rglob("*") if path.is_file() and path.name != REPORT_NAME]
        return {str(path): path.read_bytes() for path in found}

    before = files()
    assert report_of(config, [layout]) == report_of(config, [layout])
    assert files() == before


def test_names_from_the_data_are_text_and_never_markup(tmp_path: Path, write_digits: WriteDigits) -> None:
    names = ["<script>alert(1)</script>", "$x_{$", "日本", "a\x00b\ud800", '"><img src=x onerror=y>', *"fghij"]
    run = SmallRun(tmp_path, write_digits, names)
    config, layout = whole_run(run)
    html = report_of(config, [layout])
    assert "<script" not in html
    assert "<img src=x" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    labels = {text.text for figure in figures_in(html) for text in figure.iter("{http://www.w3.org/2000/svg}text")}
    assert {"$x_{$", "日本", "a�b�"} <= labels


def test_a_page_stands_alone_and_describes_each_figure(run: SmallRun) -> None:
    config, layout = whole_run(run)
    html = report_of(config, [layout])
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert len(figures_in(html)) == 8
    assert all(len(alt) > 20 for alt in re.findall(r'<img [^>]*alt="([^"]*)"', html))
    assert len(re.findall(r"<img ", html)) == len(re.findall(r'<img [^>]*alt="[^"]+"', html))


def test_a_teacher_alone_has_a_report(run: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    config = run.config(truth=False)
    layout = Layout(config.run_dir)
    run.model(layout.teacher, "teacher")
    html = report_of(config, [layout])
    assert "There is no student to compare" in html
    assert "62.50 % (validation)" in capsys.readouterr().out


def test_without_test_images_and_truth_the_rest_is_there(run: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    config = run.config(truth=False)
    layout = Layout(config.run_dir)
    run.model(layout.teacher, "teacher")
    run.label(config, layout)
    select(config, layout)
    run.model(layout.student, "student")
    capsys.readouterr()
    html = report_of(config, [layout])
    assert "Validation does not say how many of the 79 kept labels are right: there are no validation images" in html
    assert "not known: there is no truth file" in html
    assert "No test images" in html
    assert 'class="verdict"' not in html
    assert len(figures_in(html)) == 5  # timeline, loss, validation, confidence, classes
    printed = capsys.readouterr().out
    assert "Not evaluated" in printed
    assert "right" not in printed


def test_a_pretraining_shows_its_curves_and_which_images_it_saw(run: SmallRun) -> None:
    config, layout = whole_run(run)
    assert "Pretraining" not in report_of(config, [layout])
    run.pretrain(layout)
    html = report_of(config, [layout])
    assert "<h2>Pretraining (byol)</h2>" in html
    for label in ("loss", "kNN top-1, % of labeled images", "feature spread"):
        assert f"Line chart of the pretraining&#39;s {label} over its steps" in html
    assert cells(html, "left out: cannot be decoded") == ["4"]
    assert cells(html, "used") == ["113"]
    assert "(71.50 % right at the" in html
    assert cells(html, "pretrain")[:2] == ["4.0 s", "500"]  # 20 steps of 100 images
    assert "have collapsed" not in html


def test_a_collapsed_pretraining_says_so(run: SmallRun) -> None:
    config, layout = whole_run(run)
    run.pretrain(layout, spread=0.03)
    assert "<strong>The features have collapsed</strong> (spread 0.030" in report_of(config, [layout])


def test_weights_trained_elsewhere_show_without_curves_and_without_secrets(run: SmallRun) -> None:
    weights = "https://store/teacher.pth?token=s3cret"
    config = run.config(truth=False, teacher={"weights": weights})
    layout = Layout(config.run_dir)
    stage = open_stage(layout.teacher, "teacher", Fingerprint({"teacher.weights": weights}, {"weights": weights}))
    model = build_model("resnetrs26", 10, {"width": 0.125})
    info = WeightsInfo(model="resnetrs26", model_args={"width": 0.125}, num_classes=10, image_size=16, crop_pct=1,
                       interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))  # fmt: skip
    save_weights(stage.path("weights"), model.state_dict(), info)
    stage.commit(["weights/model.safetensors", "weights/config.json"], {"trained_elsewhere": weights})
    html = report_of(config, [layout])
    assert "s3cret" not in html
    assert "<h2>Training</h2>" not in html
    assert cells(html, "parameters") == [f"{count_parameters(model) / 1e6:.2f} M"]


def test_of_a_thousand_classes_twenty_are_shown(tmp_path: Path, write_digits: WriteDigits) -> None:
    run = SmallRun(tmp_path, write_digits, [f"class_{number}" for number in range(1000)])
    config, layout = whole_run(run)
    html = report_of(config, [layout])
    for title in ("Accuracy per class", "Classes before"):
        table = html[html.index(title) :]
        assert len(re.findall(r'<th scope="row">class_', table[: table.index("</tbody>")])) == 20
    assert len(html) < 3_000_000


def test_classes_without_names_are_shown_by_number(tmp_path: Path, write_digits: WriteDigits) -> None:
    config, layout = whole_run(SmallRun(tmp_path, write_digits, None))
    assert cells(report_of(config, [layout]), "class 3")


def test_each_generation_has_its_student_and_its_labels(run: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    config, one = whole_run(run, generations=2)
    two = Layout(config.run_dir, 2)
    run.label(config, two, num_wrong=10)
    select(config, two)
    run.model(two.student, "student", seconds=50)
    run.evaluate(two, {"teacher": first(320), "student": first(360)})
    html = report_of(config, [one, two])
    assert cells(html, "top-1")[2] == "90.00 ± 1.50 %"
    assert "Student 2 is 15.00 ± 1.79 points better than the teacher" in html
    assert "Pseudo-labels, generation 2" in html
    printed = capsys.readouterr().out
    assert re.search(r"student 2 +90\.00 %", printed)
    assert printed.count("12.0 s") == 2  # teacher and student 1, each once
    assert "student 2 50.0 s" in printed


def test_results_of_an_older_student_are_not_shown(run: SmallRun) -> None:
    config, layout = whole_run(run)
    storage.remove(layout.student)
    run.model(layout.student, "student", weights=b"others")
    html = report_of(config, [layout])
    assert "80.00" not in html
    assert "Run stage=evaluate to bring it up to date" in html


@pytest.mark.parametrize("damage", ["removed", "cut short"])
def test_without_the_unlabeled_images_the_labels_are_still_shown(run: SmallRun, damage: str) -> None:
    config, layout = whole_run(run)
    for shard in (run.folder / "unlabeled").glob("*.tar"):
        shard.unlink() if damage == "removed" else shard.write_bytes(shard.read_bytes()[:100])
    assert report_of(config, [layout]).count("image not there") > 20


def test_an_empty_run_directory_has_no_report(run: SmallRun) -> None:
    config = run.config()
    with pytest.raises(StageError, match="no stage is done"):
        write_report(config, run.layouts(config))
    assert not (Path(config.run_dir) / REPORT_NAME).exists()


def test_errors_under_corruptions_are_shown_if_measured(run: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    config, layout = whole_run(run)
    assert "Robustness" not in report_of(config, [layout])
    url = storage.join(layout.evaluation, "done.json")
    record = json.loads(storage.read_text(url))
    for role, error in (("teacher", 0.4), ("student", 0.3)):
        errors = {name: [error - 0.1, error, error, error, error + 0.1] for name in CORRUPTIONS}
        record["summary"][role]["robustness"] = {
            "images": 1000, "clean_error": 0.125, "mean_corruption_error": error, "errors": errors,
        }  # fmt: skip
    record["summary"]["student"]["robustness"]["error_against_teacher"] = 0.75
    storage.write_text(url, json.dumps(record))
    html = report_of(config, [layout])
    assert cells(html, "none") == ["12.5", "12.5"]
    assert cells(html, "glass blur") == cells(html, "mean of all") == ["40.0", "30.0"]
    said = "Under corruption: teacher 40.0 % wrong, student 30.0 % wrong (0.75 times its teacher's errors)."
    assert said in capsys.readouterr().out
    assert said.replace("'", "&#39;") in html


def test_results_older_than_the_models_are_not_shown(run: SmallRun) -> None:
    config, layout = whole_run(run)
    assert {"teacher", "student", "labels"} <= write_summary(config, layout).keys()
    storage.remove(layout.student)
    run.model(layout.student, "student", weights=b"another")
    summary = write_summary(config, layout)
    assert "student" not in summary  # it has not been evaluated
    assert summary["teacher"]["top1"] == 0.75
    storage.remove(layout.teacher)
    run.model(layout.teacher, "teacher", weights=b"another")
    assert "teacher" not in write_summary(config, layout)
    html = report_of(config, [layout])
    assert "the output of stage label is not shown: it is from before stage teacher ran last" in html
    storage.remove(layout.labels)
    run.label(config, layout, num_wrong=10)
    assert "kept" not in write_summary(config, layout)["labels"]  # these labels have no selection yet
