"""Labels for other people's training: every image once with its label, from a run, an export or a server, whatever fails on the way."""

from __future__ import annotations

import logging
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, chdir
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor

from data import storage
from data.errors import DataError
from data.labels.pseudo_labels import PseudoLabels
from data.labels.sources import COLUMNS
from data.storage import retry
from data.storage.retry import ChangedError, StorageError
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.export.stage import export
from pipeline.export.tasks import make_file
from teacher.selection.stage import select
from tests import HANGS_S
from tests.conftest import DIGIT_NAMES, make_writer
from tests.label_server import TOKEN, LabelServer, label_server
from tests.pipeline.export.test_export import with_teacher
from tests.s3_server import FaultyS3
from tests.small_run import SmallRun

Said = dict[str, tuple[int, float, int]]  # key → label, confidence, copies


@dataclass
class Sources:
    """The same labels thrice; `every` has those that are not selected, too."""

    run: Path
    export: Path
    every: Path
    kept: Said  # as the stages' own files say
    images: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, digits: tuple[np.ndarray, np.ndarray]) -> Sources:
    folder = tmp_path_factory.mktemp("sources")
    run = SmallRun(folder, make_writer(digits))
    layout = with_teacher(run)
    run.label(run.config(), layout)
    select(run.config(), layout)
    for number, selected in enumerate((True, False), 1):
        config = run.config(export={"samples_per_shard": 10, "selected": selected})
        export_here(config, layout)
        assert (folder / f"run/exports/v{number}").is_dir()
    exports = folder / "run/exports"
    images = {f"unlabeled-{n // 50:06d}-{n % 50:07d}": digits[0][n] for n in range(120)}
    return Sources(folder / "run", exports / "v1", exports / "v2", said_by_stages(layout), images)


