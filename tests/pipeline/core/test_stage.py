"""Done, continue or refuse; and one writer at a time."""

import json
import multiprocessing
from pathlib import Path

import pytest

from data import storage
from pipeline.core.lock import LockedError, run_lock
from pipeline.core.schema import TrainConfig
from pipeline.core.stage import (
    Fingerprint,
    Stage,
    StageError,
    StageRefusedError,
    done_record,
    inspect_stage,
    open_stage,
    refuse_other_config,
    require_done,
)

FINGERPRINT = Fingerprint({"teacher.epochs": 3, "teacher.lr": 0.1}, {"labeled": "abc"})


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "stage") if request.param == "local" else f"memory://{tmp_path.name}/stage"


def finished(folder: str, fingerprint: Fingerprint = FINGERPRINT) -> Stage:
    stage = open_stage(folder, "teacher", fingerprint)
    storage.write_bytes(stage.path("weights/model.bin"), b"weights")
    stage.commit(["weights/model.bin"], {"top1": 0.5})
    return stage


def test_a_stage_is_new_then_continues_then_is_done(folder: str) -> None:
    assert open_stage(folder, "teacher", FINGERPRINT).state == "new"
    assert open_stage(folder, "teacher", FINGERPRINT).state == "continue"
    finished(folder)
    assert open_stage(folder, "teacher", FINGERPRINT).is_done
    assert require_done(folder, "teacher")["summary"] == {"top1": 0.5}


def test_other_settings_are_refused_with_each_field_and_both_values(folder: str) -> None:
    finished(folder)
    other = Fingerprint({"teacher.epochs": 4, "teacher.lr": 0.1, "teacher.new": 1}, {"labeled": "xyz"})
    with pytest.raises(StageRefusedError) as caught:
        open_stage(folder, "teacher", other)
    message = str(caught.value)
    for part in (
        "teacher.epochs: 3 there, 4 now",
        "teacher.new: None there, 1 now",
        "labeled: changed upstream",
        "force=true",
    ):
        assert part in message
    assert "teacher.lr" not in message
    assert done_record(folder) is not None


def test_a_field_that_was_added_since_counts_as_its_default(folder: str) -> None:
    finished(folder)
    added = Fingerprint({**FINGERPRINT.config, "teacher.mixup": 0.0}, FINGERPRINT.inputs)
    assert open_stage(folder, "teacher", added).is_done
    assert added.digest() == FINGERPRINT.digest()
    with pytest.raises(StageRefusedError, match=r"teacher\.mixup: 0\.0 there, 0\.2 now"):
        open_stage(folder, "teacher", Fingerprint({**FINGERPRINT.config, "teacher.mixup": 0.2}, FINGERPRINT.inputs))


def test_an_added_field_is_in_no_fingerprint_at_its_default(folder: str) -> None:
    """So a run at the defaults writes the same bytes as before there was such a field; and another value is refused both ways."""
    default, other = (
        Fingerprint(TrainConfig.model_validate(fields).fingerprint("teacher."), {})
        for fields in ({}, {"optimizer": "adamw"})
    )
    assert "teacher.optimizer" not in default.config
    assert other.config["teacher.optimizer"] == "adamw"
    for number, (there, now) in enumerate([(default, other), (other, default)]):
        finished(f"{folder}-{number}", there)
        values = [fingerprint.config.get("teacher.optimizer", "momentum") for fingerprint in (there, now)]
        words = r"teacher\.optimizer: '{}' there, '{}' now".format(*values)
        with pytest.raises(StageRefusedError, match=words) as caught:
            open_stage(f"{folder}-{number}", "teacher", now)
        assert caught.value.fields == ("teacher.optimizer",)


def test_unfinished_work_of_other_settings_is_refused_too(folder: str) -> None:
    storage.write_bytes(open_stage(folder, "teacher", FINGERPRINT).path("checkpoints/step-1.pt"), b"work")
    with pytest.raises(StageRefusedError, match=r"teacher\.lr: 0\.1 there, 0\.2 now"):
        refuse_other_config(folder, "teacher", {"teacher.epochs": 3, "teacher.lr": 0.2})


def test_a_stage_that_ended_before_it_made_anything_takes_mended_settings(folder: str) -> None:
    open_stage(folder, "teacher", Fingerprint({"teacher.model": "resnetrs51"}, {"labeled": "abc"}))
    mended = Fingerprint({"teacher.model": "resnetrs50"}, {"labeled": "abc"})
    refuse_other_config(folder, "teacher", mended.config)
    assert open_stage(folder, "teacher", mended).state == "new"
    assert open_stage(folder, "teacher", mended).state == "continue"


