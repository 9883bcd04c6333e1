# SPDX-License-Identifier: Apache-2.0
"""The files of an ONNX folder: graphs in each precision, and what other programs read beside them."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray
from PIL import Image

from aced_sdk.errors import UnsupportedError
from aced_sdk.files import write_json
from aced_sdk.towers import DualEncoder
from export.onnx.graphs import FILES, float16_graph, float32_graph, is_large, is_siglip_text, pad_inside, save_graph
from export.onnx.quantize import described, int8_graph
from export.onnx.report import SUFFIX, ExportReport, Graph, Manifest, Part, Precision, TextInput
from export.onnx.tokenizer import token_ids, tokenizer_config, write_tokenizer
from export.runtime import parity
from export.runtime.manifest import GEOMETRY, INPUTS, OUTPUTS, TOKENIZER
from export.student import Source
from export.writing import front_matter

_QUANTISED = "_quantized"  # the name under which transformers.js looks for int8, its dtype "q8"


class Settings(NamedTuple):
    """The arguments of `to_onnx` that decide what graphs are made."""

    parts: Sequence[Part]
    precisions: Sequence[Precision]
    opset: int
    uint8: bool
    int8_cosine: float


class Calibration(NamedTuple):
    """What int8 learns ranges from, and how many of the pictures are the user's own."""

    pictures: list[Image.Image]
    texts: list[str]
    own: int


def calibration_of(own: list[Image.Image], texts: Sequence[str]) -> Calibration:
    """The user's pictures, or the built-in ones, and all texts."""
    return Calibration(own or parity.pictures(), [*parity.TEXTS, *texts], len(own))


# -- graphs -------------------------------------------------------------------------------------------------------


def write_graphs(
    student: DualEncoder, folder: Path, settings: Settings, source: Source, given: Calibration
) -> tuple[Graph, ...]:
    """Write `onnx/`, each part in each precision.

    Raises:
        UnsupportedError: for a part that the student does not have, and for fp16 and int8 of graphs above 2 GB.
        ExportError: if a graph cannot be made.
    """
    (folder / "onnx").mkdir()
    metadata = {
        "source_weights_sha256": source.weights_sha256,
        "source_config_sha256": source.config_sha256,
        "license": source.license,
        "aced_sdk": version("aced-sdk"),
        "torch": version("torch"),
    }
    graphs = []
    for part in settings.parts:
        model = float32_graph(student, part, settings.opset, metadata, settings.uint8)
        if is_large(model) and set(settings.precisions) != {"fp32"}:
            raise UnsupportedError(
                f"the {part} graph is above 2 GB, and only fp32 can be that large",
                remedy="export with precisions=('fp32',)",
                field="precisions",
            )
        for precision in settings.precisions:
            name = f"onnx/{FILES[part]}{SUFFIX[precision]}.onnx"
            quantised = None
            if precision == "int8":
                made = int8_graph(model, _feeds(student, part, settings.uint8, given), settings.int8_cosine)
                save_graph(pad_inside(made.model, student), folder / name)
                _link(folder / name, folder / f"onnx/{FILES[part]}{_QUANTISED}.onnx")
                quantised = described(made, given.own)
                if made.method == "static" and not given.own:
                    warnings.warn(
                        f"the int8 {part} graph was calibrated on built-in pictures; give calibration=[...], pictures "
                        "like those it will see",
                        stacklevel=3,
                    )
            else:
                converted = float16_graph(model) if precision == "fp16" else model
                save_graph(pad_inside(converted, student), folder / name)
            data = f"{name}_data"
            graphs.append(
                Graph(
                    part=part,
                    precision=precision,
                    file=name,
                    data=data if (folder / data).is_file() else None,
                    inputs=INPUTS[part],
                    outputs=OUTPUTS[part],
                    quantised=quantised,
                )
            )
    return tuple(graphs)


def _feeds(student: DualEncoder, part: Part, uint8: bool, given: Calibration) -> list[dict[str, NDArray[Any]]]:
    """Calibration inputs of one row each; where pictures and texts go in together, as many as there are of both."""
    columns: dict[str, list[NDArray[Any]]] = {}
    if "pixel_values" in INPUTS[part]:
        resized = [student.resize(picture) for picture in given.pictures]
        columns["pixel_values"] = [
            (pixels.permute(1, 2, 0) if uint8 else student.normalise(pixels)).numpy()[None] for pixels in resized
        ]
    if "input_ids" in INPUTS[part]:
        columns["input_ids"] = [row[None] for row in student.tokenize(given.texts).numpy()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=False)]


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)  # a second name, not a second copy of the bytes
    except OSError:
        shutil.copy(source, target)