def export_here(config: Config, layout: Layout) -> None:
    """`stage=export` in this process, without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.export.stage.start_ray", lambda address: None)
        patch.setattr(
            "pipeline.export.stage.make_files", lambda job, files, *rest: [make_file(job, file) for file in files]
        )
        export(config, layout)


def said_by_stages(layout: Layout) -> Said:
    """Read without any of what is tested."""
    found: Said = {}
    selection = layout.current_selection()
    for path in sorted(Path(layout.labels).glob("unlabeled-*.parquet")):
        copies = pq.read_table(f"{selection}/{path.name}").column("copies").to_pylist()
        for row, number in zip(pq.read_table(path).to_pylist(), copies, strict=True):
            if number:
                found[f"{path.stem}-{row['ordinal']:07d}"] = (row["label"], row["confidence"], number)
    return found


@pytest.fixture
def web(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> Iterator[LabelServer]:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    with label_server(sources.export) as running:
        yield running


@pytest.fixture(params=["run", "export", "exports", "server"])
def source(request: pytest.FixtureRequest, sources: Sources) -> Iterator[str]:
    """Each kind, the same labels in all."""
    with ExitStack() as stack:
        if request.param == "server":
            yield stack.enter_context(label_server(sources.export)).address
        elif request.param == "exports":
            yield str(sources.export.parent)
        else:
            yield str(getattr(sources, request.param))


def pixels(image: Image.Image) -> torch.Tensor:
    return pil_to_tensor(image)


def read(labels: PseudoLabels, workers: int = 0, **options: Any) -> list[dict[str, Any]]:
    """All samples, one by one."""
    loader = DataLoader(labels.dataset(pixels, as_dict=True, **options), batch_size=None, num_workers=workers)
    return list(loader)


def as_said(samples: list[dict[str, Any]]) -> Said:
    said = {sample["key"]: (sample["label"], sample["confidence"], sample["copies"]) for sample in samples}
    assert len(said) == len(samples), "every sample once"
    return said


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


def test_a_manifest_of_another_version_is_refused(web: LabelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = web.manifest() | {"version": 2}
    monkeypatch.setattr(web, "manifest", lambda: manifest)
    with pytest.raises(DataError, match=r"manifest\.json: version: .*the server is of another version"):
        PseudoLabels(web.address)


def test_a_sample_more_or_less_than_the_manifest_says_is_an_error(
    web: LabelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = web.manifest()
    manifest["shards"][0]["num_samples"] += 1
    monkeypatch.setattr(web, "manifest", lambda: manifest)
    with pytest.raises(DataError, match=r"000000\.tar: 10 samples, and 11 by the manifest"):
        read(PseudoLabels(web.address))


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


def test_an_overloaded_server_and_cut_streams_cost_a_retry_of_the_missing_range(
    web: LabelServer, sources: Sources
) -> None:
    web.faults += [("503", "manifest"), ("503", "000001.tar"), ("cut", "000000.tar"), ("cut", "000002.tar")]
    labels = PseudoLabels(web.address)
    assert as_said(read(labels)) == sources.kept
    assert not web.faults
    ranges = [wanted for path, wanted in web.asked if "000000.tar" in path]
    assert len(ranges) == 3, "looked up, cut, and whole"


def test_a_server_that_stays_away_is_an_error(web: LabelServer) -> None:
    labels = PseudoLabels(web.address)
    web.faults += [("503", "000000.tar")] * 10
    with pytest.raises(StorageError, match=r"000000\.tar: open failed: 503 \(busy\); tried 6 times"):
        read(labels)


def test_a_shard_that_is_replaced_in_mid_stream_is_never_mixed(
    web: LabelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.storage.remote._MAX_AHEAD", 1000)
    labels = PseudoLabels(web.address)
    web.faults.append(("replaced", "000001.tar"))
    with pytest.raises(ChangedError, match=r"000001\.tar: it was replaced on the server"):
        read(labels)


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


def test_a_manifest_that_names_another_server_is_refused(web: LabelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = web.manifest()
    manifest["shards"][0]["url"] = "http://elsewhere.example/x.tar"
    monkeypatch.setattr(web, "manifest", lambda: manifest)
    with pytest.raises(DataError, match=r"names http://elsewhere\.example/x\.tar; expected URLs of the same server"):
        PseudoLabels(web.address)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b"\x89PNG", b"\x00PNG", "the image of key 'unlabeled-[0-9-]+' cannot be decoded"),
        (
            b'"label":',
            b'"lebal":',
            r"pseudo-000000\.tar, key 'unlabeled-[0-9-]+': damaged \.json \(label: Field required\); fetch",
        ),
    ],
)
def test_a_damaged_sample_is_named(sources: Sources, tmp_path: Path, before: bytes, after: bytes, message: str) -> None:
    shutil.copytree(sources.export, tmp_path / "v1")
    shard = tmp_path / "v1/pseudo-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(before, after, 1))
    with pytest.raises(DataError, match=message):
        list(PseudoLabels(str(tmp_path / "v1")).dataset(shuffle=False))


def test_damaged_shards_of_an_export_are_found(sources: Sources, web: LabelServer) -> None:
    path = sources.export / "pseudo-000001.tar"
    content = bytearray(path.read_bytes())
    content[512 + 300] ^= 1  # in the padding behind a label, which no reader of tars looks at
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        for source in (str(sources.export), web.address):
            with pytest.raises(DataError, match=r"pseudo-000001\.tar: damaged: another SHA-256"):
                read(PseudoLabels(source))
        path.write_bytes(whole[:1536])
        with pytest.raises(DataError, match=r"pseudo-000001\.tar: "):
            read(PseudoLabels(str(sources.export)))
    finally:
        path.write_bytes(whole)


def test_damaged_labels_and_indexes_of_a_run_are_found(sources: Sources) -> None:
    labels = sources.run / "gen-1/labels/unlabeled-000001.parquet"
    selection = sources.run / "gen-1/selections" / (sources.run / "gen-1/selections/current").read_text().strip()
    for path in (labels, selection / "unlabeled-000001.parquet"):
        whole = path.read_bytes()
        path.write_bytes(whole + b"\0")
        try:
            with pytest.raises(DataError, match=r"unlabeled-000001\.parquet.*not as the run committed it"):
                read(PseudoLabels(str(sources.run)))
        finally:
            path.write_bytes(whole)
    index = sources.run.parent / "unlabeled/index/unlabeled-000001.parquet"
    whole, other = index.read_bytes(), index.with_name("unlabeled-000000.parquet").read_bytes()
    index.write_bytes(other)
    try:
        with pytest.raises(DataError, match="damaged index"):
            read(PseudoLabels(str(sources.run)))
    finally:
        index.write_bytes(whole)


def test_what_is_no_source_is_told(sources: Sources, tmp_path: Path, web: LabelServer) -> None:
    with pytest.raises(DataError, match="expected a run directory"):
        PseudoLabels(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"nothing/manifest\.json"):
        PseudoLabels(f"{web.address}/nothing")
    (tmp_path / "config.yaml").write_text("data: {unlabeled: []}\n")
    with pytest.raises(DataError, match="nothing is labeled and selected there yet"):
        PseudoLabels(str(tmp_path))
    with pytest.raises(DataError, match=r"min_confidence=2: expected 0 to 1"):
        PseudoLabels(str(sources.run), min_confidence=2)
    with pytest.raises(DataError, match=r"classes: 10: expected class numbers from 0 to 9"):
        PseudoLabels(str(sources.export), classes=[10])


def test_a_run_whose_images_are_elsewhere_is_told_of_the_folder(sources: Sources, tmp_path: Path) -> None:
    shutil.copytree(sources.run, tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace(f"{sources.run.parent}/unlabeled", "unlabeled"))
    with pytest.raises(DataError, match=r"data\.unlabeled: 'unlabeled/\*\.tar' matches no file.*the run was started"):
        PseudoLabels(str(tmp_path / "run"))
    with chdir(sources.run.parent):
        assert as_said(read(PseudoLabels(str(tmp_path / "run")))) == sources.kept


def test_more_workers_than_shards_are_warned_of(sources: Sources, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "data.labels"):
        next(iter(PseudoLabels(str(sources.run)).dataset()))
    assert not caplog.records
    dataset = PseudoLabels(str(sources.run)).dataset()
    dataset._rank = (0, 4)
    next(iter(dataset))
    assert "3 shards for 4 ranks and workers together" in caplog.text
