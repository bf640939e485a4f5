"""generations=auto: compare a generation's student with its teacher on the validation images; generations.py has the rule.

A module of its own, because it needs torch, and status reads decisions without.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from data.shards.split import Split, open_split
from pipeline.core.devices import call_on_device, require_device
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import Fingerprint, done_record, open_stage, require_done, with_recorded_device
from pipeline.evaluation.generations import Decision, read_decision
from pipeline.inference.accuracy import paired_comparison
from pipeline.inference.predictor import predict_batches
from pipeline.inference.stage_weights import load_predictor
from pipeline.stages import NUMERICS


def decide(config: Config, layout: Layout) -> Decision | None:
    """Compare this generation's student with its teacher, or read the earlier comparison; None while there is no student."""
    if done_record(layout.student) is None:
        return None
    validation = open_split(config.data.validation, layout.indexes)
    expected = _fingerprint(config, layout, validation)
    before = done_record(layout.decision)
    is_outdated = before is not None and before["fingerprint"] != expected.as_json()
    stage = open_stage(
        layout.decision,
        "decision",
        expected,
        force=is_outdated,
        check=lambda: require_device(config.resolved_device(), config.ray_address),
    )
    if not stage.is_done:
        device = config.resolved_device()
        stage.commit([], call_on_device(device, config.ray_address, _compare, config, layout, validation))
    return read_decision(layout)


def _fingerprint(config: Config, layout: Layout, validation: Split) -> Fingerprint:
    stages = {"teacher": layout.teacher_stage, "student": "student"}
    models = {role: require_done(folder, stages[role])["digest"] for role, folder in layout.models.items()}
    found = Fingerprint(config.values_of(NUMERICS), {"validation": validation.digest()} | models)
    return with_recorded_device(found, layout.decision)


def _compare(config: Config, layout: Layout, validation: Split) -> dict[str, Any]:
    torch.set_num_threads(config.threads)
    device = config.resolved_device()
    teacher, student = (
        _is_right(validation, folder, device, config.training(stage).eval_batch_size)
        for stage, folder in ((layout.teacher_stage, layout.teacher), ("student", layout.student))
    )
    return {
        "teacher_top1": float(teacher.mean()),
        "student_top1": float(student.mean()),
        "comparison": asdict(paired_comparison(teacher, student)),
    }


def _is_right(validation: Split, folder: str, device: str, batch_size: int) -> np.ndarray:
    """Whether a model's top-1 is right, per image: (N,) bool."""
    predictor = load_predictor(folder, device, batch_size)
    batches = predict_batches(validation, predictor.view, batch_size, predictor.logits)
    return np.concatenate([logits.argmax(axis=1) == labels for logits, labels in batches])