def test_the_number_of_training_processes_may_change_on_the_way_and_is_told(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    two, three = (Fingerprint({**FINGERPRINT.config, "teacher.workers": n}, FINGERPRINT.inputs) for n in (2, 3))
    stage = open_stage(folder, "teacher", two)
    storage.write_bytes(stage.path("checkpoints/step-1.pt"), b"work")
    assert open_stage(folder, "teacher", three).state == "continue"
    assert "continues with teacher.workers=3, 2 before: " in capsys.readouterr().out
    finished(folder, three)
    record = done_record(folder)
    assert open_stage(folder, "teacher", two).is_done
    assert done_record(folder) == record
    with pytest.raises(StageRefusedError, match=r"teacher\.lr: 0\.1 there, 0\.2 now"):
        open_stage(folder, "teacher", Fingerprint({**two.config, "teacher.lr": 0.2}, FINGERPRINT.inputs))


def test_how_often_a_stage_measures_and_logs_never_refuses(folder: str) -> None:
    reports = {"teacher.log_every_steps": 50, "teacher.eval_every_epochs": 5.0}
    stage = finished(folder, Fingerprint({**FINGERPRINT.config, **reports}, FINGERPRINT.inputs))
    record = done_record(folder)
    for field in reports:
        assert open_stage(
            folder, "teacher", Fingerprint({**stage.fingerprint.config, field: 1}, FINGERPRINT.inputs)
        ).is_done
    assert done_record(folder) == record


def test_a_number_of_threads_refuses_on_cpus_where_it_rounds_and_not_on_gpus(folder: str) -> None:
    def made(device: str, threads: int) -> Fingerprint:
        return Fingerprint({**FINGERPRINT.config, "device": device, "threads": threads}, FINGERPRINT.inputs)

    finished(folder, made("cuda", 2))
    assert open_stage(folder, "teacher", made("cuda", 8)).is_done
    with pytest.raises(StageRefusedError, match="threads: 2 there, 8 now"):
        open_stage(folder, "teacher", made("cpu", 8))
    finished(f"{folder}-2", made("cpu", 2))
    with pytest.raises(StageRefusedError, match="threads: 2 there, 8 now"):
        open_stage(f"{folder}-2", "teacher", made("cpu", 8))


def test_other_inputs_alone_are_refused_with_what_to_do(folder: str) -> None:
    finished(folder)
    with pytest.raises(StageRefusedError) as caught:
        open_stage(folder, "teacher", Fingerprint(FINGERPRINT.config, {"labeled": "xyz"}))
    message = str(caught.value)
    assert "was made from other inputs" in message
    assert "stage=teacher force=true moves this stage's output aside and makes it again" in message
    assert "old values" not in message


def test_looking_says_what_opening_would_do_and_changes_nothing(folder: str) -> None:
    assert inspect_stage(folder, "teacher", FINGERPRINT) == ("new", "")
    assert not storage.exists(folder)
    finished(folder)
    assert inspect_stage(folder, "teacher", FINGERPRINT) == ("done", "")
    storage.remove(storage.join(folder, "weights/model.bin"))
    state, reason = inspect_stage(folder, "teacher", FINGERPRINT)
    assert state == "continue"
    assert "model.bin is missing" in reason
    assert done_record(folder) is not None


def test_force_moves_the_old_output_aside_and_starts_over(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    finished(folder)
    stage = open_stage(folder, "teacher", Fingerprint({"teacher.epochs": 9}, {}), force=True)
    assert stage.state == "new"
    assert storage.read_bytes(f"{folder}.old-1/weights/model.bin") == b"weights"
    assert f"{folder}.old-1" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["remove", "cut"])
def test_an_output_lost_after_the_marker_is_noticed(
    folder: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(folder)
    url = storage.join(folder, "weights/model.bin")
    storage.remove(url)
    if damage == "cut":
        storage.write_bytes(url, b"wei")
    assert open_stage(folder, "teacher", FINGERPRINT).state == "continue"
    assert done_record(folder) is None
    assert "model.bin is missing or has another size" in capsys.readouterr().out


def test_a_commit_needs_every_output_to_be_there(folder: str) -> None:
    stage = open_stage(folder, "teacher", FINGERPRINT)
    with pytest.raises(FileNotFoundError):
        stage.commit(["weights/model.bin"], {})
    assert done_record(folder) is None


def test_the_digest_follows_content_and_settings_but_not_time(tmp_path: Path) -> None:
    digests = [require_done(finished(str(tmp_path / name)).folder, "teacher")["digest"] for name in ("a", "b")]
    other = finished(str(tmp_path / "c"), Fingerprint({"teacher.epochs": 4}, {}))
    assert digests[0] == digests[1] != require_done(other.folder, "teacher")["digest"]


def test_an_earlier_stage_that_is_not_done_is_named(folder: str) -> None:
    with pytest.raises(StageError, match="run stage=teacher first"):
        require_done(folder, "teacher")


def test_a_damaged_marker_is_an_error_that_names_it(folder: str) -> None:
    finished(folder)
    storage.write_text(storage.join(folder, "done.json"), "{")
    with pytest.raises(StageError, match=r"done\.json: damaged"):
        open_stage(folder, "teacher", FINGERPRINT)


def test_values_survive_json_so_that_a_tuple_equals_its_list(folder: str) -> None:
    fingerprint = Fingerprint({"student.crop_scale": (0.08, 1.0)}, {})
    finished(folder, fingerprint)
    assert open_stage(folder, "teacher", fingerprint).is_done


def _hold(run_dir: str, ready: "multiprocessing.synchronize.Event", end: "multiprocessing.synchronize.Event") -> None:
    with run_lock(run_dir, "the first command"):
        ready.set()
        end.wait(20)


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, end = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), ready, end))
    process.start()
    try:
        assert ready.wait(20)
        with (
            pytest.raises(LockedError, match=rf"process {process.pid} on .*the first command"),
            run_lock(str(tmp_path), "x"),
        ):
            pass
    finally:
        process.kill()
        process.join()
    with run_lock(str(tmp_path), "the lock of a killed process is free"):
        assert json.loads((tmp_path / "lock.json").read_text())["command"].startswith("the lock")


@pytest.mark.slow
def test_on_an_object_store_a_lease_keeps_the_second_writer_out_until_it_lapses() -> None:
    url = "memory://lease-test/run"
    with run_lock(url, "first"), pytest.raises(LockedError, match="first"), run_lock(url, "second"):
        pass
    storage.write_text(f"{url}/lock.json", json.dumps({"command": "dead", "beat": 0, "token": "x"}))
    with run_lock(url, "a lapsed lease is taken over"):
        assert json.loads(storage.read_text(f"{url}/lock.json"))["command"].startswith("a lapsed")
