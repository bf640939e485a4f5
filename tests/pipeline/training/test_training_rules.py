"""Loss, moving average, schedule and optimizer against their closed forms."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.core.schema import TrainConfig
from pipeline.inputs.targets import pseudo_targets, smoothed_targets
from pipeline.training.ema import EMA, ema_decay
from pipeline.training.objectives.cross_entropy import soft_cross_entropy
from pipeline.training.optimizer import build_optimizer, learning_rate, parameter_groups, state_per_parameter


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))


def test_smoothed_labels_equal_torchs() -> None:
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    targets = smoothed_targets(labels.numpy(), 5, 0.1).dense()
    torch.testing.assert_close(targets[1], torch.tensor([0.02, 0.92, 0.02, 0.02, 0.02]))
    expected = functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(soft_cross_entropy(logits, targets), expected)


def test_the_loss_is_the_mean_cross_entropy_of_the_samples() -> None:
    logits, targets = torch.randn(6, 5), torch.randn(6, 5).softmax(1)
    each = [-(targets[row] * logits[row].log_softmax(0)).sum() for row in range(6)]
    torch.testing.assert_close(soft_cross_entropy(logits, targets), torch.stack(each).mean())


def test_the_loss_is_float32_under_autocast() -> None:
    logits, targets = torch.randn(6, 5) * 20, torch.randn(6, 5).softmax(1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = soft_cross_entropy(logits.bfloat16(), targets.bfloat16())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, soft_cross_entropy(logits.bfloat16().float(), targets.bfloat16().float()))


def test_a_mixed_batch_is_one_mean_over_all_samples() -> None:
    """Not the sum of two means: with SGD that would change the learning rate."""
    labels, pseudo = torch.tensor([1, 2]), torch.randn(6, 5).softmax(1)
    smoothed = smoothed_targets(labels.numpy(), 5, 0.1).dense()
    targets = torch.cat([smoothed, pseudo])
    logits = torch.randn(8, 5)
    labeled = soft_cross_entropy(logits[:2], smoothed)
    unlabeled = soft_cross_entropy(logits[2:], pseudo)
    torch.testing.assert_close(soft_cross_entropy(logits, targets), (2 * labeled + 6 * unlabeled) / 8)


def test_pseudo_targets_are_soft_hard_or_sharpened() -> None:
    probabilities = torch.tensor([[0.6, 0.4, 0.0], [0.2, 0.2, 0.6]])
    torch.testing.assert_close(pseudo_targets(probabilities), probabilities)
    torch.testing.assert_close(pseudo_targets(probabilities.half(), "hard"), torch.eye(3)[[0, 2]])
    squared = probabilities**2
    expected = squared / squared.sum(1, keepdim=True)
    torch.testing.assert_close(pseudo_targets(probabilities, temperature=0.5), expected)


def test_the_decay_follows_the_update_count() -> None:
    assert [ema_decay(t, 0.9999) for t in (0, 1, 90)] == [0.1, 2 / 11, 0.91]
    assert ema_decay(10**6, 0.9999) == 0.9999
    assert ema_decay(8, 0.5) == 0.5


def test_the_average_of_weights_and_statistics_has_its_closed_form() -> None:
    """average ← d × average + (1 − d) × value, for parameters and batch-norm statistics alike."""
    model = small_model()
    ema = EMA(model, decay=0.3)
    expected = {name: value.clone().double() for name, value in model.state_dict().items()}
    for step in range(6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(4, 3, 4, 4) + step)  # moves the running statistics
        ema.update(model)
        decay = min(0.3, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            moved = decay * expected[name] + (1 - decay) * value.double()
            expected[name] = moved if value.is_floating_point() else value.double()
    averages = ema.module.state_dict()
    assert averages["1.num_batches_tracked"] == 6
    for name, value in expected.items():
        torch.testing.assert_close(averages[name].double(), value, atol=1e-5, rtol=1e-5)
    assert not torch.equal(averages["1.running_mean"], model.state_dict()["1.running_mean"])


def test_the_averaged_module_is_in_eval_mode_and_shares_nothing_with_the_model() -> None:
    model = small_model()
    ema = EMA(model, 0.99)
    assert not ema.module.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    own = {tensor.data_ptr() for tensor in ema.module.state_dict().values()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in model.state_dict().values())


def test_an_average_continues_exactly_from_its_state() -> None:
    model = small_model()
    whole, first = EMA(model, 0.9), EMA(model, 0.9)
    values = [torch.randn(4, 3, 3, 3) for _ in range(5)]

    def advance(ema: EMA, value: torch.Tensor) -> None:
        with torch.no_grad():
            next(model.parameters()).copy_(value)
        ema.update(model)

    for value in values:
        advance(whole, value)
    for value in values[:2]:
        advance(first, value)
    second = EMA(small_model(), 0.9)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for value in values[2:]:
        advance(second, value)
    weights = second.state_dict()["module"]
    assert second.num_updates == 5
    assert all(torch.equal(weights[name], value) for name, value in whole.module.state_dict().items())


def test_the_learning_rate_warms_up_from_zero_and_ends_at_zero() -> None:
    rates = [learning_rate(step, total_steps=110, warmup_steps=10, peak=1.6) for step in (0, 5, 10, 35, 60, 85, 110)]
    quarter = 0.8 * (1 + math.cos(math.pi / 4))
    assert rates == pytest.approx([0.0, 0.8, 1.6, quarter, 0.8, 1.6 - quarter, 0.0])
    assert 0 < learning_rate(109, 110, 10, 1.6) < 0.001


def test_the_warm_up_may_be_absent_or_last_all_the_run_but_not_longer() -> None:
    assert learning_rate(0, 10, 0, 1.0) == 1.0
    assert learning_rate(9, 10, 10, 1.0) == 0.9
    assert learning_rate(10, 10, 10, 1.0) == 1.0
    with pytest.raises(ValueError, match=r"warmup_steps must be 0 to 10 \(total_steps\), but is 11"):
        learning_rate(0, 10, 11, 1.0)


def test_the_step_schedule_drops_where_resnets_did() -> None:
    """Epochs 30, 60 and 80 of 90, five of them warm-up."""
    rates = [learning_rate(epoch, 90, 5, 0.1, "step") for epoch in range(90)]
    assert rates[:5] == pytest.approx([0, 0.02, 0.04, 0.06, 0.08])
    assert rates[5:] == pytest.approx([0.1] * 25 + [0.01] * 30 + [0.001] * 20 + [0.0001] * 10)


def test_an_average_with_decay_0_equals_the_weights() -> None:
    model = small_model()
    ema = EMA(model, decay=0.0)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter)
        ema.update(model)
    for average, parameter in zip(ema.module.parameters(), model.parameters(), strict=True):
        assert torch.equal(average, parameter)


def test_weights_and_biases_decay_but_batch_norm_does_not() -> None:
    model = small_model()
    decayed, undecayed = parameter_groups(model, 4e-5)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (4e-5, 0.0)
    assert [id(parameter) for parameter in undecayed["params"]] == [id(model[1].weight), id(model[1].bias)]
    expected = [model[0].weight, model[0].bias, model[4].weight, model[4].bias]
    assert [id(parameter) for parameter in decayed["params"]] == [id(parameter) for parameter in expected]


def test_frozen_parameters_are_left_out_and_shared_ones_come_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    decayed, _ = parameter_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight), id(model[0].bias), id(model[1].bias)]


def test_the_optimizer_is_plain_momentum_with_decay_in_the_gradient() -> None:
    """v ← m v + (g + λ w);  w ← w − lr v. Nesterov would step by g + m v."""
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, momentum=0.9, weight_decay=0.01)
    weight, velocity = model.weight.detach().clone().double(), torch.zeros(2, 3, dtype=torch.float64)
    for _ in range(4):
        gradient = torch.randn(2, 3)
        model.weight.grad, model.bias.grad = gradient, torch.zeros(2)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.step()
        velocity = 0.9 * velocity + gradient.double() + 0.01 * weight
        weight -= 0.1 * velocity
    torch.testing.assert_close(model.weight.detach().double(), weight, atol=1e-6, rtol=1e-6)


RATE, DECAY = 0.1, 0.01
Rule = Callable[[torch.Tensor, torch.Tensor, list[torch.Tensor], int], torch.Tensor]  # weight, gradient, state, step


def nesterov(weight: torch.Tensor, gradient: torch.Tensor, state: list[torch.Tensor], step: int) -> torch.Tensor:
    """v ← m v + g;  w ← w − lr (g + m v), as in torch's SGD; v begins as g."""
    gradient = gradient + DECAY * weight
    state[0] = gradient if step == 1 else 0.9 * state[0] + gradient
    return weight - RATE * (gradient + 0.9 * state[0])


