# SPDX-License-Identifier: Apache-2.0
"""open_clip's ViT as transformers' CLIPVisionModel: the same numbers, the layout that LLaVA and servers know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from aced_sdk.errors import ModelError
from aced_sdk.towers.dual_encoder import DualEncoder

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPVisionModel

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def is_clip_vit(encoder: DualEncoder) -> bool:
    """Whether the image tower is a plain CLIP ViT, which transformers can hold without loss."""
    from open_clip.transformer import VisionTransformer

    visual = encoder.model.visual
    vision_cfg = encoder.model_cfg["vision_cfg"]
    plain = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
    return isinstance(visual, VisionTransformer) and set(vision_cfg) <= plain


def clip_vision_model(encoder: DualEncoder) -> CLIPVisionModel:
    """The image tower as `CLIPVisionModel` (without the final projection), in evaluation mode.

    Raises:
        ModelError: if the tower is not a plain CLIP ViT.
    """
    from transformers import CLIPVisionModel

    if not is_clip_vit(encoder):
        raise ModelError(
            "this image tower is no plain CLIP ViT, and transformers' CLIPVisionModel cannot hold it",
            remedy="take a student whose vision_cfg has only "
            "image_size, layers, width, patch_size, head_width, mlp_ratio",
        )
    model = CLIPVisionModel(clip_vision_config(encoder))
    own = model.state_dict()
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in own) else ""
    weights = {prefix + key: value for key, value in vision_weights(encoder.model.visual).items()}  # type: ignore[arg-type]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    lost = [key for key in missing if not key.endswith("position_ids")]
    if lost or unexpected:
        raise ModelError(
            f"transformers' CLIPVisionModel has another layout than expected: {(lost + list(unexpected))[0]}",
            remedy="install a transformers version named in constraints.txt",
        )
    return model.eval()


def clip_vision_config(encoder: DualEncoder) -> Any:
    """The `CLIPVisionConfig` of a plain CLIP ViT tower."""
    from transformers import CLIPVisionConfig

    cfg = encoder.model_cfg["vision_cfg"]
    width = int(cfg["width"])
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=int(width * cfg.get("mlp_ratio", 4.0)),
        num_hidden_layers=int(cfg["layers"]),
        num_attention_heads=width // int(cfg.get("head_width", 64)),
        image_size=encoder.preprocess_config.size[0],
        patch_size=int(cfg["patch_size"]),
        hidden_act="quick_gelu" if encoder.model_cfg.get("quick_gelu") else "gelu",
        projection_dim=encoder.embedding_dim,
        layer_norm_eps=1e-5,
    )


def vision_weights(visual: nn.Module) -> dict[str, Tensor]:
    """The tower's tensors under transformers' names, without the `vision_model.` prefix and the projection."""
    source = visual.state_dict()
    weights = {
        "embeddings.class_embedding": source["class_embedding"],
        "embeddings.patch_embedding.weight": source["conv1.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
    }
    for ours, theirs in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        for kind in ("weight", "bias"):
            weights[f"{theirs}.{kind}"] = source[f"{ours}.{kind}"]
    weights |= block_weights(source, "transformer.resblocks.", "encoder.layers.")
    return weights


def block_weights(source: dict[str, Tensor], prefix: str, target: str) -> dict[str, Tensor]:
    """Transformer blocks from open_clip's names to transformers' names; q, k and v are taken apart."""
    weights: dict[str, Tensor] = {}
    count = 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in source if key.startswith(prefix))
    for layer in range(count):
        block, out = f"{prefix}{layer}.", f"{target}{layer}."
        for kind in ("weight", "bias"):
            for part, tensor in zip("qkv", torch.chunk(source[f"{block}attn.in_proj_{kind}"], 3), strict=True):
                weights[f"{out}self_attn.{part}_proj.{kind}"] = tensor.contiguous()
            for ours, theirs in _BLOCK.items():
                weights[f"{out}{theirs}.{kind}"] = source[f"{block}{ours}.{kind}"]
    return weights


def clip_image_processor(encoder: DualEncoder) -> CLIPImageProcessor:
    """transformers' image processor with the same geometry and normalisation.

    Raises:
        ModelError: for a geometry that it cannot express.
    """
    from transformers import CLIPImageProcessor

    config = encoder.preprocess_config
    height, width = config.size
    if config.resize_mode == "longest":
        raise ModelError(
            "transformers' CLIPImageProcessor cannot pad after the longest side",
            remedy="train the student with resize='squash' or 'shortest'",
            field="student.resize",
        )
    squash = config.resize_mode == "squash"
    return CLIPImageProcessor(
        do_resize=True,
        size={"height": height, "width": width} if squash else {"shortest_edge": height},
        resample=3 if config.interpolation == "bicubic" else 2,
        do_center_crop=not squash,
        crop_size={"height": height, "width": width},
        image_mean=list(config.mean),
        image_std=list(config.std),
    )
