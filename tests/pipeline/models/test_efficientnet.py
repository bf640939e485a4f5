"""EfficientNets as a family: published sizes and training, timm's names, and which student can begin as which teacher."""

from __future__ import annotations

import pytest
from timm.layers import DropPath

from pipeline.core.config import load, load_config
from pipeline.core.recipes.sizes import Sizes
from pipeline.core.schema import StudentConfig
from pipeline.core.stage import StageError
from pipeline.models.efficientnet import PUBLISHED
from pipeline.models.registry import build_model, count_flops, count_parameters, on_meta, timm_architecture, timm_record
from pipeline.models.resnet_rs import ModelError
from pipeline.training.optimizer import learning_rate
from student.warm_start import require_warm_start

IMAGENET = Sizes(labeled=1_255_542, unlabeled=130_000_000, classes=1000, side=1000)


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameters_and_flops_are_the_published_ones(size: int) -> None:
    published = PUBLISHED[size]
    model = on_meta(lambda: build_model(f"efficientnetrs_b{size}", 1000, {}))
    assert count_parameters(model) / 1e6 == pytest.approx(published.parameters, rel=0.02)
    flops = count_flops(model, published.image_size) / 1e9
    assert flops == pytest.approx(2 * published.multiply_adds, rel=0.04)


def test_efficientnet_rs_is_the_network_of_timms_efficientnet_and_finds_its_weights() -> None:
    theirs = on_meta(lambda: build_model("tf_efficientnet_b1", 10, {})).state_dict()
    ours = on_meta(lambda: build_model("efficientnetrs_b1", 10, {})).state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert timm_architecture("efficientnetrs_b1", {"in_chans": 1}) == ("tf_efficientnet_b1", {"in_chans": 1})
    record = timm_record("efficientnetrs_b1", {})
    assert record is not None
    assert record.architecture == "tf_efficientnet_b1"


def test_the_image_size_is_a_free_choice() -> None:
    model = on_meta(lambda: build_model("efficientnetrs_b0", 10, {}).eval())
    flops = [count_flops(model, size) for size in (64, 128)]
    assert flops[1] / flops[0] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("name", ["efficientnetrs_b0", "tf_efficientnet_b0", "efficientnet_b0"])
def test_stochastic_depth_grows_linearly_over_the_blocks_and_dropout_is_before_the_classifier(name: str) -> None:
    model = on_meta(lambda: build_model(name, 10, {}, dropout=0.3, stochastic_depth=0.2))
    blocks = [block for stage in model.blocks for block in stage]  # type: ignore[union-attr]
    rates = [block.drop_path.drop_prob if isinstance(block.drop_path, DropPath) else 0.0 for block in blocks]
    assert rates == pytest.approx([0.2 * number / len(blocks) for number in range(len(blocks))])
    assert model.drop_rate == 0.3


def test_an_unknown_size_names_those_that_there_are() -> None:
    with pytest.raises(ModelError, match=r"did you mean 'efficientnetrs_b[0-7]'"):
        build_model("efficientnetrs_b9", 10, {})


@pytest.mark.parametrize("teacher", ["efficientnetrs_b0", "tf_efficientnet_b0.ns_jft_in1k", "efficientnet_b0"])
@pytest.mark.parametrize(("student", "args"), [("efficientnetrs_b1", {}), ("resnetrs50", {})])
def test_a_deeper_or_wider_one_does_not_begin_as_its_teacher(teacher: str, student: str, args: dict[str, int]) -> None:
    section = StudentConfig(init="teacher", model=student, model_args=args)
    message = f"the teacher is {teacher} .*a deeper or wider EfficientNet has other channels.*or student.init=null"
    with pytest.raises(StageError, match=message):
        require_warm_start(section, teacher, {})


def test_an_equal_one_begins_as_its_teacher() -> None:
    require_warm_start(StudentConfig(init="teacher", model="efficientnetrs_b0"), "efficientnetrs_b0", {})


def test_the_learning_rate_falls_by_3_percent_every_2_4_epochs_in_steps() -> None:
    rates = {
        epoch: learning_rate(round(epoch * 100), 35_000, 500, 0.256, "exponential", steps_per_epoch=100)
        for epoch in (0, 2.5, 5, 7.19, 7.2, 9.59, 9.6, 349.9)
    }
    assert (rates[0], rates[2.5]) == (0, 0.128)  # the warm-up
    assert [rates[epoch] / 0.256 for epoch in (5, 7.19, 7.2, 9.59, 9.6)] == pytest.approx(
        [0.97**2, 0.97**2, 0.97**3, 0.97**3, 0.97**4]
    )
    assert rates[349.9] / 0.256 == pytest.approx(0.97**145)


@pytest.mark.parametrize("name", ["efficientnetrs_b5", "tf_efficientnet_b5.ap_in1k", "efficientnet_b5"])
def test_the_imagenet_recipe_trains_an_efficientnet_as_published(name: str) -> None:
    config = load(None, ["recipe=imagenet", f"teacher.model={name}"]).with_sizes(IMAGENET).config
    teacher, student = config.teacher, config.student
    assert (teacher.optimizer, teacher.lr, teacher.lr_schedule) == ("rmsprop", 0.016, "exponential")
    assert (teacher.weight_decay, teacher.momentum, teacher.ema_decay) == (1e-5, 0.9, 0.9999)
    assert (teacher.stochastic_depth, teacher.dropout, teacher.bn_momentum) == (0.2, 0.4, 0.01)
    assert (teacher.image_size, teacher.crop_pct, teacher.augment.magnitude) == (456, 0.934, 17)
    assert (teacher.epochs, teacher.warmup_epochs, teacher.label_smoothing) == (350, 5, 0.1)
    assert (student.model, student.optimizer, student.lr, student.image_size) == ("resnetrs152", "momentum", 0.1, 224)


@pytest.mark.parametrize("size", PUBLISHED)
def test_each_size_has_its_published_image_size_in_the_recipe(size: int) -> None:
    words = ["recipe=imagenet", f"student.model=efficientnetrs_b{size}"]
    student = load(None, words).with_sizes(IMAGENET).config.student
    pixels = PUBLISHED[size].image_size
    assert student.image_size == pixels
    assert student.crop_pct == pytest.approx(pixels / (pixels + 32), abs=0.001)  # released: padded by 32
    assert load(None, words).with_sizes(IMAGENET.model_copy(update={"side": 60})).config.student.image_size == 64


def test_words_win_over_what_the_recipe_knows_of_a_model_and_other_models_are_as_before() -> None:
    words = ["recipe=imagenet", "teacher.model=efficientnet_b0", "teacher.lr=0.5", "teacher.augment.magnitude=3"]
    teacher = load_config(None, words).teacher
    assert (teacher.lr, teacher.augment.magnitude, teacher.augment.num_ops, teacher.optimizer) == (0.5, 3, 2, "rmsprop")
    for other in ("tf_efficientnetv2_b0", "efficientnet_b0_gn", "resnetrs50"):
        assert load_config(None, ["recipe=imagenet", f"teacher.model={other}"]).teacher.optimizer == "momentum"
