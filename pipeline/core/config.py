"""The configuration of a command: typed defaults < recipe < YAML < the run directory's config.yaml < key=value words.

`schema/` has the fields of each section; `recipes/` the recipes; `config_layers.py` finds where a value is from.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from importlib import resources
from operator import attrgetter, getitem
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from data import storage
from data.run_names import CONFIG_NAME as CONFIG_NAME
from data.settings import UsageError, nearest
from data.storage.redact import redacted
from pipeline.core.config_layers import DEFAULT, Layer, as_container, as_typed, literal, merged, origin_of, sets
from pipeline.core.recipes.recipe import Recipe, read_recipe, recipe_names, remembered_recipe
from pipeline.core.recipes.sizes import Sizes
from pipeline.core.schema import Config, DataConfig, fields_of

_MOVED = {"select.exclude": "data.exclude"}
_SAME = (("student.from_teacher", "student.init"),)  # two names of one field: of earlier versions, and now
_COMMAND_LINE = "command_line"  # key in RUN/config.yaml: the overrides of all commands so far
_FROM_RECIPE = "from_recipe"  # key in RUN/config.yaml: see `recipes.recipe.RecipeRecord`
_HERE, _REMEMBERED = "is from the command line", "is remembered in"


def config_names() -> list[str]:
    """Names of the shipped configurations."""
    folder = resources.files("pipeline") / "configs"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


@dataclass(frozen=True)
class Loaded:
    """A command's configuration, and where each value is from.

    Attributes:
        layers: in order; later ones win.
        remembered: dotted field → word of RUN/config.yaml that wins over the YAML file of this command.
        typed: dotted fields that the words of earlier commands set.
        followed: dotted fields whose values are those of the weights that `init` names; RUN/config.yaml leaves them out.
        recipe: the recipe, whose layer is the first.
        given_data: `config.data` as given, where `config` names the shards made of folders; RUN/config.yaml keeps the folders.
    """

    config: Config
    layers: tuple[Layer, ...]
    remembered: Mapping[str, str]
    typed: frozenset[str] = frozenset()
    followed: frozenset[str] = frozenset()
    recipe: Recipe | None = None
    given_data: DataConfig | None = None

    def origin(self, field: str) -> str:
        """`teacher.epochs` → `teacher.epochs is from mine.yaml`, `… is remembered in RUN/config.yaml`, …"""
        return f"{field} {origin_of(self.layers, field)}"

    def is_given(self, field: str) -> bool:
        """Whether a word of this command sets the field."""
        return origin_of(self.layers, field) == _HERE

    def is_remembered(self, field: str) -> bool:
        """Whether the value is from the run directory."""
        return origin_of(self.layers, field).startswith(_REMEMBERED)

    def is_set(self, field: str) -> bool:
        """Whether the file, the run directory or a word sets the field."""
        return origin_of(self.layers, field) != DEFAULT

    def is_unset(self, field: str) -> bool:
        """Whether nobody has chosen the field's value: nothing sets it; or a recipe does, for other weights than `init` names; or the
        run directory remembers the default, from before this command gave the section its `init`."""
        section, _, name = field.rpartition(".")
        origin = origin_of(self.layers, field)
        if origin == DEFAULT:
            return True
        if self.recipe is not None and origin == self.recipe.origin:
            return not self.recipe.gives_weights(section)
        init_is_new = not origin_of(self.layers, f"{section}.init").startswith((_REMEMBERED, DEFAULT))
        if not (origin.startswith(_REMEMBERED) and init_is_new) or field in self.typed:
            return False
        values = attrgetter(section)(self.config)
        return bool(getattr(values, name) == type(values).model_fields[name].default)

    def write(self, overrides: Sequence[str]) -> None:
        """Write RUN/config.yaml: the fields, and the overrides given so far. Secrets in URLs are blanked, and variables
        (`${oc.env:X}`) stay as typed."""
        safe = [Layer(layer.origin, literal_fields(layer.fields, resolvers_only=True)) for layer in self.layers]
        config = self.config.model_copy(update={"data": self.given_data}) if self.given_data else self.config
        write_config(config, overrides, as_container(merged(safe), resolve=True), self.followed, self.recipe)

    def with_data(self, data: DataConfig) -> Loaded:
        """With the shards made of folders; RUN/config.yaml keeps the folders."""
        config = self.config.model_copy(update={"data": data})
        return replace(self, config=config, given_data=self.given_data or self.config.data)

    def with_sizes(self, sizes: Sizes) -> Loaded:
        """The same for data of these sizes: the recipe's fields follow them. Raises as `load`; there must be a recipe."""
        assert self.recipe is not None
        above = self.layers[1:]
        recipe = self.recipe.sized(sizes, above)
        config = _validated([recipe.layer, *above], "the configuration")
        config = config.model_copy(update={"data": self.config.data})
        return replace(self, config=config, layers=(recipe.layer, *above), recipe=recipe)


