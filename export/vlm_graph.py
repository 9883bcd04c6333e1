# SPDX-License-Identifier: Apache-2.0
"""What a vision-language model sees, as one ONNX graph: its vision tower and its projector."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from pydantic import Field
from torch import Tensor, nn

from aced_sdk.config import Config
from aced_sdk.errors import ConfigError, MissingPackageError, ModelError, UnsupportedError
from aced_sdk.files import sha256, whole_folder, write_json
from export import parity
from export.graphs import _clean, check_inference, save_graph
from export.report import ExportError

FILE = "onnx/vision_encoder.onnx"  # the name that transformers.js looks for
INPUT, OUTPUT = "pixel_values", "image_features"
MANIFEST = "export.json"
_BOUND = 1e-4  # max-abs of image features over the largest of them: they are not normalised
_PACKAGES = ("aced-sdk", "torch", "onnx", "onnxruntime", "transformers")


class VlmVisionReport(Config):
    """The graph as onnxruntime runs it, against the model in torch."""

    max_abs: float = Field(description="largest absolute difference of a component of the image features")
    largest: float = Field(description="largest absolute value of a component, to judge the difference by")
    bytes: int = Field(description="size of the graph's file")
    batch_sizes: tuple[int, ...] = Field(description="batch sizes compared")


class VlmVisionManifest(Config):
    """`export.json` of such a folder."""

    format: Literal[1] = 1
    kind: Literal["onnx_vlm_vision"] = "onnx_vlm_vision"
    source_weights_sha256: dict[str, str] = Field(description="sha256 of the model's weight files, by name")
    model_type: str = Field(description="transformers' name of the model's kind")
    file: str = FILE
    input: str = Field(INPUT, description="float32 [N, 3, height, width], as the image processor gives")
    output: str = Field(OUTPUT, description="float32 [N, tokens, width], what replaces the image tokens' embeddings")
    size: tuple[int, int] = Field(description="height and width of a prepared picture")
    tokens: int
    width: int
    opset: int
    files: dict[str, str] = Field(description="sha256 of every other file")
    versions: dict[str, str]
    report: VlmVisionReport


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


def vlm_vision_to_onnx(vlm_folder: str | PathLike[str], directory: str | Path, *, opset: int = 20) -> VlmVisionReport:
    """Write the vision tower and the projector of a saved vision-language model as one graph, verified against torch.

    The folder holds `onnx/vision_encoder.onnx` (`pixel_values` float32 [N, 3, height, width] -> `image_features`
    float32 [N, tokens, width], N free), `preprocessor_config.json` and the manifest `export.json`. It appears whole or
    not at all; an older export there is replaced.

    Args:
        vlm_folder: a LLaVA, FastVLM or Aya Vision folder of transformers, such as `vlm.save` writes.
        directory: the folder to write.
        opset: ONNX operator set, 18 or newer.

    Raises:
        ModelError: if the folder cannot be loaded.
        ConfigError: for an opset below 18.
        UnsupportedError: for other models, and for adapters that lie apart.
        ExportError: if torch cannot export the tower, the graph does not agree with torch, or the directory holds
            something else.
    """
    if opset < 18:
        raise ConfigError(f"opset {opset} is too old", remedy="take 18 or newer", field="opset")
    if find_spec("onnxscript") is None:
        raise MissingPackageError("onnxscript is not installed", remedy="install aced-sdk[export]")
    target = Path(directory)
    if target.exists() and not (target / MANIFEST).is_file() and (target.is_file() or any(target.iterdir())):
        raise ExportError(
            f"{target} holds something else than an export", remedy="name a new or an empty folder", field="directory"
        )
    source = Path(vlm_folder)
    model, image_processor = _load(source)
    images = [image for image in parity.pictures() if image.mode == "RGB"]
    pixels = image_processor(images=images, return_tensors="pt")["pixel_values"]
    features = _Features(model).eval()
    with torch.no_grad():
        own = model.get_image_features(pixels).pooler_output
        want = torch.stack(list(own)).flatten(1, -2)
        wrong = float((features(pixels) - want).abs().max())
    if not wrong <= _BOUND * float(want.abs().max()):
        raise ExportError(
            f"this model's image features are made in another way than known: they differ by {wrong:.1e}",
            remedy="report it with the model's config and the version of transformers",
            field="vlm_folder",
        )
    weights = {path.name: sha256(path) for path in sorted(source.glob("*.safetensors"))}
    graph = _graph(features, pixels[:2], opset, {f"source_{name}": digest for name, digest in weights.items()})
    with whole_folder(target) as folder:
        (folder / "onnx").mkdir()
        save_graph(graph, folder / FILE)
        image_processor.save_pretrained(folder)
        report = _compared(folder / FILE, pixels, want)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        manifest = VlmVisionManifest(
            source_weights_sha256=weights,
            model_type=model.config.model_type,
            size=(int(pixels.shape[2]), int(pixels.shape[3])),
            tokens=int(want.shape[1]),
            width=int(want.shape[2]),
            opset=opset,
            files={name: sha256(folder / name) for name in names},
            versions={name: version(name) for name in _PACKAGES},
            report=report,
        )
        write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    return report


def _load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    if (folder / "adapter" / "adapter_config.json").is_file() or (folder / "adapter_config.json").is_file():
        raise UnsupportedError(
            f"{folder} keeps its adapter apart, and the trained projector in it",
            remedy="save the model with vlm.save(..., merge=True) first",
            field="vlm_folder",
        )
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
        image_processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{folder} holds no vision-language model: {error}",
            remedy="name a folder that vlm.save wrote",
            field="vlm_folder",
        ) from error
    if model.config.model_type not in ("llava", "fast_vlm", "aya_vision"):
        raise UnsupportedError(
            f"a {model.config.model_type} model cannot be exported",
            remedy="take a LLaVA, FastVLM or Aya Vision model, such as vlm.build makes",
            field="vlm_folder",
        )
    return model, image_processor


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
    model = _clean(program.model_proto)
    onnx.helper.set_model_props(model, metadata)
    check_inference(model, "vision")
    return model


def _compared(file: Path, pixels: Tensor, want: Tensor) -> VlmVisionReport:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    sizes = tuple(size for size in parity.BATCH_SIZES if size <= len(pixels))
    max_abs = 0.0
    for size in sizes:
        (got,) = session.run([OUTPUT], {INPUT: pixels[:size].numpy()})
        max_abs = max(max_abs, float((torch.from_numpy(got) - want[:size]).abs().max()))
    largest = float(want.abs().max())
    if not max_abs <= _BOUND * largest:  # also where a value is not a number
        raise ExportError(
            f"the graph differs from torch by {max_abs:.1e} where values reach {largest:.1e}",
            remedy="try another opset, and report it with the model's config",
            field="opset",
        )
    return VlmVisionReport(max_abs=max_abs, largest=largest, bytes=file.stat().st_size, batch_sizes=sizes)
