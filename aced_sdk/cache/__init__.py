# SPDX-License-Identifier: Apache-2.0
"""Cached embeddings of frozen models, one row per pair. A cache belongs to one model, preprocessing and pool."""

from aced_sdk.cache.embeddings import EmbeddingCache, default_directory, open_cache
from aced_sdk.cache.frozen import FrozenModel, FrozenSource, build_frozen, open_or_write
from aced_sdk.cache.stored import stored_fingerprint, stored_width, write_stored
from aced_sdk.cache.writer import CacheWriter
from aced_sdk.cache.writing import write_cache

__all__ = [
    "CacheWriter",
    "EmbeddingCache",
    "FrozenModel",
    "FrozenSource",
    "build_frozen",
    "default_directory",
    "open_cache",
    "open_or_write",
    "stored_fingerprint",
    "stored_width",
    "write_cache",
    "write_stored",
]
