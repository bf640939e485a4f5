"""Batch norms of several processes, in a group of one: on a GPU with NCCL and the kernels of torch's SyncBatchNorm."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from pipeline.models.shared_batch_norm import share_statistics
from tests.cuda.setting import on_each_device, only_on_cuda

CHANNELS = 24


@pytest.fixture
def group(tmp_path: Path, device: str) -> Iterator[None]:
    """This process as the only one of a group."""
    backend = "nccl" if device == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def results(layer: nn.Module, images: torch.Tensor, slopes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients and statistics after a pass."""
    x = images.clone(memory_format=torch.preserve_format).requires_grad_()
    output = layer(x)
    (output * slopes).sum().backward()
    assert x.grad is not None
    gradients = {f"{name}.grad": value.grad for name, value in layer.named_parameters() if value.grad is not None}
    return {"output": output.detach(), "gradient": x.grad, **gradients, **dict(layer.named_buffers())}


@on_each_device
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_it_computes_what_torchs_batch_norm_does(
    device: str, dtype: torch.dtype, close: float, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    shape = 16, CHANNELS, 7, 5
    images = (torch.randn(shape, device=device) * 3 + 5).to(dtype, memory_format=memory_format)
    slopes = torch.randn(shape, device=device).to(dtype, memory_format=memory_format)
    plain = nn.BatchNorm2d(CHANNELS, device=device)
    nn.init.uniform_(plain.weight, 0.5, 1.5)
    shared = copy.deepcopy(plain)
    share_statistics(shared)
    expected, found = (results(layer, images, slopes) for layer in (plain, shared))
    assert found["output"].dtype == found["gradient"].dtype == dtype
    for name, value in expected.items():
        scale = max(1.0, float(value.float().abs().max()))
        torch.testing.assert_close(found[name].float(), value.float(), rtol=0, atol=close * scale, msg=name)


@only_on_cuda
@pytest.mark.usefixtures("group")
def test_a_pass_waits_for_nothing(device: str) -> None:
    layer = nn.BatchNorm2d(CHANNELS, device=device)
    share_statistics(layer)
    images = torch.randn(16, CHANNELS, 7, 5, device=device, requires_grad=True)
    layer(images).sum().backward()  # makes NCCL's communicator
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(images).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
