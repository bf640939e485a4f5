"""The further labels of the benchmark of suggestions are the true ones of the chosen images."""

from __future__ import annotations

import tarfile
from pathlib import Path

from benchmarks.bench_suggest import labeled_samples
from tests.conftest import WriteDigits
from tests.small_run import PER_SHARD, SmallRun


def test_a_chosen_image_gets_its_own_true_label(tmp_path: Path, write_digits: WriteDigits) -> None:
    run = SmallRun(tmp_path, write_digits)
    run.write_truth()
    chosen = [("unlabeled-000001", 3), ("unlabeled-000000", 7), ("unlabeled-000001", 0)]
    found = list(labeled_samples(str(tmp_path), chosen))
    assert [key for key, _ in found] == ["added000000", "added000001", "added000002"]
    for (shard, ordinal), (_, fields) in zip(chosen, found, strict=True):
        number = int(shard[-6:]) * PER_SHARD + ordinal
        assert fields["cls"] == str(run.truth[number]).encode()
        with tarfile.open(tmp_path / f"unlabeled/{shard}.tar") as tar:
            member = tar.extractfile(tar.getmembers()[ordinal])
            assert member is not None
            assert fields["png"] == member.read()
