# SPDX-License-Identifier: Apache-2.0
"""What a user chooses about the box, and what the three sizes mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class BoxConfig(BaseModel):
    """The recipe of a box; equal recipes give equal shards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(default=0, ge=0, description="decides the held-out concepts, the sample, the noise and the order")
    picture_size: int = Field(default=112, ge=16, le=512, description="side of the square pictures, pixels")
    noise: float = Field(default=0.5, ge=0.0, le=1.0, description="share of pool captions dealt to wrong pictures")
    size: Literal["slice", "small", "full"] = Field(default="small", description="slice is for tests, full has no caps")
    with_apt: bool = Field(default=False, description="add clip-art and Tux Paint stamps; needs apt-get and dpkg-deb")


@dataclass(frozen=True)
class Size:
    """Upper bounds of one box size, before blank pictures are dropped.

    `concepts` is the share of the emoji concepts taken; caps are rows; None is no cap.
    """

    concepts: float
    trusted: int | None
    emoji: int | None
    icons: int | None
    logos: int | None
    clipart: int | None
    questions_train: int
    questions_test: int


SIZES: dict[str, Size] = {
    "slice": Size(0.25, 300, 220, 250, 150, 150, 400, 80),
    "small": Size(1.0, None, None, 5600, 3200, 3500, 6000, 600),
    "full": Size(1.0, None, None, None, None, None, 20000, 2000),
}
