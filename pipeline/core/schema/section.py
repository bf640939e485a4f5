"""What a section of the configuration is: a group of typed fields, and which of them count in fingerprints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

from data.storage.redact import redacted

RUNTIME: dict[str, Any] = {"runtime": True}
RESUMABLE: dict[str, Any] = {"resumable": True}
REPORTING: dict[str, Any] = {"reporting": True}
CPU_NUMERICS: dict[str, Any] = {"cpu_numerics": True}
BY_DIGEST: dict[str, Any] = {"by_digest": True}
ADDED: dict[str, Any] = {"added": True}

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


def _listed(value: Any) -> Any:
    """One path as a list of one."""
    return [value] if isinstance(value, str) and value else value


Patterns = Annotated[list[str], BeforeValidator(_listed)]
"""Paths; one alone need not be in brackets."""


def setting(default: Any, meaning: str, **options: Any) -> Any:
    """A field that counts in fingerprints. --help and docs/fields.md print `meaning`; `options`, as limits, are those of `Field`."""
    return Field(default, description=meaning, **options)


def runtime(default: Any, meaning: str, **options: Any) -> Any:
    """A field that changes how fast or how loudly a stage runs, never its output, so it is in no fingerprint."""
    return setting(default, meaning, json_schema_extra=RUNTIME, **options)


def resumable(default: Any, meaning: str, **options: Any) -> Any:
    """A field in the fingerprint that may change while a stage is not done."""
    return setting(default, meaning, json_schema_extra=RESUMABLE, **options)


def reporting(default: Any, meaning: str, **options: Any) -> Any:
    """A field of how often a stage measures or logs. It changes no weights and no labels, so another value never refuses.

    It is in the fingerprint, as in those of earlier versions, which says how the stage was made.
    """
    return setting(default, meaning, json_schema_extra=REPORTING, **options)


def cpu_numerics(default: Any, meaning: str, **options: Any) -> Any:
    """A field in the fingerprint that changes rounding on CPUs alone: another value never refuses what a GPU makes."""
    return setting(default, meaning, json_schema_extra=CPU_NUMERICS, **options)


def by_digest(default: Any, meaning: str, **options: Any) -> Any:
    """A field of which the fingerprint has the digest of what it names, not its value."""
    return setting(default, meaning, json_schema_extra=BY_DIGEST, **options)


def added(default: Any, meaning: str, **options: Any) -> Any:
    """A field of a later version, which is in the fingerprint only if it is not at its default.

    So a run that does not use it writes the same bytes as before there was one.
    """
    return setting(default, meaning, json_schema_extra=ADDED, **options)


class Section(BaseModel):
    """A group of fields. Unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    def fingerprint(self, prefix: str, every: bool = False) -> dict[str, Any]:
        """`{prefix + field: value}` of every field that can change the output, nested sections flattened.

        Args:
            every: also ADDED fields at their defaults.
        """
        fields: dict[str, Any] = {}
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if info.json_schema_extra in (RUNTIME, BY_DIGEST):
                continue
            if info.json_schema_extra == ADDED and value == info.default and not every:
                continue
            if isinstance(value, Section):
                fields |= value.fingerprint(f"{prefix}{name}.", every)
            else:
                fields[f"{prefix}{name}"] = redacted(value) if isinstance(value, str) else value
        return fields


def fields_of(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted name, field) of a section, nested sections flattened."""
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from fields_of(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info