def literal_fields(fields: DictConfig, resolvers_only: bool = False) -> DictConfig:
    """See `config_layers.literal`."""
    return OmegaConf.create(literal(as_container(fields), resolvers_only))


def load_config(config: str | None, overrides: Sequence[str]) -> Config:
    """The configuration of a command; see `load`."""
    return load(config, overrides).config


def load(config: str | None, overrides: Sequence[str]) -> Loaded:
    """The configuration of a command: defaults < recipe < `config` < the run directory's config.yaml < overrides (`key=value`).

    If `config` is given for an existing run directory, only the key=value words that the run directory remembers count, not its
    other fields. Fields of a recipe that follow the data's sizes have the remembered values, or else those of the problem on which the
    recipe was found, until `Loaded.with_sizes`. Raises one UsageError with every bad field, and where its value is from.
    """
    layers = [Layer(f"is from {config}", _read_yaml(config))] if config else []
    run_dir = _text_of(_with_words(layers, overrides)[-1], "run_dir")
    earlier, remembered_in = _read_run_config(run_dir) if run_dir else None, run_dir
    if earlier is None and (source := _text_of(_with_words(layers, overrides)[-1], "labels_from")):
        earlier, remembered_in = _config_of_source(source), source
    words, typed = {}, frozenset(_words_of(earlier)) if earlier is not None else frozenset()
    if earlier is not None:
        words = _words_of(earlier) if config else {}
        fields = literal_fields(_parse_overrides(list(words.values())) if config else _fields_alone(earlier))
        layers.append(Layer(f"{_REMEMBERED} {storage.join(redacted(remembered_in), CONFIG_NAME)}", fields))
    given, _ = _with_words(layers, overrides)
    recipe = _recipe_in_force(given, earlier, run_dir)
    if recipe is not None:
        given = [recipe.layer, *given]
    checked = _validated(given, config or "the configuration")
    return Loaded(checked, tuple(given), _winning(words, layers, given), typed, recipe=recipe)


def _recipe_in_force(given: Sequence[Layer], earlier: DictConfig | None, run_dir: str) -> Recipe | None:
    """The recipe that the layers name, or that an existing run directory remembers. Raises UsageError when these are two."""
    naming = [layer for layer in given if sets(layer, "recipe")]
    name = OmegaConf.select(naming[-1].fields, "recipe") if naming else None
    if earlier is None:
        return read_recipe(str(name), given) if name is not None else None
    known = OmegaConf.select(earlier, "recipe")
    if naming and name != known:
        begun = f"with recipe={known}" if known else "without a recipe"
        raise UsageError(
            f"recipe={name}: {redacted(run_dir)} was begun {begun} (recipe {naming[-1].origin}); give another run_dir=, or the fields "
            "that should change"
        )
    if known is None:
        return None
    record = as_container(earlier).get(_FROM_RECIPE)
    return read_recipe(str(known), given) if record is None else _remembered(str(known), record, run_dir)


def _remembered(name: str, record: Any, run_dir: str) -> Recipe:
    try:
        return remembered_recipe(name, record)
    except ValidationError as error:
        where = storage.join(redacted(run_dir), CONFIG_NAME)
        raise UsageError(f"{where}: {_FROM_RECIPE} is damaged ({error.errors()[0]['msg']}); restore it") from None


