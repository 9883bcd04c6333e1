# SPDX-License-Identifier: Apache-2.0
"""A student's folder in transformers.js under Node: tokens, pixels and embeddings beside ours."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

import export
from aced_sdk import towers
from aced_sdk.files import alone, home, whole_folder
from aced_sdk.towers.huggingface import is_clip_vit

pytestmark = [pytest.mark.network, pytest.mark.slow]
PACKAGE, VERSION = "@huggingface/transformers", "4.3.1"
# Texts that fit the context: transformers.js cuts a longer one together with its end token, for every CLIP model.
CLASSES = ["apple", "boat", "cat"]
TEXTS = ["a photo of a cat", "Two red apples!", "it's raining"]
SCRIPT = """
import {
  env, pipeline, AutoProcessor, AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage,
} from '@huggingface/transformers';
import { writeFileSync } from 'node:fs';
const [parent, name, pictures, texts, classes, out] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = parent;
const options = { dtype: 'fp32', device: 'cpu' };
const processor = await AutoProcessor.from_pretrained(name);
const tokenizer = await AutoTokenizer.from_pretrained(name);
const vision = await CLIPVisionModelWithProjection.from_pretrained(name, options);
const text = await CLIPTextModelWithProjection.from_pretrained(name, options);
const inputs = await processor(await Promise.all(JSON.parse(pictures).map((path) => RawImage.read(path))));
const tokens = tokenizer(JSON.parse(texts), { padding: 'max_length', truncation: true });
const { image_embeds } = await vision(inputs);
const { text_embeds } = await text(tokens);
const short = await text(tokenizer(JSON.parse(texts), { padding: true, truncation: true }));
const classify = await pipeline('zero-shot-image-classification', name, options);
const guesses = await classify(JSON.parse(pictures)[0], JSON.parse(classes));
guesses.sort((a, b) => a.label.localeCompare(b.label));
writeFileSync(out, JSON.stringify({
  pixels: inputs.pixel_values.tolist(), ids: tokens.input_ids.tolist().map((row) => row.map(Number)),
  image: image_embeds.tolist(), text: text_embeds.tolist(), short: short.text_embeds.tolist(),
  scores: guesses.map((guess) => guess.score),
}));
"""


@pytest.fixture(scope="module")
def node_modules() -> Path:
    """transformers.js outside the checkout, installed once; no Node, npm or network: skipped."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("needs Node.js with npm")
    target = home() / "node" / f"transformers.js-{VERSION}"
    with alone(home() / "node", "transformers.js", wait=True):
        if not target.is_dir():
            with whole_folder(target) as folder:
                # its graphs run on the libraries inside the packages; scripts would fetch others from elsewhere
                command = ["npm", "install", f"{PACKAGE}@{VERSION}", "--ignore-scripts", "--no-audit", "--no-fund"]
                try:
                    done = subprocess.run(
                        [*command, "--loglevel", "error"], cwd=folder, capture_output=True, text=True, timeout=240
                    )
                except subprocess.TimeoutExpired:
                    pytest.skip("npm did not fetch transformers.js in 240 s")
                if done.returncode:
                    pytest.skip(f"npm cannot fetch transformers.js: {done.stderr[-300:]}")
    return target / "node_modules"


def run(node_modules: Path, scratch: Path, folder: Path, pictures: list[Path]) -> dict[str, Tensor]:
    """What transformers.js makes of pictures and `TEXTS`."""
    (scratch / "node_modules").symlink_to(node_modules)
    (scratch / "encode.mjs").write_text(SCRIPT, encoding="utf-8")
    lists = [json.dumps(values) for values in ([str(path) for path in pictures], TEXTS, CLASSES)]
    command = ["node", "encode.mjs", f"{folder.parent}/", folder.name, *lists, "out.json"]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((scratch / "out.json").read_text())
    return {name: torch.tensor(values) for name, values in found.items()}


