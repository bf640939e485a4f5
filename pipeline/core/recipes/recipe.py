"""A recipe: a layer of the configuration between the defaults and the YAML file, with fields that follow the data's sizes.

It is resolved once. RUN/config.yaml keeps the sizes, all of the recipe's fields and the reasons. Later commands take these, also when
the data has grown, or when another version of this project has other values in its recipes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, reduce
from importlib import resources
from operator import attrgetter
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, field_validator

from data.settings import UsageError, nearest
from pipeline.core.config_layers import Layer, as_container, literal, merged, sets
from pipeline.core.recipes.rules import TRAININGS, Resolver, Rules
from pipeline.core.recipes.sizes import Sizes
from pipeline.core.schema import Config, fields_of

_BY_SIZE, _BY_MODEL = "by_size", "by_model"  # keys in a recipe's file
_WITH_MODEL = ("teacher", "student")  # trainings that follow their model
_OWN_INIT = (None, "teacher", "pretrain")  # values of `init` that name no weights from elsewhere


class RecipeRecord(BaseModel):
    """What RUN/config.yaml keeps of a recipe."""

    model_config = ConfigDict(extra="forbid")

    sizes: Sizes
    fields: dict[str, Any]
    reasons: dict[str, str]

    @field_validator("reasons")
    @classmethod
    def _check_names(cls, value: dict[str, str]) -> dict[str, str]:
        if unknown := value.keys() - {name for name, _ in fields_of(Config)}:
            raise ValueError(f"reasons of {min(unknown)}, which is no field")
        return value


@dataclass(frozen=True)
class Recipe:
    """A recipe in force.

    Attributes:
        fields: nested, those that follow the data's sizes included.
        sizes: those that `fields` follow; None before they are measured: then `fields` follow `Rules.found_on`.
        reasons: dotted field → why it has its value, for each that follows the data's sizes.
    """

    name: str
    fields: Mapping[str, Any]
    sizes: Sizes | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """As `Layer.origin`."""
        return f"is from recipe={self.name}"

    @property
    def layer(self) -> Layer:
        """The layer of the configuration."""
        return Layer(self.origin, OmegaConf.create(literal({**self.fields, "recipe": self.name})))

    def gives_weights(self, section: str) -> bool:
        """Whether the recipe names weights from elsewhere that a training begins with."""
        return dict(self.fields.get(section, {})).get("init") not in _OWN_INIT

    def value(self, name: str) -> Any:
        """The recipe's value of a dotted field."""
        return OmegaConf.select(self.layer.fields, name)

    def pending(self) -> frozenset[str]:
        """Dotted fields that wait for unlabeled images. RUN/config.yaml leaves them out, so that they can still follow."""
        if self.sizes is None or self.sizes.unlabeled:
            return frozenset()
        return frozenset(
            _resolved(self.name, self.fields, _read(self.name).rules.found_on, ()).keys() - self.reasons.keys()
        )

    def sized(self, sizes: Sizes, above: Sequence[Layer]) -> Recipe:
        """The recipe for data of these sizes. Fields that follow sizes already stay as they are.

        Args:
            above: the layers that win over the recipe.
        """
        found = _resolved(self.name, self.fields, sizes, above)
        new = {name: follows for name, follows in found.items() if name not in self.reasons}
        fields = OmegaConf.create(dict(self.fields))
        for name, (value, _) in new.items():
            OmegaConf.update(fields, name, value)
        reasons = {name: reason for name, (_, reason) in new.items()}
        return replace(self, fields=as_container(fields), sizes=sizes, reasons={**self.reasons, **reasons})

    def record(self) -> dict[str, Any] | None:
        """A RecipeRecord as JSON; None before the sizes are known."""
        if self.sizes is None:
            return None
        return RecipeRecord(sizes=self.sizes, fields=dict(self.fields), reasons=dict(self.reasons)).model_dump(
            mode="json"
        )


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def read_recipe(name: str, above: Sequence[Layer]) -> Recipe:
    """A shipped recipe before the sizes of the data are known. Raises UsageError for a name that is none.

    Args:
        above: the layers that win over the recipe. Where one names another model, the recipe's `model_args` do not belong to it; what
            the recipe knows of that model (`by_model`) wins over its other fields.
    """
    file = _read(name)
    given, own = merged(above) if above else OmegaConf.create({}), dict(file.fields)
    for section in TRAININGS:
        model = _select(given, f"{section}.model")
        if section in own and model is not None and model != own[section].get("model"):
            own[section] = {key: value for key, value in own[section].items() if key != "model_args"}
        if section in own and section in _WITH_MODEL:
            own[section] = _merged(own[section], file.of_model(model or own[section].get("model")))
    recipe = Recipe(name, own).sized(file.rules.found_on, above)
    return replace(recipe, sizes=None, reasons={})


