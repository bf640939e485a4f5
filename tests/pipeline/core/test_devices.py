"""A driver without a GPU sends the work to the cluster's; on one machine nothing starts Ray.

Ray believes what a node says of itself, so a node with `num_gpus` stands in for one with GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from data.settings import UsageError
from pipeline.core import ray_runtime
from pipeline.core.config import load_config
from pipeline.core.devices import call_on_device, require_device, resolve_device
from pipeline.core.layout import Layout
from pipeline.core.stage import StageError
from pipeline.evaluation import stage as evaluation_stage
from pipeline.evaluation.stage import evaluate
from pipeline.inference import commit_weights
from pipeline.inference.predictor import Predictor
from pipeline.models.registry import build_model
from pipeline.run import main
from teacher.labeling import stage as labeling_stage
from teacher.labeling.stage import label
from teacher.train import train_teacher
from tests.conftest import WriteDigits


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A driver's node without GPUs, and one with two."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1, num_gpus=2)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def where(word: str) -> tuple[str, str]:
    print("measured there")
    return ray.get_runtime_context().get_node_id(), word


def refuse() -> None:
    raise StageError("no such classes")


def test_on_one_machine_calls_stay_here_and_ray_is_not_started(
    without_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    assert resolve_device("auto", None) == "cpu"
    assert call_on_device("cpu", "10.0.0.1:6379", str.upper, "here") == "HERE"
    assert call_on_device("cpu", None, str.upper, "here") == "HERE"
    with pytest.raises(UsageError, match="device=cuda: torch finds no GPU here; check"):
        require_device("cuda")


def test_with_a_gpu_here_nothing_is_asked_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto", "10.0.0.1:1") == "cuda"
    require_device("cuda", "10.0.0.1:1")
    assert call_on_device("cuda", "10.0.0.1:1", str.upper, "here") == "HERE"


@pytest.mark.slow
def test_a_driver_without_a_gpu_measures_where_they_are(
    without_gpu: None, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resolve_device("auto", cluster.address) == "cuda"
    assert load_config(None, [f"ray_address={cluster.address}"]).resolved_device() == "cuda"
    require_device("cuda", cluster.address)
    with_gpus = {node["NodeID"] for node in ray.nodes() if node["Resources"].get("GPU")}
    driver = ray.get_runtime_context().get_node_id()
    node, word = call_on_device("cuda", cluster.address, where, "there")
    assert node in with_gpus - {driver}
    assert word == "there"
    assert capsys.readouterr().out.endswith("measured there\n")
    with pytest.raises(StageError, match="no such classes"):
        call_on_device("cuda", cluster.address, refuse)


def small_run(folder: Path, write: WriteDigits) -> list[str]:
    """Words of a run whose teacher was trained elsewhere."""
    for name in ("validation", "test", "unlabeled"):
        write(folder / name, 0, 60, labeled=name != "unlabeled")
    args = {"width": 0.125, "blocks": [1, 1, 1, 1]}
    torch.save(build_model("resnetrs26", 10, args).state_dict(), folder / "elsewhere.pth")
    data = [f"data.{name}=[{folder}/{name}/*.tar]" for name in ("validation", "test", "unlabeled")]
    model = ["teacher.model=resnetrs26", "teacher.model_args={width: 0.125, blocks: [1, 1, 1, 1]}",
             f"teacher.weights={folder}/elsewhere.pth", "teacher.image_size=32"]  # fmt: skip
    return [f"run_dir={folder}/run", *data, *model]


@pytest.mark.slow
def test_without_its_cluster_a_plan_says_unknown_and_what_is_done_stays_done(
    tmp_path: Path, write_digits: WriteDigits, without_gpu: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(ray_runtime, "_CONNECT_TIMEOUT_S", 0.0)
    words = small_run(tmp_path, write_digits)
    assert main(["stage=teacher,evaluate", *words]) == 0
    gone = [*words, "ray_address=127.0.0.1:9"]  # where nothing listens
    capsys.readouterr()
    assert main(["stage=teacher,evaluate", *gone]) == 0
    out = capsys.readouterr().out
    assert "teacher: done (" in out
    assert "evaluate: done (" in out
    assert main(["stage=teacher,label,evaluate", "plan=true", *gone]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("device      unknown: no Ray cluster answers at ray_address=127.0.0.1:9") for line in lines
    )
    states = {words[2]: " ".join(words[3:]) for line in lines if (words := line.split()) and words[0] == "generation"}
    assert states["teacher"].startswith("done")
    assert states["label"].startswith("would run")
    assert states["evaluate"].startswith("done")
    assert main(["stage=label", *gone]) == 2
    assert "ray_address=127.0.0.1:9: no Ray cluster answers there" in capsys.readouterr().err
    assert not (tmp_path / "run/gen-1/labels/started.json").exists()
    assert main(["stage=evaluate", "evaluate.robustness_images=2", *gone]) == 2, "its figures are outdated"
    assert (tmp_path / "run/gen-1/evaluation/done.json").exists()


class _ReachedLabelingError(Exception):
    pass


@pytest.mark.slow
def test_stages_measure_in_calls_that_another_machine_can_make(
    tmp_path: Path, write_digits: WriteDigits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Function and arguments survive the way there, and nothing is measured outside such a call."""
    sent: list[str] = []

    def call(device: str, address: str | None, function: Callable[..., Any], *args: Any) -> Any:
        sent.append(function.__name__)
        there, arguments = ray.cloudpickle.loads(ray.cloudpickle.dumps((function, args)))
        with monkeypatch.context() as allowed:
            allowed.setattr(Predictor, "__init__", original)
            return there(*arguments)

    def reached(*args: Any) -> None:
        raise _ReachedLabelingError

    original = Predictor.__init__
    monkeypatch.setattr(Predictor, "__init__", lambda *args, **kwargs: pytest.fail("measured by the driver"))
    for module in (commit_weights, evaluation_stage, labeling_stage):
        monkeypatch.setattr(module, "call_on_device", call)
    monkeypatch.setattr(labeling_stage, "_label_shards", reached)
    config = load_config(None, [*small_run(tmp_path, write_digits), "evaluate.robustness_images=5"])
    layout = Layout(config.run_dir)
    train_teacher(config, layout)
    evaluate(config, layout)
    with pytest.raises(_ReachedLabelingError):
        label(config, layout, accept_chance=True)
    assert sent == ["_measure_quality", "_measure_models", "_robustness", "measure_speed", "_check"]
