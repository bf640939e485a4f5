"""The two ImageNet configurations, planned at the real size: 1,281 labeled and 13,000 unlabeled shards."""

import os
from pathlib import Path

import pyarrow as pa
import pytest

from data.shards.index import INDEX_SCHEMA, index_digest
from data.shards.split import INDEX_FOLDER, MANIFEST_NAME, Manifest, ShardRecord
from data.tables import write_table
from pipeline.core.config import load_config
from pipeline.models.registry import build_model, count_parameters, on_meta
from pipeline.run import main

CLASSES = [f"class_{number:03d}" for number in range(1000)]
SPLITS = {
    "imagenet/labeled": (1281, 980),
    "imagenet/validation": (26, 985),
    "imagenet/test/labeled": (5, 10_000),
    "unlabeled": (13_000, 10_000),
}
BYTES = 1_100_000_000


def write_shard_list(folder: Path, num_shards: int, per_shard: int, class_names: list[str] | None) -> None:
    """A manifest, sparse files of the recorded size, and indexes of labeled shards: all that planning reads."""
    (folder / INDEX_FOLDER).mkdir(parents=True)
    rows = [
        {"key": f"{n}", "extension": "jpg", "offset": 0, "size": 1, "label": n % 1000, "problem": ""}
        for n in range(per_shard if class_names else 0)
    ]
    index = pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)
    write_table(str(folder / "one.parquet"), index)
    names = [f"{folder.name}-{number:06d}.tar" for number in range(num_shards)]
    for name in names:
        with (folder / name).open("wb") as file:
            file.truncate(BYTES)
        if class_names:
            os.link(folder / "one.parquet", folder / INDEX_FOLDER / f"{Path(name).stem}.parquet")
    digest = index_digest(index)
    shards = [
        ShardRecord(name=name, bytes=BYTES, num_samples=per_shard, index_sha256=digest, sha256="0") for name in names
    ]
    (folder / MANIFEST_NAME).write_text(Manifest(class_names=class_names, shards=shards).model_dump_json())


@pytest.fixture(scope="module")
def cluster_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imagenet")
    for name, (num_shards, per_shard) in SPLITS.items():
        write_shard_list(root / name, num_shards, per_shard, CLASSES if name != "unlabeled" else None)
    return root


@pytest.mark.parametrize(
    ("name", "teacher_parameters", "student_parameters"),
    [("imagenet", 63.6e6, 86.6e6), ("imagenet_paper", 480.3e6, 86.6e6)],
)
def test_their_models_are_the_published_ones(name: str, teacher_parameters: float, student_parameters: float) -> None:
    config = load_config(name, [])
    for section, expected in ((config.teacher, teacher_parameters), (config.student, student_parameters)):
        model = on_meta(lambda section=section: build_model(section.model, 1000, section.model_args, 0.25, 0.0))  # type: ignore[misc]
        assert count_parameters(model) == pytest.approx(expected, rel=0.005)


def test_the_papers_numbers_are_the_defaults_of_its_configuration() -> None:
    config = load_config("imagenet_paper", [])
    student = config.student
    assert (student.model, student.image_size, student.epochs, student.batch_size) == ("resnetrs152", 224, 350, 4096)
    assert (student.lr, student.weight_decay, student.label_smoothing, student.ema_decay) == (0.1, 4e-5, 0.1, 0.9999)
    assert (student.dropout, student.augment.num_ops, student.augment.magnitude) == (0.25, 2, 15)
    assert (config.select.confidence_threshold, config.select.per_class) == (0.3, 130_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imagenet", "imagenet_paper"])
def test_all_stages_are_planned_from_shard_lists_of_the_real_size(
    name: str, cluster_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cluster_data)
    assert main(["stage=all", f"config={name}", "plan=true"]) == 0
    plan = capsys.readouterr().out
    assert "13,000 shards    130,000,000 images" in plan
    assert "1,281 shards      1,255,380 images" in plan
    steps = -(-350 * 1_255_380 // 1024)
    assert f"{steps:,} steps of 4,096 (1,024 labeled)" in plan
    assert "130,000 images per class" in plan
    assert "GB of checkpoints" in plan
    assert "a worker on a machine like this:" in plan
    assert "GB for files and images (label.memory_mb)" in plan
    assert "memory of one GPU, GB (of 80, assumed: plan.gpu_memory_gb)" in plan
    assert "GB of a GPU's" not in plan  # all stages fit
    header, *rows = plan[plan.index("expected time:") :].splitlines()[1:5]
    assert header.split() == ["here,", "without", "a", "GPU", "1", "GPU", "8", "GPUs", "64", "GPUs"]
    assert [row.split()[0] for row in rows if row.split()[0] in ("teacher", "label", "student")] == (
        ["teacher", "label", "student"] if name == "imagenet" else ["label", "student"]
    )
    assert not (cluster_data / "runs").exists()
