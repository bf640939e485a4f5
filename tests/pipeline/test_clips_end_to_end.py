"""The same stages on clips: a teacher on labeled videos, labels, selection, a student, an evaluation and the report."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.shards.write import write_shards
from data.tables import read_table
from pipeline.run import main
from tests.data.clips.videos import encoded_frames, moving_square

FIELDS = [
    "data.modality=clip", "clip.frames=4", "clip.stride=4", "clip.size=16", "label.clips=2", "label.batch_size=8",
    "device=cpu", "threads=1", "label.threads=1", "select.per_class=20", "select.confidence_threshold=0",
]  # fmt: skip
TRAINING = {
    "model": "resnet3drs50", "model_args.width": 0.0625, "model_args.small_input": "true", "augment.crop": "pad_crop",
    "augment.pad": 2, "augment.num_ops": 0, "augment.hflip": 0, "batch_size": 8, "epochs": 8, "warmup_epochs": 0, "lr": 1,
    "bn_momentum": 0.1, "ema_decay": 0.5, "loader_workers": 0, "dropout": 0, "eval_batch_size": 16, "log_every_steps": 1,
}  # fmt: skip


def samples(count: int, first: int, labeled: bool = True) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number in range(first, first + count):
        video = {"mp4": encoded_frames(moving_square(number % 2, number, side=16))}
        yield f"clip{number}", video | ({"cls": str(number % 2).encode()} if labeled else {})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    names = ["right", "down"]
    for split, count, first in (("labeled", 16, 0), ("validation", 8, 100), ("test", 8, 200)):
        write_shards(samples(count, first), str(folder / split), split, 100, names)
    unlabeled = [
        *samples(24, 300, labeled=False),
        ("damaged", {"mp4": encoded_frames(moving_square(0, 0, side=16))[:700]}),
    ]
    write_shards(unlabeled, str(folder / "unlabeled"), "unlabeled", 16)
    fields = [f"{stage}.{name}={value}" for stage in ("teacher", "student") for name, value in TRAINING.items()]
    shards = [f"data.{name}={folder}/{name}/*.tar" for name in ("labeled", "validation", "test", "unlabeled")]
    rest = ["label.max_quarantined=0.1", "student.unlabeled_ratio=1", f"run_dir={folder}/run"]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.run", "stage=all", *FIELDS, *fields, *shards, *rest],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


@pytest.mark.slow
def test_all_stages_run_on_clips_and_the_teacher_learns(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["teacher"]["images"] == summary["student"]["images"] == 8
    assert summary["labels"]["labels"] == 24
    assert summary["teacher"]["flops"] == summary["student"]["flops"] > 0
    lines = [json.loads(line) for line in (finished / "gen-1/teacher/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert (finished / "report.html").read_text().count("data:image/") > 2


@pytest.mark.slow
def test_the_weights_say_which_frames_they_see(finished: Path) -> None:
    info = json.loads((finished / "gen-1/student/weights/config.json").read_text())["noisy_student"]
    assert info["clip"] == {"frames": 4, "stride": 4}
    assert info["image_size"] == 16


@pytest.mark.slow
def test_a_damaged_video_is_quarantined_with_the_reason_and_the_others_are_labeled(finished: Path) -> None:
    labels = [read_table(str(path), "") for path in sorted((finished / "gen-1/labels").glob("unlabeled-*.parquet"))]
    assert sum(table.num_rows for table in labels) == 24
    assert len({value for table in labels for value in table.column("image_hash").to_pylist()}) > 10
    (bad,) = read_table(str(finished / "gen-1/labels/quarantine.parquet"), "").to_pylist()
    assert bad["key"] == "damaged"
    assert "no complete video" in bad["reason"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (["teacher.model=resnetrs50"], "teacher.model=resnetrs50: expected one for clips"),
        (["label.views=2"], "label.views=2"),
        (["teacher.channels_last=true"], "teacher.channels_last"),
        (["student.augment.cutout=8"], "student.augment.cutout"),
        (["data.modality=image"], "give data.modality=clip"),
    ],
)
def test_fields_that_do_not_go_with_clips_are_named(
    fields: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["teacher.model=resnet3drs50", "student.model=resnet3drs50"]
    assert main(["stage=teacher", f"run_dir={tmp_path}/run", *FIELDS, *models, *fields]) != 0
    assert named in capsys.readouterr().err
