"""Folding batch norms changes a model's cost, not its logits."""

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.models.fold_batch_norm import fold_batch_norm
from pipeline.models.registry import build_model


def trained_like(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and gains that change the logits."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 1.5, generator=generator)
            assert module.running_mean is not None
            nn.init.normal_(module.running_mean, 0, 0.1, generator=generator)
            nn.init.normal_(module.bias, 0, 0.1, generator=generator)
    return model


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "args"),
    [("resnetrs26", {"width": 0.25}), ("tf_efficientnet_lite0", {}), ("resnet18", {}), ("vit_tiny_patch16_224", {})],
)
def test_a_folded_model_gives_the_same_logits_without_batch_norms(name: str, args: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = trained_like(build_model(name, 10, args)).eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    folded = fold_batch_norm(model, (3, 224, 224))
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(folded(images), model(images), rtol=1e-3, atol=1e-4)
    assert norms(folded) == 0
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())


class Shared(nn.Module):
    """A convolution whose output feeds a batch norm and a sum, so that it cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.convolution(images)
        return (self.norm(features) + features).mean((2, 3))


def test_a_model_that_cannot_be_folded_is_returned_unchanged() -> None:
    model = trained_like(Shared()).eval()
    assert fold_batch_norm(model, (3, 32, 32)) is model
