"""A packing that was stopped, or that an earlier version began or made, and what is in the way of a first one."""

import builtins
import errno
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data import pack
from data.errors import DataError
from data.images.decode import Pixels
from data.packing import pack_folder, screening
from tests.conftest import png
from tests.data.packing.conftest import Digits, write
from tests.data.packing.test_folders import sources


class Kill:
    """Stands in for `held_out_row` and stops the packing at the n-th image."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self._left, self._held_out_row = at, screening.held_out_row
        monkeypatch.setattr(screening, "held_out_row", self)

    def __call__(self, image: Pixels) -> object:
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1
        return self._held_out_row(image)


@pytest.mark.parametrize("at", [0, 3, 12, 16, 17])
def test_a_packing_that_was_stopped_anywhere_continues_to_the_same_bytes(photos: Path, tmp_path: Path, at: int) -> None:
    pack_folder.pack(str(photos), str(tmp_path / "whole"), validation=0.2, samples_per_shard=5)
    with pytest.MonkeyPatch.context() as patch:
        Kill(patch, at)
        with pytest.raises(KeyboardInterrupt):
            pack_folder.pack(str(photos), str(tmp_path / "out"), validation=0.2, samples_per_shard=5)
    pack_folder.pack(str(photos), str(tmp_path / "out"), validation=0.2, samples_per_shard=5)
    files = [
        {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        for folder in (tmp_path / "whole", tmp_path / "out")
    ]
    assert files[0] == files[1]


def test_a_packing_that_was_stopped_does_not_go_on_with_other_files(
    photos: Path, tmp_path: Path, digits: Digits, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"images={photos}", f"out={tmp_path}/out", "validation=0.5"]
    with pytest.MonkeyPatch.context() as patch:
        Kill(patch, 12)
        assert pack.main(words) == 130
    assert "stopped; the same command continues" in capsys.readouterr().err
    write(photos / "one/00.png", png(digits[0][50]))
    assert pack.main(words) == 2
    assert "other files than when packing into" in (error := capsys.readouterr().err)
    assert "20 images then, 21 now" in error
    assert not (tmp_path / "out/validation/manifest.json").exists()
    (photos / "one/00.png").unlink()
    assert pack.main(words) == 0
    assert not sources(tmp_path / "out", "labeled") & sources(tmp_path / "out", "validation")


def as_of_an_earlier_version(out: Path) -> None:
    """What that version left: no list of files, no marker."""
    claim = json.loads((out / "packing-labeled.json").read_text())
    del claim["files"], claim["group"]
    (out / "packing-labeled.json").write_text(json.dumps(claim) + "\n")
    for marker in out.glob("*/.packing.json"):
        marker.unlink()


def test_a_packing_of_an_earlier_version_is_done_and_a_leak_in_it_is_found(
    photos: Path, tmp_path: Path, digits: Digits, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    pack_folder.pack(str(photos), str(out), validation=0.5)
    as_of_an_earlier_version(out)
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    assert pack.main([f"images={photos}", f"out={out}", "validation=0.5"]) == 0
    assert "WRONG" not in capsys.readouterr().out
    assert {f: f.read_bytes() for f in out.rglob("*") if f.is_file()} == before
    write(photos / "one/00.png", png(digits[0][50]))  # as it was when that version went on
    pack_folder.pack(str(photos), str(tmp_path / "changed"), validation=0.5)
    (out / "validation").rename(tmp_path / "old")
    (tmp_path / "changed/validation").rename(out / "validation")
    both = len(sources(out, "labeled") & sources(out, "validation"))
    assert both
    assert pack.main([f"images={photos}", f"out={out}", "validation=0.5"]) == 0
    assert f"WRONG: {both} of 11 validation images are in {out}/labeled too" in capsys.readouterr().out


def test_copies_that_an_earlier_version_parted_are_found(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    pack_folder.pack(str(photos), str(out), validation=0.5)
    held_out = Path(sorted(sources(out, "validation"))[0])
    other = Path(sorted(path for path in sources(out, "labeled") if Path(path).parent == held_out.parent)[0])
    as_of_an_earlier_version(out)
    other.write_bytes(held_out.read_bytes())
    pack_folder.pack(str(photos), str(out), validation=0.5)
    assert f"WRONG: 1 of 10 validation images are in {out}/labeled too ({held_out})" in capsys.readouterr().out


def test_a_packing_that_an_earlier_version_began_goes_on_if_its_split_is_the_same(
    photos: Path, tmp_path: Path, digits: Digits
) -> None:
    out = tmp_path / "out"
    pack_folder.pack(str(photos), str(out), validation=0.5)
    as_of_an_earlier_version(out)
    (out / "validation").rename(tmp_path / "was")
    write(photos / "one/00.png", png(digits[0][50]))
    with pytest.raises(DataError, match=r"was packed into it, but images=.* has changed since"):
        pack_folder.pack(str(photos), str(out), validation=0.5)
    (photos / "one/00.png").unlink()
    pack_folder.pack(str(photos), str(out), validation=0.5)
    assert sources(out, "validation") == sources(tmp_path, "was")
    assert json.loads((out / "packing-labeled.json").read_text())["files"]["count"] == 20


def test_what_is_in_the_way_of_a_first_packing_is_refused_and_stays(photos: Path, tmp_path: Path) -> None:
    for name in ("labeled/manifest.json", "validation/validation-000000.tar"):
        mine = write(tmp_path / "out" / name)
        with pytest.raises(DataError, match="choose another out="):
            pack_folder.pack(str(photos), str(tmp_path / "out"), validation=0.2)
        assert [f for f in (tmp_path / "out").rglob("*") if f.is_file()] == [mine]
        mine.unlink()
        mine.parent.rmdir()


@pytest.mark.parametrize("splits", ["labeled", "all"])
def test_a_packing_on_a_disk_that_is_read_only_now_is_done_or_names_what_it_cannot_write(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], splits: str
) -> None:
    words = [f"images={photos}", f"out={tmp_path}/out", "validation=0.2"]
    assert pack.main(words) == 0
    if splits == "labeled":  # as if it had been stopped before the second
        shutil.rmtree(tmp_path / "out/validation")
        (tmp_path / "out/validation").mkdir()
    before = capsys.readouterr().out
    make_read_only(monkeypatch, tmp_path / "out")
    code = pack.main(words)
    said = capsys.readouterr()
    if splits == "all":
        assert (code, said.err) == (0, "")
        assert (
            said.out == f"{tmp_path}/out/labeled: packed already\n{tmp_path}/out/validation: packed already\n{before}"
        )
    else:
        assert code == 2
        assert re.fullmatch(
            rf"error: .*Read-only file system: '{tmp_path}/out/validation/.*'", said.err.splitlines()[-1]
        )


def make_read_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """What calls that change a folder do on a disk that is mounted read-only; root may write whatever the modes say."""

    def refusing(call: Callable[..., Any], changes: Callable[[int], bool]) -> Callable[..., Any]:
        def refuse(path: Any, flags: int = 0, *rest: Any, **options: Any) -> Any:
            if str(path).startswith(str(folder)) and changes(flags):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return call(path, flags, *rest, **options)

        return refuse

    def refuse_writing(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if str(path).startswith(str(folder)) and "r" not in mode:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return io.open(path, mode, *rest, **options)  # noqa: UP020 (the other one is replaced)

    monkeypatch.setattr(builtins, "open", refuse_writing)
    monkeypatch.setattr(os, "mkdir", refusing(os.mkdir, lambda _: True))
    monkeypatch.setattr(os, "open", refusing(os.open, lambda flags: bool(flags & (os.O_WRONLY | os.O_RDWR))))
    unlink = os.unlink
    monkeypatch.setattr(os, "unlink", refusing(lambda path, _=0, **options: unlink(path, **options), lambda _: True))
