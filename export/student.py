# SPDX-License-Identifier: Apache-2.0
"""Read the arguments of an export: the student, pictures, and names of parts and precisions."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path

from PIL import Image

from aced_sdk import towers
from aced_sdk.config import Config
from aced_sdk.errors import ConfigError, UnsupportedError
from aced_sdk.files import expand, printable, sha256
from aced_sdk.processing.plain import PictureError, to_rgb
from aced_sdk.processing.plain.inputs import open_input
from aced_sdk.towers.dual_encoder import DualEncoder
from aced_sdk.towers.folder import CONFIG, weights_of
from aced_sdk.towers.folder import MANIFEST as STUDENT_MANIFEST
from export.runtime import encoder
from export.runtime.errors import InputError
from export.writing import ExportError


class Source(Config):
    """The student that was exported."""

    weights_sha256: str
    config_sha256: str
    license: str


def known(field: str, values: Sequence[str], names: Sequence[str]) -> None:
    """Refuse values that are not some of the names, each once.

    Raises:
        ConfigError: if they are not.
    """
    if isinstance(values, str) or not values or len(set(values)) < len(values) or not set(values) <= set(names):
        raise ConfigError(f"{field} is {values!r}", remedy=f"give some of {', '.join(names)}, each once", field=field)


def load_student(student_folder: str | PathLike[str]) -> tuple[DualEncoder, Source]:
    """The student and what identifies it.

    Raises:
        UnsupportedError: for a hub name.
        ModelError: if the folder cannot be loaded.
    """
    name = fspath(student_folder)
    if name.startswith("hf-hub:"):
        raise UnsupportedError(
            f"{name} lies on a hub", remedy="load it and save it as a folder first", field="student_folder"
        )
    student = towers.load(name)
    folder = expand(name.removeprefix("local-dir:"))
    license = towers.read_manifest(folder).license if (folder / STUDENT_MANIFEST).is_file() else "unknown"
    source = Source(weights_sha256=sha256(weights_of(folder)), config_sha256=sha256(folder / CONFIG), license=license)
    return student, source


def opened(field: str, paths: Sequence[str | Path]) -> list[Image.Image]:
    """The pictures of an argument, as RGB.

    Raises:
        ExportError: if one cannot be read.
    """
    images = []
    for n, path in enumerate(paths):
        try:
            images.append(to_rgb(open_input(path, f"{field}[{n}]", encoder.MAX_PIXELS)))
        except InputError as error:
            raise ExportError(error.cause, remedy=error.remedy, field=field) from error
        except PictureError as error:
            why = f"{field}[{n}] ({printable(path)}) cannot be used: {printable(error)}"
            raise ExportError(why, remedy="give pictures of 8 or 16 bits", field=field) from error
    return images
