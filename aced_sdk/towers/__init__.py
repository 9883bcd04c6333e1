# SPDX-License-Identifier: Apache-2.0
"""Dual encoders through open_clip and timm: build, load, save, preprocess, tokenise, resize, profile."""

from aced_sdk.processing.transforms import Preprocess
from aced_sdk.towers.dual_encoder import DualEncoder
from aced_sdk.towers.embeddings import Embeddings
from aced_sdk.towers.folder import StudentManifest, build, load, names_weights, read_config, read_manifest, save
from aced_sdk.towers.profile import Profile
from aced_sdk.towers.resolution import shrink
from aced_sdk.towers.sizes import check_size
from aced_sdk.towers.student import ProfiledStudent

__all__ = [
    "DualEncoder",
    "Embeddings",
    "Preprocess",
    "Profile",
    "ProfiledStudent",
    "StudentManifest",
    "build",
    "check_size",
    "load",
    "names_weights",
    "read_config",
    "read_manifest",
    "save",
    "shrink",
]
