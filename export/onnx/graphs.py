# SPDX-License-Identifier: Apache-2.0
"""Towers as ONNX graphs: float32 from torch, float16 from that. `export.onnx.quantize` makes the int8 ones.

Graphs stay plain ONNX. onnxruntime fuses LayerNorm, Gelu and their likes itself when it loads one; its offline
optimiser on top was no faster for ViT-B/32, and its Attention operator 1 %, for graphs that nothing else could read.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aced_sdk.errors import UnsupportedError
from aced_sdk.towers import DualEncoder
from export.onnx.report import Part
from export.onnx.tokenizer import padding_of
from export.runtime.manifest import INPUTS, OUTPUTS, SHORT
from export.writing import ExportError

FILES: dict[Part, str] = {"vision": "vision_model", "text": "text_model", "both": "model", "patches": "patches_model"}
EXTERNAL_ABOVE = 2_000_000_000  # bytes of weights; protobuf holds 2 GB, so that larger graphs keep theirs beside them


class _PlainAttention(nn.Module):
    """nn.MultiheadAttention of a sequence with itself, batch first from end to end.

    torch's own puts the sequence first and reshapes with sizes taken at run time: some seventy more nodes a tower. Its
    output projection becomes a Gemm there, which the quantiser passes over.
    """

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = source.num_heads
        self.project = nn.Linear(source.embed_dim, 3 * source.embed_dim)
        self.project.weight, self.project.bias = source.in_proj_weight, source.in_proj_bias
        self.out_proj = source.out_proj

    def forward(self, query: Tensor, *_: Tensor, attn_mask: Tensor | None = None, **__: Any) -> tuple[Tensor, None]:
        count, length, width = query.shape
        parts = self.project(query).chunk(3, dim=-1)
        heads = [part.reshape(count, length, self.heads, -1).transpose(1, 2) for part in parts]
        if attn_mask is not None and attn_mask.dim() == 3:  # [N * heads, L, L]
            attn_mask = attn_mask.view(count, self.heads, length, length)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask)
        return self.out_proj(mixed.transpose(1, 2).reshape(count, length, width)), None


class Tower(nn.Module):
    """What one graph computes, on a copy of the student made for inference.

    Args:
        student: whose towers are copied; convolutional ones are re-parameterised.
        part: "vision" and "text" give embeddings before normalisation, as transformers' towers do; "both" gives
            L2-normalised ones and logits per image and per text, as transformers' CLIPModel and SiglipModel do: scale *
            cosine, and `graph_bias`; "patches" gives [N, T, W], what the last block leaves (a ViT's class token first,
            and before its last norm).
        uint8: whether pixel_values are uint8 [N, H, W, 3] of the tower's size, or normalised float32 [N, 3, H, W].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, student: DualEncoder, part: Part, uint8: bool = False) -> None:
        super().__init__()
        self.part, self.uint8 = part, uint8
        self.model = _inference_copy(student, part)
        self.scale, self.bias = student.scale, graph_bias(student)
        self.register_buffer("mean", student.mean)
        self.register_buffer("std", student.std)
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.part == "text":
            return self._text(inputs[0])
        pixels = inputs[0]
        if self.uint8:
            pixels = (pixels.permute(0, 3, 1, 2).to(torch.float32) / 255 - self.mean) / self.std
        if self.part == "patches":
            return self._patches(pixels)
        image: Tensor = self.model.visual(pixels)  # type: ignore[operator]
        if self.part == "vision":
            return image
        image, text = F.normalize(image, dim=-1), F.normalize(self._text(inputs[1]), dim=-1)
        logits = self.scale * image @ text.T + self.bias
        return image, text, logits, logits.T

    def _text(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.model.encode_text(input_ids)  # type: ignore[operator]
        return out

    def _patches(self, pixels: Tensor) -> Tensor:
        visual: Any = self.model.visual
        if not hasattr(visual, "trunk"):
            tokens: Tensor = visual.transformer(visual._embeds(pixels))
            return tokens
        features: Tensor = visual.trunk.forward_features(pixels)
        return features if features.dim() == 3 else features.flatten(2).transpose(1, 2)


def is_siglip_text(student: DualEncoder) -> bool:
    """Whether the text tower reads both ways, as SigLIP's does: it reads its padding too."""
    return bool(student.model_cfg["text_cfg"].get("no_causal_mask"))


def graph_bias(student: DualEncoder) -> float:
    """The bias inside the logits: SiglipModel has one, CLIPModel none, and clients take a softmax of its logits."""
    return student.bias if is_siglip_text(student) else 0.0


def _inference_copy(student: DualEncoder, part: Part) -> nn.Module:
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
    from timm.utils.model import reparameterize_model

    if part == "patches" and not isinstance(student.model.visual, (VisionTransformer, TimmModel)):
        raise UnsupportedError(
            f"the patches of a {type(student.model.visual).__name__} are not known",
            remedy="leave 'patches' out",
            field="parts",
        )
    model = copy.deepcopy(student.model)
    visual: Any = model.visual
    if isinstance(visual, TimmModel):  # MobileCLIP and FastViT fold their training branches
        model.visual = reparameterize_model(visual, inplace=True)
    for block in model.modules():
        if isinstance(block, ResidualAttentionBlock) and not hasattr(block, "ln_1_kv"):
            block.attn = _PlainAttention(block.attn)
    return model


def example(student: DualEncoder, part: Part, uint8: bool = False) -> tuple[Tensor, ...]:
    """Inputs of the right shapes: two pictures, three texts."""
    device = student.mean.device
    height, width = student.preprocess_config.size
    shape = (2, height, width, 3) if uint8 else (2, 3, height, width)
    pixels = torch.zeros(shape, dtype=torch.uint8 if uint8 else torch.float32, device=device)
    tokens = student.tokenize(["one", "two", "three"]).to(device)
    return tuple(pixels if name == "pixel_values" else tokens for name in INPUTS[part])


def float32_graph(
    student: DualEncoder, part: Part, opset: int, metadata: dict[str, str], uint8: bool = False
) -> onnx.ModelProto:
    """One part of the student as a checked float32 graph with a dynamic batch size.

    A text input has the student's whole context length, because open_clip adds all its positions; `pad_inside` lets it
    be shorter. For `uint8` see `Tower`.

    Raises:
        UnsupportedError: for a part that this tower does not have.
        ExportError: if torch cannot export the tower or the graph is not a clean inference graph.
    """
    names = {"pixel_values": "batch_size", "input_ids": "text_batch_size"}
    dims = tuple({0: torch.export.Dim(names[name])} for name in INPUTS[part])
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                Tower(student, part, uint8),
                example(student, part, uint8),
                dynamo=True,
                opset_version=opset,
                input_names=list(INPUTS[part]),
                output_names=list(OUTPUTS[part]),
                dynamic_shapes=(dims,),
                optimize=True,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        raise ExportError(
            f"torch cannot export the {part} tower: {type(error).__name__}: {error}",
            remedy="try another opset; plain CLIP ViT towers are known to work",
            field="student_folder",
        ) from error
    if program is None:
        raise ExportError(f"torch gave no graph for the {part} tower", remedy="update torch")
    model = clean(program.model_proto)
    onnx.helper.set_model_props(model, metadata)
    check_inference(model, part)
    return model


def pad_inside(model: onnx.ModelProto, student: DualEncoder) -> onnx.ModelProto:
    """Let `input_ids` [N, L] be shorter than L: the graph's first nodes pad them as the student's tokenizer does.

    Clients pad texts to the longest of a batch, as transformers does, or not at all. Longer ones stay an error.

    Args:
        model: a graph. A large one is changed, others are copied; one without texts stays as it is.
        student: whose tokenizer says with what, and on which side.

    Raises:
        ExportError: if the graph is no valid ONNX.
    """
    name, padded = "input_ids", "input_ids_padded"
    if not any(value.name == name for value in model.graph.input):
        return model
    large = is_large(model)
    if not large:
        model = _copied(model)
    graph = model.graph
    (given,) = (value for value in graph.input if value.name == name)
    for node in graph.node:
        node.input[:] = [padded if one == name else one for one in node.input]
    given.type.tensor_type.shape.dim[1].ClearField("dim_value")
    given.type.tensor_type.shape.dim[1].dim_param = SHORT
    pad_id, _, side = padding_of(student)
    constants = {"zero": [0], "length": [student.context_length], "pad": pad_id, "axis": [1]}
    for key, value in constants.items():
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.int64), f"{padded}_{key}"))
    ends = [f"{padded}_zero", f"{padded}_missing"] if side == "right" else [f"{padded}_missing", f"{padded}_zero"]
    own = onnx.helper.make_node
    nodes = [
        own("Shape", [name], [f"{padded}_given"], start=1, end=2),
        own("Sub", [f"{padded}_length", f"{padded}_given"], [f"{padded}_difference"]),
        own("Max", [f"{padded}_difference", f"{padded}_zero"], [f"{padded}_missing"]),  # a negative one would cut
        own("Concat", ends, [f"{padded}_pads"], axis=0),
        own("Pad", [name, f"{padded}_pads", f"{padded}_pad", f"{padded}_axis"], [padded]),
    ]
    for node in reversed(nodes):
        graph.node.insert(0, node)
    if not large:
        _valid(model, "text")
    return model


