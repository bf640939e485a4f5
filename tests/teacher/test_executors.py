"""All executors give the same bytes and the same errors: threads, processes, Ray tasks."""

from __future__ import annotations

import json
import os
import platform
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from data.labels.exclusions import ExcludedKeys
from pipeline.core.ray_runtime import start_ray
from teacher.executors import MANY_SHARDS, Executor, RayTasks, Threads, processes
from teacher.selection.copies import write_all_copies
from teacher.selection.label_reader import Exclusions, LabelSource
from teacher.selection.quota_search import select_shards
from teacher.selection.rule import SelectError, SelectRule
from teacher.selection.selection_file import selection_json
from teacher.selection.stage import _executor
from tests import HANGS_S

RULE = SelectRule(num_classes=6, confidence_threshold=0.3, per_class=120, max_copies=4)
SHARDS = [f"shard-{number}" for number in range(9)]


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[None]:
    start_ray(None)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine label files with many ties, classes above and below the quota, and an empty one."""
    folder, rng = tmp_path_factory.mktemp("labels"), np.random.default_rng(5)
    for number, shard in enumerate(SHARDS):
        rows = 40 * number
        columns = {
            "ordinal": np.arange(rows, dtype=np.int32),
            "__key__": pa.array([f"{shard}-{row}" for row in range(rows)], pa.string()),
            "label": rng.choice(5, rows, p=[0.6, 0.3, 0.07, 0.02, 0.01]).astype(np.int32),
            "confidence": (rng.integers(0, 50, rows) / 50).astype(np.float32),
            "image_hash": rng.integers(0, 2**64, rows, dtype=np.uint64),
        }
        pq.write_table(pa.table(columns), folder / f"{shard}.parquet")
    return folder


def selected_bytes(labels: Path, out: Path, executor: Executor, shards: Sequence[str] = SHARDS) -> dict[str, bytes]:
    exclusions = Exclusions(keys=ExcludedKeys({"shard-3-7"}), held_out_samples={"shard-2": [1, 2, 30]})
    selection = select_shards(LabelSource(str(labels), RULE, exclusions), shards, executor, max_candidates=20)
    counts = write_all_copies(selection, shards, str(out), executor)
    content = selection_json(selection, {shard: counts[shard] for shard in SHARDS})
    return {path.name: path.read_bytes() for path in out.iterdir()} | {"json": json.dumps(content).encode()}


@pytest.fixture(scope="module")
def expected(labels: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    files = selected_bytes(labels, tmp_path_factory.mktemp("one"), Threads(1))
    assert sorted(files) == ["json", *(f"{shard}.parquet" for shard in SHARDS)]
    return files


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("executor", [Threads(2), Threads(7), RayTasks(1), RayTasks(2), RayTasks(99)], ids=repr)
def test_the_bytes_are_the_same_however_the_label_files_are_shared_out(
    labels: Path, tmp_path: Path, expected: dict[str, bytes], executor: Executor, backwards: bool
) -> None:
    shards = SHARDS[::-1] if backwards else SHARDS
    assert selected_bytes(labels, tmp_path, executor, shards) == expected


def test_the_bytes_are_the_same_when_processes_share_the_label_files(
    labels: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    for number in (1, 2, 7):
        with processes(number) as executor:
            assert selected_bytes(labels, tmp_path / str(number), executor) == expected


def test_the_stage_takes_threads_processes_or_the_cluster_that_it_is_given() -> None:
    with _executor("the cluster that runs", "labels", 1) as on_cluster:
        assert isinstance(on_cluster, RayTasks)
        assert on_cluster.num_workers == ray.cluster_resources()["CPU"]
    with _executor(None, "labels", MANY_SHARDS - 1) as here:
        assert isinstance(here, Threads)
    with _executor(None, "s3://bucket/labels", MANY_SHARDS) as waiting:
        assert isinstance(waiting, Threads), "they wait for the store, which takes no CPU"
        assert waiting.num_workers > here.num_workers
    with _executor(None, "labels", MANY_SHARDS) as here:
        process, *_ = here(_process_ids, ["a"], "test")
    assert process != os.getpid()


def _process_ids(shards: Iterable[str]) -> int:
    return os.getpid()


def test_an_error_in_a_process_is_raised_as_it_was(tmp_path: Path) -> None:
    with (
        pytest.raises(SelectError, match=r"^\S*gone\.parquet: no such label file; run stage=label"),
        processes(1) as executor,
    ):
        select_shards(LabelSource(str(tmp_path), RULE), ["gone"], executor)


def _refused(shards: Iterable[str]) -> None:
    raise ConnectionRefusedError("the store is away")


def test_a_tasks_own_connection_error_is_not_taken_for_a_lost_process() -> None:
    with pytest.raises(ConnectionRefusedError, match=r"^the store is away"), processes(1) as executor:
        list(executor(_refused, ["a"], "count"))


def _end(shards: Iterable[str]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_was_killed_is_told_in_a_sentence() -> None:
    with (
        pytest.raises(OSError, match=r"^a worker process of this command was killed during 'count' \(out of memory"),
        processes(2) as executor,
    ):
        list(executor(_end, ["a", "b"], "count"))


def test_processes_end_with_the_one_they_work_for_however_that_ends(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from teacher.executors import processes\n"
        "from tests.teacher.test_executors import _process_ids\n"
        "with processes(1) as executor:\n"
        "    (number,) = executor(_process_ids, ['a'], 'test')\n"
        "    print(number, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(f"if __name__ == '__main__':\n{textwrap.indent(code, '    ')}")
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    ended = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=HANGS_S
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    number = int(ended.stdout)
    deadline = time.monotonic() + HANGS_S
    while Path(f"/proc/{number}/cmdline").exists() and Path(f"/proc/{number}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the process goes on"
        time.sleep(0.1)


def test_an_error_in_a_task_is_raised_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(SelectError, match=r"^\S*gone\.parquet: no such label file; run stage=label") as caught:
        select_shards(LabelSource(str(tmp_path), RULE), ["gone"], RayTasks())
    assert type(caught.value) is SelectError


def test_a_bug_in_a_task_is_raised_with_its_place() -> None:
    def task(shards: object) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match=r"(?s)in task.*a bug"):
        list(RayTasks()(task, ["a"], "test"))


def test_progress_counts_the_shards_that_are_done() -> None:
    seen: list[tuple[str, int, int]] = []
    parts = RayTasks(2, lambda *now: seen.append(now))(list, ["a", "b", "c"], "read")
    assert sorted(shard for part in parts for shard in part) == ["a", "b", "c"]
    assert seen[-1] == ("read", 3, 3)
    assert len(seen) == 2


def test_an_error_in_one_thread_stops_the_others() -> None:
    taken: list[str] = []

    def task(shards: Iterable[str]) -> None:
        for shard in shards:
            taken.append(shard)
            if shard == "0":
                raise SelectError("broken")
            time.sleep(0.005)

    with pytest.raises(SelectError, match="broken"):
        Threads(3)(task, [str(index) for index in range(500)], "test")
    assert len(taken) < 500


def test_processes_that_select_do_not_load_torch() -> None:
    """Torch takes half a gigabyte in each of a cluster's tasks; a module that all others import once imported it."""
    modules = "teacher.executors, teacher.diff, teacher.selection.stage, pipeline.core.stage"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what other C libraries do is theirs")
def test_threads_are_given_the_memory_of_freed_arrays_again() -> None:
    """Mapping each batch's arrays anew took a sixth of selection's time."""
    code = """if True:
        import resource, sys
        import numpy as np
        from teacher.executors import Threads

        def faults(shards):
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
            for _ in shards:
                [np.ones(2**19, np.uint8) for _ in range(8)]
            return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

        print(*Threads(1)(faults, [str(number) for number in range(200)], "test"))
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 200 * 2**22 / resource.getpagesize() / 10
