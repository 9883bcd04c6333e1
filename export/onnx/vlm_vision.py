# SPDX-License-Identifier: Apache-2.0
"""What a vision-language model sees, as one ONNX graph: its vision tower and its projector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import onnx
import onnxruntime
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from aced_sdk.config import Config
from aced_sdk.errors import AcedError, ConfigError, MissingPackageError, ModelError, UnsupportedError
from aced_sdk.files import ReadError, inside, printable, read_json, sha256
from aced_sdk.towers.trust import bounded, check_folder, check_vision_language, weight_bytes, without_bars
from export.onnx.graphs import check_inference, clean, float16_graph, save_graph
from export.onnx.quantize import described, int8_graph
from export.onnx.report import SUFFIX, Precision, Quantisation
from export.runtime import parity
from export.runtime.manifest import MANIFEST, check_digest, check_files
from export.runtime.sessions import session_options
from export.student import known, opened
from export.writing import ExportError, all_digests, check_target, export_folder, write_manifest

NAME = "onnx/vision_encoder"  # what transformers.js looks for, with a precision's suffix
INPUT, OUTPUT = "pixel_values", "image_features"
_LEAST = 0.9  # cosine of any token in any precision: below, the graph is broken
_BOUND = 1e-4  # fp32's max-abs of image features over the largest of them: they are not normalised
_PACKAGES = ("aced-sdk", "torch", "onnx", "onnxruntime", "transformers")


class VlmVisionGraph(Config):
    """One graph as onnxruntime runs it, against the model in torch."""

    precision: Precision
    file: str
    max_abs: float = Field(description="largest absolute difference of a component of the image features")
    min_cosine: float = Field(description="least cosine of the features of one token")
    bytes: int = Field(description="size of the graph's file")
    quantised: Quantisation | None = Field(None, description="int8 only: how, and what stayed in float")


class VlmVisionReport(Config):
    """What was checked on save."""

    graphs: tuple[VlmVisionGraph, ...]
    largest: float = Field(description="largest absolute value of a component, to judge the differences by")
    batch_sizes: tuple[int, ...] = Field(description="batch sizes compared")


class VlmVisionManifest(Config):
    """`export.json` of such a folder."""

    format: Literal[2] = 2
    kind: Literal["onnx_vlm_vision"] = "onnx_vlm_vision"
    source_weights_sha256: dict[str, str] = Field(description="sha256 of the model's weight files, by name")
    model_type: str = Field(description="transformers' name of the model's kind")
    input: str = Field(INPUT, description="float32 [N, 3, height, width], as the image processor gives")
    output: str = Field(OUTPUT, description="float32 [N, tokens, width], what replaces the image tokens' embeddings")
    size: tuple[int, int] = Field(description="height and width of a prepared picture")
    tokens: int
    width: int
    opset: int
    files: dict[str, str] = Field(description="sha256 of every other file")
    versions: dict[str, str]
    report: VlmVisionReport
    digest: str = Field("", description="sha256 of all the above, so that no alteration goes unseen")


class _Features(nn.Module):
    """A model's `get_image_features` without what hinders a dynamic batch: LLaVA's makes a list of the batch."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self.is_map = model.config.model_type == "fast_vlm"  # its tower gives [N, D, rows, columns]
        layer = model.config.vision_feature_layer
        self.layers = [layer] if isinstance(layer, int) else list(layer)
        self.first = 1 if model.config.vision_feature_select_strategy == "default" else 0

    def forward(self, pixel_values: Tensor) -> Tensor:
        if self.is_map:
            chosen = self.tower(pixel_values).last_hidden_state.flatten(2).permute(0, 2, 1)
        else:
            hidden = self.tower(pixel_values, output_hidden_states=True).hidden_states
            chosen = torch.cat([hidden[layer] for layer in self.layers], dim=-1)[:, self.first :]
        features: Tensor = self.projector(chosen)
        return features.flatten(1, -2)  # a projector that merges tokens may leave rows and columns