def web_folder(student: Path, folder: Path) -> Path:
    """transformers' folder with the graphs in it."""
    parts = ("vision", "text", "both")
    export.to_onnx(student, folder / "onnx", parts, precisions=("fp32",), measure=False)
    export.to_transformers(student, folder / "web", onnx=folder / "onnx")
    return folder / "web"


def draw(path: Path, width: int, height: int) -> Path:
    coarse = Image.fromarray(np.random.default_rng(width).integers(0, 256, (5, 5, 3), dtype=np.uint8))
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


def compare(student: Any, found: dict[str, Tensor], pictures: list[Path]) -> tuple[Tensor, Tensor]:
    """Largest difference of pixels, and the cosine of embeddings, of each picture from the file on."""
    torch.testing.assert_close(normalize(found["text"], dim=-1), student.encode_text(TEXTS), atol=1e-5, rtol=0)
    torch.testing.assert_close(found["short"], found["text"], atol=1e-5, rtol=0)  # padded to the longest, or wholly
    torch.testing.assert_close(
        normalize(found["image"], dim=-1), student.encode_image(found["pixels"]), atol=1e-5, rtol=0
    )
    images = [Image.open(path) for path in pictures]
    prompts = student.encode_text([f"This is a photo of {name}" for name in CLASSES])
    scores = (student.scale * student.encode_image(images[:1]) @ prompts.T).softmax(1)[0]
    torch.testing.assert_close(found["scores"], scores, atol=1e-4, rtol=0)
    ours = torch.stack([student.preprocess(image) for image in images])
    cosines = (normalize(found["image"], dim=-1) * student.encode_image(images)).sum(1)
    print("JS", (found["pixels"] - ours).abs().amax((1, 2, 3)), cosines)
    return (found["pixels"] - ours).abs().amax((1, 2, 3)), cosines


@pytest.mark.parametrize("name", ["web", "onnx"])
def test_a_tiny_student(node_modules: Path, tmp_path: Path, name: str) -> None:
    student = tiny.encoder(text_cfg=tiny.ARCHITECTURE["text_cfg"] | {"context_length": 14})
    folder = web_folder(towers.save(student, tmp_path / "s"), tmp_path).with_name(name)  # what to_onnx wrote opens too
    side = student.preprocess_config.size[0]
    pictures = [draw(tmp_path / "own.png", side, side), draw(tmp_path / "large.png", 90, 70)]
    found = run(node_modules, tmp_path, folder, pictures)
    expected = student.tokenize(TEXTS)
    assert torch.equal(torch.where(expected == 0, 49407, expected), found["ids"])  # padded with the end, not with 0
    pixels, cosines = compare(student, found, pictures)
    assert pixels[0] <= 1e-6  # no resize: the same from the file on
    assert cosines[0] >= 1 - 1e-5
    assert pixels[1] > 0.01  # sharp resizes without antialiasing; the cosine says what it costs
    assert cosines[1] > 0.99


def test_a_trained_student(node_modules: Path, tmp_path: Path, root: Path) -> None:
    """The same with a student that a demo run on this machine distilled, where there is one."""
    places = [*(root / "runs").glob("**/distil/*/student"), *home().glob("*/distil/*/student")]
    trained = next((place for place in sorted(places) if is_clip_vit(towers.load(place))), None)
    if trained is None:
        pytest.skip("no distilled CLIP ViT lies in runs/ or the cache")
    student = towers.load(trained)
    side = student.preprocess_config.size[0]
    pictures = [draw(tmp_path / "own.png", side, side), draw(tmp_path / "large.png", 4 * side, 3 * side)]
    found = run(node_modules, tmp_path, web_folder(trained, tmp_path), pictures)
    pixels, cosines = compare(student, found, pictures)
    assert pixels[0] <= 1e-6
    assert cosines[0] >= 1 - 1e-5
    assert cosines[1] > 0.95
