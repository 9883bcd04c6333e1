# SPDX-License-Identifier: Apache-2.0
"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aced_sdk.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


def home() -> Path:
    """Where downloads, caches and built data live: `ACED_HOME`, else the user's cache directory."""
    if given := os.environ.get("ACED_HOME"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "aced-sdk"


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `target` when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())  # a rename must never outlive the bytes it names
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well; an older one is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{target.name}.{platform.node()}-"
    _sweep(target.parent, mark)
    prefix = f"{mark}{os.getpid()}."
    temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=target.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=prefix, suffix=".old", dir=target.parent))
            os.replace(target, old / "folder")
            os.replace(temporary, target)
            shutil.rmtree(old)
        else:
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sweep(parent: Path, mark: str) -> None:
    """Remove what killed processes of this machine left behind: their number stands in the name."""
    for path in parent.iterdir():
        number = path.name.removeprefix(mark).split(".")[0]
        if path.name.startswith(mark) and number.isdigit() and not _alive(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives, and is somebody else's
    return True


@contextmanager
def alone(directory: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Hold a folder for this process; the lock ends with the process, however that ends.

    Args:
        directory: made if it is not there.
        what: is worked on there, for the error.
        wait: for another process that holds it, instead of an error.

    Raises:
        ConfigError: if another process holds it, and is not waited for.
        OSError: if the folder cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process works on {what} in {directory}",
                remedy="wait for it or stop it, then start again: finished work is kept",
                field="directory",
            ) from None
        yield


def write_json(target: Path, value: Any) -> None:
    """Write JSON with a final newline, whole or not at all."""
    with whole_file(target) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=False, allow_nan=False) + "\n", encoding="utf-8")


def save_tensors(target: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors, readable for whoever may read the folder.

    Raises:
        OSError: if the disk is full or the place cannot be written to.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, target, metadata)
    except SafetensorError as error:  # what a full disk raises there
        raise OSError(str(error)) from error
    target.chmod(0o644)


def tensor_digest(tensors: Mapping[str, Tensor], start: str = "") -> str:
    """Hex digest of `start`, then of every tensor's name and bytes in the names' order."""
    import torch

    digest = hashlib.sha256(start.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
