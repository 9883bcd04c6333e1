# SPDX-License-Identifier: Apache-2.0
"""open_clip's `model_cfg`: an allow-list of its fields with bounds, and the model that it describes.

A `model_cfg` comes from a model folder or a YAML config, which somebody else may have written. It is checked before
anything is built: first each field, then the model's outline on the meta device, which needs no memory.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, ConfigDict, Field

from aced_sdk.config import Config
from aced_sdk.errors import ConfigError, ModelError, UnsupportedError
from aced_sdk.files import memory_limit, printable
from aced_sdk.processing.transforms import MAX_SIDE
from aced_sdk.towers import text_files

MAX_PARAMETERS = 10_000_000_000  # open_clip's largest model has 5 billion
_MAX_SCORES = (
    2**29
)  # attention scores of one example in one layer: heads * tokens**2; SAM's ViT-H at 1,024 px has 2**28


# Attention of one example over all layers, as multiply-adds: some seconds on two cores. ViT-H at 378 px has 2**34.
_MAX_ATTENTION = 2**39
_HEAD = 64  # a narrower head takes as long, since the softmax does


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Side = Annotated[int, Field(strict=True, ge=1, le=MAX_SIDE)]
Sides = Side | Annotated[tuple[Side, Side], BeforeValidator(_tuple)]
_Width = Annotated[int, Field(ge=1, le=16_384)]
_Heads = Annotated[int, Field(ge=1, le=1_024)]
_Layers = Annotated[int, Field(ge=1, le=512)]
_Stages = Annotated[tuple[_Layers, _Layers, _Layers, _Layers], BeforeValidator(_tuple)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Word = Annotated[str, Field(max_length=200)]


class _Plain(Config):
    model_config = ConfigDict(strict=True)


class _Activation(_Plain):
    approximate: Literal["none", "tanh"] = "none"


class _Norm(_Plain):
    eps: _Share = 1e-5
    elementwise_affine: bool = True
    bias: bool = True


class _Tower(_Plain):
    """What both towers have."""

    width: _Width = 768
    mlp_ratio: float = Field(4.0, gt=0, le=64)
    ls_init_value: float | None = None
    final_ln_after_pool: bool = False
    pool_type: _Word = "tok"
    output_tokens: bool = False
    act_kwargs: _Activation | None = None
    norm_kwargs: _Norm | None = None
    block_type: _Word | None = None
    qk_norm: bool = False
    scaled_cosine_attn: bool = False
    scale_heads: bool = False
    scale_attn_inner: bool = False
    scale_attn: bool = False
    scale_fc: bool = False


class Vision(_Tower):
    """open_clip's `vision_cfg`."""

    layers: _Layers | _Stages = 12
    head_width: _Width = 64
    patch_size: Sides | None = 16
    image_size: Sides = 224
    patch_dropout: _Share = 0.0
    attentional_pool: bool | Literal["parallel", "cascade"] = False
    attn_pooler_queries: Annotated[int, Field(ge=1, le=4_096)] = 256
    attn_pooler_heads: _Heads = 8
    no_ln_pre: bool = False
    pos_embed_type: _Word = "learnable"
    # No scheme such as `hf-hub:` or `local-dir:`: only what timm itself defines.
    timm_model_name: Annotated[str, Field(max_length=200, pattern=r"^\w+(\.\w+)?$")] | None = None
    timm_model_pretrained: bool = False
    timm_pool: _Word | None = "avg"
    timm_proj: _Word | None = "linear"
    timm_proj_bias: bool = False
    timm_drop: _Share = 0.0
    timm_drop_path: _Share | None = None


class TokenizerOptions(_Plain):
    """What `tokenizer_kwargs` may pass on to open_clip's tokenizers and to transformers."""

    clean: Literal["whitespace", "lower", "canonicalize"] = "whitespace"
    strip_sep_token: bool = False
    language: Annotated[str, Field(pattern=r"^[\w-]{1,40}$")] | None = None
    use_fast: bool = True
    do_lower_case: bool = False
    add_prefix_space: bool = False
    legacy: bool = False


