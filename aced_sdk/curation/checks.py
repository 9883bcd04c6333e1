# SPDX-License-Identifier: Apache-2.0
"""Check what a selector returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aced_sdk.errors import CurationError
from aced_sdk.files import one_line

_REMEDY = "return int64 [sub_batch], different indices of candidates, from `select`"


def check_picked(picked: Any, size: int, candidates: int, selector: str) -> Tensor:
    """Check the result of `Selector.select`. Takes O(B).

    Args:
        picked: the result.
        size: b, examples of the sub-batch.
        candidates: B.
        selector: name of the selector, for errors.

    Returns:
        int64 [b], on the CPU.

    Raises:
        CurationError: if it is no int64 tensor [b] of different indices in 0..B-1.
    """

    def wrong(what: str) -> CurationError:
        return CurationError(f"{one_line(selector, 80)} selects {what}", remedy=_REMEDY, field="curation")

    if not isinstance(picked, Tensor):
        raise wrong(f"a {type(picked).__name__}, not a tensor")
    if picked.dtype != torch.int64 or picked.ndim != 1:
        raise wrong(f"{str(picked.dtype).removeprefix('torch.')} {list(picked.shape)}")
    if len(picked) != size:
        raise wrong(f"{len(picked)} of {candidates} candidates, and the sub-batch has {size}")
    indices = picked.detach().cpu()
    low, high = (int(value) for value in indices.aminmax())
    if low < 0 or high >= candidates:
        raise wrong(f"index {low if low < 0 else high} of {candidates} candidates")
    times = torch.bincount(indices, minlength=candidates)
    if int(times.max()) > 1:
        raise wrong(f"candidate {int(times.argmax())} {int(times.max())} times")
    return indices
