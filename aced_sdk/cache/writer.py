# SPDX-License-Identifier: Apache-2.0
"""Write a cache with the embeddings of any encoder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aced_sdk.cache.embeddings import USABLE, write_usable
from aced_sdk.cache.manifest import (
    MANIFEST,
    CacheManifest,
    Dtype,
    Shards,
    as_pool,
    bound_shards,
    check_binding,
    read_manifest,
)
from aced_sdk.cache.rows import ROWS, Layout, RowReader, RowWriter
from aced_sdk.config import LossForm
from aced_sdk.data import Pool
from aced_sdk.data.rowset import Rows
from aced_sdk.errors import CacheError
from aced_sdk.files import alone, printable, write_json

_LEFTOVER = re.compile(r"\.(?:cache\.json|usable\.bin|\.usable-[0-9]{5,})\.[0-9a-f]{16}\.tmp|\.usable-[0-9]{5,}")


class CacheWriter:
    """Write the embeddings of your own encoder, in any order. Use it in a `with` block.

    At the end of the block, rows that were not written count as unusable pairs, and the cache is complete. If the block
    ends with an error or the process is killed, the rows written so far are kept; `missing` returns the others. Another
    writer of the same folder waits. A run uses the cache through `aced.Cached(directory=...)`.

    Args:
        directory: output folder.
        pool: the pairs, or their shards.
        dim: D.
        scale: scale on cosine similarities (not its logarithm).
        bias: bias of a sigmoid-trained model; 0 for a softmax-trained model.
        model: name or fingerprint of the model. A cache of another model is refused, so include the version.
        trained_with: loss that the encoder was trained with; None: sigmoid if it has a bias, else softmax.
        dtype: dtype of the stored embeddings.

    Raises:
        CacheError: if the folder contains another cache, cannot be written, or the disk has not enough space.
        ConfigError: if a value is invalid.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        pool: Pool | Shards,
        *,
        dim: int,
        scale: float,
        model: str,
        bias: float = 0.0,
        trained_with: LossForm | None = None,
        dtype: Dtype = "fp16",
    ) -> None:
        self._directory, pool = Path(directory), as_pool(pool)
        manifest = CacheManifest(
            model=model,
            dim=dim,
            scale=scale,
            bias=bias,
            shards=bound_shards(pool),
            dtype=dtype,
            trained_with=trained_with,
        )
        with ExitStack() as held, writable(self._directory):
            held.enter_context(lock(self._directory))
            self._manifest = bind(self._directory, manifest, dtype)
            if self._manifest != manifest:
                cause = f"the cache {printable(self._directory)} has another scale, bias or loss"
                raise _wrong(cause, "name another cache directory, or delete this one", "directory")
            layout = Layout(self._manifest, len(pool))
            self._file = RowWriter(self._directory, layout)
            held.callback(self._file.close)
            new = self._file.reserve()
            self._intact = np.zeros(len(pool), np.bool_)
            self._usable = np.zeros(len(pool), np.bool_)
            if not new:
                scan(RowReader(self._directory, layout), range(len(pool)), self._intact, self._usable)
            self._held = held.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._held.close()

    def missing(self) -> Rows:
        """Return the rows without embeddings, int64 [K]: all of them for a new cache."""
        return np.flatnonzero(~self._intact)

    def write(self, rows: Tensor | Rows, image: Tensor, text: Tensor) -> None:
        """Write embeddings. Rows that have embeddings already are replaced.

        Args:
            rows: int64 [K], different rows of the pool.
            image: float [K, D]; normalised before they are stored.
            text: float [K, D], likewise.

        Raises:
            CacheError: if the rows or shapes are wrong, embeddings are zero or not finite, or the disk fails.
        """
        if self._file.closed:
            raise _wrong("the writer is closed", "write before its block ends, or open another writer", "rows")
        numbers = np.asarray(rows)
        if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
            cause = f"rows are {numbers.dtype} of shape {list(numbers.shape)}"
            raise _wrong(cause, "pass integer row numbers [K]", "rows")
        numbers = numbers.astype(np.int64)
        image, text = torch.as_tensor(image), torch.as_tensor(text)
        shape, last = (len(numbers), self._manifest.dim), len(self._intact) - 1
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() <= last:
            raise _wrong(f"rows of this pool are 0 to {last}", "pass row numbers of the pool", "rows")
        for name, values in (("image", image), ("text", text)):
            if tuple(values.shape) != shape:
                cause = f"{name} has the shape {list(values.shape)} instead of {list(shape)}"
                raise _wrong(cause, "pass one embedding for each row", name)
            norms = torch.linalg.vector_norm(values.detach().float(), dim=1)
            if not (norms.isfinite() & (norms > 0)).all():
                cause = f"{name} has embeddings that are zero or not finite"
                raise _wrong(cause, "leave out the rows of unusable pairs", name)
        with writable(self._directory):
            (self._directory / USABLE).unlink(missing_ok=True)  # incomplete until it is closed
            self._file.write(numbers, _unit(image), _unit(text))
        self._intact[numbers] = self._usable[numbers] = True

    def close(self) -> None:
        """Mark the cache as complete. Rows that were not written are unusable pairs. A second call does nothing."""
        if self._file.closed:
            return
        with self._held, writable(self._directory):
            self._file.blank(self.missing())
            self._file.sync()
            write_usable(self._directory, self._manifest, self._usable)


def scan(reader: RowReader, rows: range, intact: NDArray[np.bool_], usable: NDArray[np.bool_]) -> None:
    """Read rows and record which are intact and which of those have embeddings.

    Args:
        reader: of the cache.
        rows: which rows.
        intact: bool [len(rows)], filled in.
        usable: bool [len(rows)], filled in.
    """
    for part, content, good in reader.read(rows):
        place = slice(part.start - rows.start, part.stop - rows.start)
        intact[place] = good
        usable[place] = good & content[:, :-1].any(axis=1)


def bind(directory: Path, manifest: CacheManifest, dtype: Dtype | None) -> CacheManifest:
    """Write the manifest, or check and return that of the existing cache.

    Requires the lock. Temporary files of killed writers are removed; files with other names are kept.

    Raises:
        CacheError: if the directory contains another cache.
        OSError: if it cannot be written.
    """
    path = directory / MANIFEST
    if os.path.lexists(path):
        found = read_manifest(directory)
        check_binding(found, manifest.model, manifest.shards, directory, dtype, manifest.dim)
        manifest = found
    else:
        for name in (USABLE, ROWS):
            if os.path.lexists(directory / name):
                raise CacheError(
                    f"{printable(directory / name)} has no cache.json beside it",
                    remedy="restore cache.json, or delete the file",
                    field="cache",
                )
        write_json(path, manifest.model_dump(mode="json"))
    with suppress(OSError):  # leftover files are harmless
        for other in directory.iterdir():
            if _LEFTOVER.fullmatch(other.name) and (other.is_symlink() or other.is_file()):
                other.unlink(missing_ok=True)
    return manifest


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Lock the directory; a second writer waits and then finds the rows."""
    with alone(directory, "embeddings", wait=True):
        yield


@contextmanager
def writable(directory: Path) -> Iterator[None]:
    """Raise a CacheError if the folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"cannot write embeddings to {printable(directory)}: {error.strerror or error}",
            remedy="free disk space and run again: complete rows are kept",
            field="cache",
        ) from error


def _unit(values: Tensor) -> Tensor:
    return torch.nn.functional.normalize(values.detach().cpu().float(), dim=1)


def _wrong(cause: str, remedy: str, field: str) -> CacheError:
    return CacheError(cause, remedy=remedy, field=field)
