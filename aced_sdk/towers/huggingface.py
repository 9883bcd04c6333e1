# SPDX-License-Identifier: Apache-2.0
"""ViTs as transformers' CLIPVisionModel and SiglipVisionModel: the same numbers, the layout that others know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from aced_sdk.errors import ModelError
from aced_sdk.towers.dual_encoder import DualEncoder

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPVisionModel, SiglipVisionModel

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_SIGLIP = {  # timm's names, the longer ones first
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "attn_pool.proj.": "head.attention.out_proj.",
    "attn_pool.norm.": "head.layernorm.",
    "attn_pool.mlp.": "head.mlp.",
    "attn.proj.": "self_attn.out_proj.",
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
    "blocks.": "encoder.layers.",
}


def is_clip_vit(encoder: DualEncoder) -> bool:
    """Whether the image tower is a plain CLIP ViT, which transformers can hold without loss."""
    from open_clip.transformer import VisionTransformer

    visual = encoder.model.visual
    vision_cfg = encoder.model_cfg["vision_cfg"]
    plain = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
    square = isinstance(vision_cfg.get("image_size"), int) and isinstance(vision_cfg.get("patch_size"), int)
    return isinstance(visual, VisionTransformer) and set(vision_cfg) <= plain and square


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
    fill(model, weights)
    return model.eval()


def fill(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put the weights into a model of transformers; every tensor must have its place.

    Raises:
        ModelError: if this version of transformers has another layout.
    """
    missing, unexpected = model.load_state_dict(weights, strict=False)
    lost = [key for key in missing if not key.endswith("position_ids")]
    if lost or unexpected:
        raise ModelError(
            f"transformers' {type(model).__name__} has another layout than expected: {(lost + list(unexpected))[0]}",
            remedy="install a transformers version named in constraints.txt",
        )


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


def is_siglip_vit(encoder: DualEncoder) -> bool:
    """Whether the image tower is a SigLIP ViT of timm, which transformers can hold without loss.

    That is a ViT without class token, pooled by attention, its pooled state the embedding.
    """
    from timm.layers import AttentionPoolLatent
    from timm.models.vision_transformer import VisionTransformer
    from transformers import SiglipVisionModel

    visual: Any = encoder.model.visual
    trunk = getattr(visual, "trunk", None)
    plain = (
        isinstance(trunk, VisionTransformer)
        and isinstance(trunk.attn_pool, AttentionPoolLatent)
        and trunk.pos_embed is not None
        and isinstance(trunk.attn_pool.q, nn.Linear)
        and trunk.attn_pool.q.bias is not None
        and trunk.attn_pool.num_heads == trunk.blocks[0].attn.num_heads
        and len(visual.head) == 0
        and activation(trunk.blocks[0].mlp.act) == activation(trunk.attn_pool.mlp.act)
        and activation(trunk.blocks[0].mlp.act) is not None
        and encoder.preprocess_config.size[0] == encoder.preprocess_config.size[1]
    )
    if not plain:
        return False
    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in SiglipVisionModel(siglip_vision_config(encoder)).state_dict().items()
        }
    return shapes == {name: tensor.shape for name, tensor in siglip_vision_weights(visual).items()}


def siglip_vision_model(encoder: DualEncoder) -> SiglipVisionModel:
    """The image tower as `SiglipVisionModel`, whose `pooler_output` is the embedding, in evaluation mode.

    Raises:
        ModelError: if the tower is not a SigLIP ViT.
    """
    from transformers import SiglipVisionModel

    if not is_siglip_vit(encoder):
        raise ModelError(
            "this image tower is no SigLIP ViT, and transformers' SiglipVisionModel cannot hold it",
            remedy="take a student with a vit_*_siglip_* tower of timm, timm_pool 'map' and timm_proj 'none'",
        )
    model = SiglipVisionModel(siglip_vision_config(encoder))
    fill(model, siglip_vision_weights(encoder.model.visual))  # type: ignore[arg-type]
    return model.eval()


def siglip_vision_config(encoder: DualEncoder) -> Any:
    """The `SiglipVisionConfig` of a SigLIP ViT tower."""
    from transformers import SiglipVisionConfig

    trunk: Any = encoder.model.visual.trunk  # type: ignore[union-attr]
    block = trunk.blocks[0]
    return SiglipVisionConfig(
        hidden_size=trunk.embed_dim,
        intermediate_size=block.mlp.fc1.out_features,
        num_hidden_layers=len(trunk.blocks),
        num_attention_heads=block.attn.num_heads,
        image_size=encoder.preprocess_config.size[0],
        patch_size=trunk.patch_embed.patch_size[0],
        hidden_act=activation(block.mlp.act),
        layer_norm_eps=block.norm1.eps,
    )


def siglip_vision_weights(visual: nn.Module) -> dict[str, Tensor]:
    """The tower's tensors under the names of `SiglipVisionModel`; one that has no place there keeps its own name."""
    source: dict[str, Tensor] = dict(visual.trunk.state_dict())  # type: ignore[union-attr]
    weights = {
        "embeddings.position_embedding.weight": source.pop("pos_embed")[0],
        "head.probe": source.pop("attn_pool.latent"),
    }
    for kind in ("weight", "bias"):
        parts = [source.pop(f"attn_pool.{part}.{kind}") for part in ("q", "kv")]
        weights[f"head.attention.in_proj_{kind}"] = torch.cat(parts)
    for name, tensor in source.items():
        for ours, theirs in _SIGLIP.items():
            name = name.replace(ours, theirs)
        if name.startswith("norm."):
            name = f"post_layer{name}"
        if ".attn.qkv." in name:
            for part, own in zip("qkv", torch.chunk(tensor, 3), strict=True):
                weights[name.replace(".attn.qkv.", f".self_attn.{part}_proj.")] = own.contiguous()
        else:
            weights[name] = tensor
    return weights


def activation(module: nn.Module) -> str | None:
    """transformers' name of an activation of open_clip or timm; None for one that a ViT of transformers has not."""
    from open_clip.transformer import QuickGELU
    from timm.layers.activations import GELU, GELUTanh

    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    names = {QuickGELU: "quick_gelu", GELU: "gelu", GELUTanh: "gelu_pytorch_tanh"}
    return names.get(type(module))


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