def rmsprop(weight: torch.Tensor, gradient: torch.Tensor, state: list[torch.Tensor], step: int) -> torch.Tensor:
    """TensorFlow's: s begins at 1, epsilon is under the root, the learning rate in the velocity."""
    gradient = gradient + DECAY * weight
    state[1] = (torch.ones_like(weight) if step == 1 else state[1]).lerp(gradient**2, 0.1)
    state[0] = 0.9 * state[0] + RATE * gradient / (state[1] + 1e-3).sqrt()
    return weight - state[0]


def adamw(weight: torch.Tensor, gradient: torch.Tensor, state: list[torch.Tensor], step: int) -> torch.Tensor:
    """Algorithm 2 of arXiv 1711.05101 with a schedule of 1; torch multiplies the decay by the learning rate."""
    state[0], state[1] = 0.9 * state[0] + 0.1 * gradient, 0.999 * state[1] + 0.001 * gradient**2
    mean, square = state[0] / (1 - 0.9**step), state[1] / (1 - 0.999**step)
    return weight - RATE * DECAY * weight - RATE * mean / (square.sqrt() + 1e-8)


def lars(weight: torch.Tensor, gradient: torch.Tensor, state: list[torch.Tensor], step: int) -> torch.Tensor:
    """Algorithm 1 of arXiv 1708.03888, with the rate outside of the velocity, and |g| + λ |w| for the norm."""
    ratio = 1e-3 * weight.norm() / (gradient.norm() + DECAY * weight.norm())
    scaled = ratio * (gradient + DECAY * weight)
    state[0] = scaled if step == 1 else 0.9 * state[0] + scaled
    return weight - RATE * state[0]


