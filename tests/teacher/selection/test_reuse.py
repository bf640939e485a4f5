"""select.keep_images: a later generation reuses the images chosen before, with new labels."""

from pathlib import Path

import pytest

from data import storage
from data.labels.label_files import read_labels
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import StageError, done_record
from pipeline.upstream.stage_inputs import require_labels, require_selection
from teacher.selection.stage import select
from tests.conftest import WriteDigits
from tests.pipeline.report.test_report import report_of
from tests.small_run import SmallRun
from tests.teacher.test_diff import rows, with_rule


@pytest.fixture
def run(tmp_path: Path, write_digits: WriteDigits) -> SmallRun:
    return SmallRun(tmp_path, write_digits)


def two_generations(run: SmallRun, **rule: object) -> tuple[Config, Layout, Layout]:
    """The first is selected; the second has labels."""
    config = with_rule(run.config(2), keep_images=True, **rule)
    first, second = run.layouts(config)
    for layout, wrong in ((first, 30), (second, 12)):
        run.model(layout.teacher, "teacher" if layout.generation == 1 else "student")
        run.label(config, layout, wrong)
    select(config, first)
    return config, first, second


def test_copies_stay_with_their_images_and_labels_are_new(run: SmallRun) -> None:
    config, first, second = two_generations(run, per_class=14)
    record = select(config, second)
    before, after = (rows(layout, layout.current_selection()) for layout in (first, second))
    assert {key: copies for key, (_, copies) in before.items()} == {key: copies for key, (_, copies) in after.items()}
    assert {copies for _, copies in after.values()} >= {1, 2}, "images of rare classes are repeated"
    assert any(before[key][0] != after[key][0] for key in before)
    assert record["summary"]["kept"] == sum(copies > 0 for _, copies in after.values())
    assert record["summary"]["copies"] == sum(copies for _, copies in after.values())
    content = storage.read_text(storage.join(second.current_selection() or "", "selection.json"))
    assert '"kept_from"' in content
    run.write_truth()
    assert "labels; nothing was selected again" in report_of(config, [first, second])


def test_an_image_that_is_excluded_by_now_is_not_kept(run: SmallRun) -> None:
    config, first, second = two_generations(run)
    chosen = [key for key, (_, copies) in rows(first, first.current_selection()).items() if copies]
    shard = read_labels(f"{second.labels}/{chosen[0][0]}.parquet").to_pylist()
    key = next(row["__key__"] for row in shard if row["ordinal"] == chosen[0][1])
    (run.folder / "exclude.txt").write_text(f"{key}\n")
    data = config.data.model_copy(update={"exclude": str(run.folder / "exclude.txt")})
    config = config.model_copy(update={"data": data})
    record = select(config, second)
    after = rows(second, second.current_selection())
    assert after[chosen[0]][1] == 0
    assert (
        sum(copies > 0 for _, copies in after.values())
        == len(chosen) - record["summary"]["reasons"]["excluded_by_user"]
    )


def test_the_first_generation_chooses_whatever_the_setting(run: SmallRun) -> None:
    config, first, second = two_generations(run)
    digest = first.current_selection()
    select(with_rule(config, keep_images=False), first)
    assert first.current_selection() == digest
    select(config, second)
    with pytest.raises(StageError, match=r"not made with select\.keep_images=false"):
        require_selection(with_rule(config, keep_images=False), second, require_labels(config, second))
    assert require_selection(config, second, require_labels(config, second))[0] == second.current_selection()
    select(with_rule(config, keep_images=False), second)
    assert rows(second, second.current_selection()) != rows(first, first.current_selection())


def test_another_selection_before_is_another_one_after(run: SmallRun) -> None:
    config, first, second = two_generations(run)
    select(config, second)
    kept = second.current_selection()
    select(with_rule(config, per_class=2), first)
    select(with_rule(config, per_class=2), second)
    assert second.current_selection() != kept
    record = done_record(second.current_selection() or "")
    assert record is not None
    assert record["summary"]["kept"] <= 20


def test_without_a_selection_before_it_says_so(run: SmallRun) -> None:
    config, first, second = two_generations(run)
    storage.remove(f"{first.selections}/current")
    with pytest.raises(StageError, match="generation 1 has no selection"):
        select(config, second)
