"""The models that stage=transfer compares: where the weights are from, what they are, and the features they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn

from data import storage
from data.settings import UsageError, nearest
from pipeline.core.schema import Config
from pipeline.core.schema.transfer import BackboneConfig
from pipeline.core.stage import digest_of
from pipeline.inference.preprocessing import Preprocessing
from pipeline.models.external_weights import PRETRAINED, load_external, weights_digest
from pipeline.models.heads import match
from pipeline.models.initial_weights import find_weights
from pipeline.models.registry import build_model, on_meta
from pipeline.models.resnet_rs import ModelError
from pipeline.models.weights import CONFIG_NAME, MODEL_NAME, WeightsInfo, load_info, read_safetensors

RANDOM = "random"
SEED = "{seed}"
_SOME_CLASSES = 2


@dataclass(frozen=True)
class Backbone:
    """A model without its head.

    Attributes:
        name: in `transfer.backbones`.
        source: a folder or file of weights, a timm model, or `random`.
        kind: what `source` is.
        preprocessing: of every set: an image is resized and its centre cropped.
        seed: of fresh weights.
    """

    name: str
    source: str
    kind: Literal["folder", "file", "timm", "random"]
    model: str
    model_args: Mapping[str, Any]
    preprocessing: Preprocessing
    seed: int

    def digest(self) -> str:
        """16 hex digits over weights, model and preprocessing. Raises ModelError where weights are missing."""
        weights = {
            "folder": lambda: weights_digest(self.source),
            "file": lambda: weights_digest(self.source),
            "timm": lambda: self.source,
            "random": lambda: f"{RANDOM} {self.seed}",
        }[self.kind]()
        return digest_of([weights, self.model, dict(self.model_args), asdict(self.preprocessing)])

    def check(self) -> None:
        """Raise ModelError where there is no such model, or weights do not fit it. Those of timm are not read: they fit their model."""
        if self.kind in ("folder", "file"):
            self._features()
        else:
            on_meta(lambda: build_model(self.model, 0, self.model_args))

    def network(self) -> nn.Module:
        """The model that maps normalized images (N, 3, S, S) to pooled features (N, F).

        Raises ModelError where weights are missing or do not fit the model.
        """
        torch.manual_seed(self.seed)
        network = build_model(self.model, 0, self.model_args)
        if self.kind != "random":
            features = self._features()
            network.load_state_dict({name: features.get(name, own) for name, own in network.state_dict().items()})
        return network

    def _state(self) -> dict[str, Tensor]:
        if self.kind == "timm":
            known = get_pretrained_cfg(self.source)
            assert known is not None, "open_backbone has found it"
            return load_external(self.source, self.model_args, known.num_classes, PRETRAINED)
        return read_safetensors(storage.join(self.source, MODEL_NAME) if self.kind == "folder" else self.source)

    def _features(self) -> dict[str, Tensor]:
        """The weights without the head. Raises ModelError where they do not fit the model."""
        whole = on_meta(lambda: build_model(self.model, _SOME_CLASSES, self.model_args))
        try:
            return match(whole, self._state(), new_head=True).tensors
        except ModelError as error:
            raise ModelError(
                f"{self.source} does not fit {self.model}: {error}; give transfer.backbones.{self.name}.model and model_args"
            ) from None


def varies_with_seed(entry: BackboneConfig) -> bool:
    """Whether each seed has weights of its own."""
    return entry.weights == RANDOM or SEED in entry.weights


def open_backbone(config: Config, name: str) -> Backbone:
    """The backbone of this name for `config.seed`; reads what its weights record, and no weights.

    Raises:
        UsageError: there is nothing of that name, or it is no such thing.
        ModelError: a folder's record is damaged.
    """
    entry = config.transfer.backbones[name]
    source = entry.weights.replace(SEED, str(config.seed))
    found = _open(config, entry, name, source)
    given = {field: value for field in ("image_size", "crop_pct", "mean", "std") if (value := getattr(entry, field))}
    return replace(found, preprocessing=replace(found.preprocessing, **given))


def _open(config: Config, entry: BackboneConfig, name: str, source: str) -> Backbone:
    section = config.teacher
    model, args = entry.model or section.model, entry.model_args
    own_args = args if args is not None else {} if entry.model else section.model_args
    trained = replace(Preprocessing.of_training(section), resize="crop")
    if section.augment.crop == "pad_crop":
        trained = replace(trained, crop_pct=1.0)
    if source == RANDOM:
        return Backbone(name, source, "random", model, own_args, trained, config.seed)
    if source.endswith(".safetensors"):
        _require(name, source, storage.exists(source), "no such file")
        return Backbone(name, source, "file", model, own_args, trained, config.seed)
    if (folder := find_weights(source)) and storage.exists(storage.join(folder, CONFIG_NAME)):
        info = load_info(folder)
        return Backbone(name, folder, "folder", info.model, info.model_args, _resized(info), config.seed)
    known = _timm_weights(source)
    hint = nearest(source, timm.list_models(pretrained=True))
    _require(name, source, known is not None and known.num_classes, f"no folder with weights, and no timm model{hint}")
    assert known is not None, "required above"
    return Backbone(name, source, "timm", source, args or {}, _of_timm(known), config.seed)


def _timm_weights(source: str) -> PretrainedCfg | None:
    """What timm records of the weights of this name; None where it knows no such weights."""
    try:
        return get_pretrained_cfg(source) if timm.is_model(source) else None
    except RuntimeError:  # a model, but not such a tag
        return None


def _require(name: str, source: str, holds: object, problem: str) -> None:
    if not holds:
        raise UsageError(
            f"transfer.backbones.{name}={source}: {problem}; expected a folder of weights, of a stage or of a run, a .safetensors "
            "file, a timm model with pretrained weights, or random"
        )


def _resized(info: WeightsInfo) -> Preprocessing:
    """As the weights record it, but resized where they pad: other sets have images of other sizes."""
    recorded = Preprocessing.of_weights(info)
    return recorded if recorded.resize == "crop" else replace(recorded, resize="crop", crop_pct=1.0)


def _of_timm(known: PretrainedCfg) -> Preprocessing:
    interpolation: Literal["bilinear", "bicubic"] = "bilinear" if known.interpolation == "bilinear" else "bicubic"
    mean: Any = tuple(known.mean)
    std: Any = tuple(known.std)
    return Preprocessing(known.input_size[-1], known.crop_pct, interpolation, mean, std)
