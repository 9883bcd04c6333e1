# SPDX-License-Identifier: Apache-2.0
"""Towers as ONNX graphs: float32 from torch, float16 and int8 from that."""

from __future__ import annotations

import logging
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from aced_sdk.errors import UnsupportedError
from aced_sdk.towers import DualEncoder
from export.report import ExportError, Part

# Names as in optimum and transformers.js, so that their users find what they know.
INPUTS: dict[Part, str] = {"vision": "pixel_values", "text": "input_ids"}
OUTPUTS: dict[Part, str] = {"vision": "image_embeds", "text": "text_embeds"}
_BATCH: dict[Part, str] = {"vision": "batch_size", "text": "text_batch_size"}
_PROTOBUF_LIMIT = 2_000_000_000  # bytes; a larger graph needs external data


class _Vision(nn.Module):
    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixel_values: Tensor) -> Tensor:
        out: Tensor = self.visual(pixel_values)
        return out


class _Text(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.model.encode_text(input_ids)  # type: ignore[operator]
        return out


def float32_graph(student: DualEncoder, part: Part, opset: int, metadata: dict[str, str]) -> onnx.ModelProto:
    """One tower as a checked float32 graph with a dynamic batch size.

    The output is not normalised, as with transformers' `image_embeds` and `text_embeds`. The text graph takes
    `input_ids` of the student's whole context length, because open_clip adds all its positions.

    Raises:
        UnsupportedError: for towers of 2 GB and more.
        ExportError: if torch cannot export the tower or the graph is not a clean inference graph.
    """
    tower, example = _tower(student, part)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tower.state_dict().values())
    if size > _PROTOBUF_LIMIT:
        raise UnsupportedError(
            f"the {part} tower has {size / 1e9:.1f} GB, and one ONNX file holds 2", remedy="export a smaller student"
        )
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                tower.eval(),
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUTS[part]],
                output_names=[OUTPUTS[part]],
                dynamic_shapes=({0: torch.export.Dim(_BATCH[part])},),
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
    model = _clean(program.model_proto)
    onnx.helper.set_model_props(model, metadata)
    check_inference(model, part)
    return model


def _tower(student: DualEncoder, part: Part) -> tuple[nn.Module, Tensor]:
    device = student.mean.device
    if part == "text":
        return _Text(student.model), student.tokenize(["one", "two"]).to(device)
    from open_clip.timm_model import TimmModel
    from timm.utils.model import reparameterize_model

    visual: Any = student.model.visual
    if isinstance(visual, TimmModel):
        visual = reparameterize_model(visual)  # MobileCLIP and FastViT fold their training branches; a copy
    return _Vision(visual), torch.zeros(2, 3, *student.preprocess_config.size, device=device)


def _clean(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without torch's notes on nodes: stack traces with paths of the machine that exported."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(model)


def check_inference(model: onnx.ModelProto, part: str) -> None:
    """Refuse what is no valid ONNX or would still train.

    Raises:
        ExportError: saying why.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"the {part} graph is no valid ONNX: {error}", remedy="try another opset", field="opset"
        ) from error
    for node in model.graph.node:
        training = any(attribute.name == "training_mode" and attribute.i for attribute in node.attribute)
        if training or node.op_type in ("Dropout", "RandomNormalLike", "RandomUniformLike"):
            raise ExportError(
                f"the {part} graph still trains: it has a {node.op_type} node",
                remedy="take a student without random layers at inference",
            )


def float16_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Half-precision weights and arithmetic, float32 at both ends.

    Gelu stays in float32: onnxruntime's CPU provider crashes while it optimises half-precision Gelu.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    half = OnnxModel(convert_float_to_float16(copy, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, "Gelu"]))
    half.topological_sort()  # the converter appends its casts at the end
    check_inference(half.model, "float16")
    return half.model


def int8_graph(model: onnx.ModelProto, target: str) -> None:
    """Write a dynamically quantised graph: int8 products per channel and token table; convolutions stay."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    add_pre_process_metadata(copy)  # shapes are inferred; otherwise the quantiser warns through the root logger
    root = logging.getLogger()
    before = list(root.handlers)
    try:
        quantize_dynamic(
            copy,
            target,
            per_channel=True,
            op_types_to_quantize=["MatMul", "Gather"],
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:  # the quantiser logs through the root logger, which installs a handler where there was none
        for handler in set(root.handlers) - set(before):
            root.removeHandler(handler)
