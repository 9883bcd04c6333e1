# SPDX-License-Identifier: Apache-2.0
"""A vision-language model of transformers out of a vision tower and a language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aced_sdk.errors import ModelError, UnsupportedError
from aced_sdk.towers import DualEncoder
from aced_sdk.towers.trust import library_errors
from vlm.chat import IMAGE, chat_template
from vlm.config import Projector
from vlm.language import load_language
from vlm.projectors import empty_model, new_projector
from vlm.towers import VisionTower, open_tower

if TYPE_CHECKING:
    from transformers import LlavaProcessor, PreTrainedModel, PreTrainedTokenizerBase

_MAX_NEW_ROWS = 4096  # of embeddings, between those of the language model and the image token's


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
        image_token = _add_image_token(lm, tokenizer)
        lm.config._name_or_path = ""  # a path of this machine has no place in what is saved
        model: Any = empty_model(tower, lm, connector, image_token, feature_layer)
        if type(model.model.language_model) is not type(lm.base_model) or lm.get_output_embeddings().bias is not None:
            raise _refused(lm, "its body or its head")
        model.model.vision_tower = tower.model
        model.model.language_model = lm.base_model
        model.lm_head = lm.get_output_embeddings()
        model.model.multi_modal_projector = new_projector(model, lm, connector, seed)
        _check_logits(model.eval(), lm)
        _end_answers_with(model, lm, tokenizer, end)
        return model, _processor(tower, tokenizer, template, connector)


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


def _add_image_token(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Make `<image>` one token, with a row in the embedding that no prediction can prefer.

    Raises:
        ModelError: if the tokenizer cannot hold such a token, or numbers it far beyond the language model's tokens.
    """
    new = tokenizer.add_tokens([IMAGE], special_tokens=True)
    index = tokenizer.convert_tokens_to_ids(IMAGE)
    if (
        index is None
        or index == tokenizer.unk_token_id
        or tokenizer.encode(f"a{IMAGE}b", add_special_tokens=False).count(index) != 1
    ):
        raise ModelError(
            f"the tokenizer has no free token for pictures: '{IMAGE}' does not become one token of its own",
            remedy=f"add '{IMAGE}' to its vocabulary as a special token, or take a tokenizer of the tokenizers library",
            field="language",
        )
    index, rows = int(index), lm.get_input_embeddings().weight.shape[0]
    if index > rows + _MAX_NEW_ROWS:
        raise ModelError(
            f"the tokenizer numbers '{IMAGE}' {index}, and the language model has embeddings of {rows} tokens",
            remedy="take the tokenizer that belongs to the language model",
            field="language",
        )
    if added := index >= rows:
        lm.resize_token_embeddings(index + 1, mean_resizing=False)
    if new or added:
        with torch.no_grad():
            for table in (lm.get_input_embeddings(), lm.get_output_embeddings()):
                table.weight[index].zero_()
    tokenizer.padding_side = "left"
    return index


@torch.no_grad()
def _check_logits(model: Any, lm: PreTrainedModel) -> None:
    """A few tokens through both: what a language model does to its logits at the end has no place in LLaVA.

    Gemma 2's cap is let pass: it keeps their order, so that greedy answers are the same.
    """
    ids = torch.arange(4).unsqueeze(0) + 3
    expected, logits = lm(input_ids=ids).logits, model(input_ids=ids).logits
    if cap := getattr(lm.config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    if not torch.allclose(logits, expected, atol=1e-3, rtol=1e-3):
        raise _refused(lm, "what it does to its logits")


def _refused(lm: PreTrainedModel, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"the language model is a '{lm.config.model_type}', and LLaVA has no place for {what}",
        remedy="take a Llama-, Qwen-, Gemma-, Mistral- or SmolLM-like model for text alone",
        field="language",
    )


def _end_answers_with(model: Any, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end: str) -> None:
    stop = int(tokenizer.convert_tokens_to_ids(end))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = end
    model.generation_config = lm.generation_config
    model.generation_config.eos_token_id = stop
    model.generation_config.pad_token_id = tokenizer.pad_token_id
