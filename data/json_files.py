"""Read JSON files: an object with the expected fields, or an error that names the file and says what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from . import storage
from .errors import DataError, damaged

Shape = TypeVar("Shape")


def read_json(
    url: str, remedy: str, shape: type[BaseModel] | None = None, error: type[ValueError] = DataError
) -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        remedy: what to do about a damaged file; ends the message.
        shape: required fields and their types. The result is the object as written, with further fields if it has any.
        error: the exception type to raise.

    Raises:
        DataError: not UTF-8, not JSON, or not the expected object.
        FileNotFoundError, StorageError: as `storage.read_bytes`.
    """
    return parse_json(storage.read_bytes(url), url, remedy, shape, error)


def parse_json(
    content: bytes, url: str, remedy: str, shape: type[BaseModel] | None = None, error: type[ValueError] = DataError
) -> dict[str, Any]:
    """As `read_json`, for a file's content."""
    value = parse_any(content, url, remedy, error)
    if not isinstance(value, dict):
        raise error(damaged(url, f"expected an object in braces, but got {_some_of(value)}", remedy))
    if problem := _mismatch(value, shape):
        raise error(damaged(url, problem, remedy))
    return value


def parse_any(content: bytes, url: str, remedy: str, error: type[ValueError] = DataError) -> Any:
    """As `parse_json`, for any JSON value."""
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as why:
        raise error(damaged(url, "it is empty" if not content.strip() else str(why), remedy)) from None


def parse_json_lines(content: bytes, url: str, remedy: str) -> list[dict[str, Any]]:
    """The objects in a file with one per line. Raises as `read_json`."""
    lines = content.splitlines()
    return [parse_json(line, f"{url}, line {number + 1}", remedy) for number, line in enumerate(lines) if line]


def read_if_usable(url: str, kind: type[Shape]) -> Shape | None:
    """The object in a JSON file as a dataclass or model; None when it is missing, damaged or of another shape. Raises StorageError.

    For files that the work can do without, and that another process may write at any moment.
    """
    try:
        return TypeAdapter(kind).validate_python(read_json(url, ""))
    except (FileNotFoundError, DataError, ValidationError):
        return None


def _some_of(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]} …"


def _mismatch(value: Mapping[str, Any], shape: type[BaseModel] | None) -> str:
    """The first missing or ill-typed field, with the reason; empty when there is none."""
    try:
        if shape is not None:
            _adapter(shape).validate_python(value, strict=True)
    except ValidationError as error:
        return first_problem(error)
    return ""


def first_problem(error: ValidationError) -> str:
    """`field.part: reason`, for the first wrong field."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}"


@cache
def _adapter(shape: type[BaseModel]) -> TypeAdapter[BaseModel]:
    return TypeAdapter(shape)
