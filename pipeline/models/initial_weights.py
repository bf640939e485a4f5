"""Weights that a training begins with (`teacher.init`, `student.init`): where they are, whether they fit, and their preprocessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from data import storage
from data.json_files import read_json
from data.run_names import generation_of
from pipeline.core.layout import Layout
from pipeline.core.schema import TrainConfig
from pipeline.core.stage import StageError
from pipeline.models.class_order import names_in
from pipeline.models.external_weights import PRETRAINED, WEIGHT_FILES, pretrained_state, read_state, weights_digest
from pipeline.models.heads import match
from pipeline.models.registry import build_model, on_meta, timm_record
from pipeline.models.resnet_rs import ModelError
from pipeline.models.weights import CONFIG_NAME, MODEL_NAME, OURS, load_info, load_weights

PRETRAIN, TEACHER = "pretrain", "teacher"  # values of `init`: of this run's stage, of this generation's teacher
FOLLOWED = ("image_size", "crop_pct", "interpolation", "mean", "std")  # fields of TrainConfig that weights record
_INTERPOLATIONS = ("bilinear", "bicubic")
_WEIGHTS = "weights"  # folder in a stage's folder


@dataclass(frozen=True)
class InitialWeights:
    """Plain data that travels to every training process.

    Attributes:
        field: `teacher.init` or `student.init`, for messages.
        source: a file, a folder of weights, or `pretrained`.
        new_head: leave its head: the classes are others.
        grows: layers that it lacks stay fresh: blocks (`can_warm_start`), or a head.
    """

    field: str
    source: str
    new_head: bool = False
    grows: bool = False

    def load_into(self, model: nn.Module, name: str, args: Mapping[str, Any]) -> str:
        """Load the weights into a model that `build_model(name, …, args)` has built; return what was loaded, in words.

        Raises ModelError when they cannot be read or do not fit.
        """
        if self.grows:
            loaded = load_weights(self.source)[1]
            model.load_state_dict(model.state_dict() | loaded)
            return f"{len(loaded)} of {len(model.state_dict())} tensors loaded"
        found = match(model, self._state(name, args), self.new_head)
        model.load_state_dict(model.state_dict() | found.tensors)
        return found.note

    def check(self, section: TrainConfig, num_classes: int) -> str:
        """What `load_into` would load, in words. Raises ModelError as it does; of weights that do not fit, it names the field."""
        model = on_meta(lambda: build_model(section.model, num_classes, section.model_args))
        state = self._state(section.model, section.model_args)
        try:
            return match(model, state, self.new_head).note
        except ModelError as error:
            where = self.field.partition(".")[0]
            raise ModelError(
                f"{self.field}={self.source} does not fit {where}.model={section.model}: {error}; give the model and the "
                f"{where}.model_args that it was trained with"
            ) from None

    def _state(self, name: str, args: Mapping[str, Any]) -> dict[str, Tensor]:
        if self.source == PRETRAINED:
            return pretrained_state(name, args, self.field)
        return read_state(self.source, name, args)


def find_source(init: str, field: str, run_dir: str) -> str:
    """The file, the folder of weights, or `pretrained` that a value of `init` other than `teacher` names.

    Args:
        init: a folder is one of `find_weights`.
        field: of the configuration, for messages.
        run_dir: where `pretrain` lies.

    Raises StageError when there are no weights.
    """
    if init == PRETRAINED or init.endswith(WEIGHT_FILES):
        return init
    folder = storage.join(run_dir, PRETRAIN) if init == PRETRAIN else init
    if (found := find_weights(folder)) is not None:
        return found
    if init == PRETRAIN:
        raise StageError(f"{field}={PRETRAIN}: {folder} has no weights; run stage={PRETRAIN} first")
    raise StageError(
        f"{field}={init}: no {MODEL_NAME} there; expected a .safetensors or .pth file, a folder of weights, of a stage or of a run, "
        f"or {PRETRAINED}"
    )


def find_weights(folder: str) -> str | None:
    """The folder of weights that a folder is or has; None without any.

    A stage's folder stands for its weights; a run's for its last student, its teacher while it has none, or its pretraining.
    """
    generations = sorted({generation_of(name) or 0 for name in storage.list_names(folder)} - {0}, reverse=True)
    models = [getattr(Layout(folder, number), role) for number in generations for role in ("student", TEACHER)]
    stages = folder, *models, storage.join(folder, PRETRAIN)
    for place in (folder, *(storage.join(stage, _WEIGHTS) for stage in stages)):
        if storage.exists(storage.join(place, MODEL_NAME)):
            return place
    return None


def initial_weights(
    section: TrainConfig, name: str, run_dir: str, class_names: Sequence[str] | None
) -> InitialWeights | None:
    """The weights that a section of the configuration names in `init`, if it is not `teacher`; None without.

    Args:
        name: of the section.
        class_names: the data's. A head of other classes, or of the same in another order, is left.

    Raises:
        StageError, ModelError: there are no weights, or their config.json cannot be read.
    """
    if section.init is None:
        return None
    source = find_source(section.init, f"{name}.init", run_dir)
    url = storage.join(source, CONFIG_NAME)
    theirs = names_in(url)[0] if source != PRETRAINED and storage.exists(url) else None
    is_other = theirs is not None and class_names is not None and list(theirs) != list(class_names)
    return InitialWeights(f"{name}.init", source, new_head=is_other)


def init_digest(section: TrainConfig, name: str, run_dir: str) -> dict[str, str]:
    """The fingerprint's input of `init`: digest of the file, or which of timm's weights; empty without, and with the teacher's."""
    if section.init in (None, TEACHER):
        return {}
    source = find_source(str(section.init), f"{name}.init", run_dir)
    if source != PRETRAINED:
        return {"init": weights_digest(source)}
    known = timm_record(section.model, section.model_args)
    return {"init": f"{PRETRAINED} {known.hf_hub_id or known.url}" if known is not None else PRETRAINED}


def recorded_preprocessing(source: str, name: str, args: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """`FOLLOWED` field → value, as far as they are known, and who says so.

    A folder's config.json records them (this pipeline's, or timm's); of a file alone, those of timm's weights of the model are taken.

    Raises ModelError when config.json cannot be read.
    """
    url = storage.join(source, CONFIG_NAME)
    if source != PRETRAINED and storage.exists(url):
        content = read_json(url, "bring the weights folder again", error=ModelError)
        if OURS in content:
            info = load_info(source)
            return {field: getattr(info, field) for field in FOLLOWED}, url
        return _of_timm(content.get("pretrained_cfg", content)), url
    known = timm_record(name, args)
    return _of_timm(asdict(known)) if known is not None else {}, f"timm's weights of {name}"


def _of_timm(cfg: Mapping[str, Any]) -> dict[str, Any]:
    size, interpolation = cfg.get("input_size"), cfg.get("interpolation")
    values = {"crop_pct": cfg.get("crop_pct"), "image_size": size[-1] if size else None}
    values |= {field: tuple(cfg[field]) for field in ("mean", "std") if len(cfg.get(field) or ()) == 3}
    values["interpolation"] = interpolation if interpolation in _INTERPOLATIONS else None
    return {field: value for field, value in values.items() if value is not None}
