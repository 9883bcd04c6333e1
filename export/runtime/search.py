# SPDX-License-Identifier: Apache-2.0
"""A small search over embeddings of pictures and texts: exact, in memory, in numpy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from aced_sdk.files import ReadError, parse_json, printable, whole_file
from aced_sdk.processing.plain.inputs import Picture, at_least_one
from export.runtime.arrays import read_arrays
from export.runtime.encoder import Floats, OnnxEncoder
from export.runtime.errors import FolderError, InputError

_TOLERANCE = 1e-2  # of the square of a norm
_MAX_BYTES = 2**36  # of a saved search: 2**24 entries of 1024 numbers


def _are_normalised(embeddings: Floats) -> bool:
    """Whether every row [..., D] has the norm 1, up to what half precision loses."""
    return bool((np.abs(np.einsum("...d,...d->...", embeddings, embeddings) - 1) <= _TOLERANCE).all())


class Hit(NamedTuple):
    """What was found, and its cosine to what was asked."""

    key: str
    cosine: float


class Search:
    """Pictures and texts under keys, found by pictures and texts. Takes 4 * D bytes an entry.

    May be used from several threads at once: a query sees the entries that were added whole before it.

    Args:
        encoder: what embeds; embeddings of another student cannot be compared with its.
    """

    def __init__(self, encoder: OnnxEncoder) -> None:
        self.encoder = encoder
        self._lock = Lock()
        self._known: set[str] = set()
        self._keys: list[str] = []
        self._blocks: list[Floats] = [np.empty((0, encoder.embedding_dim), np.float32)]

    def __len__(self) -> int:
        return len(self._keys)

    def add_images(self, keys: Sequence[str], images: Sequence[Picture]) -> None:
        """Add pictures, all or none.

        Raises:
            InputError: naming the picture that cannot be used, or as `add`.
        """
        self.add(keys, self.encoder.encode_image(images))

    def add_texts(self, keys: Sequence[str], texts: Sequence[str]) -> None:
        """Add texts, all or none; raises as `add_images`."""
        self.add(keys, self.encoder.encode_text(texts))

    def add(self, keys: Sequence[str], embeddings: Floats) -> None:
        """Add L2-normalised embeddings [N, D] under N keys, all or none.

        Raises:
            InputError: for a key that is taken or given twice, or embeddings of another shape, not finite or not
                normalised.
        """
        if embeddings.shape != (len(keys), self.encoder.embedding_dim) or not np.isfinite(embeddings).all():
            raise InputError(
                f"{len(keys)} keys came with embeddings {list(embeddings.shape)}",
                remedy=f"give one key for each row of {self.encoder.embedding_dim} finite numbers",
                field="keys",
            )
        if not _are_normalised(embeddings):
            raise InputError(
                "the embeddings are not L2-normalised", remedy="divide each by its norm", field="embeddings"
            )
        with self._lock:
            fresh: set[str] = set()
            for key in keys:
                if key in self._known or key in fresh:
                    raise InputError(f"the key '{key}' is taken", remedy="give each entry its own", field="keys")
                fresh.add(key)
            self._known |= fresh
            self._keys.extend(keys)
            self._blocks.append(np.array(embeddings, np.float32))

    def query_image(self, image: Picture, k: int = 10) -> list[Hit]:
        """The k entries nearest to a picture, best first; fewer if there are fewer."""
        return self.query(self.encoder.encode_image([image])[0], k)

    def query_text(self, text: str, k: int = 10) -> list[Hit]:
        """The k entries nearest to a text, best first; fewer if there are fewer."""
        return self.query(self.encoder.encode_text([text])[0], k)

    def query(self, embedding: Floats, k: int = 10) -> list[Hit]:
        """The k entries of the largest cosine to an L2-normalised embedding [D], best first; the older of equals.

        Raises:
            InputError: if k is below 1, or the embedding has another width, is not finite or not normalised.
        """
        at_least_one(k=k)
        if embedding.shape != (self.encoder.embedding_dim,) or not np.isfinite(embedding).all():
            raise InputError(
                f"the embedding is {list(embedding.shape)}",
                remedy=f"give one row of {self.encoder.embedding_dim} finite numbers",
                field="embedding",
            )
        if not _are_normalised(embedding):
            raise InputError("the embedding is not L2-normalised", remedy="divide it by its norm", field="embedding")
        cosines = self._embeddings() @ embedding
        near = np.arange(len(cosines))
        if k < len(cosines):  # all that reach the k-th value, so that ties are settled by age below
            near = np.flatnonzero(cosines >= np.partition(cosines, -k)[-k])
        best = near[np.argsort(-cosines[near], kind="stable")][:k]
        return [Hit(self._keys[n], float(cosines[n])) for n in best]

    def save(self, path: str | Path) -> None:
        """Write everything to one npz file, whole or not at all.

        Raises:
            OSError: if the place cannot be written to.
        """
        with self._lock:
            keys, embeddings = list(self._keys), np.concatenate(self._blocks)
        facts = json.dumps({"source": self.encoder.source, "keys": keys}).encode()
        with whole_file(Path(path)) as temporary, temporary.open("wb") as stream:
            np.savez(stream, facts=np.frombuffer(facts, np.uint8), embeddings=embeddings)

    @classmethod
    def load(cls, path: str | Path, encoder: OnnxEncoder) -> Search:
        """Read what `save` wrote.

        Raises:
            FolderError: if the file is missing, broken, or was made with another student.
        """
        name = printable(path)
        try:
            arrays = read_arrays(path, _MAX_BYTES)
            facts, embeddings = parse_json(arrays["facts"].tobytes(), name), arrays["embeddings"]
            source, keys = facts["source"], facts["keys"]
            if embeddings.dtype != np.float32 or not all(isinstance(key, str) for key in keys):
                raise ValueError("keys are no strings or embeddings no float32")
        except (KeyError, TypeError, ValueError) as error:
            why = error.cause if isinstance(error, ReadError) else repr(error)
            raise FolderError(
                f"{name} is no saved search: {printable(why)}", remedy="make it again", field="path"
            ) from error
        if source != encoder.source:
            raise FolderError(
                f"{name} was made with another student", remedy="load that one's export, or make it again", field="path"
            )
        search = cls(encoder)
        try:
            search.add(keys, embeddings)
        except InputError as error:
            raise FolderError(
                f"{name} is no saved search: {printable(error.cause)}", remedy="make it again", field="path"
            ) from error
        return search

    def _embeddings(self) -> Floats:
        with self._lock:
            if len(self._blocks) > 1:
                self._blocks = [np.concatenate(self._blocks)]
            return self._blocks[0]
