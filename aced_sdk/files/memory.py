# SPDX-License-Identifier: Apache-2.0
"""How much memory this process may take: the machine's, or less where a container or a limit of the shell says so."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from aced_sdk.files.reading import ReadError, read_text

_CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # versions 2 and 1
_UNKNOWN = 2**34


def memory_limit(cgroups: Iterable[Path] = _CGROUPS) -> int:
    """Bytes; 16 GiB where the system does not say.

    Args:
        cgroups: files that hold a container's limit, as a number or `max`.
    """
    try:
        limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, OSError, ValueError):  # not on Windows
        limits = [_UNKNOWN]
    for path in cgroups:
        try:
            limits.append(int(read_text(path, 64)))
        except (ReadError, ValueError):  # there is none, or it is `max`
            continue
    return min(limit for limit in limits if limit > 0)
