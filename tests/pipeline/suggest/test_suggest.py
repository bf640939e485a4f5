"""stage=suggest: what is chosen is uncertain and different, is never excluded, and is what the list says."""

from __future__ import annotations

import csv
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data.labels.label_files import read_labels
from data.labels.top_k import top_k_columns
from pipeline.core.layout import Layout
from pipeline.run import main
from pipeline.suggest.candidates import find_candidates
from pipeline.suggest.choose import choose_diverse, disagreement
from tests.conftest import WriteDigits
from tests.pipeline.earlier_run import RUN, unpack_earlier_run
from tests.small_run import SmallRun


@pytest.fixture
def _run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that an earlier version finished, of 12-pixel images."""
    unpack_earlier_run(tmp_path)
    monkeypatch.chdir(tmp_path)


def rows_of(folder: str = f"{RUN}/suggestions") -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(folder, "suggestions.csv").read_text())))


def _shard_of(name: str) -> Path:
    (found,) = Path.cwd().rglob(f"{name}.tar")
    return found


def test_voters_that_agree_do_not_disagree() -> None:
    sure, split = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0.5, 0.5], [0.5, 0.5]])
    votes = np.stack([np.stack([sure[0], split[0]]), np.stack([sure[1], split[1]])])  # voters, images, classes
    found = disagreement(votes)
    assert found == pytest.approx([np.log(2), 0.0]), "two sure voters of two classes; two that are both undecided"


def test_of_equally_uncertain_images_the_most_different_are_chosen() -> None:
    features = np.array([[1, 0], [1, 0.01], [0, 1], [1, 1], [0.01, 1]], float)
    uncertainty = np.array([1.1, 1, 1, 1, 1])
    assert choose_diverse(uncertainty, features, 3) == [0, 2, 3]
    assert choose_diverse(np.array([1.0, 0, 0, 0, 0.9]), features, 2) == [0, 4], (
        "a sure image is not chosen for its distance"
    )
    assert sorted(choose_diverse(uncertainty, features, 9)) == [0, 1, 2, 3, 4]


def test_candidates_are_the_smallest_margins_of_all_shards(tmp_path: Path, write_digits: WriteDigits) -> None:
    run = SmallRun(tmp_path, write_digits)
    config = run.config()
    layout = Layout(config.run_dir)
    run.model(layout.teacher, "teacher")
    run.label(config, layout)
    tables = [read_labels(str(path)) for path in Path(layout.labels).glob("unlabeled-*.parquet")]
    probabilities = np.concatenate([top_k_columns(table)[1] for table in tables]).astype(np.float32)
    found = find_candidates(config, layout, 10)
    assert [each.margin for each in found] == sorted((probabilities[:, 0] - probabilities[:, 1]).tolist())[:10]
    assert len({each.shard for each in found}) == 3


@pytest.mark.usefixtures("_run")
def test_pictures_and_list_are_of_the_least_certain_labels(capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in Path(RUN).rglob("*") if path.is_file()}
    assert main(["stage=suggest", f"run_dir={RUN}", "suggest.images=5", "suggest.candidates_per_image=2"]) == 0
    rows = rows_of()
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert all(row["class"] == "" for row in rows)
    margins: dict[tuple[str, str], float] = {}
    for path in Path(RUN, "gen-1/labels").glob("unlabeled-*.parquet"):
        table = read_labels(str(path))
        _, probabilities = top_k_columns(table)
        keys = [(path.stem, key) for key in table.column("__key__").to_pylist()]
        margins |= dict(zip(keys, (probabilities[:, 0].astype(float) - probabilities[:, 1]).tolist(), strict=True))
    bound = sorted(margins.values())[9]
    assert all(margins[row["shard"], row["key"]] <= bound for row in rows), "of the 5 × 2 smallest margins"
    with tarfile.open(_shard_of(rows[0]["shard"])) as shard:
        names = {name.partition(".")[0]: name for name in shard.getnames()}
        member = shard.extractfile(names[rows[0]["key"]])
        assert member is not None
        assert Path(RUN, "suggestions", rows[0]["picture"]).read_bytes() == member.read()
    for row in rows:
        assert Path(RUN, "suggestions", row["picture"]).read_bytes().startswith(b"\x89PNG")
    assert {path: path.read_bytes() for path in before} == before
    capsys.readouterr()
    assert main(["stage=suggest", f"run_dir={RUN}"]) == 2
    assert "there are suggestions already; remove the folder, or give suggest.out=DIR" in capsys.readouterr().err


@pytest.mark.usefixtures("_run")
def test_excluded_images_are_not_suggested_and_the_choice_is_the_same_again() -> None:
    words = ["stage=suggest", f"run_dir={RUN}", "suggest.images=3", "suggest.format=csv"]
    assert main([*words, "suggest.out=first"]) == 0
    assert main([*words, "suggest.out=again"]) == 0
    assert rows_of("first") == rows_of("again")
    assert [path.name for path in Path("first").iterdir()] == ["suggestions.csv"]
    keys = [row["key"] for row in rows_of("first")]
    Path("exclude.txt").write_text("\n".join(keys) + "\n")
    assert main([*words, "suggest.out=others", "data.exclude=exclude.txt"]) == 0
    assert not {row["key"] for row in rows_of("others")} & {*keys}


def test_without_labels_the_stage_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stage=suggest", f"run_dir={tmp_path}/none"]) == 2
    assert "run stage=label first" in capsys.readouterr().err
