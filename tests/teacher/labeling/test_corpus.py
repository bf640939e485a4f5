"""Defects of unlabeled shards stop a run before anything is computed, or are reported in a line; every lost image is reported."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from data.shards.split import Split, open_split
from pipeline.core.schema import LabelConfig
from pipeline.core.stage import StageError
from pipeline.run import main
from teacher.labeling.corpus import check_corpus, check_shards, count_unusable, known_problems, report_oddities
from tests.data.shards.test_samples import Member, tar

PER_SHARD = 60


def corpus(folder: Path, **shards: Sequence[str | Member] | bytes) -> Split:
    folder.mkdir(exist_ok=True)
    for name, members in shards.items():
        content = (
            members if isinstance(members, bytes) else tar([m if isinstance(m, tuple) else (m, b"3") for m in members])
        )
        (folder / f"{name}.tar").write_bytes(content)
    return open_split(f"{folder}/*.tar", str(folder / "index"))


def images(prefix: str = "") -> list[Member]:
    return [(f"{prefix}{n}.jpg", b"image" * 300) for n in range(PER_SHARD)]


def cut(members: list[Member]) -> bytes:
    content = tar(members)
    return content[: len(content) // 3]


@pytest.fixture
def two_of_three_are_cut(tmp_path: Path) -> Split:
    return corpus(tmp_path / "shards", a=cut(images("a")), b=images("b"), c=cut(images("c")))


def test_shards_that_were_cut_stop_the_run_and_are_named_with_the_position(two_of_three_are_cut: Split) -> None:
    a, _, c = two_of_three_are_cut.shards
    with pytest.raises(StageError) as caught:
        check_shards(two_of_three_are_cut, LabelConfig())
    message = str(caught.value)
    assert message.startswith("2 of 3 shards are cut short or damaged, more than label.max_damaged_shards=0")
    for shard in (a, c):
        assert (
            f"\n  {shard.url}: truncated or damaged tar: unexpected end of data, at byte {shard.bytes} of {shard.bytes}"
            in message
        )
    assert "Fetch or pack them again, or remove them from data.unlabeled; label.max_damaged_shards=2 labels" in message


def test_as_many_as_are_allowed_are_labeled_up_to_the_damage_and_said(
    two_of_three_are_cut: Split, capsys: pytest.CaptureFixture[str]
) -> None:
    check_shards(two_of_three_are_cut, LabelConfig(max_damaged_shards=2))
    report_oddities(two_of_three_are_cut)
    assert "label: 2 damaged shards are labeled up to the damage:\n" in capsys.readouterr().out
    a, b, _ = two_of_three_are_cut.shards
    assert [row.key for row in known_problems(a)] == [f"a{a.num_samples - 2}", ""], (
        "the image that is cut, and the shard"
    )
    assert known_problems(b) == []


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>" * 100, b"\x1f\x8b" + bytes(600), tar(["1.jpg"]) * 2])
def test_whatever_is_no_whole_tar_counts(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(StageError, match=r"1 of 2 shards are cut short or damaged(.|\n)*bad\.tar: .*, at byte \d+ of"):
        check_shards(corpus(tmp_path, bad=content, good=images()), LabelConfig(max_quarantined=1))


@pytest.mark.parametrize("word", ["plan=true", "plan=false"])
def test_the_plan_tells_and_a_command_stops_before_it_trains_a_teacher(
    two_of_three_are_cut: Split, tmp_path: Path, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "stage=teacher,label", f"run_dir={tmp_path}/run", f"data.unlabeled=[{tmp_path}/shards/*.tar]", "data.num_classes=3",
        "teacher.model=resnetrs26", "teacher.weights=pretrained", word,
    ]  # fmt: skip
    code = main(words)
    captured = capsys.readouterr()
    assert f"{two_of_three_are_cut.shards[2].url}: truncated or damaged tar" in captured.out + captured.err
    if word == "plan=true":
        assert "label     would refuse" in captured.out
    else:
        assert code == 2
        assert not (tmp_path / "run/config.yaml").exists()
        assert not (tmp_path / "run/gen-1").exists()


def test_images_that_merge_stop_the_run_with_the_remedy(tmp_path: Path) -> None:
    split = corpus(tmp_path, dates=[f"2024.05.{day:02d}.jpg" for day in range(1, 29)], good=images())
    assert split.num_samples == PER_SHARD + 28
    with pytest.raises(
        StageError,
        match=r"28 of 88 images could not be used, more than label.max_quarantined=0.01; (.|\n)*rename the files",
    ):
        check_corpus(split, LabelConfig())
    check_corpus(split, LabelConfig(max_quarantined=0.5))


def test_parts_of_samples_that_lie_apart_stop_the_run_with_the_remedy(tmp_path: Path) -> None:
    split = corpus(tmp_path, x=[f"{n}.{field}" for field in ("cls", "jpg", "json") for n in range(15)])
    with pytest.raises(
        StageError,
        match=r"30 of 45 images could not be used(.|\n)*x\.tar: 30 samples, the first: the key '0' comes back",
    ):
        check_corpus(split, LabelConfig())


def test_depth_maps_are_said_in_a_line_and_stop_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = corpus(tmp_path, x=[f"{n}.{field}" for n in range(20) for field in ("depth.png", "jpg")])
    check_corpus(split, LabelConfig(max_quarantined=0))
    report_oddities(split)
    assert capsys.readouterr().out == (
        "label: 20 images in 1 shards are not labeled, as they lie beside the image of a sample (depth.png in x.tar)\n"
    )


def test_images_that_only_share_a_key_count_like_quarantined_ones(tmp_path: Path) -> None:
    split = corpus(tmp_path, x=[*images(), "7.b.jpg", "8.b.jpg"])
    assert split.num_samples == PER_SHARD + 2, "the first is beside its image no more: 7.jpg … 8.jpg lie between"
    split = corpus(tmp_path / "beside", x=[*images(), "more.jpg", "more.b.jpg", "more.c.jpg"])
    assert count_unusable(split, {}) == 2
    with pytest.raises(
        StageError,
        match=r"2 of 61 images could not be used(.|\n)*2 images that lie beside the image of a sample \(b.jpg, c.jpg\)",
    ):
        check_corpus(split, LabelConfig())
    check_corpus(split, LabelConfig(max_quarantined=0.05))


def test_what_was_found_wrong_when_labeling_replaces_what_the_index_knew(tmp_path: Path) -> None:
    split = corpus(tmp_path, a=["1.cls", "2.jpg"], b=["1.cls", "2.jpg"])
    assert count_unusable(split, {}) == 2
    assert count_unusable(split, {"a": 2}) == 3
