"""What the report says of labels: their precision, flips between generations, near-duplicates."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from data.images.decode import decode
from data.images.held_out_hashes import HeldOutRow, write_hashes
from data.images.similarity import thumbnail as thumbnail_of
from data.labels.label_files import (
    VALIDATION_NAME,
    read_labels,
    read_labels_manifest,
)
from data.tables import write_table
from pipeline.core.layout import Layout
from pipeline.core.stage import StageError
from teacher.selection.stage import select
from tests.conftest import png
from tests.pipeline.report.test_report import cells, report_of, whole_run
from tests.small_run import NUM_UNLABELED, PER_SHARD, SmallRun


def test_expected_and_measured_precision_are_side_by_side(run: SmallRun) -> None:
    config = run.config(select={"confidence_threshold": 0.6, "per_class": 8, "max_copies": 4})
    layout = Layout(config.run_dir)
    run.write_truth()
    run.model(layout.teacher, "teacher")
    run.label(config, layout)
    label, right = np.arange(200) % 10, np.arange(200) >= 30
    columns = {"label": label, "predicted": np.where(right, label, (label + 1) % 10)}
    table = pa.table({name: pa.array(values, pa.int32()) for name, values in columns.items()})
    confidence = pa.array(np.linspace(0.5, 0.9, 200).astype(np.float32))
    write_table(f"{layout.labels}/{VALIDATION_NAME}", table.append_column("confidence", confidence))
    select(config, layout)
    html = report_of(config, [layout])
    found = labels_of(layout)
    above = [row for row in found if row["confidence"] >= np.float32(0.6)]
    places = [(f"unlabeled-{number // PER_SHARD:06d}", number % PER_SHARD) for number in range(NUM_UNLABELED)]
    truth = dict(zip(places, run.truth.tolist(), strict=True))
    real = sum(truth[row["shard"], row["ordinal"]] == row["label"] for row in above) / len(above)
    kept = [row for row in found if row["copies"]]
    expected = sum(row["confidence"] for row in kept) / len(kept)
    row = cells(html, "at or above the threshold: validation images")
    assert row == [f"{len(above)}", "100.0 % (97.5 % to 100.0 %)", f"{100 * real:.1f} %", f"{100 * (1 - real):+.1f}"]
    assert cells(html, "kept labels: mean confidence")[:2] == [f"{len(kept)}", f"{100 * expected:.1f} %"]
    assert "150 of 150 validation images at or above the threshold are labeled right" in html
    assert "as it labels" in html
    assert "Just below the cut-off: the image of highest confidence that was left out" in html


def labels_of(layout: Layout) -> list[dict[str, Any]]:
    """Read all label rows with their copies."""
    folder = layout.current_selection()
    assert folder is not None
    found = []
    for entry in read_labels_manifest(layout.labels).values():
        rows = read_labels(f"{layout.labels}/{entry.name}.parquet").to_pylist()
        copies = read_labels(f"{folder}/{entry.name}.parquet").column("copies").to_pylist()
        found += [row | {"shard": entry.name, "copies": number} for row, number in zip(rows, copies, strict=True)]
    return found


@pytest.mark.slow
def test_labels_that_flipped_between_generations_are_listed(run: SmallRun) -> None:
    config = run.config(2)
    for layout, wrong in zip(run.layouts(config), (30, 12), strict=True):
        run.model(layout.teacher, "teacher" if layout.generation == 1 else "student")
        run.label(config, layout, wrong)
        select(config, layout)
    run.write_truth()
    html = report_of(config, run.layouts(config))
    assert "18 of 117 labels (15.38 %) differ from those of generation\n1" in html


def test_a_truth_file_that_is_not_there_is_named(run: SmallRun) -> None:
    config, layout = whole_run(run)
    (run.folder / "truth.parquet").unlink()
    with pytest.raises(StageError, match=r"data\.truth=.*truth\.parquet: no such file"):
        report_of(config, [layout])


def test_only_images_with_a_known_truth_count(run: SmallRun) -> None:
    config, layout = whole_run(run)
    run.write_truth(40)
    assert "25.00 % of the pseudo-labels are right" in report_of(config, [layout])  # 10 of the first 40


def test_near_duplicates_are_counted_and_their_listing_is_named(
    run: SmallRun, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    picture = thumbnail_of(decode(png(digits[0][5])))
    write_hashes(
        str(run.folder / "held_out"), [HeldOutRow(5, 2**63, picture.tobytes(), bytes(128))]
    )  # label rows' hashes are 0, 1, 2, …
    data = {
        "unlabeled": [f"{run.folder}/unlabeled/*.tar"],
        "held_out_hashes": [f"{run.folder}/held_out/hashes.parquet"],
    }
    config, layout = whole_run(run, data=data, select={"confidence_threshold": 0.3, "max_near_duplicates": 1})
    html = report_of(config, [layout])
    assert cells(html, "left out: near-duplicate of a validation or test image")[0] == "1"
    assert (
        cells(html, "left out: near-duplicate of enough others")[0] == "67"
    )  # 117 labels with 49 hashes, and that one
    assert "1 unlabeled images are near-duplicates of one of the\n1 held-out images" in html
    assert f"{next(Path(layout.near_duplicates).iterdir()).name}/listing.parquet" in html