def _validated(layers: Sequence[Layer], name: str) -> Config:
    """Merge and validate; `name`: of the configuration, for messages."""
    try:
        values = as_container(merged(layers) if layers else OmegaConf.create({}), resolve=True)
    except OmegaConfBaseException as error:  # ${…} of a missing field or variable
        where = f"{error.full_key} {origin_of(layers, str(error.full_key))}"
        raise UsageError(f"{name}: {error.full_key}: {error.msg} ({where})") from None
    return config_of(_under_one_name(values, layers), layers)


def _under_one_name(values: dict[str, Any], layers: Sequence[Layer]) -> dict[str, Any]:
    """Of two names of one field, keep the one that the later layer sets; both, for an error, if one layer does."""
    for names in _SAME:
        places = [max((n for n, layer in enumerate(layers) if sets(layer, name)), default=-1) for name in names]
        if min(places) >= 0 and places[0] != places[1]:
            *above, last = names[places[0] > places[1]].split(".")
            inner = values
            for part in above:
                inner = inner[part]
            del inner[last]
    return values


def _text_of(fields: DictConfig, name: str) -> str:
    try:
        return str(OmegaConf.select(fields, name) or "")
    except OmegaConfBaseException as error:
        raise UsageError(f"{name}: {error.msg}") from None


def _config_of_source(run_dir: str) -> DictConfig:
    """Content of config.yaml of the run that `labels_from` names, without what is of that run alone."""
    found = _read_run_config(run_dir)
    if found is None:
        raise UsageError(f"labels_from={redacted(run_dir)}: no run there ({CONFIG_NAME} is missing); check the path")
    if further := OmegaConf.select(found, "labels_from"):
        raise UsageError(
            f"labels_from={redacted(run_dir)}: that run has its labels from {further}; give labels_from={further}"
        )
    return OmegaConf.masked_copy(found, [str(key) for key in found if key not in ("run_dir", "labels_from")])


def _with_words(layers: Sequence[Layer], words: Sequence[str]) -> tuple[list[Layer], DictConfig]:
    """Add a layer per word; returns all layers, and all merged. Raises UsageError for the first word that does not fit."""
    result, total = list(layers), merged(layers) if layers else OmegaConf.create({})
    for word in words:
        layer = Layer(_HERE, _parse_overrides([word]))
        try:
            total = merged([Layer("", total), layer])
        except (OmegaConfBaseException, TypeError) as error:
            raise UsageError(f"{word}: does not fit the field ({str(error).splitlines()[0]})") from None
        result.append(layer)
    return result, total


def _winning(words: Mapping[str, str], layers: Sequence[Layer], given: Sequence[Layer]) -> dict[str, str]:
    """The remembered words that change a value of the named file and that this command does not override."""
    if not words:
        return {}
    file, run = literal_fields(layers[0].fields), layers[-1]
    return {
        field: redacted(word)
        for field, word in words.items()
        if origin_of(given, field) == run.origin
        and OmegaConf.select(file, field) != OmegaConf.select(run.fields, field)
    }


def config_of(fields: Any, layers: Sequence[Layer] = ()) -> Config:
    """Validate fields (nested mappings); `layers` tell where they are from. Raises one UsageError with every bad field."""
    try:
        return Config.model_validate(fields)
    except ValidationError as error:
        lines = (_explain(problem, layers) for problem in error.errors())
        raise UsageError("\n".join(["the configuration has bad fields:", *lines])) from None


def write_config(
    config: Config,
    overrides: Sequence[str],
    typed: Any = None,
    followed: Collection[str] = frozenset(),
    recipe: Recipe | None = None,
) -> None:
    """Write RUN/config.yaml, without secrets; see `Loaded.write`.

    Args:
        typed: the nested fields as typed, variables not filled in.
        followed: dotted fields to leave out.
        recipe: what to keep of it.
    """
    earlier = _read_run_config(config.run_dir)
    given = {word.partition("=")[0]: word for word in overrides}
    renamed = {name for names in _SAME for name in names if given.keys() & set(names)}
    before = _words_of(earlier) if earlier is not None else {}
    words = {field: word for field, word in before.items() if field not in renamed - given.keys()} | given
    fields = _readable(as_typed(config.model_dump(mode="json"), typed), config)
    for field in {*followed, *(recipe.pending() if recipe else ())}:
        *above, name = field.split(".")
        del reduce(getitem, above, fields)[name]
    record = recipe.record() if recipe else None
    content = fields | ({_FROM_RECIPE: record} if record else {})
    content |= {_COMMAND_LINE: [word for key, word in words.items() if key != "run_dir"]}
    text = redacted(OmegaConf.to_yaml(OmegaConf.create(literal(content)), resolve=True))
    storage.write_text(storage.join(config.run_dir, CONFIG_NAME), text)


