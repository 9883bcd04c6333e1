# SPDX-License-Identifier: Apache-2.0
"""Small files of models, exports and conversations that took minutes or all memory, or ended the process."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from PIL import Image
from safetensors.torch import save_file
from tiny import ARCHITECTURE, encoder

import export
import vlm
from aced_sdk import towers
from aced_sdk.config import Student
from aced_sdk.errors import ConfigError, ModelError
from aced_sdk.files import ReadError, sha256
from aced_sdk.processing.plain import read_tokenizer
from export.runtime.graph_types import NAMED_INPUTS
from tests.security.exports import (
    FLOAT,
    VISION,
    change_json,
    constant,
    embed,
    embed_text,
    model_of,
    pristine_export,
    put,
)
from tests.security.folders import change, with_text, write
from tests.security.sandbox import run
from tests.security.test_fourth_round_models import fits, load
from tests.security.test_service_attacks import ask, serving
from tests.security.test_vlm_gguf import LLAMA, changed, gguf, tensor
from tests.security.vlm_parts import edit, foreign, open_all, parts, refused
from vlm.model.gguf_header import check_gguf

__all__ = ["parts"]
Parts = dict[str, Path]
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine_export(tmp_path_factory), tmp_path / "o"))


# -- graphs -----------------------------------------------------------------------------------------------------------

SPLIT = helper.make_node("Split", ["reals"], ["", "half"], axis=0, num_outputs=2)
REALS = helper.make_tensor("reals", FLOAT, [2], [1.0, 1.0])
DIVISION = helper.make_node("Div", ["whole", "whole"], ["quotient"])
CAST = helper.make_node("Cast", ["quotient"], ["last"], to=FLOAT)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([helper.make_node("Max", ["zeros", ""], ["last"])], "Max of an input without a name"),
        ([helper.make_node("Sum", ["zeros", ""], ["last"])], "Sum of an input without a name"),
        ([helper.make_node("Einsum", ["zeros", ""], ["last"], equation="ab,ab->ab")], "Einsum of an input"),
        ([helper.make_node("LayerNormalization", ["zeros", "row", ""], ["last"])], "LayerNormalization of an input"),
        ([SPLIT, helper.make_node("Gemm", ["n", "n", ""], ["whole"]), DIVISION, CAST], "divides what may be integers"),
    ],
    ids=["max", "sum", "einsum", "norm", "division"],
)
def test_inputs_without_a_name(folder: Path, nodes: list[Any], words: str) -> None:
    weights = [REALS, constant("n", [[1]])]
    put(folder, VISION, model_of(nodes, weights).SerializeToString())
    assert run(embed, str(folder)).refused(words)


def test_operators_with_any_number_of_inputs_are_known() -> None:
    variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic
    known = {
        schema.name
        for schema in onnx.defs.get_all_schemas_with_history()
        if schema.domain == "" and any(given.option == variadic for given in schema.inputs)
    }
    assert known - {"Loop", "Scan", "SequenceMap"} <= {name.decode() for name in NAMED_INPUTS}  # those have subgraphs


# -- tokenizers -------------------------------------------------------------------------------------------------------


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern or {"String": "b"}, "content": content}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def word_piece(letters: int) -> dict[str, Any]:
    plain = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": {"a": 0, "##a": 1}}
    return plain | {"max_input_chars_per_word": letters}


def unigram(letters: int) -> dict[str, Any]:
    return {"type": "Unigram", "unk_id": 0, "vocab": [["a" * n, -1.0 - n] for n in range(1, letters + 1)]}


def added(content: str) -> dict[str, Any]:
    return {"id": 99, "content": content, "special": True}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"normalizer": sequence({"type": "NFKD"}, replace("\U0001f600" * 60, Regex="."))}, "growth in Replace"),
        ({"normalizer": replace("\U0001f600" * 255)}, "growth in Replace"),
        ({"model": word_piece(1000)}, "max_input_chars_per_word"),
        ({"model": word_piece(100), "normalizer": replace("a" * 250)}, "growth for words or tokens"),
        ({"model": unigram(1024), "normalizer": replace("a" * 255)}, "growth for words or tokens"),
        ({"added_tokens": [added("<" + "i" * 60_000 + ">")]}, "added tokens"),
        ({"truncation": {"max_length": 4096, "stride": 4093}}, "stride"),
    ],
    ids=["nfkd", "bytes", "word", "words", "tokens", "added", "stride"],
)
def test_steps_of_a_tokenizer(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    plain = {"model": word_piece(100), "normalizer": None, "added_tokens": []}
    write(tmp_path / "tokenizer.json", plain | values)
    with pytest.raises(ReadError, match=words):
        read_tokenizer(tmp_path / "tokenizer.json")


def charsmap(longest: int) -> str:
    return base64.b64encode(struct.pack("<I", 4) + bytes(4) + b"a" * longest + b"\0").decode()


@pytest.mark.parametrize(
    "values",
    [
        {  # ALBERT's
            "model": unigram(16),
            "normalizer": sequence(
                replace('"', String="``"),
                {"type": "NFKD"},
                {"type": "StripAccents"},
                {"type": "Lowercase"},
                {"type": "Precompiled", "precompiled_charsmap": charsmap(33)},
            ),
        },
        {  # T5's
            "model": unigram(16),
            "normalizer": sequence(
                {"type": "Precompiled", "precompiled_charsmap": charsmap(33)}, replace("\u2581", Regex=" {2,}")
            ),
        },
        {"model": word_piece(100), "normalizer": sequence({"type": "NFKC"}, {"type": "BertNormalizer"})},
        {"truncation": {"max_length": 384, "stride": 128}},  # of question answering
    ],
    ids=["albert", "t5", "bert", "stride"],
)
def test_tokenizers_of_today_are_read(tmp_path: Path, values: dict[str, Any]) -> None:
    write(tmp_path / "tokenizer.json", {"model": word_piece(100)} | values)
    assert read_tokenizer(tmp_path / "tokenizer.json")


def test_an_exported_tokenizer_has_no_stride(folder: Path) -> None:
    change_json(folder, "tokenizer.json", lambda values: values["truncation"].update(stride=1))
    assert run(embed_text, str(folder)).refused("stride")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"additional_special_tokens": [f"<{n}>" for n in range(10_001)]}, "more than 10,000 tokens"),
        ({"extra_special_tokens": {f"t{n}_token": f"<{n}>" for n in range(10_001)}}, "more than 10,000 tokens"),
        ({"added_tokens_decoder": {str(n): added(f"<{n}>") for n in range(10_001)}}, "more than 10,000 tokens"),
        ({"image_token": "i" * 2000}, "more than 1,024 characters"),
        ({"eos_token": {"content": "i" * 2000}}, "more than 1,024 characters"),
        ({"extra_special_tokens": {"image_token": "i" * 2000}}, "more than 1,024 characters"),
        ({"added_tokens_decoder": {"7": added("i" * 2000)}}, "more than 1,024 characters"),
    ],
    ids=["list", "mapping", "decoder", "token", "content", "named", "decoded"],
)
def test_special_tokens(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    model = fits(tmp_path / "s", with_text(tmp_path / "s/t"))
    change(model / "t/tokenizer_config.json", **settings)
    assert run(load, model).refused("tokenizer_config.json", words)


def test_added_tokens_are_not_long(tmp_path: Path) -> None:
    model = fits(tmp_path / "s", with_text(tmp_path / "s/t"))
    write(model / "t/added_tokens.json", {"i" * 2000: 9})
    assert run(load, model).refused("added_tokens.json", "more than 1,024 characters")


# -- vision-language models -------------------------------------------------------------------------------------------


def many_tokens(model: Path) -> None:
    edit(model / "processor_config.json", "patch_size", 1)
    edit(model / "preprocessor_config.json", "size", {"height": 2048, "width": 2048})
    edit(model / "preprocessor_config.json", "do_center_crop", False)


def not_resized(model: Path) -> None:
    edit(model / "processor_config.json", "patch_size", 1)
    for name in ("do_resize", "do_center_crop"):
        edit(model / "preprocessor_config.json", name, False)


def long_token(model: Path) -> None:
    name = "<" + "i" * 100 + ">"
    edit(model / "processor_config.json", "image_token", name)
    values = (model / "tokenizer.json").read_text().replace('"<image>"', json.dumps(name))
    (model / "tokenizer.json").write_text(values)


def tall(model: Path) -> None:
    edit(model / "preprocessor_config.json", "size", {"max_height": 16_384, "max_width": 16_384})


def sparse(model: Path) -> None:
    save_file({"x": torch.zeros(1)}, model / "model.safetensors", {"format": "pt"})
    (model / "more.safetensors").touch()
    os.truncate(model / "more.safetensors", 200 * 2**30)
    sizes = {"num_hidden_layers": 8, "hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32}
    for name, value in sizes.items():
        edit(model / "config.json", f"text_config.{name}", value)


def long_header(model: Path) -> None:
    (model / "more.safetensors").write_bytes(struct.pack("<Q", 2**25) + b"{")


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "many tokens": (many_tokens, "may become 4,194,304 tokens"),
    "a long token": (long_token, "image_token has 102 characters"),
    "a tall size": (tall, "max_height"),
    "a sparse file": (sparse, "describes more than 67,1"),
    "a long header": (long_header, "the header of"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_small_files_of_a_model(parts: Parts, tmp_path: Path, name: str) -> None:
    spoil, words = CHANGES[name]
    spoil(foreign(parts["merged"], tmp_path / "m"))
    refused([("merged", tmp_path / "m")], parts, words)


def test_large_pictures_that_are_not_resized_are_not_written_as_millions_of_tokens(
    parts: Parts, tmp_path: Path
) -> None:
    not_resized(foreign(parts["merged"], tmp_path / "m"))
    outcome = run(_ask_of_a_large_picture, tmp_path / "m")
    assert outcome.refused("a picture of 3000 x 3000 may become 9,000,000 tokens")


def _ask_of_a_large_picture(model: Path) -> None:
    loaded, processor = vlm.load(model)
    vlm.answer(loaded, processor, [Image.new("RGB", (3000, 3000))], ["what ?"], 2)


def test_an_adapters_header_has_a_bound(parts: Parts, tmp_path: Path) -> None:
    model = foreign(parts["apart"], tmp_path / "m")
    (model / "adapter/adapter_model.safetensors").write_bytes(struct.pack("<Q", 2**25) + b"{")
    refused([("apart", model)], parts, "the header of")


def test_models_as_they_are_saved_open(parts: Parts, tmp_path: Path) -> None:
    folders = [(kind, foreign(parts[kind], tmp_path / kind)) for kind in ("merged", "apart", "language", "vision")]
    assert run(open_all, folders, parts).returned() == [""] * 4


def test_tensors_of_a_gguf_file_fit_its_blocks(tmp_path: Path) -> None:
    for blocks, count in ((1, 129), (1024, 8193)):
        content = gguf(changed("llama.block_count", blocks), [tensor(f"x{n}", (1,)) for n in range(count)])
        (tmp_path / "m.gguf").write_bytes(content + bytes(2**20))
        with pytest.raises(ReadError, match=f"it has {count} tensors"):
            check_gguf(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(gguf(LLAMA, [tensor(f"x{n}", (1,)) for n in range(128)]) + bytes(2**20))
    check_gguf(tmp_path / "m.gguf")


def test_a_file_that_is_one_hole_has_no_digest(tmp_path: Path) -> None:
    (tmp_path / "hole").touch()
    os.truncate(tmp_path / "hole", 200 * 2**30)
    with pytest.raises(ReadError, match="sparse file"):
        sha256(tmp_path / "hole")


# -- conversations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"answers": ["red " * 2**19]}, "more than 1,048,576 characters"),
        ({"answers": ["\ud800"]}, "half a character"),
        ({"kind": "\udfff"}, "half a character"),
        ({"images": np.zeros(3)}, "not in the form of messages"),
    ],
    ids=["long", "answers", "kind", "array"],
)
def test_right_answers_and_kinds(fields: dict[str, Any], words: str) -> None:
    turns = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "red"}]
    plain = {"messages": turns}
    read = vlm.load_messages([plain, plain | fields], max_unusable_fraction=0.5)
    assert len(read) == 1
    assert words in read.skipped[0]


def test_captions_of_a_picture_are_not_too_long_together(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    images = [{"id": n, "file_name": "a.png"} for n in (1, 2)]
    captions = [{"image_id": 1, "caption": "red"}] + [{"image_id": 2, "caption": "red " * 200_000}] * 2
    write(tmp_path / "c.json", {"images": images, "annotations": captions})
    read = vlm.load_coco_captions(tmp_path / "c.json", tmp_path, max_unusable_fraction=0.5)
    assert len(read) == 1
    assert "more than 1,048,576 characters" in read.skipped[0]


# -- dual encoders and exports ----------------------------------------------------------------------------------------


def test_an_mlp_over_many_tokens_has_a_bound() -> None:
    sizes = {"image_size": 128, "patch_size": 1, "width": 1024, "layers": 1, "head_width": 1024, "mlp_ratio": 64}
    with pytest.raises(ModelError, match="values in one layer"):
        towers.build(Student(architecture=ARCHITECTURE | {"vision_cfg": sizes}), 0)


def test_towers_with_convolutions_of_three_dimensions_are_built() -> None:
    sizes = {"timm_model_name": "lambda_resnet26t", "image_size": 256}
    made = towers.build(Student(architecture=ARCHITECTURE | {"vision_cfg": sizes}), 0)
    assert made.encode_image([Image.new("RGB", (20, 20))]).isfinite().all()


def test_convolutions_have_their_quick_layout() -> None:
    sizes = {"timm_model_name": "test_resnet", "image_size": 64}
    visual = towers.build(Student(architecture=ARCHITECTURE | {"vision_cfg": sizes}), 0).model.visual
    convolutions = [module for module in visual.modules() if isinstance(module, torch.nn.Conv2d)]
    assert convolutions
    for convolution in convolutions:
        last = convolution.in_channels != 3
        layout = torch.channels_last if last else torch.contiguous_format
        assert convolution.weight.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("license", ["\ud800", "mit\n---\n# evil", "mit" * 100])
def test_a_licence_is_a_short_name(tmp_path: Path, license: str) -> None:
    model = towers.save(encoder(), tmp_path / "s")
    values = json.loads((model / "aced.json").read_text())
    write(model / "aced.json", values | {"license": license})
    with pytest.raises(ModelError, match=r"aced\.json cannot be read"):
        towers.load(model)
    with pytest.raises(ConfigError, match="license"):
        towers.save(encoder(), tmp_path / "t", license=license)


def test_facts_that_json_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="JSON cannot hold the facts"):
        towers.save(encoder(), tmp_path / "s", facts={"a": object()})


@pytest.mark.parametrize("field", ["calibration", "pictures"])
def test_pictures_of_32_bits_are_named(tmp_path: Path, field: str) -> None:
    Image.new("F", (8, 8)).save(tmp_path / "f.tiff")
    model = towers.save(encoder(), tmp_path / "s")
    with pytest.raises(export.ExportError, match=rf"{field}\[0\].*32 bits"):
        export.to_onnx(model, tmp_path / "o", **{field: [tmp_path / "f.tiff"]})


# -- the service ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [b"/image", b"/nowhere"])
def test_tiny_chunks_are_refused(folder: Path, path: bytes) -> None:
    with serving(export.OnnxEncoder(folder)) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(10)
        connection.sendall(b"POST " + path + b" HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            connection.sendall(b"1\r\na\r\n" * 10_000_000)
        assert ask(port, "/health")[0] == 200


def test_bodies_in_chunks_of_a_usual_size_are_read(folder: Path) -> None:
    with serving(export.OnnxEncoder(folder)) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(10)
        connection.sendall(b"POST /text HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b"40\r\n" + b"a" * 64 + b"\r\n" + b"0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
