# SPDX-License-Identifier: Apache-2.0
"""Connectors inside what transformers can load: each belongs to one of its vision-language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from aced_sdk.errors import ModelError, UnsupportedError
from vlm.config import Projector
from vlm.model.towers import VisionTower

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_kinds() -> tuple[type[Any], ...]:
    """The classes of transformers that this package builds, tunes and saves."""
    from transformers import (
        AyaVisionForConditionalGeneration,
        FastVlmForConditionalGeneration,
        LlavaForConditionalGeneration,
    )

    return (LlavaForConditionalGeneration, FastVlmForConditionalGeneration, AyaVisionForConditionalGeneration)


def empty_model(
    tower: VisionTower, language: PreTrainedModel, projector: Projector, image_token: int, feature_layer: int
) -> PreTrainedModel:
    """The vision-language model that holds this tower and this connector, without weights (on the meta device).

    Args:
        tower: the vision tower.
        language: its config becomes the text config.
        projector: the connector.
        image_token: id of the image token.
        feature_layer: the tower's hidden state that is projected.

    Raises:
        UnsupportedError: if no model of transformers has this connector for this tower.
    """
    from transformers import AyaVisionConfig, FastVlmConfig, LlavaConfig

    llava, fast_vlm, aya = model_kinds()
    common = {
        "vision_config": tower.model.config,
        "text_config": language.config,
        "image_token_index": image_token,
        "image_seq_length": reduced_tokens(tower, projector),
        "vision_feature_layer": feature_layer,
        "vision_feature_select_strategy": tower.strategy,
        "tie_word_embeddings": language.config.tie_word_embeddings,
    }
    activation = "linear" if projector.kind == "linear" else "gelu"
    if projector.kind == "pixel_shuffle":
        # Of the models that reduce tokens, InternVL and Idefics 3 load their own towers alone; Aya Vision loads any
        config = AyaVisionConfig(
            **common,
            downsample_factor=projector.factor,
            alignment_intermediate_size=2 * language.config.hidden_size,  # half of it is SwiGLU's gate
        )
        kind = aya
    elif tower.convolutional:
        config, kind = FastVlmConfig(**common, projector_hidden_act=activation), fast_vlm
    else:
        config, kind = LlavaConfig(**common, projector_hidden_act=activation), llava
    with torch.device("meta"):  # all parts are put in later; none is drawn twice
        model: PreTrainedModel = kind(config)
    return model


def reduced_tokens(tower: VisionTower, projector: Projector) -> int:
    """Tokens that a picture takes in the language model.

    Raises:
        UnsupportedError: if this connector cannot reduce this tower's tokens.
    """
    if projector.kind != "pixel_shuffle":
        return tower.tokens
    if tower.convolutional:
        raise UnsupportedError(
            "transformers has no pixel shuffle for a convolutional tower",
            remedy=f"leave projector.kind at 'mlp': this tower makes {tower.tokens} tokens of a picture as it is",
            field="projector.kind",
        )
    rows, columns = tower.grid
    if rows != columns or rows % projector.factor:
        raise UnsupportedError(
            f"a grid of {rows} x {columns} patches cannot be folded {projector.factor} x {projector.factor}",
            remedy="take a factor that divides the side of the grid, or a tower of another picture size",
            field="projector.factor",
        )
    return tower.tokens // projector.factor**2


@torch.no_grad()
def new_projector(model: Any, language: PreTrainedModel, projector: Projector, seed: int) -> nn.Module:
    """A connector with new weights, whose output has the size of word embeddings for input of size 1.

    Args:
        model: what `empty_model` gave; its own connector lends the class.
        language: its word embeddings tell the size.
        projector: the connector.
        seed: of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        connector: nn.Module = type(model.model.multi_modal_projector)(model.config)
        linears = [module for module in connector.modules() if isinstance(module, nn.Linear)]
        for linear in linears:
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
        cell = projector.factor**2 if projector.kind == "pixel_shuffle" else 1
        probe = connector(torch.randn(1024 // cell, cell, model.config.vision_config.hidden_size))
    linears[-1].weight *= _word_size(language) / probe.pow(2).mean().sqrt()
    return connector


def _word_size(language: PreTrainedModel) -> Tensor:
    """Root mean square of the word embeddings as layers see them: Gemma's are scaled on their way.

    Raises:
        ModelError: if they are all zero, or not all finite.
    """
    embedding = language.get_input_embeddings()
    used = embedding.weight.any(dim=1).nonzero().flatten()  # some models have rows of zeros
    if not len(used) or not embedding.weight.isfinite().all():
        raise ModelError(
            "the language model's word embeddings are all zero, or not all finite",
            remedy="take a trained language model, as its authors saved it",
            field="language",
        )
    some = used[::97]
    scale = embedding(some).norm() / embedding.weight[some].norm()
    size: Tensor = scale * embedding.weight.pow(2).mean().sqrt()
    return size
