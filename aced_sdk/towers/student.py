# SPDX-License-Identifier: Apache-2.0
"""A student's config that knows what its towers cost."""

from __future__ import annotations

import torch

from aced_sdk.config import Student
from aced_sdk.towers.folder import build
from aced_sdk.towers.profile import Profile


class ProfiledStudent(Student):
    """`Student` with a `profile`; the same fields, YAML and hash."""

    def profile(self, size: int | None = None) -> Profile:
        """MACs of one picture and one text, and parameters; of an architecture from its shapes, without weights.

        Args:
            size: side of the picture in pixels; None: the tower's own.

        Raises:
            ModelError: if the architecture is unknown, cannot be built, or names a folder that is not there.
        """
        folder = isinstance(self.architecture, str) and self.architecture.startswith("local-dir:")
        with torch.device("cpu" if folder else "meta"):
            encoder = build(self, seed=0)
        return encoder.profile(size)
