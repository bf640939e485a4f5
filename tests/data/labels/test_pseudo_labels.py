"""Labels for other people's training: every image once with its label, from a run, an export or a server, whatever fails on the way."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader

from data import storage
from data.errors import DataError
from data.labels.pseudo_labels import PseudoLabels
from data.labels.sources import COLUMNS
from data.storage.retry import StorageError
from tests import HANGS_S
from tests.conftest import DIGIT_NAMES
from tests.label_server import TOKEN, LabelServer, label_server
from tests.label_sources import Sources, as_said, pixels, read
from tests.s3_server import FaultyS3


def test_every_image_comes_once_with_its_label_from_every_kind_of_source(source: str, sources: Sources) -> None:
    labels = PseudoLabels(source)
    samples = read(labels)
    assert as_said(samples) == sources.kept
    for sample in samples:
        assert (sample["image"][0].numpy() == sources.images[sample["key"]]).all()
    assert len(labels) == len(sources.kept)
    assert labels.class_names == tuple(DIGIT_NAMES)
    image, label = next(iter(labels.dataset()))
    assert (image.mode, image.size, label) == ("RGB", (8, 8), samples[0]["label"])


def test_the_table_says_the_same_as_the_samples(source: str, sources: Sources) -> None:
    table = PseudoLabels(source).table()
    assert table.column_names == list(COLUMNS)
    rows = table.to_pylist()
    assert {row["__key__"]: (row["label"], row["confidence"], row["copies"]) for row in rows} == sources.kept
    for row in rows:
        assert row["__key__"] == f"{row['source_shard']}-{row['source_ordinal']:07d}"
        assert row["topk_index"][0] == row["label"]


def test_loader_workers_share_the_samples(source: str, sources: Sources) -> None:
    assert as_said(read(PseudoLabels(source), workers=2)) == sources.kept


@pytest.mark.slow
def test_ranks_and_their_workers_share_the_samples(sources: Sources, tmp_path: Path) -> None:
    words = ["2", str(tmp_path / "store"), str(sources.export)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.label_ranks", str(rank), *words], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    parts = [process.communicate(timeout=HANGS_S)[0].split() for process in ranks]
    assert sorted(parts[0] + parts[1]) == sorted(sources.kept)
    assert all(parts), "both have some"


def test_a_worker_that_is_spawned_knows_the_rank_of_the_process_that_made_it(
    sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, parts = PseudoLabels(str(sources.export)).dataset(pixels, as_dict=True), []
    for rank in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(dist, "is_initialized", lambda: True)
            patch.setattr(dist, "get_rank", lambda rank=rank: rank)
            patch.setattr(dist, "get_world_size", lambda: 3)
            sent = pickle.dumps(dataset)
        parts.append([sample["key"] for sample in pickle.loads(sent)])
    assert all(parts)
    assert sorted(chain.from_iterable(parts)) == sorted(sources.kept)


def test_a_shuffled_order_follows_from_seed_and_epoch(source: str, sources: Sources) -> None:
    labels = PseudoLabels(source)

    def keys(epoch: int, **options: int) -> list[str]:
        dataset = labels.dataset(pixels, as_dict=True, **options)
        dataset.set_epoch(epoch)
        return [sample["key"] for sample in dataset]

    first = keys(0, shuffle=20)
    assert sorted(first) == sorted(sources.kept)
    assert first == keys(0, shuffle=20)
    assert len({tuple(order) for order in (first, keys(1, shuffle=20), keys(0, shuffle=20, seed=1), keys(0))}) == 4


def test_persistent_workers_see_the_epoch_change(sources: Sources) -> None:
    dataset = PseudoLabels(str(sources.export)).dataset(pixels, as_dict=True, shuffle=20)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    first, again = ([sample["key"] for sample in loader] for _ in range(2))
    dataset.set_epoch(1)
    assert first == again != [sample["key"] for sample in loader]


def test_labels_are_read_without_torch(source: str, sources: Sources) -> None:
    samples = [(label, np.array(image)[..., 0]) for image, label in PseudoLabels(source)]
    assert [label for label, _ in samples] == [label for label, _, _ in sources.kept.values()]
    for (_, image), key in zip(samples, sources.kept, strict=True):
        assert (image == sources.images[key]).all()


def test_classes_are_chosen_by_name_or_number(source: str) -> None:
    by_number = PseudoLabels(source, classes=[3, 7]).table()
    assert set(by_number.column("label").to_pylist()) == {3, 7}
    choices: list[list[int | str]] = [["digit_3", "digit_7"], ["digit_7", 3]]
    for names in choices:
        assert PseudoLabels(source, classes=names).table() == by_number
    assert set(PseudoLabels(source, classes="digit_3").table().column("label").to_pylist()) == {3}
    with pytest.raises(DataError, match="classes: no class 'digit_33' among 10; did you mean 'digit_3'"):
        PseudoLabels(source, classes=["digit_33"])


def test_the_text_of_an_object_says_what_it_was_opened_with(sources: Sources) -> None:
    labels = PseudoLabels(str(sources.export), min_confidence=0.5, classes=[3], selected=False)
    assert repr(labels) == (
        f"PseudoLabels('{sources.export}', min_confidence=0.5, classes=['digit_3'], selected=False): "
        f"{labels._source.num_shards} shards, 10 classes (digit_0, digit_1, digit_2, …)"
    )


def test_a_filter_lets_through_what_it_says(sources: Sources) -> None:
    expected = {k: v for k, v in sources.kept.items() if v[1] >= np.float32(0.7) and v[0] in (3, 7)}
    with label_server(sources.every) as web:
        for source in (sources.run, sources.export, sources.every, web.address):
            labels = PseudoLabels(str(source), min_confidence=0.7, classes=[3, 7])
            assert as_said(read(labels)) == expected
            assert len(labels) == len(expected)
    for source in (sources.run, sources.every):
        everything = PseudoLabels(str(source), selected=False)
        assert len(read(everything)) == len(everything) == 117


def test_the_server_of_a_joined_run_gets_the_filter(web: LabelServer) -> None:
    web.kind = "joined"
    PseudoLabels(web.address)
    PseudoLabels(web.address, min_confidence=0.7, classes=[7, 3], selected=False)
    assert [path for path, _ in web.asked if "?" in path][:1] == [
        "/manifest.json?min_confidence=0.7&classes=3,7&selected=false"
    ]
    assert "?" not in web.asked[0][0]


@pytest.mark.slow
def test_an_export_and_a_run_are_read_from_an_object_store(sources: Sources, s3: FaultyS3, folder: str) -> None:
    for path in sources.run.parent.rglob("*"):
        if path.is_file():
            content = path.read_bytes().replace(f"{sources.run.parent}/".encode(), f"{folder}/".encode())
            storage.write_bytes(f"{folder}/{path.relative_to(sources.run.parent)}", content)
    for name in ("run", "run/exports/v1", "run/exports"):
        labels = PseudoLabels(f"{folder}/{name}")
        fault = s3.add("cut", "GET", ".tar", keep=100)
        assert as_said(read(labels)) == sources.kept
        assert fault.done
        assert as_said(read(labels, workers=2)) == sources.kept


def test_the_token_is_sent_and_its_absence_is_told(web: LabelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    web.token = TOKEN
    with pytest.raises(StorageError, match=r"refused \(401 no token\).*NOISY_STUDENT_TOKEN"):
        PseudoLabels(web.address)
    monkeypatch.setenv("NOISY_STUDENT_TOKEN", f"{web.address}={TOKEN}")
    assert len(read(PseudoLabels(web.address))) > 0


@pytest.mark.slow
def test_a_token_that_is_given_reaches_spawned_workers_and_only_web_servers(
    web: LabelServer, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.token = TOKEN
    monkeypatch.setattr("data.storage.web_tokens._given", {})
    labels = PseudoLabels(web.address, token=TOKEN)
    loader = DataLoader(
        labels.dataset(pixels, as_dict=True), batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    assert as_said(list(loader)) == sources.kept
    with pytest.raises(DataError, match="no http:// or https:// address; expected no token"):
        PseudoLabels(str(sources.export), token=TOKEN)


def test_more_workers_than_shards_are_warned_of(sources: Sources, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "data.labels"):
        next(iter(PseudoLabels(str(sources.run)).dataset()))
    assert not caplog.records
    dataset = PseudoLabels(str(sources.run)).dataset()
    dataset._rank = (0, 4)
    next(iter(dataset))
    assert "3 shards for 4 ranks and workers together" in caplog.text