def vlm_vision_to_onnx(
    vlm_folder: str | PathLike[str],
    directory: str | Path,
    *,
    precisions: Sequence[Precision] = ("fp32",),
    calibration: Sequence[str | Path] = (),
    int8_cosine: float = 0.99,
    opset: int = 20,
) -> VlmVisionReport:
    """Write the vision tower and the projector of a saved vision-language model as one graph, verified against torch.

    The folder holds `onnx/vision_encoder.onnx` (`pixel_values` float32 [N, 3, height, width] -> `image_features`
    float32 [N, tokens, width], N free), with `_fp16` and `_int8` beside it where asked for, `preprocessor_config.json`
    and the manifest `export.json`. It appears whole or not at all; an older export there is replaced.

    Args:
        vlm_folder: a LLaVA, FastVLM or Aya Vision folder of transformers, such as `vlm.save` writes.
        directory: the folder to write.
        precisions: of the files.
        calibration: pictures that int8 is made and judged by; without any, built-in ones.
        int8_cosine: least cosine of a token's features that int8 keeps on them; what costs more stays in float.
        opset: ONNX operator set, 18 or newer.

    Raises:
        ModelError: if the folder cannot be loaded.
        ConfigError: for an opset below 18, or an unknown precision.
        UnsupportedError: for other models, and for adapters that lie apart.
        ExportError: if torch cannot export the tower, a graph does not agree with torch, a calibration picture cannot
            be read, or the directory holds something else.
    """
    if opset < 18:
        raise ConfigError(f"opset {opset} is too old", remedy="take 18 or newer", field="opset")
    known("precisions", precisions, get_args(Precision))
    own = opened("calibration", calibration)
    if find_spec("onnxscript") is None:
        raise MissingPackageError("onnxscript is not installed", remedy="install aced-sdk[export]")
    target = Path(directory)
    check_target(target, MANIFEST)
    source = Path(vlm_folder)
    model, image_processor = _load(source)
    images = [image for image in parity.pictures() if image.mode == "RGB"]
    try:
        pixels = image_processor(images=images, return_tensors="pt")["pixel_values"]
        features = _Features(model).eval()
        with torch.no_grad():
            theirs = model.get_image_features(pixels).pooler_output
            want = torch.stack(list(theirs)).flatten(1, -2)
            wrong = float((features(pixels) - want).abs().max())
    except Exception as error:  # configs of another make lead transformers to many kinds of errors
        raise ModelError(
            f"the model in {printable(source)} cannot read pictures: {printable(repr(error))}",
            remedy="name a folder that vlm.save wrote",
            field="vlm_folder",
        ) from error
    if not wrong <= _BOUND * float(want.abs().max()):
        raise ExportError(
            f"this model's image features are made in another way than known: they differ by {wrong:.1e}",
            remedy="report it with the model's config and the version of transformers",
            field="vlm_folder",
        )
    weights = {path.name: sha256(path) for path in sorted(source.glob("*.safetensors"))}
    graph = _graph(features, pixels[:2], opset, {f"source_{name}": digest for name, digest in weights.items()})
    with export_folder(target) as folder:
        (folder / "onnx").mkdir()
        judged = image_processor(images=own, return_tensors="pt")["pixel_values"] if own else pixels
        feeds = [{INPUT: one[None].numpy()} for one in judged]
        graphs = []
        for precision in precisions:
            file, quantised = f"{NAME}{SUFFIX[precision]}.onnx", None
            if precision == "int8":
                made = int8_graph(graph, feeds, int8_cosine)
                onnx.save_model(made.model, str(folder / file))
                quantised = described(made, len(own))
            elif precision == "fp16":
                onnx.save_model(float16_graph(graph), str(folder / file))
            else:
                save_graph(graph, folder / file)
            graphs.append(_compared(folder, file, precision, pixels, want, quantised))
        image_processor.save_pretrained(folder)
        report = VlmVisionReport(
            graphs=tuple(graphs), largest=float(want.abs().max()), batch_sizes=_batch_sizes(len(pixels))
        )
        manifest = VlmVisionManifest(
            source_weights_sha256=weights,
            model_type=model.config.model_type,
            size=(int(pixels.shape[2]), int(pixels.shape[3])),
            tokens=int(want.shape[1]),
            width=int(want.shape[2]),
            opset=opset,
            files=all_digests(folder),
            versions={name: version(name) for name in _PACKAGES},
            report=report,
        )
        write_manifest(folder, manifest)
    return report


