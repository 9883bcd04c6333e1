# SPDX-License-Identifier: Apache-2.0
"""A student as models and processors of transformers, in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aced_sdk.towers import DualEncoder
from aced_sdk.towers.huggingface import (
    activation,
    block_weights,
    clip_image_processor,
    clip_vision_config,
    fill,
    siglip_vision_config,
    siglip_vision_model,
    siglip_vision_weights,
    vision_weights,
)
from export.onnx.tokenizer import backend


def whole_model(student: DualEncoder, siglip: bool) -> Any:
    """`SiglipModel` or `CLIPModel` with the student's weights, in evaluation mode.

    Raises:
        ModelError: if this version of transformers has another layout.
    """
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    if siglip:
        vision, text = siglip_vision_config(student).to_dict(), _siglip_text_config(student).to_dict()
        model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
    else:
        vision, text = clip_vision_config(student).to_dict(), _clip_text_config(student).to_dict()
        config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=student.embedding_dim)
        model = CLIPModel(config)
    fill(model, _siglip_weights(student) if siglip else _clip_weights(student))
    return model.eval()


def vision_model(student: DualEncoder, siglip: bool) -> Any:
    """`SiglipVisionModel` or `CLIPVisionModelWithProjection` with the student's weights, in evaluation mode.

    Raises:
        ModelError: if this version of transformers has another layout.
    """
    from transformers import CLIPVisionModelWithProjection

    if siglip:
        return siglip_vision_model(student)
    model = CLIPVisionModelWithProjection(clip_vision_config(student))
    weights = _clip_weights(student)
    fill(model, {key: weights[key] for key in weights if key.startswith(("vision_model.", "visual_projection."))})
    return model.eval()


def _clip_text_config(student: DualEncoder) -> Any:
    from transformers import CLIPTextConfig

    text_cfg, tokenizer = student.model_cfg["text_cfg"], student.tokenizer
    width = int(text_cfg["width"])
    return CLIPTextConfig(
        vocab_size=text_cfg["vocab_size"],
        hidden_size=width,
        intermediate_size=int(width * text_cfg.get("mlp_ratio", 4.0)),
        num_hidden_layers=text_cfg["layers"],
        num_attention_heads=text_cfg["heads"],
        max_position_embeddings=student.context_length,
        hidden_act="quick_gelu" if student.model_cfg.get("quick_gelu") else "gelu",
        layer_norm_eps=1e-5,
        projection_dim=student.embedding_dim,
        bos_token_id=tokenizer.sot_token_id,
        eos_token_id=tokenizer.eot_token_id,  # pooling takes its first place, open_clip the highest id's: the same
        pad_token_id=tokenizer.eot_token_id,
    )


def _siglip_text_config(student: DualEncoder) -> Any:
    from transformers import SiglipTextConfig

    text: Any = student.model.text
    tokenizer = student.tokenizer.tokenizer
    return SiglipTextConfig(
        vocab_size=text.token_embedding.num_embeddings,
        hidden_size=text.width,
        intermediate_size=text.transformer.resblocks[0].mlp.c_fc.out_features,
        num_hidden_layers=len(text.transformer.resblocks),
        num_attention_heads=text.heads,
        max_position_embeddings=student.context_length,
        hidden_act=activation(text.transformer.resblocks[0].mlp.gelu),
        layer_norm_eps=text.ln_final.eps,
        projection_size=student.embedding_dim,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _clip_weights(student: DualEncoder) -> dict[str, Tensor]:
    source = student.model.state_dict()
    visual: Any = student.model.visual
    weights = {f"text_model.{key}": tensor for key, tensor in _text_weights(source).items()}
    weights |= {f"vision_model.{key}": tensor for key, tensor in vision_weights(visual).items()}
    return weights | {
        "visual_projection.weight": source["visual.proj"].T.contiguous(),
        "text_projection.weight": source["text_projection"].T.contiguous(),
        "logit_scale": source["logit_scale"],
    }


def _siglip_weights(student: DualEncoder) -> dict[str, Tensor]:
    model: Any = student.model
    projection = model.text.text_projection
    bias = projection.bias if isinstance(projection, nn.Linear) else torch.zeros(student.embedding_dim)
    weight = projection.weight if isinstance(projection, nn.Linear) else projection.T.contiguous()
    text = _text_weights(model.text.state_dict()) | {"head.weight": weight, "head.bias": bias}
    weights = {f"text_model.{key}": tensor for key, tensor in text.items()}
    weights |= {f"vision_model.{key}": tensor for key, tensor in siglip_vision_weights(model.visual).items()}
    return weights | {
        "logit_scale": model.logit_scale.detach().reshape(1),
        "logit_bias": torch.full((1,), student.bias),
    }


def _text_weights(source: dict[str, Tensor]) -> dict[str, Tensor]:
    return block_weights(source, "transformer.resblocks.", "encoder.layers.") | {
        "embeddings.token_embedding.weight": source["token_embedding.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
        "final_layer_norm.weight": source["ln_final.weight"],
        "final_layer_norm.bias": source["ln_final.bias"],
    }


def processor(student: DualEncoder, siglip: bool) -> Any:
    """Image processor and tokenizer in one, `SiglipProcessor` or `CLIPProcessor`.

    Raises:
        UnsupportedError: for tokenizer options that no file can hold.
    """
    from transformers import CLIPProcessor, CLIPTokenizer, SiglipProcessor

    if siglip:
        return SiglipProcessor(clip_image_processor(student), _siglip_tokenizer(student))
    simple = student.tokenizer
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}  # CLIPTokenizer splits by these
    tokenizer = CLIPTokenizer(
        vocab={names.get(token, token): number for token, number in simple.encoder.items()},
        merges=list(simple.bpe_ranks),
        model_max_length=student.context_length,
    )
    return CLIPProcessor(image_processor=clip_image_processor(student), tokenizer=tokenizer)


def _siglip_tokenizer(student: DualEncoder) -> Any:
    """The student's tokenizer with open_clip's cleaning inside, all but ftfy and HTML entities."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend(student)[0],
        model_max_length=student.context_length,
        model_input_names=["input_ids"],  # the tower reads its padding too: no mask
        **student.tokenizer.tokenizer.special_tokens_map,
    )
