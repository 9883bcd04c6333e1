# SPDX-License-Identifier: Apache-2.0
"""A vision-language model of transformers out of a vision tower and a language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aced_sdk.errors import ModelError
from aced_sdk.towers import DualEncoder
from aced_sdk.towers.trust import library_errors
from vlm.config import Projector
from vlm.data.chat import IMAGE, chat_template
from vlm.model.checks import check_language, refused
from vlm.model.decoding import decoding, drop_settings
from vlm.model.language import load_language
from vlm.model.projectors import empty_model, new_projector
from vlm.model.tokens import add_image_token, settle
from vlm.model.towers import VisionTower, open_tower

if TYPE_CHECKING:
    from transformers import LlavaProcessor, PreTrainedModel, PreTrainedTokenizerBase


def build(
    vision: str | Path | DualEncoder,
    language: str | Path,
    projector: Projector | None = None,
    feature_layer: int = -1,
    seed: int = 0,
) -> tuple[PreTrainedModel, LlavaProcessor]:
    """A vision-language model in float32 with a new projector, and its processor.

    It is a `LlavaForConditionalGeneration`; a `FastVlmForConditionalGeneration` for a convolutional tower, and an
    `AyaVisionForConditionalGeneration` for the projector that reduces tokens.

    Args:
        vision: a student (its folder, or loaded), an open_clip folder (`local-dir:FOLDER`), or a transformers folder
            or hub name of CLIP, SigLIP, SigLIP 2 at a fixed resolution, DINOv2 or ViT.
        language: a transformers folder, a hub name, a GGUF file or a folder with one.
        projector: the connector; None is LLaVA-1.5's MLP.
        feature_layer: the tower's hidden state that is projected; -1: the last block's output, before the final norm.
        seed: of the projector's first weights.

    Returns:
        The model, in evaluation mode, and the processor: one token a patch, the class token left out.

    Raises:
        ModelError: if a folder cannot be loaded, its parts do not fit together, or the tower has no such layer.
        UnsupportedError: if no model of transformers holds the tower, the language model or both with this projector.
    """
    connector = projector or Projector()
    tower = open_tower(vision)
    _check_layer(tower, feature_layer)
    lm, tokenizer = load_language(language)
    with library_errors(
        f"no model can be built of the vision tower and the language model '{language}'",
        remedy="take a Llama-, Qwen-, Gemma-, Mistral- or SmolLM-like model for text alone, as its authors saved it",
        field="language",
    ):
        template, end = chat_template(tokenizer)
        settle(tokenizer, end)
        image_token = add_image_token(lm, tokenizer)
        _untie(lm)
        drop_settings(lm.config)
        lm.config._name_or_path = ""  # a path of this machine has no place in what is saved
        model: Any = empty_model(tower, lm, connector, image_token, feature_layer)
        if type(model.model.language_model) is not type(lm.base_model) or lm.get_output_embeddings().bias is not None:
            raise refused(lm, "its body or its head")
        model.model.vision_tower = tower.model
        model.model.language_model = lm.base_model
        model.lm_head = lm.get_output_embeddings()
        model.model.multi_modal_projector = new_projector(model, lm, connector, seed)
        given = lm.generation_config.to_dict() | {"eos_token_id": tokenizer.convert_tokens_to_ids(end)}
        model.generation_config = decoding(given | {"pad_token_id": tokenizer.pad_token_id}, tokenizer, image_token)
        check_language(model.eval(), lm)
        return model, _processor(tower, tokenizer, template, connector)


def _untie(lm: PreTrainedModel) -> None:
    """Give the head weights of its own where LLaVA would not find what it is tied to."""
    body, words = lm.base_model, lm.get_input_embeddings()
    if lm.get_output_embeddings().weight is words.weight and getattr(body, "embed_tokens", None) is not words:
        lm.get_output_embeddings().weight = torch.nn.Parameter(words.weight.detach().clone())
        lm.config.tie_word_embeddings = False


def _check_layer(tower: VisionTower, feature_layer: int) -> None:
    if tower.convolutional and feature_layer != -1:
        raise ModelError("a convolutional tower has its last map alone", remedy="leave it at -1", field="feature_layer")
    if not tower.convolutional and not -tower.layers - 1 <= feature_layer <= tower.layers:
        raise ModelError(
            f"the tower has {tower.layers} layers, and none is number {feature_layer}",
            remedy="take -1",
            field="feature_layer",
        )


def _processor(
    tower: VisionTower, tokenizer: PreTrainedTokenizerBase, template: str, projector: Projector
) -> LlavaProcessor:
    from transformers import LlavaProcessor

    factor = projector.factor if projector.kind == "pixel_shuffle" else 1
    if not getattr(tower.image_processor, "crop_size", None):  # servers count tokens by it, cropped or not
        tower.image_processor.crop_size = {"height": tower.size[0], "width": tower.size[1]}
    return LlavaProcessor(
        image_processor=tower.image_processor,
        tokenizer=tokenizer,
        patch_size=tower.stride * factor,
        vision_feature_select_strategy=tower.strategy,
        chat_template=template,
        image_token=IMAGE,
        num_additional_image_tokens=tower.prefix,
    )