def remembered_recipe(name: str, record: Any) -> Recipe:
    """The recipe that a run directory remembers. Raises pydantic's ValidationError for a damaged record."""
    known = RecipeRecord.model_validate(record)
    return Recipe(name, known.fields, known.sizes, known.reasons)


def describe_recipe(recipe: Recipe, values: Config, stages: Collection[str]) -> Iterator[str]:
    """Yield lines: the sizes, and each field that follows them and has the recipe's value, with its reason.

    Args:
        stages: of the command; fields of `pretrain` are for that stage alone.
    """
    if recipe.sizes is None:
        return
    yield f"recipe={recipe.name} for {recipe.sizes.describe()}:"
    for name, reason in recipe.reasons.items():
        value = attrgetter(name)(values)
        if value == recipe.value(name) and (not name.startswith("pretrain.") or "pretrain" in stages):
            yield f"    {name}={value:g}".ljust(42) + f" {reason}"


@cache
def _defaults() -> Config:
    return Config()


@dataclass(frozen=True)
class _File:
    """A shipped recipe as written.

    Attributes:
        by_model: pattern (a regular expression of the whole name, without the tag of timm's weights) → fields of a training of such
            a model; of several patterns that match, later ones win.
    """

    fields: Mapping[str, Any]
    rules: Rules
    by_model: Mapping[str, Mapping[str, Any]]

    def of_model(self, model: Any) -> dict[str, Any]:
        """Fields of a training of this model."""
        name = str(model).partition(".")[0]
        return reduce(_merged, (fields for pattern, fields in self.by_model.items() if re.fullmatch(pattern, name)), {})

    def rules_for(self, total: DictConfig) -> Rules:
        """The rules, where the image size of a model stands for that of the recipe's own model."""
        sizes = {role: self.of_model(_select(total, f"{role}.model")).get("image_size") for role in _WITH_MODEL}
        changed = {
            role: getattr(self.rules, role).model_copy(update={"image_size": size})
            for role, size in sizes.items()
            if size
        }
        return self.rules.model_copy(update=changed)


def _merged(fields: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    return dict(as_container(merged([Layer("", OmegaConf.create(dict(part))) for part in (fields, later)])))


@cache
def _read(name: str) -> _File:
    """A recipe's file. Raises UsageError for a name that is none."""
    if name not in recipe_names():
        raise UsageError(
            f"recipe={name}: no such recipe; expected {', '.join(recipe_names())}{nearest(name, recipe_names())}"
        )
    loaded = OmegaConf.load(io.StringIO((_folder() / f"{name}.yaml").read_text()))
    assert isinstance(loaded, DictConfig)
    content = as_container(loaded)
    rules, by_model = Rules.model_validate(content.pop(_BY_SIZE)), content.pop(_BY_MODEL, {})
    return _File(content, rules, by_model)


def _folder() -> Any:
    return resources.files("pipeline") / "configs" / "recipes"


def _resolved(name: str, fields: Mapping[str, Any], sizes: Sizes, above: Sequence[Layer]) -> dict[str, tuple[Any, str]]:
    """Dotted field → value and reason, by the recipe's rules."""
    total = merged([Layer("", OmegaConf.create(literal(dict(fields)))), *above])
    resolver = Resolver(
        _read(name).rules_for(total),
        sizes,
        value=lambda field: _value(total, field),
        is_given=lambda field: any(sets(layer, field) for layer in above),
    )
    return resolver.resolve()


def _value(fields: DictConfig, name: str) -> Any:
    """The value of a dotted field, of the default's type. One that is of no such type is reported when the configuration is
    validated."""
    found, default = _select(fields, name), attrgetter(name)(_defaults())
    if found is None or not isinstance(default, int | float):
        return default if found is None else found
    try:
        return float(found)
    except (TypeError, ValueError):
        return default


def _select(fields: DictConfig, name: str) -> Any:
    try:
        return OmegaConf.select(fields, name)
    except OmegaConfBaseException:  # a variable that is not set, reported when the configuration is validated
        return None