def _copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return copied


def is_large(model: onnx.ModelProto) -> bool:
    """Whether the weights are too many for one file."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer) > EXTERNAL_ABOVE


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph; a large one keeps its weights in `<name>.onnx_data` beside it.

    Raises:
        ExportError: if a large graph is no valid ONNX, which only its files can tell.
    """
    if not is_large(model):
        onnx.save_model(model, str(path))
        return
    onnx.save_model(model, str(path), save_as_external_data=True, location=f"{path.name}_data")
    _valid(str(path), path.stem)


def clean(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without torch's notes on nodes: stack traces with paths of the machine that exported."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    del model.graph.metadata_props[:]
    if is_large(model):  # protobuf cannot hand it to the inference of shapes; torch's own stay
        return model
    del model.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(model)


def check_inference(model: onnx.ModelProto, part: str) -> None:
    """Refuse what is no valid ONNX or would still train.

    Raises:
        ExportError: saying why.
    """
    if not is_large(model):
        _valid(model, part)
    for node in model.graph.node:
        training = any(attribute.name == "training_mode" and attribute.i for attribute in node.attribute)
        if training or node.op_type in ("Dropout", "RandomNormalLike", "RandomUniformLike"):
            raise ExportError(
                f"the {part} graph still trains: it has a {node.op_type} node",
                remedy="take a student without random layers at inference",
            )


def _valid(model: onnx.ModelProto | str, part: str) -> None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"the {part} graph is no valid ONNX: {error}", remedy="try another opset", field="opset"
        ) from error


def float16_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Half-precision weights and arithmetic, float32 at both ends.

    Gelu stays in float32: onnxruntime's CPU provider crashes while it optimises half-precision Gelu.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    blocked = [*DEFAULT_OP_BLOCK_LIST, "Gelu"]
    half = OnnxModel(convert_float_to_float16(_copied(model), keep_io_types=True, op_block_list=blocked))
    half.topological_sort()  # the converter appends its casts at the end
    check_inference(half.model, "float16")
    return half.model
