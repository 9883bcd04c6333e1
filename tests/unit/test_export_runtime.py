# SPDX-License-Identifier: Apache-2.0
"""The ONNX runtime: its text cleaning and tokens, its pixels, its batching, and the packages it does without."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer, get_clean_fn
from PIL import Image
from tiny import exported
from tokenizers import Tokenizer

import export
from aced_sdk.towers import Preprocess
from export.onnx.tokenizer import clip_tokenizer
from export.runtime.cleaning import CLEANINGS, clean_text
from export.runtime.parity import TEXTS, pictures
from export.runtime.pictures import Geometry

FRESH = """
import sys, time
import export
assert "onnxruntime" not in sys.modules
encoder = export.OnnxEncoder(sys.argv[1])
images = encoder.encode_image([sys.argv[2]] * 2)
texts = encoder.encode_text(["a red square"])
heavy = {"torch", "transformers", "open_clip", "onnx", "pydantic", "timm", "yaml"} & set(sys.modules)
own = {name.split(".")[1] for name in sys.modules if name.startswith("aced_sdk.")}
heavy |= own - {"errors", "files", "processing"}
print(images.shape, texts.shape, sorted(heavy))
"""

SIMPLE = SimpleTokenizer(context_length=16)
# Scripts whose letters all Unicode tables in use agree on, and what captions and bad encodings bring along.
ALPHABET = st.one_of(
    st.characters(min_codepoint=0x20, max_codepoint=0x17F),
    st.sampled_from(
        "'’‘“”\"&;#<>/_-.,!?…  \t\n\r\x0b\x1b\x85\xa0\u200b\u200d\u2028\u3000ﬀﬁ①²ＦｕｌｌαβΣςжЯ猫写真カナ고양이قطة😀🎉❤️"
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("export"))


def test_fresh_process_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    pictures()[0].save(picture)
    command = [sys.executable, "-c", FRESH, str(folder), str(picture)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.stdout.strip() == "(2, 8) (1, 8) []", result.stderr


def test_import_is_light() -> None:
    code = "import sys, export; export.OnnxEncoder; print(sorted({'torch', 'pydantic'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "[]"
    assert {"OnnxEncoder", "to_onnx", "to_transformers", "verify", "ExportReport"} <= set(dir(export))
    with pytest.raises(AttributeError, match="no attribute 'to_jax'"):
        _ = export.to_jax


@settings(max_examples=300, deadline=None)
@given(st.text(ALPHABET, max_size=40), st.sampled_from(CLEANINGS))
def test_cleaning_equals_open_clip(text: str, cleaning: str) -> None:
    from ftfy import TextFixerConfig, fix_text

    undamaged = fix_text(text, TextFixerConfig(fix_encoding=False))
    if fix_text(text) == undamaged:  # repair of wrong encodings is the one step left out
        assert clean_text(text, cleaning) == get_clean_fn(cleaning)(text)


@pytest.mark.parametrize(
    "text",
    [
        *TEXTS,
        "&NTILDE; &amp;amp;lt; &#39;x&#x2019; &nosuch; &ETH;",
        "a<b &eacute;\n&eacute;",
        "\ud83d\udca9 \ud83d",
        "ŉ ﬅ Ǆ",
    ],
)
def test_cleaning_of_known_texts(text: str) -> None:
    assert clean_text(text, "lower") == get_clean_fn("lower")(text)


def test_wrongly_decoded_text_is_left_alone() -> None:
    assert clean_text("CafÃ©", "lower") == "cafã©"


@pytest.fixture(scope="module")
def tokens() -> object:
    tokenizer = clip_tokenizer(SIMPLE)
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16, pad_id=0, pad_token="!")
    return lambda text: tokenizer.encode(clean_text(text, "lower")).ids


@settings(max_examples=300, deadline=None)
@given(text=st.text(ALPHABET, max_size=40))
def test_tokens_equal_open_clip(text: str, tokens) -> None:  # type: ignore[no-untyped-def]
    from ftfy import TextFixerConfig, fix_text

    if fix_text(text) == fix_text(text, TextFixerConfig(fix_encoding=False)):
        assert tokens(text) == SIMPLE([text])[0].tolist()


@pytest.mark.parametrize(
    "text",
    [
        *TEXTS, "x" * 300, "1234567890", "don't DON'T 's", "<START_OF_TEXT>", "½ ⅷ ² ①",
        "it'ſ 'ſſ 'S 'Sſ", "<ſtart_of_text> <ﬅart_of_text> <End_of_text>", "'ﬆ 'ẗ '\u212a \u212am 'İ 'ı 'ß",
        "'Re're'VE'vE'LL'lL'M'D",
    ],
)  # fmt: skip
def test_tokens_of_known_texts(text: str, tokens) -> None:  # type: ignore[no-untyped-def]
    assert tokens(text) == SIMPLE([text])[0].tolist()


def test_tokenizer_files_suit_javascript(folder: Path) -> None:
    """Its regular expressions have no flags inside."""
    assert "(?" not in json.dumps(json.loads((folder / "tokenizer.json").read_text())["pre_tokenizer"])


def test_raw_texts_are_cleaned_by_the_file(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ["  Two\n RED\tapples!", "it's"]:
        assert tokenizer.encode(text).ids == export.OnnxEncoder(folder).tokenize([text])[0].tolist()


def test_graphs_pad_short_texts_and_refuse_long_ones(folder: Path) -> None:
    encoder = export.OnnxEncoder(folder)
    session = onnxruntime.InferenceSession(str(folder / "onnx/text_model.onnx"))
    assert session.get_inputs()[0].shape == ["text_batch_size", "sequence_length"]
    ids = encoder.tokenize(["a cat", "a red boat", "tree"])
    (whole,) = session.run(None, {"input_ids": ids})
    np.testing.assert_allclose(whole, encoder.run("text", ids), atol=1e-6)
    (short,) = session.run(None, {"input_ids": ids[:, :5]})  # the longest has five with both ends
    np.testing.assert_allclose(short, whole, atol=1e-6)
    with pytest.raises(export.EncoderError, match="cannot run the text graph"):
        encoder.run("text", np.pad(ids, ((0, 0), (0, 1))))


@pytest.mark.parametrize("size", [(24, 24), (24, 32)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["squash", "shortest", "longest"])
def test_pixels_equal_open_clip(resize_mode: str, interpolation: str, size: tuple[int, int]) -> None:
    preprocess = Preprocess(
        size=size, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation=interpolation, resize_mode=resize_mode, fill_color=7
    )
    resample = 3 if interpolation == "bicubic" else 2
    geometry = Geometry(*size, preprocess.mean, preprocess.std, resample, resize_mode, 7)
    resize = preprocess.resizer()
    for image in [*pictures(), Image.new("1", (3, 90), 1), Image.new("I;16", (20, 31), 300)]:
        np.testing.assert_array_equal(geometry.pixels(image), resize(image).permute(1, 2, 0).numpy())


def test_every_form_of_a_picture(folder: Path, tmp_path: Path) -> None:
    encoder = export.OnnxEncoder(folder)
    image = pictures()[0]
    image.save(tmp_path / "p.png")
    stream = io.BytesIO()
    image.save(stream, "PNG")
    forms = [image, tmp_path / "p.png", str(tmp_path / "p.png"), stream.getvalue(), np.asarray(image)]
    embeddings = encoder.encode_image(forms, batch_size=2)
    np.testing.assert_allclose(embeddings, np.repeat(embeddings[:1], 5, axis=0), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    assert embeddings.dtype == np.float32


def test_batching_and_empty_input(folder: Path) -> None:
    encoder = export.OnnxEncoder(folder, threads=1)
    images = pictures()
    whole = encoder.encode_image(images)
    np.testing.assert_allclose(encoder.encode_image(images, batch_size=3), whole, atol=1e-6)
    assert encoder.encode_image([]).shape == encoder.encode_text([]).shape == (0, 8)
    np.testing.assert_allclose(encoder.encode_text("one"), encoder.encode_text(["one"]), atol=1e-6)
    many = iter(encoder.encode_text([f"text {n}" for n in range(9)], batch_size=4))
    np.testing.assert_allclose(next(many), encoder.encode_text(["text 0"])[0], atol=1e-6)


def test_threads_share_an_encoder(folder: Path) -> None:
    """Threads that ask for different things at once get what they would get alone."""
    encoder = export.OnnxEncoder(folder, threads=1)
    images = [np.asarray(image.convert("RGB")) for image in pictures()]

    def work(n: int) -> tuple[np.ndarray, np.ndarray]:
        size = 1 + n % len(images)
        return encoder.encode_image(images[-size:], batch_size=3), encoder.encode_text(TEXTS[-size:], batch_size=2)

    want = [work(n) for n in range(len(images))]
    with ThreadPoolExecutor(8) as pool:
        for n, (image, text) in enumerate(pool.map(work, range(160))):
            np.testing.assert_allclose(image, want[n % len(images)][0], atol=1e-6)
            np.testing.assert_allclose(text, want[n % len(images)][1], atol=1e-6)


def test_no_graph_call_is_larger_than_the_bound(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = export.OnnxEncoder(folder, threads=1, max_batch=2)
    want = export.OnnxEncoder(folder, threads=1).encode_text(TEXTS)
    sizes: list[int] = []
    run = encoder.run
    monkeypatch.setattr(encoder, "run", lambda part, inputs: (sizes.append(len(inputs)), run(part, inputs))[1])
    np.testing.assert_allclose(encoder.encode_text(TEXTS), want, atol=1e-6)
    assert max(sizes) == 2
    with pytest.raises(export.InputError, match="a batch of 3 was given, the bound is 2"):
        run("text", encoder.tokenize(TEXTS[:3]))


def test_warm_up_runs_each_graph(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = export.OnnxEncoder(folder, threads=1)
    calls: list[tuple[str, int]] = []
    run = encoder.run
    monkeypatch.setattr(encoder, "run", lambda part, inputs: (calls.append((part, len(inputs))), run(part, inputs))[1])
    encoder.warm_up((1, 4))
    assert calls == [("vision", 1), ("text", 1), ("vision", 4), ("text", 4)]


def test_one_tower_alone(folder: Path) -> None:
    both, text = export.OnnxEncoder(folder), export.OnnxEncoder(folder, parts=("text",))
    assert (both.parts, text.parts) == (("vision", "text"), ("text",))
    np.testing.assert_allclose(text.encode_text(TEXTS), both.encode_text(TEXTS), atol=1e-6)
    with pytest.raises(export.FolderError, match="no vision graph"):
        text.encode_image([pictures()[0]])
    text.warm_up()
