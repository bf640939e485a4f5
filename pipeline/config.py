"""The run's configuration: typed defaults < YAML < what the run was started with < key=value.

`fields.py` has the fields of each section.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from data import storage
from data.redact import redacted
from data.settings import UsageError, nearest
from pipeline.fields import Config, Section

CONFIG_NAME = "config.yaml"
_MOVED = {"select.exclude": "data.exclude"}
_COMMAND_LINE = "command_line"  # key in RUN/config.yaml: the overrides that the run was started with


def config_names() -> list[str]:
    """Names that `config=` knows."""
    folder = resources.files("pipeline") / "configs"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(config: str | None, overrides: Sequence[str]) -> Config:
    """The configuration of a command: defaults < `config` < the run's own < overrides (`key=value`).

    A run directory that exists gives its config.yaml; when `config` is named again, that file counts anew, and the key=value
    words that the run was started with stay in force.

    Raises:
        UsageError: one message with every bad field.
    """
    layers: list[Any] = [_read_yaml(config)] if config else []
    run_dir = OmegaConf.select(_merge(layers, overrides), "run_dir")
    earlier = _read_run_config(str(run_dir)) if run_dir else None
    if earlier is not None:
        layers.append(_parse_overrides(earlier.get(_COMMAND_LINE, [])) if config else _without_command_line(earlier))
    try:
        merged = OmegaConf.to_container(_merge(layers, overrides), resolve=True)
    except OmegaConfBaseException as error:  # ${…} of something that is not there
        raise UsageError(f"{config or 'the configuration'}: {error.full_key}: {error.msg}") from None
    return config_of(merged)


def config_of(fields: Any) -> Config:
    """The configuration with these fields (nested mappings). Raises UsageError: one message with every bad field."""
    try:
        return Config.model_validate(fields)
    except ValidationError as error:
        raise UsageError("\n".join(["the configuration has bad fields:", *map(_explain, error.errors())])) from None


def write_config(config: Config, overrides: Sequence[str]) -> None:
    """Write RUN/config.yaml: the resolved fields, secrets in URLs blanked, and the overrides given so far."""
    url = storage.join(config.run_dir, CONFIG_NAME)
    earlier = _read_run_config(config.run_dir)
    before: list[str] = list(earlier.get(_COMMAND_LINE, [])) if earlier is not None else []
    words = {word.partition("=")[0]: word for word in [*before, *overrides]}
    content = config.model_dump(mode="json") | {
        _COMMAND_LINE: [word for key, word in words.items() if key != "run_dir"]
    }
    storage.write_text(url, redacted(OmegaConf.to_yaml(OmegaConf.create(content))))


def describe_fields(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    """`field=default  meaning` for every field, nested ones dotted."""
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from describe_fields(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={info.get_default()}".ljust(44) + f" {info.description or ''}".rstrip()


def _merge(layers: Sequence[Any], overrides: Sequence[str]) -> DictConfig:
    """Later ones win. Raises UsageError for the first override that cannot be laid over what is there."""
    merged = OmegaConf.merge(*layers, {})
    for word in overrides:
        try:
            merged = OmegaConf.merge(merged, _parse_overrides([word]))
        except (OmegaConfBaseException, TypeError) as error:
            raise UsageError(f"{word}: does not fit the field ({str(error).splitlines()[0]})") from None
    assert isinstance(merged, DictConfig)
    return merged


def _parse_overrides(words: Sequence[str]) -> DictConfig:
    bad = [word for word in words if not re.fullmatch(r"[A-Za-z_][\w.]*=.*", word, re.DOTALL)]
    if bad:
        raise UsageError(f"{bad[0]!r}: expected key=value, as in teacher.epochs=10")
    try:
        return OmegaConf.from_dotlist(list(words))
    except Exception as error:  # a YAML error has its own types, none of them exported by omegaconf
        raise UsageError(
            f"{' '.join(words)}: not readable as a value: {error}\n"
            "Text with braces needs quotes of its own, as in 'data.labeled=[\"x-{0..9}.tar\"]'"
        ) from None


def _read_run_config(run_dir: str) -> DictConfig | None:
    url = storage.join(run_dir, CONFIG_NAME)
    return _load_yaml_text(url, storage.read_text(url)) if storage.exists(url) else None


def _without_command_line(config: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != _COMMAND_LINE])


def _read_yaml(config: str) -> DictConfig:
    if config in config_names():
        return _load_yaml_text(config, (resources.files("pipeline") / "configs" / f"{config}.yaml").read_text())
    if not (storage.local_path(config).is_file() if storage.is_local(config) else storage.exists(config)):
        raise UsageError(
            f"config={config}: no such file, and not one of {', '.join(config_names())}{nearest(config, config_names())}"
        )
    try:
        text = storage.read_text(config)
    except UnicodeDecodeError as error:
        raise UsageError(f"config={config}: not a text file ({error})") from None
    return _without_command_line(_load_yaml_text(config, text))


def _load_yaml_text(name: str, text: str) -> DictConfig:
    try:
        loaded = OmegaConf.load(io.StringIO(text))
    except Exception as error:  # a YAML error has its own types, none of them exported by omegaconf
        raise UsageError(f"{name}: not readable as YAML: {error}") from None
    if not isinstance(loaded, DictConfig):
        raise UsageError(f"{name}: expected fields with values, as in `seed: 0`")
    return loaded


def _explain(error: ErrorDetails) -> str:
    path = ".".join(map(str, error["loc"]))
    if path in _MOVED:
        return f"  {path}: is {_MOVED[path]} now; give {_MOVED[path]}={error['input']}"
    if error["type"] == "extra_forbidden":
        return f"  {path}: no such field{nearest(path, [line.partition('=')[0] for line in describe_fields()])}"
    if not path:
        return f"  {error['msg'].removeprefix('Value error, ')}"
    message = error["msg"].removeprefix("Value error, ")
    return f"  {path}={error['input']!r}: {message[0].lower()}{message[1:]}"
