"""Call a function with `key=value` words, typed by its signature: the command lines of data.pack, data.fashion_mnist and benchmarks.

OmegaConf would read each value as YAML first (`out=1e3` a number, `group=[a]` a list) and report one wrong field at a time.
"""

from __future__ import annotations

import difflib
import inspect
import io
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

from .console import tolerant_output
from .storage.redact import redacted


class UsageError(ValueError):
    """Wrong arguments; the message names them and what was expected."""


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` with the known name nearest to `name`; empty when none is near."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def parse_settings(function: Callable[..., Any], arguments: Sequence[str], usage: str) -> dict[str, Any]:
    """Keyword arguments of `function` from `key=value` words.

    Raises UsageError for unknown, repeated, missing or ill-typed keys; all of them in one message, with `usage`.
    """
    parameters = inspect.signature(function).parameters
    types = typing.get_type_hints(function)
    values: dict[str, Any] = {}
    problems = []
    for word in arguments:
        key, equals, text = word.partition("=")
        if not equals or key not in parameters:
            problems.append(
                f"{word!r}: expected key=value with a key of {', '.join(parameters)}{nearest(key, list(parameters))}"
            )
            continue
        if key in values:
            problems.append(f"{word!r}: {key} is given twice")
        try:
            values[key] = _convert(text, types[key])
        except ValueError:
            problems.append(f"{key}={text}: expected {types[key].__name__}")
    problems += [
        f"{name}=… is required"
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and name not in values
    ]
    if problems:
        raise UsageError("\n".join([*problems, "", usage.strip()]))
    return values


def _convert(text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return kind(text)


def run_command(function: Callable[..., None], arguments: Sequence[str], usage: str) -> int:
    """Call `function` with its `key=value` arguments and return the exit code; print a ValueError or OSError as one line.

    A reader that is gone, as in `| head`, stops nothing.
    """
    with tolerant_output():
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # print file names that the terminal cannot show
        if wants_help(arguments):
            print(usage.strip())
            return 0
        try:
            function(**parse_settings(function, arguments, usage))
        except (ValueError, OSError) as error:
            print(f"error: {redacted(str(error))}", file=sys.stderr)
            return 2
        return 0


def wants_help(words: Sequence[str]) -> bool:
    """Whether a command asks for its help: -h or --help anywhere, or `help` first."""
    return any(word in ("-h", "--help") for word in words) or list(words[:1]) == ["help"]
