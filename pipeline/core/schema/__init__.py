"""The fields of a run's configuration, with their defaults and meanings; `python -m pipeline.run --help` prints them."""

from pipeline.core.schema.config import Config, accepted_changes, default_fields, fields_marked
from pipeline.core.schema.section import BY_DIGEST, CPU_NUMERICS, REPORTING, RESUMABLE, RUNTIME, Section, fields_of
from pipeline.core.schema.sections import DataConfig, ExportConfig, LabelConfig, SelectConfig, ServeConfig
from pipeline.core.schema.training import (
    AugmentConfig,
    ClipConfig,
    PretrainConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    ViewsConfig,
)

__all__ = [
    "BY_DIGEST",
    "CPU_NUMERICS",
    "REPORTING",
    "RESUMABLE",
    "RUNTIME",
    "AugmentConfig",
    "ClipConfig",
    "Config",
    "DataConfig",
    "ExportConfig",
    "LabelConfig",
    "PretrainConfig",
    "Section",
    "SelectConfig",
    "ServeConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "ViewsConfig",
    "accepted_changes",
    "default_fields",
    "fields_marked",
    "fields_of",
]
