"""One change adds a family: a row of `FAMILIES`, here of toy networks, and everything that asks the registry knows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.core.schema import StudentConfig
from pipeline.core.stage import StageError
from pipeline.models import registry
from pipeline.models.memory import count_pass
from pipeline.models.registry import Family, build_model, count_flops, family_of, timm_architecture
from pipeline.models.resnet_rs import ModelError
from student.warm_start import require_warm_start


class Toy(nn.Module):
    """Layers that begin as zeros beside their shortcuts, so that more of them compute the same."""

    def __init__(self, depth: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(depth))
        for parameter in self.layers.parameters():
            nn.init.zeros_(parameter)
        self.dropout, self.fc = nn.Dropout(dropout), nn.Linear(3, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) → (N, classes)."""
        for layer in self.layers:
            x = x + layer(x)
        return self.fc(self.dropout(x.mean((2, 3))))


def build(name: str, num_classes: int, args: Mapping[str, Any], dropout: float, stochastic_depth: float) -> nn.Module:
    return Toy(int(name[-1]), num_classes, dropout)


def grows(teacher: nn.Module, student: nn.Module) -> bool:
    return isinstance(teacher, Toy) and isinstance(student, Toy) and len(teacher.layers) <= len(student.layers)


TOY = Family(
    names=("toynet1", "toynet2"),
    build=build,
    timm_names=lambda name, args: (name, dict(args)),
    can_warm_start=grows,
    warm_start="a toynet may be deeper",
)


@pytest.fixture(autouse=True)
def _with_toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, TOY))


def test_a_toy_is_built_counted_and_found_by_its_name() -> None:
    model = build_model("toynet2", 10, {}, dropout=0.25)
    assert isinstance(model, Toy)
    assert model.dropout.p == 0.25
    assert count_flops(model, 8) == 2 * (2 * 9 * 64 + 30)
    assert count_pass(lambda: build_model("toynet1", 10, {}).train(), 8, bf16=False, trains=True).kept_per_image > 0
    assert timm_architecture("toynet1", {"a": 1}) == ("toynet1", {"a": 1})


def test_a_misspelt_toy_is_named() -> None:
    with pytest.raises(ModelError, match=r"did you mean 'toynet[12]'"):
        build_model("toynet3", 10, {})


def test_a_student_begins_as_its_teacher_by_the_familys_rule() -> None:
    require_warm_start(StudentConfig(init="teacher", model="toynet2"), "toynet1", {})
    with pytest.raises(StageError, match=r"\(a toynet may be deeper\)"):
        require_warm_start(StudentConfig(init="teacher", model="toynet1"), "toynet2", {})


def test_names_are_of_one_family_alone() -> None:
    names = [name for family in registry.FAMILIES for name in family.names]
    assert len(names) == len(set(names))
    assert all(family_of(name) is not None for name in names)