def _readable(fields: dict[str, Any], config: Config) -> dict[str, Any]:
    """Replace typed text that would not validate (a variable in a number or a choice; no secret is one) by the validated value."""
    try:
        Config.model_validate(fields)
    except ValidationError as error:
        values = config.model_dump(mode="json")
        for *above, last in (problem["loc"] for problem in error.errors() if problem["loc"]):
            there, value = fields, values
            for part in above:
                there, value = there[part], value[part]  # type: ignore[index]
            there[last] = value[last]  # type: ignore[index]
    return fields


def _words_of(earlier: DictConfig) -> dict[str, str]:
    """Dotted field → the word that a run directory remembers."""
    words = as_container(earlier).get(_COMMAND_LINE) or []
    return {str(word).partition("=")[0]: str(word) for word in words}


def _parse_overrides(words: Sequence[str]) -> DictConfig:
    bad = [word for word in words if not re.fullmatch(r"[A-Za-z_][\w.]*=.*", word, re.DOTALL)]
    if bad:
        raise UsageError(f"{bad[0]!r}: expected key=value, as in teacher.epochs=10")
    try:
        return OmegaConf.from_dotlist(list(words))
    except Exception as error:  # YAML errors have types that omegaconf does not export
        raise UsageError(
            f"{' '.join(words)}: not readable as a value: {error}\n"
            "Text with braces needs quotes of its own, as in 'data.labeled=[\"x-{0..9}.tar\"]'"
        ) from None


def _read_run_config(run_dir: str) -> DictConfig | None:
    url = storage.join(run_dir, CONFIG_NAME)
    return _load_yaml_text(url, storage.read_text(url)) if storage.exists(url) else None


def _fields_alone(config: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(config, [str(key) for key in config if key not in (_COMMAND_LINE, _FROM_RECIPE)])


def _read_yaml(config: str) -> DictConfig:
    if config in config_names():
        return _load_yaml_text(config, (resources.files("pipeline") / "configs" / f"{config}.yaml").read_text())
    if not (storage.local_path(config).is_file() if storage.is_local(config) else storage.exists(config)):
        hint = f"; did you mean recipe={config}?" if config in recipe_names() else nearest(config, config_names())
        raise UsageError(f"config={config}: no such file, and not one of {', '.join(config_names())}{hint}")
    try:
        text = storage.read_text(config)
    except UnicodeDecodeError as error:
        raise UsageError(f"config={config}: not a text file ({error})") from None
    return _fields_alone(_load_yaml_text(config, text))


def _load_yaml_text(name: str, text: str) -> DictConfig:
    try:
        loaded = OmegaConf.load(io.StringIO(text))
    except Exception as error:  # YAML errors have types that omegaconf does not export
        raise UsageError(f"{name}: not readable as YAML: {error}") from None
    if not isinstance(loaded, DictConfig):
        raise UsageError(f"{name}: expected fields with values, as in `seed: 0`")
    return loaded


def _explain(error: ErrorDetails, layers: Sequence[Layer]) -> str:
    path = ".".join(map(str, error["loc"]))
    origin = f" ({path} {origin_of(layers, path)})" if layers and path else ""
    if path in _MOVED:
        return f"  {path}: was renamed; give {_MOVED[path]}={error['input']}{origin}"
    if error["type"] == "extra_forbidden":
        return f"  {path}: no such field{nearest(path, [name for name, _ in fields_of(Config)])}{origin}"
    if not path:
        return f"  {error['msg'].removeprefix('Value error, ')}"
    if error["type"] == "list_type" and isinstance(error["input"], str):
        given = redacted(error["input"])
        return f"  {path}={given}: expected a list; give '{path}=[{given}]', in quotes for the shell{origin}"
    message = error["msg"].removeprefix("Value error, ")
    return f"  {path}={redacted(repr(error['input']))}: {message[0].lower()}{message[1:]}{origin}"
