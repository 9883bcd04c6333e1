# SPDX-License-Identifier: Apache-2.0
"""Write files and folders whole or not at all, under names that nobody can guess, with the permissions of the umask."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from aced_sdk.errors import ConfigError
from aced_sdk.files.reading import ReadError, expand, one_line, open_regular, printable, stored_bytes

if TYPE_CHECKING:
    from torch import Tensor

_REPLACED = 20  # times that a folder is replaced which other processes put in the same place
_MAX_SPARSE = 2**30  # bytes of a file with holes
_MOST_HOLE = 1000  # times what is on the disk
_HOST = 0xEFFFFFFC  # Linux' number of the namespace of processes outside of all containers
_KEPT = 30  # letters of a target's name in a temporary one: with four bytes each, the whole still has less than 255


def home() -> Path:
    """The folder of downloads, caches and built data: `ACED_HOME`, else the user's cache directory."""
    if given := os.environ.get("ACED_HOME"):
        return expand(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else expand("~/.cache")) / "aced-sdk"


def create(path: Path) -> int:
    """Make an empty file that must not exist yet, with the permissions of the umask; return its mode.

    Raises:
        FileExistsError: if something of that name exists, a link included.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A new, empty temporary file that replaces `target` when the block ends without an error."""
    if not target.name:  # "", "." and "/"
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name[:_KEPT]}.{secrets.token_hex(8)}.tmp")
    mode = create(temporary)
    try:
        yield temporary
        temporary.chmod(mode)  # some writers replace the file by one of their own
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())  # a rename must never outlive the bytes it names
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that replaces it when the block ends without an error.

    An older folder is removed, also one that another process puts there meanwhile. Files in the new one get the
    permissions of the umask.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{target.name[:_KEPT]}.{platform.node()}-{_processes()}"
    _sweep(target, mark)
    temporary, old = (target.with_name(f"{mark}{os.getpid()}.{secrets.token_hex(8)}.{end}") for end in ("tmp", "old"))
    temporary.mkdir()
    try:
        yield temporary
        _plain_modes(temporary)
        _put(temporary, target, old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, target: Path, old: Path) -> None:
    """Rename a folder to `target`; what is there is moved into `old` first, and removed afterwards."""
    for last in (*[False] * (_REPLACED - 1), True):
        if os.path.lexists(target):
            old.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):  # another process has just moved it away
                os.replace(target, old / ("folder" if not os.path.lexists(old / "folder") else secrets.token_hex(8)))
        try:
            os.replace(temporary, target)
            break
        except OSError as error:  # another process has just put one there
            if last or error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
    if old.is_dir():
        shutil.rmtree(old)


def reserve(handle: int, size: int, *, mapped: bool = False) -> None:
    """Give an open file its size, and reserve the space on the disk.

    Args:
        handle: the open file.
        size: bytes.
        mapped: the file is written through a memory map, where a full disk ends the process. If the file system cannot
            reserve space, every block is written. False: then only the free space is checked.

    Raises:
        OSError: if the disk has not enough space; the file has its old size again.
    """
    facts, disk = os.fstat(handle), os.fstatvfs(handle)
    missing = size - min(512 * facts.st_blocks, size)
    if missing > disk.f_bavail * disk.f_frsize:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {missing:,} bytes are needed")
    os.truncate(handle, size)
    try:
        _allocate(handle, size, mapped)
    except OSError:
        os.truncate(handle, facts.st_size)
        raise


