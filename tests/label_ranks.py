"""One rank of several that read pseudo-labels together: python -m tests.label_ranks RANK WORLD_SIZE STORE SOURCE; prints keys."""

from __future__ import annotations

import sys

import torch.distributed as dist
from torch.utils.data import DataLoader

from data.labels.pseudo_labels import PseudoLabels


def main(rank: str, world_size: str, store: str, source: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world_size))
    dataset = PseudoLabels(source).dataset(lambda image: 0, as_dict=True, shuffle=5)
    for sample in DataLoader(dataset, batch_size=None, num_workers=2):
        print(sample["key"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