@pytest.mark.parametrize("rule", [nesterov, rmsprop, adamw, lars])
def test_each_optimizer_takes_the_steps_of_its_formula(rule: Rule) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, 0.9, DECAY, rule.__name__)
    weight = model.weight.detach().clone().double()
    state = [torch.zeros_like(weight), torch.zeros_like(weight)]
    for step in range(1, 6):
        gradient = torch.randn(2, 3)
        model.weight.grad, model.bias.grad = gradient, torch.zeros(2)
        for group in optimizer.param_groups:
            group["lr"] = RATE
        optimizer.step()
        weight = rule(weight, gradient.double(), state, step)
        torch.testing.assert_close(model.weight.detach().double(), weight, atol=1e-6, rtol=1e-5)


OPTIMIZERS = get_args(TrainConfig.model_fields["optimizer"].annotation)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_each_optimizer_is_counted(name: str, momentum: float) -> None:
    if name == "nesterov" and not momentum:
        return  # refused: test_nesterov_needs_momentum
    model = nn.Linear(30, 20)
    optimizer = build_optimizer(model, momentum, DECAY, name)
    model.weight.grad, model.bias.grad = torch.ones(20, 30), torch.ones(20)
    optimizer.step()
    kept = [v for v in optimizer.state[model.weight].values() if isinstance(v, torch.Tensor) and v.numel() > 1]
    assert len(kept) == state_per_parameter(name, momentum)


def test_lars_neither_decays_nor_adapts_norms_and_biases() -> None:
    """And adapts weights without weight decay, too. arXiv 2002.05709, section 4.2, leaves norms and biases out as its code does."""
    model = small_model()
    optimizer = build_optimizer(model, 0.9, 0.0, "lars")
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, value in model.named_parameters():
        moved = (before[name] - value.detach()).abs().max()
        assert (moved == pytest.approx(1)) if value.ndim == 1 else (moved < 0.01), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_without_a_schedule_does_not_move(name: str) -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, 0.9, 0.01, name)
    model.weight.grad, model.bias.grad = torch.ones(2, 3), torch.ones(2)
    optimizer.step()
    assert torch.equal(model.weight, before)
