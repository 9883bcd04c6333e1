# SPDX-License-Identifier: Apache-2.0
"""The optional parts that Debian's package client brings: Open Clip Art for the pool, Tux Paint stamps for testing."""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from html import unescape
from pathlib import Path

from aced_sdk import files

from .emoji import words
from .fetch import FetchError, check_member, run_tool
from .pictures import Candidate, make_key
from .sources import APT_CLIPART, APT_LICENCES, APT_STAMPS

_MAX_SVG_BYTES = 300_000  # larger ones are maps that take seconds to draw
_MAX_MEMBER = 16 * 2**20
_MAX_UNPACKED = 2**32  # bytes of all members that are read
_TITLE = re.compile(rb"<dc:title>(.*?)</dc:title>", re.S)


def has_apt() -> bool:
    """Whether this system has Debian's package clients."""
    return shutil.which("apt-get") is not None and shutil.which("dpkg-deb") is not None


def fetch_deb(name: str, downloads: Path) -> Path:
    """The package file of `name`, of the version that this system's package lists have; apt checks its hash.

    One that is there is taken if its digest is beside it and fits.
    """
    for there in sorted(downloads.glob(f"{name}_*.deb"), reverse=True):
        with suppress(files.ReadError):
            if files.read_text(_digest_of(there), 100).strip() == files.sha256(there):
                return there
    with tempfile.TemporaryDirectory(prefix=".part-", dir=downloads) as temporary:
        done = run_tool(["apt-get", "download", name], Path(temporary), what=name, missing="build without apt parts")
        found = list(Path(temporary).glob("*.deb"))
        if done.returncode != 0 or len(found) != 1:
            raise FetchError(
                f"apt-get could not fetch {name}",
                remedy="run `apt-get update` and check the network, or build without the apt parts",
            )
        target = downloads / found[0].name.replace("%3a", ".")
        digest = files.sha256(found[0])
        found[0].replace(target)
        with files.whole_file(_digest_of(target)) as temporary_file:
            temporary_file.write_text(digest + "\n", encoding="utf-8")
    return target


def _digest_of(deb: Path) -> Path:
    return deb.with_name(f"{deb.name}.sha256")


def read_deb(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The `wanted` regular files inside a package file, by path, read without unpacking it to disk."""
    members: dict[str, bytes] = {}
    room = _MAX_UNPACKED
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                for member in tar:
                    name = str(check_member(member.name, path.name))
                    if not (member.isfile() and wanted(name)) or member.size > _MAX_MEMBER:
                        continue
                    room -= member.size
                    if room < 0:
                        raise FetchError(f"{path} unpacks to too many bytes", remedy="delete it and build again")
                    if (file := tar.extractfile(member)) is not None:
                        members[name] = file.read()
        except tarfile.TarError as error:
            raise FetchError(f"{path} cannot be read: {error}", remedy="delete it and build again") from error
    return members


def read_clipart(path: Path) -> list[Candidate]:
    """Open Clip Art with its titles as captions, boilerplate titles and all: that is the dirt of this source."""
    candidates: list[Candidate] = []
    for name, data in sorted(read_deb(path, lambda name: name.endswith(".svg")).items()):
        title = _TITLE.search(data)
        caption = " ".join(unescape(title.group(1).decode(errors="replace")).split()) if title else ""
        if words(caption) and len(caption) <= 120 and len(data) <= _MAX_SVG_BYTES:
            key = make_key("openclipart", name.partition("/svg/")[2].removesuffix(".svg"))
            candidates.append(
                Candidate(
                    key=key,
                    source="openclipart",
                    style="openclipart",
                    role="pool",
                    kind="clipart",
                    licence=APT_LICENCES[APT_CLIPART],
                    caption=caption,
                    meaning=None,
                    data=data,
                )
            )
    return list({candidate.key: candidate for candidate in candidates}.values())


def read_stamps(path: Path) -> dict[str, list[Candidate]]:
    """Tux Paint stamps with their English sentence: `tux_paint_photos` and `tux_paint_drawings`, without letters."""
    files = read_deb(path, lambda name: "/stamps/" in name and name.endswith((".png", ".svg", ".txt")))
    tasks: dict[str, list[Candidate]] = {"tux_paint_photos": [], "tux_paint_drawings": []}
    for name, data in sorted(files.items()):
        stem, _, ending = name.rpartition(".")
        sentence = files.get(f"{stem}.txt", b"").decode(errors="replace").partition("\n")[0].strip()
        # Letters are not pictures; a mirrored or flipped stamp shows its sentence's thing once more.
        if ending == "txt" or not sentence or "/alphabets/" in name or stem.endswith(("_mirror", "_flip")):
            continue
        drawn = ending == "svg" or "/cartoon/" in name or "/symbols/" in name
        task = "tux_paint_drawings" if drawn else "tux_paint_photos"
        tasks[task].append(
            Candidate(
                key=make_key("tuxpaint", stem.partition("/stamps/")[2]),
                source="tuxpaint",
                style="tuxpaint",
                role="unseen",
                kind="clipart",
                licence=APT_LICENCES[APT_STAMPS],
                caption=sentence,
                meaning=None,
                data=data,
            )
        )
    return tasks


def describe(path: Path, name: str) -> dict[str, str]:
    """What was found of an apt package, for the manifest."""
    version = path.stem.split("_")[1]
    return {"package": name, "version": version, "sha256": files.sha256(path), "licence": APT_LICENCES[name]}
