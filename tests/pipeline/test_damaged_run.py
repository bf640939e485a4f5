"""Whatever a JSON or Parquet file of a run directory holds: the commands that read it name it in a sentence, or do without."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from data import storage
from data.errors import DataError
from data.json_files import read_json
from data.labels.pseudo_labels import PseudoLabels
from pipeline.core.stage import StageError
from pipeline.evaluation.summary import write_speed
from pipeline.export.plan import ExportFile
from pipeline.export.tasks import ExportJob, make_file
from pipeline.inputs.batches import TrainBatches
from pipeline.models.weights import CONFIG_NAME, WeightsInfo
from pipeline.planning.status import note_stop
from pipeline.run import main
from pipeline.training.job import TrainJob
from tests.conftest import make_writer
from tests.small_run import NUM_TEST, SmallRun

CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "null": lambda _: b"null",
    "half": lambda content: content[: len(content) // 2],
    "{}": lambda _: b"{}",
    "[]": lambda _: b"[]",
    "3": lambda _: b"3",
    "text": lambda _: b'"x"',
    "empty": lambda _: b"",
    "nested": lambda _: b"[" * 100_000,
    "long number": lambda _: b'{"a": ' + b"1" * 5000 + b"}",
    "random": lambda content: np.random.default_rng(0).bytes(len(content)),
    "not UTF-8": lambda _: b'{"\xff\xfe": 1}',
}
FEW = ("null", "half", "{}")  # the quick tests give each file one of them, in turn
FINISHED = "a student's batches were read"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, digits: tuple[np.ndarray, np.ndarray]) -> SmallRun:
    """A run of all stages, with two selections and an export."""
    small = SmallRun(tmp_path_factory.mktemp("damaged"), make_writer(digits))
    config = small.config()
    (layout,) = small.layouts(config)
    small.write_truth()
    small.model(layout.teacher, "teacher")
    small.label(config, layout)
    info = WeightsInfo(
        model="resnetrs50", num_classes=10, class_names=small.class_names, image_size=8, crop_pct=1.0, interpolation="bilinear",
        mean=(0, 0, 0), std=(1, 1, 1),
    )  # fmt: skip
    storage.write_text(f"{layout.teacher}/weights/{CONFIG_NAME}", json.dumps({"noisy_student": info.model_dump()}))
    progress = {
        "images_done": 1,
        "images_total": 2,
        "shards_done": 0,
        "shards_total": 1,
        "quarantined": 0,
        "workers": 1,
    }
    storage.write_text(f"{layout.labels}/progress.json", json.dumps(progress | {"images_per_s": 1.0, "eta_s": 1.0}))
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_ray_and_training(monkeypatch)
        for words in ([], ["select.per_class=20"]):
            assert main(["stage=select", f"run_dir={config.run_dir}", *words]) == 0
        small.model(layout.student, "student")
        small.evaluate(layout, {role: np.arange(NUM_TEST) % 7 > 0 for role in ("teacher", "student")})
        speed = {"latency_ms": 1.0, "images_per_s": 1.0, "batch_size": 1}
        write_speed(layout.evaluation, {"models": {"teacher": speed, "student": speed}, "where": "here"})
        for stage in ("export", "diff", "report"):
            assert main([f"stage={stage}", f"run_dir={config.run_dir}"]) == 0
    note_stop(config.run_dir, "student", StageError("it stopped"))
    storage.write_text(f"{config.run_dir}/lock.json", json.dumps({"host": "h", "pid": 1, "command": "c"}))
    shutil.copytree(config.run_dir, small.folder / "pristine")
    return small


def without_ray_and_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Export in this process; a student that reads all its rows and stops."""

    def make_files(
        job: ExportJob, files: Sequence[ExportFile], finished: dict[str, object], total: int
    ) -> list[object]:
        return [finished.get(file.name) or make_file(job, file) for file in files]

    def train(job: TrainJob, _: object) -> None:
        batches = TrainBatches(job.streams, job.config, job.num_classes, job.seed)
        for stream in batches._streams:
            for shard in range(len(stream.spec.shard_urls)):
                stream.rows(shard)
        raise StageError(FINISHED)

    monkeypatch.setattr("pipeline.export.stage.start_ray", lambda _: None)
    monkeypatch.setattr("pipeline.export.stage.make_files", make_files)
    monkeypatch.setattr("student.train.run_training", train)
    monkeypatch.setattr("student.train.warn_of_smaller_student", lambda *_: None)  # it builds two models