# -- what is beside them ------------------------------------------------------------------------------------------


def write_configs(student: DualEncoder, folder: Path, parts: Sequence[Part]) -> TextInput | None:
    """Write the processors' files and `config.json`, by which fastembed, optimum and transformers.js open the folder.

    Returns:
        What the runtime must know about texts; None without a graph that takes any.

    Raises:
        UnsupportedError: for tokenizer options that a file cannot hold.
    """
    inputs = {name for part in parts for name in INPUTS[part]}
    text = None
    if "pixel_values" in inputs:
        write_json(folder / GEOMETRY, _preprocessor_config(student))
    if "input_ids" in inputs:
        text = write_tokenizer(student, folder / TOKENIZER)
        write_json(folder / "tokenizer_config.json", tokenizer_config(student))
    write_json(folder / "config.json", _model_config(student, inputs))
    return text


def _model_config(student: DualEncoder, inputs: set[str]) -> dict[str, object]:
    """What transformers calls a model of this kind, and its sizes as far as clients of graphs ask for them.

    Depths and widths are left out: transformers' classes could not hold every tower, and clients run the graphs.
    """
    kind = "siglip" if is_siglip_text(student) else "clip"
    width = {"projection_dim": student.embedding_dim}
    height, side = student.preprocess_config.size
    size = {"image_size": side if height == side else [height, side], "num_channels": 3}
    vision: dict[str, object] = {"model_type": f"{kind}_vision_model", **size, **width}
    if "input_ids" not in inputs:
        return vision
    text: dict[str, object] = {"model_type": f"{kind}_text_model", **width, **token_ids(student)}
    text["max_position_embeddings"] = student.context_length
    if "pixel_values" not in inputs:
        return text
    scale = {"logit_scale_init_value": math.log(student.scale)}
    return {"model_type": kind, **width, **scale, "text_config": text, "vision_config": vision}


def _preprocessor_config(student: DualEncoder) -> dict[str, object]:
    """The keys of transformers' CLIPImageProcessor, and after them what it has no words for."""
    config = student.preprocess_config
    height, width = config.size
    squash = config.resize_mode == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width} if squash else {"shortest_edge": min(height, width)},
        "resample": 3 if config.interpolation == "bicubic" else 2,
        "do_center_crop": not squash,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        "do_convert_rgb": True,
        "resize_mode": config.resize_mode,
        "fill_color": config.fill_color,
    }


def card(manifest: Manifest, report: ExportReport) -> str:
    """The folder's README."""
    parts = {graph.part for graph in manifest.graphs}
    rows = "".join(
        f"| {graph.part} | {graph.precision} | {graph.bytes:,} | {graph.max_abs:.1e} | {graph.min_cosine:.5f} |\n"
        for graph in report.graphs
    )
    notes = ""
    if manifest.text is not None:
        notes += (
            f"`input_ids` may be shorter than the context of {manifest.text.context_length} tokens: the graph pads "
            "them. `tokenizer.json` cuts longer texts, cleans texts as far as its normalisers can, and pads.\n\n"
        )
    if "both" in parts:
        notes += "`logits_per_image` and `logits_per_text` are scale * cosine"
        if manifest.graph_bias:
            notes += " + bias: a sigmoid gives probabilities.\n\n"
        elif manifest.bias:
            notes += (
                f", as of transformers' CLIPModel, without the bias of {manifest.bias:.4f} that the student was "
                "trained with: add it before a sigmoid. A softmax and rankings do not need it.\n\n"
            )
        else:
            notes += ", as of transformers' CLIPModel.\n\n"
    if manifest.pixels == "uint8":
        notes += "`pixel_values` are uint8 [N, H, W, 3]: programs that normalise pictures themselves cannot run it.\n\n"
    return (
        front_matter(license=manifest.source.license, pipeline_tag="zero-shot-image-classification")
        + "# A dual encoder as ONNX\n\n"
        "```python\nfrom export import OnnxEncoder  # needs onnxruntime, numpy, pillow, tokenizers\n"
        'encoder = OnnxEncoder("FOLDER")\n```\n\n'
        "The graphs of one tower give `image_embeds` and `text_embeds` before normalisation; OnnxEncoder divides by "
        "their L2 norm.\n\n"
        f"{notes}"
        "| part | precision | bytes | max abs to torch | least cosine to torch |\n|---|---|---|---|---|\n" + rows
    )