def check_vlm_vision(directory: str | Path) -> VlmVisionReport:
    """Compare every file of such a folder with the hash taken on export.

    Raises:
        ExportError: if a file is missing or altered.
    """
    folder = Path(directory)
    where = printable(folder / MANIFEST)
    try:
        raw = read_json(inside(folder, MANIFEST))
        manifest = VlmVisionManifest(**raw)
        check_digest(raw, where)
        check_files(folder, {**dict.fromkeys((graph.file for graph in manifest.report.graphs), ""), **manifest.files})
    except (AcedError, TypeError) as error:
        why = error.cause if isinstance(error, AcedError) else error
        raise ExportError(
            f"{where} cannot be read: {printable(why)}", remedy="export the model again", field="directory"
        ) from None
    return manifest.report


def _load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    if (folder / "adapter" / "adapter_config.json").is_file() or (folder / "adapter_config.json").is_file():
        raise UnsupportedError(
            f"{folder} keeps its adapter apart, and the trained projector in it",
            remedy="save the model with vlm.save(..., merge=True) first",
            field="vlm_folder",
        )
    try:
        config = check_folder(folder, pictures=True)
        if (kind := config.get("model_type")) not in ("llava", "fast_vlm", "aya_vision"):
            raise UnsupportedError(
                f"a {printable(kind)} model cannot be exported",
                remedy="take a LLaVA, FastVLM or Aya Vision model, such as vlm.build makes",
                field="vlm_folder",
            )
        check_vision_language(config, folder)
        with without_bars(), bounded(weight_bytes(folder)):
            model, found = AutoModelForImageTextToText.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        # LLaVA reads no pooling head of a tower, and some checkpoints have none
        if lost := [name for name in found["missing_keys"] if ".head." not in name and ".pooler." not in name]:
            raise ReadError(f"it lacks {len(lost)} of the model's tensors, {min(lost)} first", remedy="save it again")
        image_processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UnsupportedError:
        raise
    except Exception as error:  # configs of another make lead transformers to many kinds of errors
        why = error.cause if isinstance(error, AcedError) else error
        raise ModelError(
            f"{printable(folder)} holds no vision-language model: {printable(why)}",
            remedy="name a folder that vlm.save wrote",
            field="vlm_folder",
        ) from error
    return model.eval(), image_processor


def _graph(features: _Features, example: Tensor, opset: int, metadata: dict[str, str]) -> onnx.ModelProto:
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                features,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch_size")},),
                optimize=True,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        raise ExportError(
            f"torch cannot export this vision tower: {type(error).__name__}: {error}",
            remedy="try another opset; CLIP and SigLIP ViTs are known to work",
            field="vlm_folder",
        ) from error
    if program is None:
        raise ExportError("torch gave no graph for this vision tower", remedy="update torch")
    model = clean(program.model_proto)
    onnx.helper.set_model_props(model, metadata)
    check_inference(model, "vision")
    return model


def _batch_sizes(pictures: int) -> tuple[int, ...]:
    return tuple(size for size in parity.BATCH_SIZES if size <= pictures)


def _compared(
    folder: Path, file: str, precision: Precision, pixels: Tensor, want: Tensor, quantised: Quantisation | None
) -> VlmVisionGraph:
    """What onnxruntime makes of the built-in pictures, beside torch; fp32 is refused where they do not agree.

    fp16 and int8 differ by nature: int8 was held to its own limit when it was made.
    """
    session = onnxruntime.InferenceSession(
        str(folder / file), session_options(None, precision), ["CPUExecutionProvider"]
    )
    max_abs, least = 0.0, 1.0
    for size in _batch_sizes(len(pixels)):
        (out,) = session.run([OUTPUT], {INPUT: pixels[:size].numpy()})
        got = torch.from_numpy(out)
        max_abs = max(max_abs, float((got - want[:size]).abs().max()))
        least = min(least, float(functional.cosine_similarity(got, want[:size], dim=-1).min()))
    largest = float(want.abs().max())
    bound = _BOUND * largest if precision == "fp32" else math.inf
    if not (max_abs <= bound and math.isfinite(max_abs) and least >= _LEAST):  # also where a value is not a number
        raise ExportError(
            f"the {precision} graph differs from torch by {max_abs:.1e} where values reach {largest:.1e}, and its "
            f"least cosine is {least:.4f}",
            remedy="try another opset, and report it with the model's config",
            field="precisions" if precision != "fp32" else "opset",
        )
    return VlmVisionGraph(
        precision=precision,
        file=file,
        max_abs=max_abs,
        min_cosine=least,
        bytes=(folder / file).stat().st_size,
        quantised=quantised,
    )