def command(small: SmallRun, name: str) -> int:
    """The exit code of a command on the run; what PseudoLabels raises ends as a command's error would."""
    run_dir = f"{small.folder}/run"
    if name == "PseudoLabels":
        try:
            PseudoLabels(run_dir).table()
        except (ValueError, OSError) as error:
            print(f"error: {error}")
            return 2
        return 0
    words = {
        "plan": ["stage=all", "plan=true"],
        "select": ["stage=select"],
        "select back": ["stage=select", "select.per_class=8"],
        "select anew": ["stage=select", "select.per_class=5"],
        "student": [
            "stage=student", "force=true", f"data.labeled=[{small.folder}/labeled/*.tar]", "student.epochs=2",
            "student.warmup_epochs=0", "student.image_size=8", "student.batch_size=8",
        ],
        "export": ["stage=export", "export.format=csv"],
        "export again": ["stage=export"],
    }.get(name, [f"stage={name}"])  # fmt: skip
    return main([*words, f"run_dir={run_dir}"])


class Restored:
    """The run's folder, which is as before when the block ends: what a command has changed, added or removed is put back."""

    def __init__(self, small: SmallRun) -> None:
        self._folder, pristine = small.folder / "run", small.folder / "pristine"
        self._before = {p.relative_to(pristine): p.read_bytes() for p in pristine.rglob("*") if p.is_file()}
        self._seen: dict[Path, tuple[int, int]] = {}

    def __enter__(self) -> None:
        if not self._seen:
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        there = {path.relative_to(self._folder): path for path in self._folder.rglob("*") if path.is_file()}
        for name in there.keys() - self._before.keys():
            there[name].unlink()
        for name, content in self._before.items():
            if name not in there or _stamp(there[name]) != self._seen.get(name):
                (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self._folder / name).write_bytes(content)
                self._seen[name] = _stamp(self._folder / name)


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def files_of(small: SmallRun) -> list[Path]:
    """JSON and Parquet files of the run, relative to it; one label file and one of copies of each folder do for all."""
    root = small.folder / "pristine"
    names = sorted(path.relative_to(root) for path in root.rglob("*") if path.suffix in (".json", ".jsonl", ".parquet"))
    return [name for name in names if name.name not in ("unlabeled-000000.parquet", "unlabeled-000002.parquet")]


def failures(
    small: SmallRun, commands: Sequence[str], contents: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """What went wrong: a traceback, another exit code than 0 or 2, or a message that does not name the file."""
    run = Restored(small)
    cases = itertools.product(files_of(small), contents, commands)
    return [problem for case in cases if (problem := _problem(run, small, *case, capsys))]


def _problem(
    run: Restored, small: SmallRun, name: Path, kind: str, words: str, capsys: pytest.CaptureFixture[str]
) -> str:
    with run:
        path, where = small.folder / "run" / name, f"{words}: {name} is {kind}"
        path.write_bytes(CONTENTS[kind](path.read_bytes()))
        try:
            code = command(small, words)
        except Exception as error:
            return f"{where}: {type(error).__name__}: {error}"
        said = "".join(capsys.readouterr())
        if code not in (0, 2):
            return f"{where}: exit code {code}"
        is_named = name.name in said or FINISHED in said
        return f"{where}: does not name it: {said[-300:]}" if code == 2 and not is_named else ""


def few_failures(small: SmallRun, words: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """As `failures`, each file with one of FEW."""
    run = Restored(small)
    cases = ((name, FEW[number % len(FEW)], words) for number, name in enumerate(files_of(small)))
    return [problem for case in cases if (problem := _problem(run, small, *case, capsys))]


SLOW = [
    pytest.param(words, marks=pytest.mark.slow)
    for words in ("status", "plan", "diff", "select back", "student", "export")
]


@pytest.mark.parametrize("words", ["PseudoLabels", *SLOW])
def test_a_damaged_file_is_named_or_done_without(
    pristine: SmallRun, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray_and_training(monkeypatch)
    assert few_failures(pristine, words, capsys) == []


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(3000)
def test_any_content_of_any_file_is_named_or_done_without(
    pristine: SmallRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray_and_training(monkeypatch)
    commands = [
        "status", "plan", "select", "select back", "select anew", "diff", "student", "PseudoLabels", "export", "export again", "report",
    ]  # fmt: skip
    assert failures(pristine, commands, list(CONTENTS), capsys) == []


@pytest.mark.slow
def test_the_report_names_what_it_cannot_read(
    pristine: SmallRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pipeline.report.build.report_html", lambda facts, surveys: ""
    )  # drawing takes a second, reading does not
    assert few_failures(pristine, "report", capsys) == []


@pytest.mark.parametrize("kind", sorted(CONTENTS.keys() - {"{}"}))
def test_json_that_is_none_or_of_another_shape_is_one_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(CONTENTS[kind](b'{"a": 1}'))
    with pytest.raises(DataError, match=r"some\.json: damaged or cut short \(.*\); do this$") as caught:
        read_json(str(path), "do this")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
