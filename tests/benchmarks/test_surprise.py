"""bench_surprise: a cell is computed once, whatever stops a call; pictures of no class make a kept label wrong."""

from __future__ import annotations

import json
import random
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import bench_surprise
from benchmarks.bench_surprise import Cell, Result, bench
from benchmarks.surprise import HUES, MOTIFS, TEXTURES, draw_problem, picture, read_truth, write_problem
from data.shards.samples import IMAGE_EXTENSIONS

SMALL = {"labeled": 3, "test": 20, "unlabeled": 60, "size": 24}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_seed_is_a_problem(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        write_problem(str(tmp_path / name), seed, **SMALL)
    assert files(tmp_path / "one") == files(tmp_path / "again")
    assert set(read_truth(tmp_path / "one").values()) != set(read_truth(tmp_path / "other").values())


def test_pictures_are_as_many_as_asked_for_and_as_messy_as_said(tmp_path: Path) -> None:
    write_problem(str(tmp_path), seed=3, labeled=3, test=20, unlabeled=400, size=16)
    truth = read_truth(tmp_path)
    classes = set(truth.values()) - {""}
    counts = Counter((path.split("/")[0], name) for path, name in truth.items())
    assert {counts["train", name] for name in classes} == {3}
    assert {counts["test", name] for name in classes} == {20 // len(classes)}
    assert 0.05 < counts["unlabeled", ""] / 400 < 0.16
    unlabeled = [counts["unlabeled", name] for name in classes]
    assert sum(unlabeled) + counts["unlabeled", ""] == 400
    assert max(unlabeled) > 2 * min(unlabeled)
    written = set(files(tmp_path)) - {"truth.csv"}
    assert len(written) == len(truth) + 4
    assert {path.rsplit(".")[-1] for path in truth} == {"jpg", "jpeg", "JPG", "png", "webp"}
    assert {ending.lower() for ending in ("jpg", "jpeg", "JPG", "png", "webp")} <= set(IMAGE_EXTENSIONS)
    assert any(is_turned(tmp_path / path) for path in truth if path.endswith(".jpg"))


def is_turned(path: Path) -> bool:
    with Image.open(path) as image:
        return image.getexif().get(0x0112) == 6


def test_two_traits_make_a_class_and_the_third_is_drawn() -> None:
    rng = random.Random(0)
    problem = draw_problem(rng)
    assert not set(problem.classes.values()) & set(problem.strangers)
    values = next(iter(problem.classes.values()))
    drawn = [problem.traits(values, rng) for _ in range(60)]
    (free,) = {0, 1, 2} - set(problem.matters)
    assert len({traits[free] for traits in drawn}) > 3
    for position, value in zip(problem.matters, values, strict=True):
        assert {traits[position] for traits in drawn} == {value}


@pytest.mark.parametrize("motif", MOTIFS)
@pytest.mark.parametrize("texture", TEXTURES)
def test_every_motif_is_drawn_with_every_texture(motif: str, texture: str) -> None:
    image, mask = picture((motif, texture, HUES[0]), 32, random.Random(0))
    assert image.size == mask.size == (32, 32)
    assert 0.02 < (np.asarray(mask) > 127).mean() < 0.6


def result(teacher: float, student: float) -> Result:
    return Result(teacher, student, 0.01, 800, 1000, 0.9, "by validation, 88 % are right")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """No trainings: with 10 labels a student is 5 points better, with 30 it is one. Lists what was computed."""
    done: list[Cell] = []

    def measure(cell: Cell, folder: Path) -> Result:
        done.append(cell)
        return result(0.5, 0.55 if cell.labels == 10 else 0.51)

    monkeypatch.setattr(bench_surprise, "measure", measure)
    return done


def test_a_call_continues_where_the_last_one_stopped(
    tmp_path: Path, computed: list[Cell], capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.jsonl"
    bench(seeds="0,1", minutes=0, results=str(results))
    assert not computed
    assert "4 of 4 results are missing: the same command continues" in capsys.readouterr().out
    bench(seeds="0", results=str(results))
    bench(seeds="0,1", results=str(results))
    assert [(cell.seed, cell.labels) for cell in computed] == [(0, 10), (0, 30), (1, 10), (1, 30)]
    bench(seeds="0", labels="10", words="teacher.epochs=1", results=str(results))
    assert len(computed) == 5


def test_gains_beyond_chance_are_counted(
    tmp_path: Path, computed: list[Cell], capsys: pytest.CaptureFixture[str]
) -> None:
    bench(seeds="0,1,2", results=str(tmp_path / "results.jsonl"))
    printed = capsys.readouterr().out.splitlines()
    assert (
        "seed 0, 10 labels: teacher 50.0%, student 55.0% (+5.0 ± 1.0); 90.0% of 1,000 kept labels right; by validation"
        in printed[0]
    )
    assert (
        "10 labels a class, 3 problems: teacher 50.0%, student 55.0% (+5.0 ± 0.0), better beyond chance on 3" in printed
    )
    assert (
        "30 labels a class, 3 problems: teacher 50.0%, student 51.0% (+1.0 ± 0.0), better beyond chance on 0" in printed
    )
    record = json.loads(printed[-1])
    assert (record["bench"], record["seeds"], record["missing"]) == ("surprise", 3, 0)
    assert record["ours"] == pytest.approx(0.53)


def test_a_problem_that_fails_stops_no_other_and_is_tried_again(
    tmp_path: Path, computed: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    working, results = bench_surprise.measure, str(tmp_path / "results.jsonl")

    def measure(cell: Cell, folder: Path) -> Result:
        if cell.seed == 0:
            raise bench_surprise.BenchmarkError("refused")
        return working(cell, folder)

    monkeypatch.setattr(bench_surprise, "measure", measure)
    with pytest.raises(bench_surprise.BenchmarkError, match="refused"):
        bench(seeds="0,1", labels="10", results=results)
    assert [cell.seed for cell in computed] == [1]
    monkeypatch.setattr(bench_surprise, "measure", working)
    bench(seeds="0,1", labels="10", results=results)
    assert [cell.seed for cell in computed] == [1, 0]


@pytest.mark.slow
def test_a_command_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "seeds=0",
        "labels=2",
        "unlabeled=20",
        "words=teacher.lr=-1",
        f"out={tmp_path}",
        f"results={tmp_path}/results",
    ]
    with pytest.raises(bench_surprise.BenchmarkError, match=r"python -m pipeline\.run stage=teacher.*teacher\.lr=-1"):
        bench(**{**dict(word.split("=", 1) for word in words), "unlabeled": 20})  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_signal_ends_the_call_not_the_problem_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_surprise, "pipeline", lambda words: 128 + signal.SIGTERM)
    words = {"unlabeled": 20, "out": str(tmp_path), "results": str(tmp_path / "results.jsonl")}
    with pytest.raises(SystemExit) as stop:
        bench(seeds="0,1", labels="2", **words)  # type: ignore[arg-type]
    assert stop.value.code == 128 + signal.SIGTERM
    assert [path.name[:2] for path in tmp_path.iterdir()] == ["0-"], "the second problem is not begun"


@pytest.mark.slow
def test_a_cell_is_measured_from_pictures_to_its_figures(tmp_path: Path) -> None:
    """Two dozen steps at 32 px: the figures are those of the run's own summary."""
    small = "teacher.image_size=32 student.image_size=32 teacher.epochs=8 student.epochs=4 evaluate.robustness_images=0 label.views=1"
    cell = Cell(seed=1, labels=10, unlabeled=60, words=f"{small} teacher.warmup_epochs=0 student.warmup_epochs=0")
    found = bench_surprise.measure(cell, tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (found.teacher, found.student) == pytest.approx([summary[role]["top1"] for role in ("teacher", "student")])
    assert found.images == summary["teacher"]["images"]
    assert 0 < found.kept <= 60
    assert 0 <= found.right <= 1