def _allocate(handle: int, size: int, mapped: bool) -> None:
    if mapped and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
        return
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)  # Linux
    while fallocate and fallocate(handle, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def sync(folder: Path) -> None:
    """Wait until every file below a folder is on the disk.

    Raises:
        OSError: if the disk reports an error.
    """
    for directory, _, files in os.walk(folder):
        for path in (*(Path(directory, name) for name in files), Path(directory)):
            if not stat.S_ISREG(mode := path.lstat().st_mode) and not stat.S_ISDIR(mode):
                continue  # opening a pipe would wait for its writer
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _plain_modes(folder: Path) -> None:
    """Give every file the permissions of the umask: some libraries write 0600 or 0644 whatever it says."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for directory, _, files in os.walk(folder):
        for name in files:
            path = Path(directory, name)
            if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) & 0o666 != mode:
                path.chmod(mode)


def _sweep(target: Path, mark: str) -> None:
    """Remove what killed processes of this machine left behind: their process number is in the name.

    An older folder that was moved away and never replaced is moved back.
    """
    name = re.compile(re.escape(mark) + r"([0-9]{1,9})\.[0-9a-f]+\.(?:tmp|old)")
    for path in target.parent.iterdir():
        found = name.fullmatch(path.name)
        if not found or path.is_symlink() or _alive(int(found[1])):
            continue
        if path.suffix == ".old" and (path / "folder").is_dir() and not target.exists():
            os.replace(path / "folder", target)
        shutil.rmtree(path, ignore_errors=True)


def _processes() -> str:
    """Marks where process numbers count: containers may share a host's name, and each has its own numbers."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not on Linux
        return ""
    return "" if space == _HOST else f"{space}-"


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it lives, and is somebody else's
    return True


@contextmanager
def alone(directory: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Hold a folder for this process; the lock ends with the process, however that ends.

    Args:
        directory: made if it does not exist.
        what: the work that is done there, for the error.
        wait: wait for another process that holds it, instead of an error; standard error says so.

    Raises:
        ConfigError: if another process holds it and is not waited for, `.lock` is not a regular file, or no file can
            have that path.
        OSError: if the folder cannot be written.

    Warns:
        UserWarning: if the file system has no locks; then nothing is held.
    """
    import fcntl

    check_path(directory, "directory")
    directory.mkdir(parents=True, exist_ok=True)
    with os.fdopen(open_own(directory / ".lock"), "r+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait and _holder(lock) == threading.get_ident():
                raise ConfigError(
                    f"{what} and the work that needs them would be in one folder, {printable(directory)}",
                    remedy="name another folder for one of them",
                    field="directory",
                ) from None
            if wait:
                sys.stderr.write(f"waiting for another process that works on {what} in {one_line(directory, 500)}\n")
                fcntl.flock(lock, fcntl.LOCK_EX)
                with _held(lock):
                    yield
                return
            raise ConfigError(
                f"another process works on {what} in {printable(directory)}",
                remedy="wait for it or stop it, then start again: finished work is kept",
                field="directory",
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            warnings.warn(
                f"the file system of {one_line(directory, 500)} has no locks: "
                "make sure that only one process works there",
                stacklevel=3,
            )
        with _held(lock):
            yield


_HOLDERS: dict[tuple[int, int], int] = {}  # device and inode of a lock that this process holds, to the thread


def _holder(lock: IO[bytes]) -> int | None:
    facts = os.fstat(lock.fileno())
    return _HOLDERS.get((facts.st_dev, facts.st_ino))


@contextmanager
def _held(lock: IO[bytes]) -> Iterator[None]:
    facts = os.fstat(lock.fileno())
    _HOLDERS[facts.st_dev, facts.st_ino] = threading.get_ident()
    try:
        yield
    finally:
        _HOLDERS.pop((facts.st_dev, facts.st_ino), None)


def check_path(path: str | Path, field: str) -> None:
    """Refuse a path that no file can have.

    Raises:
        ConfigError: if it holds a NUL byte, or a character that no file name can have.
    """
    try:
        wrong = b"\0" in os.fsencode(path)
    except UnicodeError:  # half of a surrogate pair, which YAML can hold
        wrong = True
    if wrong:
        cause = f"{printable(path)} holds a character that no path can have"
        raise ConfigError(cause, remedy="correct the path", field=field)


def open_own(path: Path, flags: int = 0, *, only: bool = False) -> int:
    """Open a regular file for reading and writing, and make it if it is missing; a link is never followed.

    Args:
        path: the file.
        flags: further flags of `os.open`.
        only: refuse a file that has another name, too (a hard link): what is written would change that one.

    Raises:
        ConfigError: if something else than a regular file has that name, or a file that has another name, too.
        OSError: if the file cannot be opened.
    """
    wrong = ConfigError(f"{printable(path)} is not a regular file", remedy="remove it", field="directory")
    own = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, own | flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise wrong from None
        raise
    facts = os.fstat(handle)
    if not stat.S_ISREG(facts.st_mode):
        os.close(handle)
        raise wrong
    if only and facts.st_nlink > 1:
        os.close(handle)
        cause = f"{printable(path)} is a hard link: the file has another name, too"
        raise ConfigError(cause, remedy="replace it by a copy of it", field="directory")
    return handle


def write_json(target: Path, value: Any) -> None:
    """Write JSON with a final newline, whole or not at all."""
    with whole_file(target) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=False, allow_nan=False) + "\n", encoding="utf-8")


def save_tensors(target: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors, with the permissions of the umask.

    Raises:
        OSError: if the disk is full or the place cannot be written to.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else create(target)
    try:
        save_file(tensors, target, metadata)
    except SafetensorError as error:  # what a full disk raises there
        raise OSError(str(error)) from error
    target.chmod(mode)  # safetensors replaces the file by one of mode 0600


def tensor_digest(tensors: Mapping[str, Tensor], start: str = "") -> str:
    """Hex digest of `start`, then of every tensor's name and bytes in the names' order."""
    import torch

    digest = hashlib.sha256(start.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """Hex digest of a regular file's bytes.

    Raises:
        ReadError: if it cannot be read, or is large and nearly all of it is a hole, which takes hours to read.
    """
    with open_regular(path) as stream:
        size, stored = os.fstat(stream.fileno()).st_size, stored_bytes(stream)
        if stored < size / _MOST_HOLE and size > _MAX_SPARSE:
            cause = f"{printable(path)} is a sparse file of {size:,} bytes, and {stored:,} are on the disk"
            raise ReadError(cause, remedy="write it again without holes")
        return hashlib.file_digest(stream, "sha256").hexdigest()
