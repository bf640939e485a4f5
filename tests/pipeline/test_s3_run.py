"""The pipeline from and to an object store with faults: the same bytes as on a disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from data import storage
from pipeline.core.layout import Layout
from pipeline.export import card
from pipeline.export import stage as export_stage
from pipeline.run import main
from teacher.selection.stage import select
from tests import digits_run
from tests.conftest import WriteDigits, make_writer
from tests.killed_export import make_here
from tests.s3_server import SECRET, FaultyS3, put
from tests.small_run import SmallRun


@pytest.mark.slow
def test_labels_made_from_and_to_s3_through_faults_are_the_bytes_of_local_ones(
    s3: FaultyS3, folder: str, tmp_path: Path, digits: digits_run.Digits, capsys: pytest.CaptureFixture[str]
) -> None:
    digits_run.write_digits_data(tmp_path, digits[1], make_writer(digits))
    for path in sorted((tmp_path / "unlabeled").rglob("*.*")):
        put(f"{folder}/unlabeled/{path.relative_to(tmp_path / 'unlabeled')}", path.read_bytes())
    small = [f"config={tmp_path}/config.yaml", "teacher.epochs=30", "teacher.warmup_epochs=1", "label.workers=1"]
    words = ["stage=teacher,label", *small, f"run_dir={folder}/run", f"data.unlabeled=[{folder}/unlabeled/*.tar]"]
    faults = [
        s3.add("503", "GET", "unlabeled-000000.tar", times=2),
        s3.add("cut", "GET", "unlabeled-000001.tar", keep=5000),
        s3.add("short", "GET", "unlabeled-000002.tar", keep=5000),
        s3.add("slow", "GET", "unlabeled-000003.tar", seconds=1),
        s3.add("503", "PUT", "unlabeled-000004.parquet"),
        s3.add("lost answer", "PUT", "unlabeled-000005.parquet"),
        s3.add("500", "GET", "list-type"),
    ]
    result = digits_run.run(*words)
    assert result.returncode == 0, result.stderr
    assert [fault.done for fault in faults] == [2, 1, 1, 1, 1, 1, 1]
    assert SECRET not in result.stderr + storage.read_text(f"{folder}/run/config.yaml")
    local = digits_run.run("stage=teacher,label", *small, f"run_dir={tmp_path}/run")
    assert local.returncode == 0, local.stderr
    files = sorted((tmp_path / "run/gen-1/labels").glob("unlabeled-*.parquet"))
    assert len(files) == 6
    for file in files:
        assert storage.read_bytes(f"{folder}/run/gen-1/labels/{file.name}") == file.read_bytes(), file.name
    capsys.readouterr()
    assert main(words) == 0
    assert f"label: done ({folder}/run/gen-1/labels)" in capsys.readouterr().out
    assert main(["stage=status", f"run_dir={folder}/run"]) == 0
    stages = [line for line in capsys.readouterr().out.splitlines() if line.startswith("generation")]
    assert [line.split()[3] for line in stages[:3]] == ["done"] * 3


@pytest.mark.slow
def test_an_export_from_and_to_s3_through_faults_has_the_bytes_of_a_local_one(
    s3: FaultyS3, folder: str, tmp_path: Path, write_digits: WriteDigits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_stage, "make_files", make_here)
    monkeypatch.setattr(export_stage, "start_ray", lambda address: None)
    run = SmallRun(tmp_path, write_digits)
    config, layout = run.config(export={"samples_per_shard": 20}), Layout(str(tmp_path / "run"))
    run.model(layout.teacher, "teacher")
    run.label(config, layout)
    select(config, layout)
    monkeypatch.setattr(card, "_read_teacher", lambda layout: None)
    export_stage.export(config, layout)
    for path in [path for path in tmp_path.rglob("*") if path.is_file() and "exports" not in path.parts]:
        put(f"{folder}/{path.relative_to(tmp_path)}", path.read_bytes())
    remote_data = config.data.model_copy(update={"unlabeled": [f"{folder}/unlabeled/*.tar"]})
    config = config.model_copy(update={"run_dir": f"{folder}/run", "data": remote_data})
    faults = [
        s3.add("cut", "GET", "unlabeled-000001.tar", keep=100),
        s3.add("503", "PUT", "pseudo-000001.tar"),
        s3.add("lost answer", "PUT", "pseudo-000002.tar"),
    ]
    export_stage.export(config, Layout(config.run_dir))
    assert [fault.done for fault in faults] == [1, 1, 1]
    local = [path for path in (tmp_path / "run/exports/v1").rglob("*") if path.is_file()]
    same = [path.relative_to(tmp_path) for path in local if path.name not in ("seconds.json", "started.json")]
    assert len(same) > 12
    for name in same:
        assert storage.read_bytes(f"{folder}/{name}") == (tmp_path / name).read_bytes(), name
    assert storage.read_text(f"{folder}/run/exports/latest") == "v1\n"
