"""Videos of a folder are packed or rejected with a reason, and what is packed has the hashes of its content."""

from pathlib import Path

import numpy as np
import pytest

from data import pack
from data.clips.clean_view import ClipEvalView
from data.clips.sampling import ClipSampling
from data.errors import DataError
from data.images.clean_view import EvalView
from data.images.decode import DecodeError
from data.modalities import modality_of
from data.packing.pack_folder import pack as pack_folder
from data.shards.split import open_split
from tests.data.clips.bad_videos import corpus
from tests.data.clips.videos import encoded_frames, moving_square

VIEW = ClipEvalView(EvalView(32, 1.0, "bilinear", "crop"), ClipSampling(8, 2))


@pytest.fixture(scope="module")
def videos() -> dict[str, tuple[bytes, str]]:
    return corpus()


@pytest.fixture(scope="module")
def packed(videos: dict[str, tuple[bytes, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    for name, (content, _) in videos.items():
        (folder / "in").mkdir(exist_ok=True)
        (folder / "in" / name).write_bytes(content)
    (folder / "in" / "photo.jpg").write_bytes(b"")
    pack_folder(str(folder / "in"), str(folder / "out"), labeled=False, processes=1, modality="clip")
    return folder


def test_every_video_is_packed_or_rejected_with_its_reason(videos: dict[str, tuple[bytes, str]], packed: Path) -> None:
    lines = (packed / "out/unlabeled/rejected.txt").read_text().splitlines()
    reasons = {Path(line.partition(": ")[0]).name: line.partition(": ")[2] for line in lines}
    assert reasons.pop("photo.jpg").startswith("not a video file (mp4, ")
    expected = {name: reason for name, (_, reason) in videos.items() if reason}
    assert reasons.keys() == expected.keys()
    assert all(reasons[name].startswith(reason) for name, reason in expected.items()), reasons
    split = open_split([f"{packed}/out/unlabeled/*.tar"], str(packed / "indexes"))
    assert split.num_samples == len(videos) - len(expected)
    assert not any(problem for index in split.indexes() for problem in index.column("problem").to_pylist())


def test_the_clean_view_gives_the_same_reasons(videos: dict[str, tuple[bytes, str]]) -> None:
    for name, (content, reason) in videos.items():
        VIEW.decoding_bytes(content)
        if not reason:
            assert VIEW(content).shape == (8, 32, 32, 3), name
            continue
        with pytest.raises(DecodeError, match=f"^{reason.split(',')[0]}"):
            VIEW.with_hash(content)


def test_containers_and_groups_of_pictures_do_not_change_which_frames_are_seen() -> None:
    frames = [np.full((32, 64, 3), 20 + 10 * number, np.uint8) for number in range(20)]
    kinds = {
        "mp4": {}, "avi": {"bf": "2"}, "matroska": {"bf": "3"},
        "mov": {"g": "5", "bf": "2", "x264-params": "open-gop=1:scenecut=0"},
    }  # fmt: skip
    for container, options in kinds.items():
        seen = ClipEvalView(VIEW.frame, ClipSampling(3, 2), clips=4)(
            encoded_frames(frames, container=container, options=options)
        )
        levels = seen.mean(axis=(1, 2, 3))
        expected = [20 + 10 * (offset + 2 * step) for offset in (0, 5, 10, 15) for step in range(3)]
        assert np.abs(levels - expected).max() < 4, container


def test_several_clips_and_crops_lie_one_after_the_other() -> None:
    frames = [
        np.tile(np.linspace(0, 200, 96, dtype=np.uint8)[None, :, None], (32, 1, 3)) + np.uint8(n) for n in range(12)
    ]
    view = ClipEvalView(VIEW.frame, ClipSampling(4), clips=2, crops=3)
    seen = view(encoded_frames(frames, lossless=True))
    assert seen.shape == view.shape == (24, 32, 32, 3)
    middles = seen.reshape(2, 3, 4, 32, 32, 3).mean(axis=(3, 4, 5))
    assert (np.diff(middles, axis=1) > 50).all(), "left, middle and right crops"
    assert np.allclose(np.diff(middles, axis=2), 1, atol=0.5), "frames in their order"
    assert (middles[1] > middles[0]).all(), "the second clip begins later"


def test_a_video_encoded_again_has_nearly_the_hash_of_the_first() -> None:
    frames = moving_square(0, 5, side=64)
    _, first = VIEW.with_hash(encoded_frames(frames))
    _, again = VIEW.with_hash(encoded_frames(frames, container="matroska", options={"crf": "30"}))
    _, other = VIEW.with_hash(encoded_frames(moving_square(1, 6, side=64)))
    assert (first ^ again).bit_count() <= 10 < (first ^ other).bit_count()


def test_content_tells_the_modality(videos: dict[str, tuple[bytes, str]]) -> None:
    names = {name: modality_of(content).name for name, (content, _) in videos.items()}
    assert {name for name, modality in names.items() if modality == "image"} == {
        "empty.mp4",
        "picture.mp4",
        "playlist.mp4",
    }


def test_a_wrong_modality_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="modality=video: expected image or clip"):
        pack_folder(str(tmp_path), str(tmp_path / "out"), modality="video")
    assert "modality=clip" in (pack.__doc__ or "")
