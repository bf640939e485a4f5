"""What the student has from its teacher's model: initial weights if configured, and a warning if it is smaller."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from data import storage
from data.storage.redact import redacted
from pipeline.core.layout import Layout
from pipeline.core.schema import Config, StudentConfig
from pipeline.core.stage import StageError
from pipeline.inference.stage_weights import WEIGHTS_FOLDER, read_info
from pipeline.models.initial_weights import TEACHER, InitialWeights, initial_weights
from pipeline.models.registry import build_model, can_warm_start, count_parameters, family_of, on_meta

logger = logging.getLogger(__name__)


def begin_student(
    config: Config, layout: Layout, num_classes: int, class_names: Sequence[str] | None
) -> InitialWeights | None:
    """The weights that student.init names, checked, and what was loaded printed; None without.

    Raises:
        StageError: there are none, or the student's model cannot begin with the teacher's.
        ModelError: they do not fit the student's model.
    """
    student = config.student
    if student.init != TEACHER:
        initial = initial_weights(student, "student", config.source_dir, class_names)
        if initial is not None:
            print(f"{initial.field}={redacted(initial.source)}: {initial.check(student, num_classes)}", flush=True)
        return initial
    if not _has_teacher(layout):
        raise StageError(
            f"student.init=teacher: {layout.teacher} has no weights; bring them, or give student.init=null"
        )
    info = read_info(layout.teacher)
    require_warm_start(student, info.model, info.model_args)
    return InitialWeights("student.init", storage.join(layout.teacher, WEIGHTS_FOLDER), grows=True)


def _has_teacher(layout: Layout) -> bool:
    """False where only the labels were copied from another run."""
    return storage.exists(storage.join(layout.teacher, WEIGHTS_FOLDER))


def require_warm_start(student: StudentConfig, teacher: str, teacher_args: Mapping[str, Any]) -> None:
    """Raise StageError if student.init=teacher, and the student cannot begin with weights of this teacher model."""
    if student.init != TEACHER or (teacher, teacher_args) == (student.model, student.model_args):
        return
    models = (teacher, teacher_args), (student.model, student.model_args)
    if not can_warm_start(*(on_meta(partial(build_model, name, 2, args)) for name, args in models)):
        family = family_of(teacher.partition(".")[0])
        rule = f" ({family.warm_start})" if family is not None and family.warm_start else ""
        raise StageError(
            f"student.init=teacher: the teacher is {teacher} with model_args {dict(teacher_args)}, "
            f"the student {student.model} with {student.model_args}; give the student the same student.model and "
            f"student.model_args{rule}, or student.init=null"
        )


def warn_of_smaller_student(config: Config, layout: Layout, num_classes: int) -> None:
    """Log a warning if the student has fewer parameters than its teacher."""
    if not _has_teacher(layout):
        return
    teacher, student = read_info(layout.teacher), config.student
    teacher_size, student_size = (
        count_parameters(on_meta(partial(build_model, name, num_classes, args)))
        for name, args in ((teacher.model, teacher.model_args), (student.model, student.model_args))
    )
    if student_size < teacher_size:
        logger.warning(
            "the student has %.1f M parameters, its teacher %.1f M; an equal or larger one learns more",
            student_size / 1e6,
            teacher_size / 1e6,
        )
