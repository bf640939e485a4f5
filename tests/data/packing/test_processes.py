"""Packing in processes: the bytes of one process, whatever is killed, in memory that does not grow with the images."""

import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data import pack
from data.errors import DataError
from data.images.decode import DecodeError, decode
from data.modalities import Modality
from data.packing import file_list, listing, pack_folder, plan, split_packing
from data.packing.folders import ImageFile, LeftOut, ScannedImage
from data.packing.packed_shards import FINISHED_FOLDER
from data.packing.workers import workers
from data.shards.write import Fields, write_shards
from tests import HANGS_S
from tests.conftest import png

Digits = tuple[np.ndarray, np.ndarray]
NUM_IMAGES = 1300


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> Path:
    """1,300 files in nested folders; every 97th is no image, and so are the first and the last ten by their order in the shards."""
    root = tmp_path_factory.mktemp("many") / "photos"
    for number, image in enumerate(digits[0][:NUM_IMAGES]):
        path = root / "abc"[number % 3] / f"{number % 7}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"broken" if number % 97 == 0 else png(image))
    paths, order = sorted(root.rglob("*.png")), np.random.default_rng(0).permutation(NUM_IMAGES)
    for place in (0, *range(NUM_IMAGES - 10, NUM_IMAGES)):
        paths[order[place]].write_bytes(b"broken")
    return root


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_any_number_of_processes_makes_the_shards_of_one_loop_over_the_images(photos: Path, tmp_path: Path) -> None:
    paths = sorted(photos.rglob("*.png"))

    def samples() -> Iterator[tuple[str, Fields]]:
        number = 0
        for position in np.random.default_rng(0).permutation(len(paths)):
            content = paths[position].read_bytes()
            try:
                decode(content)
            except DecodeError:
                continue
            yield f"{number:09d}", {"png": content}
            number += 1

    write_shards(samples(), str(tmp_path / "expected"), "unlabeled", 70)
    for processes in (1, 3):
        pack_folder.pack(
            str(photos), str(tmp_path / f"{processes}"), labeled=False, samples_per_shard=70, processes=processes
        )
    one, three = snapshot(tmp_path / "1"), snapshot(tmp_path / "3")
    assert one == three
    expected = {f"unlabeled/{name}": content for name, content in snapshot(tmp_path / "expected").items()}
    assert {name: content for name, content in one.items() if name in expected} == expected
    beside = {name for name in one if name not in expected}
    assert beside == {
        "packing-unlabeled-files/000000.parquet", "packing-unlabeled.json", "unlabeled/rejected.txt",
        "unlabeled/sources.parquet",
    }  # fmt: skip
    assert len(one["unlabeled/rejected.txt"].splitlines()) == len({*range(0, NUM_IMAGES, 97)}) + 11 - both_ways(photos)


def both_ways(photos: Path) -> int:
    """Broken files that are a multiple of 97 and among the first or last in the order."""
    paths, order = sorted(photos.rglob("*.png")), np.random.default_rng(0).permutation(NUM_IMAGES)
    return sum(int(paths[order[place]].stem) % 97 == 0 for place in (0, *range(NUM_IMAGES - 10, NUM_IMAGES)))


def test_labeled_splits_and_hashes_do_not_depend_on_the_number_of_processes(photos: Path, tmp_path: Path) -> None:
    for processes in (1, 3):
        out = str(tmp_path / f"{processes}")
        pack_folder.pack(str(photos), out, validation=0.3, samples_per_shard=100, processes=processes)
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "3")


