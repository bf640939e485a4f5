"""The studies of ResNet-RS (arXiv 2103.07579) as rows, for `stage=ablate`: the recipe of the run's teacher, taken apart.

What a row brings in has the value that the run's configuration gives it.
"""

from __future__ import annotations

from typing import Any

from pipeline.studies.rows import Own, Row, Study, additive

# Input noise that ResNet-RS does not have: crop and flip remain.
_CROP_AND_FLIP: dict[str, Any] = {"teacher.weights": None, "teacher.mixup": 0.0, "teacher.augment.num_ops": 0} | {
    f"teacher.augment.{name}": 0
    for name in ("rotation", "zoom", "translate", "shear", "brightness", "contrast", "cutout")
}
_UNREGULARIZED = _CROP_AND_FLIP | {
    "teacher.label_smoothing": 0.0,
    "teacher.stochastic_depth": 0.0,
    "teacher.dropout": 0.0,
    "teacher.weight_decay": Own(2.5),  # 1e-4 where the recipe has 4e-5
}
_RAND_AUGMENT = {"teacher.augment.num_ops": Own(), "teacher.augment.magnitude": Own()}
_SMOOTHING = {"teacher.label_smoothing": Own()}
_DROPOUT = {"teacher.dropout": Own()}
_LOWER_DECAY = {"teacher.weight_decay": Own()}

RESNET_RS = Study(
    name="resnet_rs",
    source="ResNet-200, ImageNet (arXiv 2103.07579, table 1)",
    base=_UNREGULARIZED
    | {
        "teacher.lr_schedule": "step",
        "teacher.epochs": Own(90 / 350),  # as long as ResNets were trained, to the recipe's own length
        "teacher.ema_decay": 0.0,
        "teacher.bn_momentum": 0.1,  # the average's 1.0 without an average: evaluated with the statistics of one batch
        "teacher.model_args.se_ratio": 0.0,
        "teacher.model_args.resnet_d": False,
    },
    rows=additive(
        Row("baseline", {}, 79.0),
        Row("+ cosine", {"teacher.lr_schedule": "cosine"}, 79.3),
        Row("+ longer", {"teacher.epochs": Own()}, 78.8),
        Row("+ EMA", {"teacher.ema_decay": Own(), "teacher.bn_momentum": Own()}, 79.1),
        Row("+ label smoothing", _SMOOTHING, 80.4),
        Row("+ stochastic depth", {"teacher.stochastic_depth": Own()}, 80.6),
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
