# SPDX-License-Identifier: Apache-2.0
"""Pictures of another size than the tower's own: cheap scoring, and training at both sizes (JEST's Flexi, FlexiViT).

Convolutional towers take any size as they are. A ViT's learned positions are resampled to the coarser grid, with
gradient to the one parameter that is kept, so that folders know nothing of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aced_sdk.errors import ModelError


def shrink(images: Tensor, size: int) -> Tensor:
    """Pictures at another side length, antialiased bicubic as in preprocessing.

    Args:
        images: uint8 [N, 3, H, W], on a CPU or a GPU.
        size: new height and width; where they are the old ones, the input itself comes back.

    Returns:
        uint8 [N, 3, size, size].
    """
    from torchvision.transforms.v2.functional import InterpolationMode, resize

    small: Tensor = resize(images, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return small


def any_size(visual: nn.Module, own: tuple[int, int]) -> None:
    """Lift a timm ViT's refusal of sizes that are not its own (height, width); its positions are resampled here.

    Raises:
        ModelError: if the tower is built for another size than `own`.
    """
    from timm.models.vision_transformer import VisionTransformer

    trunk: Any = getattr(visual, "trunk", None)
    built = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    if built is not None and trunk.patch_embed.strict_img_size and tuple(built) != own:
        # open_clip builds timm's towers at their own size, whatever image_size says
        raise ModelError(
            f"this tower of timm takes pictures of {built[0]} x {built[1]}, not {own[0]} x {own[1]}",
            remedy=f"set vision_cfg.image_size to {built[0]}, or name a timm model of the size that you want",
            field="vision_cfg.image_size",
        )
    if isinstance(trunk, VisionTransformer):
        embed: Any = trunk.patch_embed
        # One whose own size is no multiple of its patch (so400m-14 at 384) would then refuse that.
        whole = all(side % patch == 0 for side, patch in zip(own, embed.patch_size, strict=True))
        embed.strict_img_size = not (whole and tuple(embed.img_size) == own)


def positions_for(visual: nn.Module, height: int, width: int) -> dict[str, Tensor]:
    """An image tower's learned positions, resampled for pictures of height x width.

    Returns:
        {parameter name inside `visual`: [prefix + rows * columns, D]} for `replaced`, differentiable
        towards the parameter; {} at the tower's own size and for towers without such positions.
    """
    found = _positions(visual)
    if found is None:
        return {}
    name, own, (rows, columns), (patch_height, patch_width) = found
    grid = (height // patch_height, width // patch_width)
    if grid == (rows, columns):
        return {}
    prefix, spatial = torch.split(own, [own.shape[-2] - rows * columns, rows * columns], dim=-2)
    old = spatial.reshape(1, rows, columns, -1).permute(0, 3, 1, 2).float()
    new = F.interpolate(old, grid, mode="bicubic", antialias=True, align_corners=False).to(own.dtype)
    return {name: torch.cat([prefix, new.flatten(2).transpose(1, 2).reshape(*own.shape[:-2], -1, own.shape[-1])], -2)}


def _positions(visual: Any) -> tuple[str, Tensor, tuple[int, int], tuple[int, int]] | None:
    """Name, value, grid and patch of a plain ViT's learned positions, open_clip's or timm's."""
    from open_clip.transformer import VisionTransformer as OpenClipViT
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    if isinstance(visual, OpenClipViT):
        return "positional_embedding", visual.positional_embedding, visual.grid_size, visual.patch_size
    trunk = getattr(visual, "trunk", None)
    if isinstance(trunk, TimmViT) and trunk.pos_embed is not None:
        return "trunk.pos_embed", trunk.pos_embed, trunk.patch_embed.grid_size, trunk.patch_embed.patch_size
    return None


def patch_of(visual: nn.Module) -> int:
    """The patch's side in pixels, of a plain ViT; 1 for towers without learned positions."""
    found = _positions(visual)
    return found[3][0] if found else 1
