"""ResNet-RS's studies (arXiv 2103.07579) for `stage=ablate`: the run's teacher recipe, one component per row.

A component has the value that the run's configuration gives it. A trial is one training of the teacher on the labeled
images, measured on the validation images.
"""

from __future__ import annotations

from typing import Any

from data.labels.exclusions import exclude_inputs
from pipeline.core.schema import Config
from pipeline.core.stage import Fingerprint
from pipeline.models.expected_time import Workload
from pipeline.studies.rows import FromRun, Row, Study, additive, no_input_noise
from pipeline.studies.trainings import labeled_job, open_splits
from pipeline.training.loop import fit
from pipeline.training.state import load_trained
from pipeline.trials.trial import Experiment
from pipeline.trials.workloads import training_workloads

_UNREGULARIZED = no_input_noise("teacher") | {
    "teacher.weights": None,
    "teacher.init": None,
    "teacher.init_head_lr_scale": 1.0,
    "teacher.freeze_backbone_epochs": 0.0,
    "teacher.label_smoothing": 0.0,
    "teacher.stochastic_depth": 0.0,
    "teacher.dropout": 0.0,
    "teacher.weight_decay": FromRun(2.5),  # 1e-4 where the recipe has 4e-5
}
_RAND_AUGMENT = {"teacher.augment.num_ops": FromRun(), "teacher.augment.magnitude": FromRun()}
_SMOOTHING = {"teacher.label_smoothing": FromRun()}
_DROPOUT = {"teacher.dropout": FromRun()}
_LOWER_DECAY = {"teacher.weight_decay": FromRun()}

RESNET_RS = Study(
    name="resnet_rs",
    source="ResNet-200, ImageNet (arXiv 2103.07579, table 1)",
    base=_UNREGULARIZED
    | {
        "teacher.lr_schedule": "step",
        "teacher.epochs": FromRun(90 / 350),  # 90 epochs of the original ResNets, scaled to the run's length
        "teacher.ema_decay": 0.0,
        "teacher.bn_momentum": 0.1,  # without EMA, 1.0 would evaluate with one batch's statistics
        "teacher.model_args.se_ratio": 0.0,
        "teacher.model_args.resnet_d": False,
    },
    rows=additive(
        Row("baseline", {}, 79.0),
        Row("+ cosine", {"teacher.lr_schedule": "cosine"}, 79.3),
        Row("+ longer", {"teacher.epochs": FromRun()}, 78.8),
        Row("+ EMA", {"teacher.ema_decay": FromRun(), "teacher.bn_momentum": FromRun()}, 79.1),
        Row("+ label smoothing", _SMOOTHING, 80.4),
        Row("+ stochastic depth", {"teacher.stochastic_depth": FromRun()}, 80.6),
        Row("+ RandAugment", _RAND_AUGMENT, 81.0),
        Row("+ dropout", _DROPOUT, 80.7),
        Row("+ lower weight decay", _LOWER_DECAY, 82.2),
        Row("+ SE", {"teacher.model_args.se_ratio": 0.25}, 82.9),
        Row("+ ResNet-D", {"teacher.model_args.resnet_d": True}, 83.4),
    ),
)

WEIGHT_DECAY = Study(
    name="weight_decay",
    source="ResNet-50, ImageNet, held-out images (arXiv 2103.07579, table 2)",
    base=_UNREGULARIZED,
    rows=(
        Row("none", {}, 79.7),
        Row("none, lower decay", _LOWER_DECAY, 78.7, of="none"),
        Row("RA + LS", _RAND_AUGMENT | _SMOOTHING, 82.4, of="none"),
        Row("RA + LS, lower decay", _LOWER_DECAY, 82.3, of="RA + LS"),
        Row("RA + LS + DO", _DROPOUT, 82.2, of="RA + LS"),
        Row("RA + LS + DO, lower decay", _LOWER_DECAY, 82.7, of="RA + LS + DO"),
    ),
)


def _fingerprint(config: Config) -> Fingerprint:
    config.teacher.require_averaged_statistics("teacher")  # whatever teacher.weights says
    labeled, validation = open_splits(config)
    inputs = {"labeled": labeled.digest(), "validation": validation.digest()}
    return Fingerprint(config.stage_fields("teacher"), inputs | exclude_inputs(config.data.exclude))


def _train(config: Config, folder: str, sources: tuple[str, ...]) -> dict[str, Any]:
    """Train; return the EMA weights' top-1 on the validation images, a fraction. No row needs another: `sources` is empty."""
    assert not sources, "no row of these studies has `needs`"
    job = labeled_job(config, "teacher", folder)
    fit(job)
    _, metrics = load_trained(job)
    top1 = [line["validation_top1"] for line in metrics if "validation_top1" in line][-1]
    loss = [line["loss"] for line in metrics if "loss" in line][-1]
    assert job.validation is not None, "see labeled_job"
    return {"top1": top1, "loss": loss, "steps": job.total_steps, "images": job.validation.num_samples}


def _workloads(config: Config, sources: tuple[str, ...]) -> list[Workload]:  # noqa: ARG001 (see _train)
    return training_workloads(labeled_job(config, "teacher", ""), open_splits(config)[0])


TEACHER_RECIPE = Experiment(_fingerprint, _train, _workloads, scratch=("checkpoints",))
