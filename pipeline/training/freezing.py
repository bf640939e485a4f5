"""The train-test resolution fix (FixRes, arXiv 1906.06423): a short training at a larger image size that moves the end of a network.

Random crops show objects larger than the centre crop of inference does, so a network is better at a larger size than it was trained
at, once what follows its convolutions knows that size (section 3). Noisy Student (arXiv 1911.04252, section 3.1) ends with
it. Trained are the last normalization, what follows it, and the classifier, on images without noise (section 4.2).
"""

from __future__ import annotations

from torch import nn

from pipeline.training.optimizer import NORMS


def freeze_early_layers(model: nn.Module) -> None:
    """Let only the model's last normalization layer and the parameters after it be trained; of all, where there is none."""
    last = _last_norm(model)
    found = last is None
    for module in model.modules():
        found = found or module is last
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(found)


def to_training_mode(network: nn.Module) -> nn.Module:
    """The network in training mode, but for frozen normalization layers: their statistics are as fixed as their gains."""
    network.train()
    for module in network.modules():
        if isinstance(module, NORMS) and not any(parameter.requires_grad for parameter in module.parameters()):
            module.eval()
    return network


def _last_norm(model: nn.Module) -> nn.Module | None:
    return next((module for module in reversed(list(model.modules())) if isinstance(module, NORMS)), None)
