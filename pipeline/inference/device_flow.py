"""Batches of pixels to the device, and their highest probabilities back, so that the device never waits for the host.

On a GPU: pixels lie in pinned memory that is used again, and go up on a stream of their own, once for all views and models. Softmax,
mean and top-k are computed there, and only the top k come back. `start` returns once the pixels are there, while the device computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from data.labels.top_k import LAST_CLASS, TopK, top_k_of


class LabelingModel(Protocol):
    """What labels: `Predictor`, or `Ensemble`."""

    device: str

    def device_probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (n, 3, S, S) on the device → float32 (n, C) there."""


@dataclass(frozen=True)
class PendingTopK:
    """The highest probabilities of a batch, maybe still being computed."""

    index: torch.Tensor
    prob: torch.Tensor
    done: torch.cuda.Event | None

    def result(self) -> TopK:
        """Wait for them."""
        if self.done is not None:
            self.done.synchronize()
        return TopK.of(self.index.numpy(), self.prob.numpy())


class DeviceFlow:
    """Label batches on the model's device. One thread calls `start` on a GPU, several may on CPUs.

    Args:
        top_k: number of probabilities to bring back; at most the number of classes.
    """

    def __init__(self, model: LabelingModel, top_k: int) -> None:
        self._model, self._top_k = model, top_k
        self.is_gpu = model.device == "cuda"
        self._uploads = torch.cuda.Stream() if self.is_gpu else None

    def allocate(self, shape: tuple[int, ...]) -> np.ndarray:
        """Memory for pixels, uint8, uninitialized; pinned for a GPU."""
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.is_gpu).numpy()

    def start(self, pixels: np.ndarray) -> PendingTopK | TopK:
        """Start labeling images, uint8 (n, S, S, 3); their memory is free again when this returns."""
        images = torch.from_numpy(pixels).movedim(-1, -3)
        if self._uploads is None:
            return top_k_of(self._model.device_probabilities(images).numpy(), self._top_k)
        compute = torch.cuda.current_stream()
        with torch.cuda.stream(self._uploads):
            there = images.to(self._model.device, non_blocking=True)
            uploaded = self._uploads.record_event()
        compute.wait_event(uploaded)
        there.record_stream(compute)
        index, prob = device_top_k(self._model.device_probabilities(there), self._top_k)
        index, prob = (values.to("cpu", non_blocking=True) for values in (index, prob))
        done = compute.record_event()
        uploaded.synchronize()
        return PendingTopK(index, prob, done)


def device_top_k(probabilities: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `top_k_of`, without leaving the device: index int64 (N, K) and probability float32 (N, K), highest first, the lower class
    first of equal ones."""
    bits = probabilities.contiguous().view(torch.int32).long()  # in the order of the probabilities, as none is negative
    keys = (bits << 16) | (LAST_CLASS - torch.arange(bits.shape[1], device=bits.device))
    index = LAST_CLASS - (keys.topk(top_k, dim=1).values & LAST_CLASS)
    return index, probabilities.gather(1, index)
