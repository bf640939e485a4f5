"""Defaults < recipe < YAML < the run's words < the command's; and fields that follow the sizes of the data."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.settings import UsageError
from pipeline.core.config import Loaded, load, load_config
from pipeline.core.recipes.recipe import describe_recipe, recipe_names
from pipeline.core.recipes.sizes import Sizes, measure_sizes
from pipeline.core.schema import Config
from pipeline.training.job import num_steps
from tests.conftest import WriteDigits

FEW = Sizes(labeled=267, unlabeled=5411, classes=9, side=72)
IMAGENET = Sizes(labeled=1_255_542, unlabeled=130_000_000, classes=1000, side=375)
SIZES = st.builds(
    Sizes,
    labeled=st.integers(1, 2_000_000),
    unlabeled=st.integers(0, 10**9),
    classes=st.integers(0, 20_000),
    side=st.integers(0, 5000),
)


def steps(config: Config, section: str, labeled: int) -> int:
    part = config.training(section)
    return num_steps(part.epochs, labeled / part.labeled_per_step)


def test_the_three_are_there_and_say_on_what_evidence_they_stand() -> None:
    assert recipe_names() == ["finetune", "imagenet", "small"]
    for name in recipe_names():
        text = (Path(__file__).parents[4] / f"pipeline/configs/recipes/{name}.yaml").read_text()
        assert text.startswith(f"# recipe={name}: ")
        assert "\n# Evidence: " in text


def test_a_recipe_is_above_the_defaults_and_below_the_file_and_the_words(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("recipe: small\nteacher: {lr: 0.3}\nselect: {max_copies: 4}\n")
    config = load_config(str(tmp_path / "mine.yaml"), ["select.max_copies=3"])
    assert (config.recipe, config.teacher.lr, config.teacher.momentum) == ("small", 0.3, 0.9)
    assert (config.select.max_copies, config.student.pseudo_labels) == (3, "hard")
    assert load_config(str(tmp_path / "mine.yaml"), ["recipe=imagenet"]).student.model == "resnetrs152", "a word wins"
    assert load("fashion_mnist", ["recipe=small", f"run_dir={tmp_path}/run"]).origin("student.lr") == (
        "student.lr is from fashion_mnist"
    )
    assert load(None, ["recipe=small"]).origin("student.lr") == "student.lr is from recipe=small"


def test_without_a_recipe_nothing_changes() -> None:
    assert load_config(None, []) == Config()


def test_a_recipes_arguments_of_a_model_go_with_its_model() -> None:
    assert load_config(None, ["recipe=small"]).teacher.model_args["width"] == 0.25
    assert load_config(None, ["recipe=small", "teacher.model=resnetrs50"]).teacher.model_args["width"] == 0.25
    assert load_config(None, ["recipe=small", "teacher.model=convnext_tiny"]).teacher.model_args == {}


def test_an_unknown_recipe_names_those_that_there_are() -> None:
    message = r"recipe=smal: no such recipe; expected finetune, imagenet, small; did you mean 'small'\?"
    with pytest.raises(UsageError, match=message):
        load_config(None, ["recipe=smal"])
    with pytest.raises(UsageError, match=r"config=small: no such file.*did you mean recipe=small\?"):
        load_config("small", [])


def test_few_images_get_small_batches_a_number_of_steps_and_a_quota_that_can_be_met() -> None:
    config = load(None, ["recipe=small"]).with_sizes(FEW).config
    assert (steps(config, "teacher", 267), steps(config, "student", 267)) == (1000, 1400)
    assert config.select.per_class == int(0.55 * 5411 / 9)
    assert config.teacher.image_size == 64
    tiny = load(None, ["recipe=small"]).with_sizes(FEW.model_copy(update={"labeled": 50, "side": 28})).config
    assert (tiny.teacher.batch_size, tiny.student.batch_size, tiny.teacher.image_size) == (32, 128, 32)
    assert steps(tiny, "teacher", 50) == 1000


def test_at_imagenets_size_the_recipe_is_the_shipped_configuration() -> None:
    fields = (
        load(None, ["recipe=imagenet"]).with_sizes(IMAGENET).config.model_dump(exclude={"recipe", "run_dir", "data"})
    )
    assert fields == load_config("imagenet", []).model_dump(exclude={"recipe", "run_dir", "data"})


def test_a_field_that_is_given_wins_and_others_follow_it() -> None:
    loaded = load(None, ["recipe=small", "teacher.batch_size=16", "student.unlabeled_ratio=7", "pretrain.epochs=3"])
    found = loaded.with_sizes(FEW)
    assert found.config.teacher.batch_size == 16
    assert steps(found.config, "teacher", 267) == 1000
    assert (found.config.student.batch_size, found.config.student.labeled_per_step) == (256, 32)
    assert found.config.pretrain.warmup_epochs < 3
    lines = list(describe_recipe(found.recipe, found.config, ["teacher"])) if found.recipe else []
    assert (
        lines[0]
        == "recipe=small for 267 labeled and 5,411 unlabeled images, 9 classes, 72 px (median of the shorter sides):"
    )
    assert not [line for line in lines if "teacher.batch_size" in line or "pretrain" in line]
    assert "    teacher.warmup_epochs=2.996" in "\n".join(lines)


@pytest.mark.parametrize("name", ["small", "imagenet", "finetune"])
@settings(max_examples=10)
@given(sizes=SIZES)
def test_any_sizes_give_a_valid_configuration(name: str, sizes: Sizes) -> None:
    config = _loaded(name).with_sizes(sizes).config
    for part in (config.teacher, config.student):
        assert part.labeled_per_step <= max(sizes.labeled, 128)
        assert part.warmup_epochs <= part.epochs
    if sizes.unlabeled and sizes.classes:
        assert config.select.per_class is not None
        assert config.select.per_class <= max(1, math.ceil(sizes.unlabeled / sizes.classes))


_CACHE: dict[str, Loaded] = {}


def _loaded(name: str) -> Loaded:
    return _CACHE.setdefault(name, load(None, [f"recipe={name}"]))


def test_weights_that_a_training_begins_with_win_over_a_recipes_preprocessing_unless_they_are_the_recipes() -> None:
    small = load(None, ["recipe=small", "teacher.init=lite0"]).with_sizes(FEW)
    assert small.is_unset("teacher.image_size")
    assert not small.is_set("teacher.mean")
    fine = load(None, ["recipe=finetune", "teacher.init=lite0"]).with_sizes(FEW)
    assert not fine.is_unset("teacher.image_size"), "chosen for such weights"
    assert fine.is_unset("teacher.mean")
    assert fine.is_unset("student.image_size"), "that of its teacher"
    assert fine.config.teacher.image_size == 96


def test_sizes_are_measured(tmp_path: Path, write_digits: WriteDigits) -> None:
    write_digits(tmp_path / "labeled", 0, 20)
    write_digits(tmp_path / "unlabeled", 20, 70, labeled=False)
    found = measure_sizes([f"{tmp_path}/labeled/*.tar"], [f"{tmp_path}/unlabeled/*.tar"], None, f"{tmp_path}/index")
    assert (found.labeled, found.unlabeled, found.classes) == (20, 50, 10)
    assert found.side > 0
    with pytest.raises(UsageError, match=r"data\.labeled has no images, and a recipe follows their number"):
        measure_sizes([], [], None, f"{tmp_path}/index")