class Text(_Tower):
    """open_clip's `text_cfg`."""

    context_length: Annotated[int, Field(ge=3, le=4_096)] = 77  # a start, an end, and something to tell texts apart
    vocab_size: Annotated[int, Field(ge=1, le=2_000_000)] = 49_408
    hf_tokenizer_name: str | None = None
    tokenizer_mode: Literal["", "clips"] | None = None
    tokenizer_kwargs: TokenizerOptions | None = None
    heads: _Heads = 8
    layers: _Layers = 12
    embed_cls: bool = False
    pad_id: Annotated[int, Field(ge=0)] = 0
    eos_id: Annotated[int, Field(ge=0)] = 2
    no_causal_mask: bool = False
    proj_bias: bool = False
    proj_type: _Word = "linear"
    hf_model_name: str | None = None
    hf_model_pretrained: bool = True
    hf_proj_type: _Word | None = "mlp"
    hf_pooler_type: _Word | None = "mean_pooler"


class ModelCfg(_Plain):
    """open_clip's `model_cfg`, without CoCa's `multimodal_cfg`."""

    embed_dim: _Width
    vision_cfg: Vision
    text_cfg: Text
    quick_gelu: bool = False
    custom_text: bool = False
    nonscalar_logit_scale: bool = False
    init_logit_scale: Annotated[float, Field(ge=-100, le=100)] = 2.66
    init_logit_bias: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None


def check(model_cfg: dict[str, Any], field: str | None = None) -> None:
    """Compare a `model_cfg` with the allow-list and its bounds.

    Raises:
        UnsupportedError: for a CoCa model.
        ModelError: for an unknown field, or a value of the wrong type or out of bounds.
    """
    if "multimodal_cfg" in model_cfg:
        raise UnsupportedError("CoCa models cannot be distilled or cached", remedy="take a dual encoder", field=field)
    try:
        cfg = ModelCfg(**model_cfg)
        _check_scores(cfg)
    except ConfigError as error:
        where = [part for part in (field, error.field and printable(error.field, 100)) if part]
        raise ModelError(
            f"open_clip cannot build this architecture: {printable(error.cause)}",
            remedy="compare the mapping with a model_cfg of open_clip's own configs",
            field=".".join(where) or None,
        ) from None


