"""The memory of batches is reused."""

from __future__ import annotations

import numpy as np

from teacher.labeling.batches import ImageMemory


def test_memory_is_used_again_only_after_it_was_given_back() -> None:
    memory = ImageMemory(batch_size=4, image_size=2)
    first, second = memory.take(4), memory.take(3)
    assert first.shape == (4, 2, 2, 3)
    assert second.shape == (3, 2, 2, 3)
    assert not np.shares_memory(first, second)
    memory.give_back(second)
    third = memory.take(4)
    assert third.shape == (4, 2, 2, 3)
    assert np.shares_memory(second, third)
    assert not np.shares_memory(first, third)
