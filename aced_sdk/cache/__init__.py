# SPDX-License-Identifier: Apache-2.0
"""Embeddings of frozen models, one file per shard, bound to model, preprocessing and shard contents."""

from aced_sdk.cache.embeddings import EmbeddingCache, default_directory, open_cache, write_cache

__all__ = ["EmbeddingCache", "default_directory", "open_cache", "write_cache"]
