# SPDX-License-Identifier: Apache-2.0
"""An exported folder checked where it runs, without torch: its hashes, and its embeddings against torch's own.

An export keeps torch's embeddings of built-in pictures and texts, so that another machine, with another onnxruntime or
processor, can be held to them later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from aced_sdk.files import ReadError, inside, printable, read_json
from export.runtime.arrays import read_arrays
from export.runtime.encoder import Floats, OnnxEncoder
from export.runtime.errors import EncoderError, FolderError, folder_errors
from export.runtime.manifest import MANIFEST, check_files, read_manifest

TORCH = "torch_embeddings.npz"
BATCH_SIZES = (1, 3, 5)
PATCH_PICTURES = 3  # patches are compared of so many pictures: they are large
_MAX_BYTES = 2**30  # of torch's embeddings
FLOAT32_BOUND = 1e-4  # max-abs on normalised embeddings

TEXTS = (
    "a photo of a cat",
    "",
    "Two red apples, a GREEN pear & 12 plums on a wooden table!",
    "it's raining; they'll stay, won't they?",
    "ﬁne “curly” quotes — and ‘more’… &amp; &eacute;t&eacute; <b>",
    "naïve café Ångström ﬀ ＦＵＬＬ　ＷＩＤＴＨ",
    "猫の写真 고양이 사진 صورة قطة фото кошки बिल्ली",
    "😀 🎉 👩‍👩‍👧 🏳️‍🌈 ❤️",
    "tabs\tand\nlines\r\n and   spaces \u00a0 \u200b end",
    "<start_of_text> literal <end_of_text> tokens",
    " ".join(["many words that never end"] * 40),
)


def pictures() -> list[Image.Image]:
    """Pictures of several sizes, aspect ratios and modes; always the same."""
    generator = np.random.default_rng(0)
    made = []
    shapes = (
        ((48, 64), "RGB"), ((97, 31), "RGB"), ((50, 200), "L"), ((240, 320), "RGBA"),
        ((33, 33), "P"), ((120, 90), "LA"), ((7, 5), "RGB"), ((480, 360), "CMYK"),
    )  # fmt: skip
    for (height, width), mode in shapes:
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(smooth + generator.integers(-30, 31, smooth.shape), 0, 255).astype(np.uint8)
        image = Image.fromarray(noisy)
        if mode in ("RGBA", "LA"):
            image = image.convert(mode[:-1])
            image.putalpha(Image.fromarray(generator.integers(0, 256, (height, width), dtype=np.uint8)))
        made.append(image.convert(mode))
    return made


Wanted = Mapping[str, Floats]
"""torch's "vision" and "text" [N, D] and "patches" [N, T, W], as far as they are needed; all L2-normalised."""


class Parity(NamedTuple):
    """One graph on this machine beside what was measured when it was exported."""

    part: str
    precision: str
    max_abs: float
    min_cosine: float
    reported_max_abs: float
    reported_min_cosine: float


def write_torch(folder: Path, embeddings: Mapping[str, Floats]) -> None:
    """Keep torch's `Wanted` of `pictures` and `TEXTS`."""
    arrays: dict[str, Any] = dict(embeddings)
    np.savez(folder / TORCH, **arrays)


def verify_folder(directory: str | Path, providers: Sequence[str] | None = None) -> tuple[Parity, ...]:
    """Check an exported folder without torch or the student: every file's hash, then every graph as it runs here.

    Args:
        directory: the exported folder.
        providers: as for `OnnxEncoder`.

    Raises:
        FolderError: if a file is missing or altered, or a graph is further from torch than `export.to_onnx` allowed.
        EncoderError: if a graph cannot be run, or gives values that are not finite.
        InputError: if a provider cannot be used.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    if not manifest.get("report"):
        raise FolderError(f"{folder} has no report: its export never ended", remedy="export again", field="directory")
    check_files(folder, {**manifest["files"], TORCH: manifest["files"].get(TORCH, "")})
    with folder_errors():
        torch = read_arrays(inside(folder, TORCH), _MAX_BYTES)
    reported = {(graph["part"], graph["precision"]): graph for graph in manifest["report"]["graphs"]}
    found = []
    for graph in manifest["graphs"]:
        part, precision = graph["part"], graph["precision"]
        encoder = OnnxEncoder(folder, precision, providers=providers, check=False, parts=(part,))
        try:
            max_abs, cosine = differences(encoder, part, pictures(), TEXTS, torch)
        except (KeyError, IndexError, ValueError) as error:
            if isinstance(error, EncoderError):
                raise
            raise FolderError(
                f"{printable(folder / TORCH)} does not fit the {part} graph: {printable(repr(error))}",
                remedy="export the student again",
            ) from None
        before = reported[part, precision]
        parity = Parity(part, precision, max_abs, cosine, before["max_abs"], before["min_cosine"])
        _allowed(folder, parity, manifest["report"]["min_cosine"])
        found.append(parity)
    return tuple(found)


def kind_of(directory: str | Path) -> str:
    """What the manifest of an exported folder calls it; "" where it has none that can be read."""
    try:
        return str(read_json(inside(directory, MANIFEST))["kind"])
    except (ReadError, KeyError, TypeError):
        return ""


def differences(
    encoder: OnnxEncoder, part: str, images: Sequence[Any], texts: Sequence[str], want: Wanted
) -> tuple[float, float]:
    """Largest absolute difference and smallest cosine to torch, over batches of 1, 3, 5 and all inputs."""
    errors, cosines = [], []
    for size in (*BATCH_SIZES, max(len(images), len(texts))):
        got = _embeddings(encoder, part, images[:size], texts[:size])
        for name, embeddings in got.items():
            rows = want[name][: len(embeddings)]
            errors.append(np.abs(rows - embeddings).max())
            cosines.append((rows * embeddings).sum(-1).min())
    return float(np.max(errors)), float(np.min(cosines))


def _embeddings(encoder: OnnxEncoder, part: str, images: Sequence[Any], texts: Sequence[str]) -> dict[str, Floats]:
    """What one graph gives, in the form of `Wanted`."""
    if part == "vision":
        return {"vision": encoder.encode_image(images)}
    if part == "text":
        return {"text": encoder.encode_text(texts)}
    if part == "patches":
        return {"patches": encoder.embed("patches", encoder.preprocess(images[:PATCH_PICTURES]))}
    inputs = {"pixel_values": encoder.preprocess(images), "input_ids": encoder.tokenize(texts)}
    out = encoder.outputs("both", inputs)
    image, text = out["image_embeds"], out["text_embeds"]
    logits = encoder.scale * image @ text.T + encoder.graph_bias
    off = np.maximum(np.abs(out["logits_per_image"] - logits).max(), np.abs(out["logits_per_text"] - logits.T).max())
    if off > FLOAT32_BOUND * max(1.0, encoder.scale) and encoder.precision == "fp32":
        image = np.full_like(image, np.nan)  # logits that do not follow from the embeddings: nothing agrees
    return {"vision": image, "text": text}


def _allowed(folder: Path, parity: Parity, min_cosine: float) -> None:
    good = parity.max_abs <= FLOAT32_BOUND if parity.precision == "fp32" else parity.min_cosine >= min_cosine
    if not good:  # also where a value is not a number
        raise FolderError(
            f"the {parity.precision} {parity.part} graph of {folder} does not agree with torch on this machine: "
            f"max abs {parity.max_abs:.1e}, cosine {parity.min_cosine:.5f} (on export {parity.reported_max_abs:.1e}, "
            f"{parity.reported_min_cosine:.5f})",
            remedy="take another precision or provider, or the onnxruntime version that the manifest names",
            field="precision",
        )
