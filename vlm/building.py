# SPDX-License-Identifier: Apache-2.0
"""A LLaVA model out of a student's vision tower and a language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from aced_sdk import towers
from aced_sdk.errors import ModelError, UnsupportedError
from aced_sdk.towers import DualEncoder
from aced_sdk.towers.huggingface import clip_image_processor, clip_vision_model, is_clip_vit
from vlm.chat import IMAGE, chat_template
from vlm.config import Projector
from vlm.language import load_language

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel, PreTrainedTokenizerBase


def build(
    vision: str | Path | DualEncoder,
    language: str | Path,
    projector: Projector | None = None,
    feature_layer: int = -1,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A vision-language model in float32 with a new projector, and its processor.

    Args:
        vision: a student's folder (or the loaded student); its image tower must be a plain CLIP ViT.
        language: a transformers folder, a hub name, a GGUF file or a folder with one.
        projector: the connector; None is LLaVA-1.5's MLP.
        feature_layer: the tower's hidden state that is projected; -1: the last block's output, before the final norm.
        seed: of the projector's first weights.

    Returns:
        The model, in evaluation mode, and the processor: one token a patch, the class token left out.

    Raises:
        ModelError: if a folder cannot be loaded, or the tower has no such layer.
        UnsupportedError: if the tower is not a plain CLIP ViT.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    encoder = vision if isinstance(vision, DualEncoder) else towers.load(str(vision))
    if not is_clip_vit(encoder):
        raise UnsupportedError(
            "this student's image tower is no plain CLIP ViT",
            remedy="two roads lead on: a CLIP or SigLIP ViT through LlavaForConditionalGeneration, a FastViT "
            "or MobileCLIP tower through FastVlmForConditionalGeneration; this version takes the CLIP ViT: distil one",
            field="vision",
        )
    tower = clip_vision_model(encoder)
    layers = tower.config.num_hidden_layers
    if not -layers - 1 <= feature_layer <= layers:
        raise ModelError(
            f"the tower has {layers} layers, and none is number {feature_layer}",
            remedy="take -1",
            field="feature_layer",
        )
    lm, tokenizer = load_language(language)
    template, end = chat_template(tokenizer)
    image_token_id = _add_image_token(lm, tokenizer)
    patches = (tower.config.image_size // tower.config.patch_size) ** 2
    lm.config._name_or_path = ""  # a path of this machine has no place in what is saved
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=lm.config,
        image_token_index=image_token_id,
        image_seq_length=patches,
        projector_hidden_act="gelu" if (projector or Projector()).kind == "mlp" else "linear",
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default",
        tie_word_embeddings=lm.config.tie_word_embeddings,
    )
    with torch.device("meta"):  # all three parts are put in below; none is drawn twice
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = lm.base_model
    model.lm_head = lm.get_output_embeddings()
    model.model.multi_modal_projector = _new_projector(LlavaMultiModalProjector, config, lm, seed)
    _end_answers_with(model, lm, tokenizer, end)
    processor = LlavaProcessor(
        image_processor=clip_image_processor(encoder),
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default",
        chat_template=template,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
    return model.eval(), processor


def _add_image_token(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Make `<image>` one token, with a row in the embedding that no prediction can prefer."""
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    index = int(tokenizer.convert_tokens_to_ids(IMAGE))
    embedding = lm.get_input_embeddings()
    if index >= embedding.weight.shape[0]:
        lm.resize_token_embeddings(index + 1, mean_resizing=False)
        with torch.no_grad():
            for table in (lm.get_input_embeddings(), lm.get_output_embeddings()):
                table.weight[index].zero_()
    tokenizer.padding_side = "left"
    return index


@torch.no_grad()
def _new_projector(kind: Any, config: Any, lm: PreTrainedModel, seed: int) -> nn.Module:
    """A projector whose output has the size of word embeddings for input of size 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector: nn.Module = kind(config)
        first, second = cast(nn.Linear, projector.linear_1), cast(nn.Linear, projector.linear_2)
        for linear in (first, second):
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
        probe = projector(torch.randn(1024, config.vision_config.hidden_size))
    words = lm.get_input_embeddings().weight
    second.weight *= words.pow(2).mean().sqrt() / probe.pow(2).mean().sqrt()
    return projector


def _end_answers_with(model: Any, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end: str) -> None:
    stop = int(tokenizer.convert_tokens_to_ids(end))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = end
    model.generation_config = lm.generation_config
    model.generation_config.eos_token_id = stop
    model.generation_config.pad_token_id = tokenizer.pad_token_id
