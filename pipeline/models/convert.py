"""Convert weights of this pipeline for other runtimes, and compare the result with torch before writing it.

    python -m pipeline.models.convert weights=RUN/gen-1/student/weights out=student.onnx [images='shards/validation/*.tar']

out=….onnx is for ONNX runtimes (needs `noisy-student-pipeline[onnx]`), out=….pt2 for `torch.export.load`. Input: `images`, float32
(batch, 3, size, size), any batch size, normalized. Output: `logits`, float32 (batch, classes). The file's metadata `config.json` is the
folder's: class names (`label_names`), size, crop, mean and std (`pretrained_cfg`), and the temperature to divide logits by
(`noisy_student`). The comparison runs the first 16 images of the first shard, or noise without `images`. If logits differ by more than
1e-4 of the largest (or of 1), nothing is written.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from itertools import islice
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from data import storage
from data.images.clean_view import EvalView
from data.settings import UsageError, run_command
from data.shards.samples import iterate_samples
from pipeline.models.registry import build_model
from pipeline.models.resnet_rs import ModelError
from pipeline.models.weights import CONFIG_NAME, WeightsInfo, load_weights

TOLERANCE = 1e-4
_COMPARED = 16  # images
_INPUT, _OUTPUT = "images", "logits"
Run = Callable[[Tensor], Tensor]  # images → logits


def convert(weights: str, out: str, images: str = "") -> None:
    """Convert, compare and write; see the module's text.

    Raises:
        UsageError: `out` does not end in .onnx or .pt2.
        ModelError: there are no weights, the model cannot be converted, or the converted model's logits differ.
        StorageError: there are no such shards.
    """
    formats = {".onnx": (_to_onnx, _load_onnx), ".pt2": (_to_pt2, _load_pt2)}
    chosen = next((formats[ending] for ending in formats if out.endswith(ending)), None)
    if chosen is None:
        raise UsageError(f"out={out}: expected a name that ends in {' or '.join(formats)}")
    info, state = load_weights(weights)
    if info.clip is not None:
        raise ModelError(f"{weights}: a model of clips ({info.model}); only models of images are converted")
    model = build_model(info.model, info.num_classes, info.model_args).eval()
    model.load_state_dict(state)
    batch = _real_images(images, info) if images else _noise(info)
    to_bytes, load = chosen
    content = to_bytes(_export(model, batch), storage.read_text(storage.join(weights, CONFIG_NAME)))
    difference = _require_same_logits(model, load(content), batch, out)
    storage.write_bytes(out, content)
    kind = "images" if images else "images of noise"
    print(
        f"{out}: {len(content) / 1e6:.3g} MB; logits differ by at most {difference:.1e} from torch's on {len(batch)} {kind}"
    )


def _export(model: nn.Module, batch: Tensor) -> torch.export.ExportedProgram:
    """The model as a graph for any batch size."""
    example = batch[:1].repeat(2, 1, 1, 1)  # from a batch of 1, torch would infer a constant 1
    try:
        return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    except Exception as error:  # tracing an arbitrary model can raise any type
        raise ModelError(
            f"{type(model).__name__}: torch.export cannot convert it ({str(error).splitlines()[0]})"
        ) from error


def _to_onnx(program: torch.export.ExportedProgram, config: str) -> bytes:
    try:
        converted = torch.onnx.export(program, input_names=[_INPUT], output_names=[_OUTPUT], dynamo=True, verbose=False)
    except ImportError as error:
        raise ModelError(
            f"a package for ONNX is missing ({error}): pip install 'noisy-student-pipeline[onnx]'"
        ) from error
    assert converted is not None, "torch.onnx.export returns the model when given no file"
    model = converted.model_proto
    entry = model.metadata_props.add()
    entry.key, entry.value = CONFIG_NAME, config
    return bytes(model.SerializeToString())


def _load_onnx(content: bytes) -> Run:
    import onnxruntime  # an optional dependency

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([_OUTPUT], {_INPUT: images.numpy()})[0])


def _to_pt2(program: torch.export.ExportedProgram, config: str) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={CONFIG_NAME: config})
    return buffer.getvalue()


def _load_pt2(content: bytes) -> Run:
    return torch.export.load(io.BytesIO(content)).module()


@torch.no_grad()
def _require_same_logits(model: nn.Module, run: Run, batch: Tensor, out: str) -> float:
    """The largest difference from torch's logits, for single images and for the whole batch. Raise ModelError above the tolerance."""
    expected = model(batch)
    together, alone = run(batch), torch.cat([run(image[None]) for image in batch])
    difference = max(float((found - expected).abs().max()) for found in (together, alone))
    maximum = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= maximum:  # NaN too
        raise ModelError(
            f"{out}: its logits differ by {difference:.2e} from torch's, more than {maximum:.2e}; it is not written"
        )
    return difference


def _real_images(pattern: str, info: WeightsInfo) -> Tensor:
    """The first images of the first shard, preprocessed: float32 (N, 3, size, size)."""
    view = EvalView(info.image_size, info.crop_pct, info.interpolation, info.resize)
    with storage.open_read(storage.expand(pattern)[0]) as file:
        places = [(s.offset, s.size) for s in islice(iterate_samples(file), _COMPARED) if not s.problem]
        pixels = [view(_at(file, *place)) for place in places]
    if not pixels:
        raise ModelError(f"images={pattern}: no image at the beginning of the first shard")
    return _normalized(np.stack(pixels), info)


def _at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _noise(info: WeightsInfo) -> Tensor:
    """float32 (N, 3, size, size)."""
    shape = (_COMPARED, info.image_size, info.image_size, 3)
    return _normalized(np.random.default_rng(0).integers(0, 256, shape, np.uint8), info)


def _normalized(pixels: np.ndarray, info: WeightsInfo) -> Tensor:
    """uint8 (N, size, size, 3) → float32 (N, 3, size, size)."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (info.mean, info.std))
    return ((images - mean) / std).contiguous()


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    return run_command(convert, arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
