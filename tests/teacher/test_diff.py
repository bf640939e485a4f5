"""stage=diff: what changed between two selections, and between two generations' labels."""

import json
from pathlib import Path

import pytest

from data import storage
from data.labels.label_files import read_labels, read_labels_manifest
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import StageError
from teacher.diff import diff
from teacher.selection.stage import select
from tests.conftest import WriteDigits
from tests.small_run import SmallRun


@pytest.fixture
def run(tmp_path: Path, write_digits: WriteDigits) -> SmallRun:
    return SmallRun(tmp_path, write_digits)


def labeled(run: SmallRun, generations: int = 1) -> tuple[Config, list[Layout]]:
    """Generations with 30 and 12 wrong labels."""
    config = run.config(generations)
    layouts = run.layouts(config)
    for layout, num_wrong in zip(layouts, (30, 12), strict=False):
        run.model(layout.teacher, "teacher" if layout.generation == 1 else "student")
        run.label(config, layout, num_wrong)
        select(config, layout)
    return config, layouts


def with_rule(config: Config, **rule: object) -> Config:
    return config.model_copy(update={"select": config.select.model_copy(update=rule)})


def rows(layout: Layout, folder: str | None) -> dict[tuple[str, int], tuple[int, int]]:
    """(shard, ordinal) → label, copies."""
    assert folder is not None
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for entry in read_labels_manifest(layout.labels).values():
        table = read_labels(storage.join(layout.labels, f"{entry.name}.parquet"))
        copies = read_labels(storage.join(folder, f"{entry.name}.parquet")).column("copies").to_pylist()
        columns = (table.column("ordinal").to_pylist(), table.column("label").to_pylist(), copies)
        found |= {(entry.name, ordinal): (label, copy) for ordinal, label, copy in zip(*columns, strict=True)}
    return found


def test_two_generations_flip_rate_and_drift_are_counted_image_by_image(run: SmallRun) -> None:
    config, layouts = labeled(run, 2)
    result = diff(config, layouts)
    before, after = (rows(layout, layout.current_selection()) for layout in layouts)
    flips = [(before[key][0], after[key][0]) for key in before if before[key][0] != after[key][0]]
    assert result["flipped"] == len(flips) == 18, "12 of 30 wrong labels are wrong again, in the same way"
    assert result["flip_rate"] == len(flips) / len(before)
    assert sum(entry["images"] for entry in result["flips"]) == len(flips)
    for index, entry in enumerate(result["classes"]):
        assert entry["labels_before"] == sum(label == index for label, _ in before.values())
        assert entry["labels_after"] == sum(label == index for label, _ in after.values())
        assert entry["flipped_away"] == sum(one == index for one, _ in flips)
        assert entry["kept_after"] == sum(label == index and copies > 0 for label, copies in after.values())
    kept = [(before[key][1] > 0, after[key][1] > 0) for key in before]
    assert result["kept"] == {
        "both": kept.count((True, True)), "only_before": kept.count((True, False)), "only_after": kept.count((False, True))
    }  # fmt: skip
    assert result["copies"] == {
        side: sum(c for _, c in found.values()) for side, found in (("before", before), ("after", after))
    }
    assert json.loads((Path(config.run_dir) / "diff.json").read_text()) == result


def test_an_image_that_only_one_side_has_is_gone_or_new(run: SmallRun) -> None:
    config, layouts = labeled(run, 2)
    name = next(iter(read_labels_manifest(layouts[1].labels)))
    (layout,) = layouts[1:]
    number = len(read_labels(url := storage.join(layout.labels, f"{name}.parquet")))
    storage.remove(url)
    with pytest.raises(FileNotFoundError, match=name):  # lost, which is no change of the corpus
        diff(config, layouts)
    manifest = Path(layout.labels, "manifest.json")  # the corpus shrank
    shards = [entry for entry in json.loads(manifest.read_text())["shards"] if entry["name"] != name]
    manifest.write_text(json.dumps({"shards": shards}))
    assert diff(config, layouts)["images"]["gone"] == number
    assert diff(config, layouts, before="2", after="1")["images"]["new"] == number


def test_another_setting_says_what_changed_against_the_last_one(
    run: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    config, (layout,) = labeled(run)
    first = layout.current_selection()
    capsys.readouterr()
    select(with_rule(config, per_class=3), layout)
    out = capsys.readouterr().out
    before, after = rows(layout, first), rows(layout, layout.current_selection())
    gone = sum(before[key][1] > 0 and after[key][1] == 0 for key in before)
    assert gone > 0
    assert f"{gone} no longer" in out
    assert "0 of 117 labels flipped (0.00%)" in out
    result = diff(config, [layout])
    assert result["kept"]["only_before"] == gone
    assert result["before"].split("/")[1] == storage.base_name(first or "")


def test_after_a_selection_was_made_anew_others_are_compared_with_it(
    run: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    config, (layout,) = labeled(run)
    select(config, layout, force=True)  # leaves the old one beside it
    capsys.readouterr()
    select(with_rule(config, per_class=3), layout)
    assert "0 of 117 labels flipped" in capsys.readouterr().out


def test_a_selection_of_labels_that_were_made_anew_is_not_compared(
    run: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    config, (layout,) = labeled(run)
    storage.move(layout.labels, f"{layout.labels}.old-1")
    run.label(config, layout, 5)
    capsys.readouterr()
    select(config, layout)
    assert "flipped" not in capsys.readouterr().out


def test_sides_that_are_not_there_are_named(run: SmallRun) -> None:
    config, layouts = labeled(run)
    with pytest.raises(StageError, match="there is only one selection"):
        diff(config, layouts)
    with pytest.raises(StageError, match=r"expected a generation \(1\) but got '7'"):
        diff(config, layouts, before="7")
    with pytest.raises(StageError, match=r"must name one selection .* but matches 0"):
        diff(config, layouts, before="1/zz")
    select(with_rule(config, per_class=3), layouts[0])
    prefix = storage.base_name(layouts[0].current_selection() or "")[:6]
    assert diff(config, layouts, before="1", after=f"1/{prefix}")["kept"]["only_before"] == 0
    assert storage.base_name(diff(config, layouts)["after"]).startswith(prefix)