def test_a_packing_that_is_killed_continues_to_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    words = [f"images={photos}", "labeled=false", "samples_per_shard=20"]
    command = [sys.executable, "-m", "data.pack", *words, f"out={tmp_path}/killed", "processes=2"]
    finished = tmp_path / "killed/unlabeled" / FINISHED_FOLDER
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while len(list(finished.glob("*.parquet"))) < 3 and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "it was killed before it ended"
    assert pack.main([*words, f"out={tmp_path}/killed", "processes=1"]) == 0
    assert pack.main([*words, f"out={tmp_path}/whole", "processes=1"]) == 0
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "whole")


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_lets_the_processes_end_and_says_how_to_continue(photos: Path, tmp_path: Path) -> None:
    words = [
        f"images={photos}",
        f"out={tmp_path}/out",
        "labeled=false",
        "samples_per_shard=2",
        "processes=2",
    ]  # many shards to come
    finished = tmp_path / "out/unlabeled" / FINISHED_FOLDER
    command = [sys.executable, "-m", "data.pack", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while not list(finished.glob("*.parquet")) and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
        error = process.communicate()[1]
    assert process.returncode == 130
    assert error.rstrip().endswith("stopped; the same command continues")
    assert "Traceback" not in error
    assert not (tmp_path / "out/.packing-unlabeled").exists()


def test_ctrl_c_while_modules_are_loaded_is_one_line_too() -> None:
    code = """if True:
        import runpy, sys

        class Interrupting:
            def find_spec(self, name, *_):
                if name == "numpy":
                    raise KeyboardInterrupt

        sys.meta_path.insert(0, Interrupting())
        runpy.run_module("data.pack", run_name="__main__")
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (130, "stopped; the same command continues\n")


def blocked_signals() -> set[int]:
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, []))


def test_ctrl_c_never_reaches_a_packing_process_not_even_while_it_starts() -> None:
    with workers(2) as executor:
        assert signal.SIGINT in executor.submit(blocked_signals).result(HANGS_S)
    assert signal.SIGINT not in blocked_signals()


def test_an_image_that_is_written_while_it_is_packed_stops_the_packing(
    tmp_path: Path, digits: Digits, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    image = tmp_path / "photos/a.png"
    image.write_bytes(png(digits[0][0]))
    make_claim = pack_folder.make_claim

    def write_meanwhile(*words: Any) -> None:
        make_claim(*words)
        image.write_bytes(png(digits[0][0]) + b"more")

    monkeypatch.setattr(pack_folder, "make_claim", write_meanwhile)
    assert pack.main([f"images={tmp_path}/photos", f"out={tmp_path}/out", "labeled=false"]) == 2
    size = len(png(digits[0][0]))
    assert f"a.png: {size + 4} bytes, and {size} when the folder was scanned" in capsys.readouterr().err
    assert not (tmp_path / "out/unlabeled/manifest.json").exists()


def test_finished_shards_are_not_read_again(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"images={photos}", f"out={tmp_path}/out", "labeled=false", "samples_per_shard=100", "processes=1"]
    read, opened = ImageFile.read, list[str]()

    def count(image: ImageFile, *place: int) -> bytes:
        if len(opened) == 900:
            raise KeyboardInterrupt
        opened.append(str(image.path))
        return read(image, *place)

    monkeypatch.setattr(split_packing, "PIECE", 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageFile, "read", count)
        assert pack.main(words) == 130
        records = sorted((tmp_path / "out/unlabeled" / FINISHED_FOLDER).glob("*.parquet"))
        packed = {path for record in records for path in pq.read_table(record).column("path").to_pylist()}
        assert len(packed) >= 800
        opened.clear()
        assert pack.main(words) == 0
    assert not packed & set(opened)
    assert len(opened) <= NUM_IMAGES - len(packed)


def test_a_shard_that_was_removed_since_is_written_again(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"images={photos}", "labeled=false", "samples_per_shard=100", "processes=1"]
    assert pack.main([*words, f"out={tmp_path}/whole"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_packing, "write_sidecars", interrupt)
        assert pack.main([*words, f"out={tmp_path}/out"]) == 130
    (tmp_path / "out/unlabeled/unlabeled-000004.tar").unlink()
    assert pack.main([*words, f"out={tmp_path}/out"]) == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_shards_of_other_settings_are_not_taken_for_finished(photos: Path, tmp_path: Path) -> None:
    words = [f"images={photos}", "labeled=false", "samples_per_shard=100", "processes=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_packing, "write_sidecars", interrupt)
        assert pack.main([*words, f"out={tmp_path}/out", "seed=1"]) == 130
    (tmp_path / "out/packing-unlabeled.json").unlink()  # someone wants to begin again
    assert pack.main([*words, f"out={tmp_path}/out"]) == 0
    assert pack.main([*words, f"out={tmp_path}/whole"]) == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_files_that_changed_between_two_runs_are_named(
    tmp_path: Path, digits: Digits, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for number, image in enumerate(digits[0][:6]):
        (root / f"{number}.png").write_bytes(png(image))
    words = [f"images={root}", f"out={tmp_path}/out", "labeled=false"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_packing, "write_sidecars", interrupt)
        assert pack.main(words) == 130
    (root / "1.png").unlink()
    (root / "11.png").write_bytes(b"new")
    (root / "2.png").write_bytes(b"other")
    os.utime(root / "4.png", ns=(1, 1))
    capsys.readouterr()
    assert pack.main(words) == 2
    error = capsys.readouterr().err
    size = len(png(digits[0][2]))
    assert f"1.png (is gone), 11.png (is new), 2.png (had {size} bytes, has 5), 4.png (was written since)" in error
    assert "0.png" not in error
    assert not (tmp_path / "out/unlabeled/manifest.json").exists()


@pytest.mark.parametrize("labeled", ["true", "false"])
def test_a_complete_packing_stays_so_when_its_files_are_copied_with_other_times(
    photos: Path, tmp_path: Path, labeled: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "photos"
    shutil.copytree(photos / "a", root / "a")
    words = [f"images={root}", f"out={tmp_path}/out", f"labeled={labeled}", "processes=1"]
    assert pack.main(words) == 0
    before = snapshot(tmp_path / "out")
    for path in root.rglob("*.png"):
        os.utime(path, ns=(1, 1))
    assert pack.main(words) == 0
    assert snapshot(tmp_path / "out") == before
    next(root.rglob("*.png")).write_bytes(b"of another size")
    capsys.readouterr()
    assert pack.main(words) == 2
    assert ".png (had " in capsys.readouterr().err


@pytest.mark.parametrize("labeled", ["true", "false"])
def test_a_file_that_was_only_written_anew_stops_a_packing_that_is_not_complete(
    photos: Path, tmp_path: Path, labeled: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "photos"
    shutil.copytree(photos / "a", root / "a")
    words = [f"images={root}", f"out={tmp_path}/out", f"labeled={labeled}", "processes=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_packing, "write_sidecars", interrupt)
        assert pack.main(words) == 130
    os.utime(min(root.rglob("*.png")), ns=(1, 1))
    capsys.readouterr()
    assert pack.main(words) == 2
    assert f"{min(root.rglob('*.png')).relative_to(root)} (was written since)" in capsys.readouterr().err


@pytest.mark.parametrize("left", [0, 2, 4, 5])
def test_files_that_are_gone_or_new_are_named_wherever_the_list_is_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    monkeypatch.setattr(file_list, "ROWS", 2)
    listings = []
    for count in (6, left):
        (tmp_path / f"{count}").mkdir()
        with listing.ListingWriter(str(tmp_path / f"{count}")) as writer:
            for number in range(count):
                writer.add(listing.Row(b"%d.jpg" % number, number, 0))
        listings.append(listing.Listing("/photos", str(tmp_path / f"{count}")))
        file_list.write_file_list(str(tmp_path / f"list-{count}"), listings[-1], None)
    names = [f"{number}.jpg" for number in range(left, 6)][:5]
    assert file_list.find_changes(f"{tmp_path}/list-6", 6, listings[1]) == [f"{name} (is gone)" for name in names]
    assert file_list.find_changes(f"{tmp_path}/list-{left}", left, listings[0]) == [
        f"{name} (is new)" for name in names
    ]


def test_a_killed_worker_is_reported_in_a_sentence() -> None:
    with pytest.raises(DataError, match=r"a packing process was killed \(out of memory\?\)"), workers(2) as executor:
        executor.submit(os._exit, 1).result()


def test_two_commands_do_not_pack_into_one_folder(photos: Path, tmp_path: Path) -> None:
    from data.packing.workspace import workspace

    with (
        workspace(str(tmp_path / "out"), "unlabeled"),
        pytest.raises(DataError, match=r"another data\.pack writes there"),
    ):
        pack_folder.pack(str(photos), str(tmp_path / "out"), labeled=False)
    assert not (tmp_path / "out").exists()


def peak_of_planning(tmp_path: Path, count: int) -> int:
    """Peak bytes while images and as many other files are scanned, listed, shuffled and digested."""
    folder = tmp_path / f"{count}"
    folder.mkdir()
    tracemalloc.start()
    images, found = plan.scan_images(Path("/photos"), str(folder), labeled=False)
    plan.plan_packing(Path("/photos"), images, found, None, 0.0, 0, "", None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(images) == count
    return peak


@pytest.mark.slow
def test_planning_takes_four_bytes_of_memory_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(root: Path, modality: Modality) -> Iterator[ScannedImage | LeftOut]:
        for number in range(counts[-1]):
            yield ScannedImage(f"{number // 1000:06d}/{number:09d}-a-name-of-usual-length.jpg", 100_000, number)
            yield LeftOut(root / f"{number}.txt", "not an image")

    monkeypatch.setattr(plan, "scan", names)
    monkeypatch.setattr(listing, "_ROWS_AT_ONCE", 2_000)
    counts = [10_000]
    small = peak_of_planning(tmp_path, counts[-1])
    counts.append(50_000)
    large = peak_of_planning(tmp_path, counts[-1])
    assert (large - small) / (counts[1] - counts[0]) < 5


def test_a_listing_gives_the_images_in_any_order(tmp_path: Path) -> None:
    rows = [
        listing.Row(f"folder/{'é' * (number % 5)}{number}.jpg".encode(), number**2, -number) for number in range(500)
    ]
    with listing.ListingWriter(str(tmp_path)) as writer:
        for row in rows:
            writer.add(row)
    found = listing.Listing("/photos", str(tmp_path))
    assert list(found.rows()) == rows
    assert [found.row(position) for position in reversed(range(500))] == rows[::-1]
    assert found[3] == ImageFile(Path("/photos/folder/ééé3.jpg"), 9)
    assert found.sizes().tolist() == [row.size for row in rows]


@pytest.mark.parametrize("count", [1, 2, 1000, 100_003])
def test_the_shuffle_is_that_of_earlier_versions(count: int) -> None:
    assert listing.shuffled(count, 5).tolist() == np.random.default_rng(5).permutation(count).tolist()