def _check_scores(cfg: ModelCfg) -> None:
    """Refuse towers whose attention over one example fills the memory, or that have no head or no patch."""
    vision, text = cfg.vision_cfg, cfg.text_cfg
    if vision.timm_model_name is None:
        resnet = isinstance(vision.layers, tuple)
        height, width = (vision.image_size,) * 2 if isinstance(vision.image_size, int) else vision.image_size
        patch = 32 if resnet else vision.patch_size or 0
        rows, columns = (patch, patch) if isinstance(patch, int) else patch
        tokens = (height // rows) * (width // columns) if rows and columns else 0
        heads = vision.width * (32 if resnet else 1) // vision.head_width
        activations = (height // 2) * (width // 2) * vision.width if resnet else _hidden(vision, tokens)
        _check_product("vision_cfg", heads * tokens**2, activations)
        _check_attention(
            "vision_cfg", 1 if isinstance(vision.layers, tuple) else vision.layers, vision.width, heads, tokens
        )
    if not text.hf_model_name:
        _check_product("text_cfg", text.heads * text.context_length**2, _hidden(text, text.context_length))
        _check_attention("text_cfg", text.layers, text.width, text.heads, text.context_length)


def _hidden(tower: _Tower, tokens: int) -> int:
    """Values inside of an MLP, before and after its activation."""
    return int(2 * tokens * tower.width * tower.mlp_ratio)


def _check_attention(field: str, layers: int, width: int, heads: int, tokens: int) -> None:
    """Refuse a tower that a small file of weights can describe and that takes minutes for one example."""
    needed = layers * max(width, _HEAD * heads) * tokens**2
    if needed > _MAX_ATTENTION:
        raise ConfigError(
            f"attention over one example takes {needed:,} operations, and the bound is {_MAX_ATTENTION:,}",
            remedy="take a smaller image_size or context_length, a larger patch, or fewer layers",
            field=field,
        )


def _check_product(field: str, scores: int, activations: int = 0) -> None:
    if scores == 0:
        raise ConfigError("the tower has no attention head or no patch", remedy="correct its sizes", field=field)
    if max(scores, activations) > _MAX_SCORES:
        raise ConfigError(
            f"one example needs {max(scores, activations):,} values in one layer, and the bound is {_MAX_SCORES:,}",
            remedy="take a smaller image_size or context_length, or a larger patch",
            field=field,
        )


def resolve(model_cfg: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """A copy in which the text tower and the tokenizer are named by local folders, their files checked.

    A model folder names them `./NAME`, which is inside of it, or by their hub name. A config may name any local folder.

    Args:
        model_cfg: as in open_clip_config.json.
        folder: the model's folder; None for the `model_cfg` of a config.

    Raises:
        UnsupportedError: for a CoCa model.
        ModelError: if the mapping is not a valid `model_cfg`, or names files outside of the folder or hostile ones.
    """
    check(model_cfg)
    cfg = copy.deepcopy(model_cfg)
    for key, place in text_files.PLACES.items():
        if name := cfg["text_cfg"].get(key):
            cfg["text_cfg"][key] = str(place(name, folder))
    return cfg


def instantiate(model_cfg: dict[str, Any], field: str | None = None) -> Any:
    """An open_clip model of this `model_cfg` with new weights; never downloads any.

    Raises:
        UnsupportedError: for a CoCa model.
        ModelError: if open_clip cannot build it, or it exceeds the bounds or this machine's memory.
    """
    outline(model_cfg, field)
    return construct(model_cfg, field)


def outline(model_cfg: dict[str, Any], field: str | None = None) -> Any:
    """The model that `model_cfg` describes, on the meta device: names and shapes without memory.

    Raises:
        ModelError: if open_clip cannot build it, or it exceeds the bounds or this machine's memory.
    """
    virtual = torch.get_default_device().type == "meta"
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = construct(model_cfg, field)
    count = sum(parameter.numel() for parameter in model.parameters())
    bound = MAX_PARAMETERS
    if not virtual:
        bound = min(bound, memory_limit() // 4)
    if count > bound:
        raise ModelError(
            f"this architecture has {count:,} parameters, and the bound on this machine is {bound:,}",
            remedy="take smaller towers, or a machine with more memory",
            field=field,
        )
    return model


def construct(model_cfg: dict[str, Any], field: str | None = None) -> Any:
    """As `instantiate`, on the default device and for a `model_cfg` whose `outline` was made before."""
    from open_clip.model import CLIP, CustomTextCLIP

    check(model_cfg, field)
    cfg = copy.deepcopy(model_cfg)
    custom = cfg.pop("custom_text", False) or "hf_model_name" in cfg["text_cfg"]
    if "timm_model_name" in cfg["vision_cfg"]:
        cfg["vision_cfg"]["timm_model_pretrained"] = False
    if name := cfg["text_cfg"].get("hf_model_name"):
        text_files.check_text_tower(Path(name))
        cfg["text_cfg"]["hf_model_pretrained"] = False
    try:
        model = (CustomTextCLIP if custom else CLIP)(**cfg, output_dict=True)
    except Exception as error:  # of four libraries, over values that somebody else wrote
        raise ModelError(
            f"open_clip cannot build this architecture: {type(error).__name__}: {printable(error)}",
            remedy="compare the mapping with a model_cfg of open_clip's own configs",
            field=field,
        ) from error
    if name:
        _check_context(model, cfg["text_cfg"].get("context_length", 77), field)
    return model


def _check_context(model: Any, wanted: int, field: str | None) -> None:
    """Refuse more tokens than a Hugging Face text tower takes."""
    from open_clip.hf_configs import arch_dict

    config = model.text.config
    names = arch_dict[config.model_type]["config_names"]
    heads, layers, width = (int(getattr(config, names[name])) for name in ("heads", "layers", "width"))
    positions = model.context_length or wanted  # T5 has no table of positions
    if wanted > positions or heads * wanted**2 > _MAX_SCORES:
        raise ModelError(
            f"the text tower takes {positions:,} tokens with {heads:,} heads, and context_length is {wanted:,}",
            remedy="set a smaller context_length",
            field=field,
        )
    try:
        _check_attention("text_cfg", layers, width, heads, wanted)
    except ConfigError as error:
        raise ModelError(error.cause, remedy=error.remedy, field=field) from None
