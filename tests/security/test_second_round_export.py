# SPDX-License-Identifier: Apache-2.0
"""Attacks of a second round on models, exports, pictures and data: each is refused, fast and in little memory."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import load_file, save_file

import vlm
from aced_sdk.errors import AcedError, DataError
from aced_sdk.files import sha256
from aced_sdk.processing import plain
from aced_sdk.processing.plain import read_tokenizer
from export import EncoderError, OnnxEncoder, ZeroShot, vlm_vision_to_onnx
from export.runtime.arrays import read_arrays
from export.runtime.errors import FolderError
from export.runtime.graph_file import check_graph_file
from export.runtime.manifest import manifest_digest
from tests.security.sandbox import run
from tests.security.vlm_parts import edit, foreign, open_part, parts, refused
from tests.tiny import exported
from vlm.data.pictures import pixels_of
from vlm.model.gguf_header import check_gguf

__all__ = ["parts"]

# -- tokenizers ---------------------------------------------------------------------------------------------------


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _sequence(kind: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", kind: steps}


LONG = "\ufdfa"  # one character, whose compatibility form has 18, four of them LAM
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
LETTERS = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
MARKS = [{"type": "Metaspace", "replacement": mark, "prepend_scheme": "always", "split": False} for mark in "xy"]
DOUBLED = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2,
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {},
}
GROWING: dict[str, dict[str, Any]] = {
    "prepend": {"normalizer": {"type": "Prepend", "prepend": "a " * 1_000_000}},
    "between": {"normalizer": _sequence("normalizers", [_replace({"Regex": ""}, "a")] * 34)},
    "bytes": {"normalizer": _sequence("normalizers", [{"type": "ByteLevel"}] * 34)},
    "pre-bytes": {"pre_tokenizer": _sequence("pretokenizers", [BYTES] * 34)},
    "compatibility": {
        "normalizer": _sequence("normalizers", [_replace({"String": "\u0644"}, LONG), {"type": "NFKD"}] * 20)
    },
    "marks": {"pre_tokenizer": _sequence("pretokenizers", [LETTERS, MARKS[0], LETTERS, MARKS[1]] * 15)},
    "doubled": {"post_processor": _sequence("processors", [DOUBLED] * 30)},
    "decoder": {"decoder": _sequence("decoders", [_replace({"Regex": ""}, "a")] * 34)},
    "dropout": {"model.dropout": 0.5},
}


def _spoil(path: Path, changes: dict[str, Any]) -> None:
    for where, value in changes.items():
        edit(path, where, value)


def test_tokenizers_of_language_models_cannot_blow_up_a_text(tmp_path: Path, parts: dict[str, Path]) -> None:
    folders = [("language", foreign(parts["language"], tmp_path / name)) for name in GROWING]
    for _, folder in folders:
        _spoil(folder / "tokenizer.json", GROWING[folder.name])
    refused(folders, parts, "no tokenizer that can be used")


@pytest.mark.parametrize("name", ["compatibility", "marks", "dropout"])
def test_tokenizers_of_exports_cannot_blow_up_a_text(tmp_path: Path, parts: dict[str, Path], name: str) -> None:
    shutil.copy(parts["language"] / "tokenizer.json", tmp_path)
    _spoil(tmp_path / "tokenizer.json", GROWING[name])
    assert run(read_tokenizer, tmp_path / "tokenizer.json").refused("no tokenizer that can be used")


# -- model folders ------------------------------------------------------------------------------------------------


def test_a_processor_cannot_name_a_model_outside(tmp_path: Path, parts: dict[str, Path]) -> None:
    elsewhere = {"audio_tokenizer_class": "LlamaForCausalLM", "audio_tokenizer_name_or_path": str(parts["language"])}
    first, second = (foreign(parts["merged"], tmp_path / name) for name in ("inside", "beside"))
    edit(first / "processor_config.json", "audio_tokenizer", elsewhere)
    (second / "audio_tokenizer_config.json").write_text(json.dumps(elsewhere))
    refused([("merged", first), ("merged", second)], parts, "audio")


def test_configs_that_break_later_are_refused(tmp_path: Path, parts: dict[str, Path]) -> None:
    names = [{"name": "default", "template": "x"}, {"name": "../../../outside", "template": "x"}]
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 1.0, "original_max_position_embeddings": 2}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [1.0] * 3}
    cases: list[tuple[str, str, str, Any]] = [
        ("merged", "config.json", "_auto_class", "AutoConfig"),
        ("merged", "config.json", "text_config.rms_norm_eps", float("nan")),
        ("merged", "config.json", "text_config.rope_parameters", rope),
        ("language", "tokenizer_config.json", "chat_template", names),
        ("vision", "config.json", "return_dict", False),
        ("apart", "adapter/adapter_config.json", "lora_alpha", float("nan")),
    ]
    folders = []
    for number, (kind, file, where, value) in enumerate(cases):
        folder = foreign(parts[kind], tmp_path / str(number))
        edit(folder / file, where, value)
        folders.append((kind, folder))
    refused(folders, parts)


def test_answers_are_texts_whatever_the_generation_config_asks(tmp_path: Path, parts: dict[str, Path]) -> None:
    folder = foreign(parts["merged"], tmp_path / "model")
    edit(folder / "generation_config.json", "return_dict_in_generate", True)
    run(open_part, "merged", folder, parts).returned()


def test_a_template_cannot_write_far_more_than_the_conversation(tmp_path: Path, parts: dict[str, Path]) -> None:
    folder = foreign(parts["merged"], tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ 'a b ' * 4000000 }}<image>")
    refused([("merged", folder)], parts, "much longer than the conversation")


def test_image_processors_cannot_blow_up_pictures(tmp_path: Path, parts: dict[str, Path]) -> None:
    big = {"height": 2048, "width": 2048}
    cases: list[dict[str, Any]] = [
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 16}, "crop_pct": 0.0004},
        {"image_processor_type": "GotOcr2ImageProcessor", "size": big, "crop_to_patches": True, "max_patches": 64},
        {"image_processor_type": "TimmWrapperImageProcessor", "pretrained_cfg": {"input_size": [3, 40_000, 40_000]}},
    ]
    folders = [("merged", foreign(parts["merged"], tmp_path / str(number))) for number in range(len(cases))]
    for (_, folder), case in zip(folders, cases, strict=True):
        _spoil(folder / "preprocessor_config.json", case)
    refused(folders, parts)


def _pad_or_keep(kind: str, options: dict[str, Any], size: tuple[int, int]) -> None:
    import transformers

    pixels_of(getattr(transformers, kind)(**options), [Image.new("RGB", size)])


@pytest.mark.parametrize(
    ("kind", "options", "size"),
    [
        ("LlavaImageProcessor", {"do_pad": True}, (31_000, 4)),
        ("CLIPImageProcessor", {"do_resize": False, "do_center_crop": False}, (6000, 6000)),
    ],
)
def test_pictures_that_a_processor_would_blow_up(kind: str, options: dict[str, Any], size: tuple[int, int]) -> None:
    outcome = run(_pad_or_keep, kind, options, size)
    assert outcome.refused("too large, or too long and thin")
    assert outcome.mib < 400


def test_a_vision_graph_is_never_made_of_new_weights(tmp_path: Path, parts: dict[str, Path]) -> None:
    lost, huge = (foreign(parts["merged"], tmp_path / name) for name in ("lost", "huge"))
    for folder, part in ((lost, "multi_modal_projector"), (huge, "language_model")):
        weights = load_file(folder / "model.safetensors")
        kept = {name: tensor for name, tensor in weights.items() if part not in name}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
    wide = {"hidden_size": 16_384, "intermediate_size": 65_536, "num_hidden_layers": 60, "num_attention_heads": 64}
    _spoil(huge / "config.json", {f"text_config.{name}": value for name, value in wide.items()})
    assert run(vlm_vision_to_onnx, lost, tmp_path / "o").refused("lacks 4 of the model's tensors")
    assert run(vlm_vision_to_onnx, huge, tmp_path / "o").refused("more than")


def _gguf(arrays: int, length: int) -> bytes:
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, arrays)
    for number in range(arrays):
        content += struct.pack("<Q", 3) + b"x.%d" % number + struct.pack("<IIQ", 9, 0, length) + bytes(length)
    return content


def test_many_values_in_a_gguf_header(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(_gguf(8, 500_000))
    assert run(check_gguf, tmp_path / "a.gguf").refused("values in its arrays")


# -- pictures -----------------------------------------------------------------------------------------------------


def _encoded(kind: str, size: tuple[int, int] = (4, 4), **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new("L", size, 90).save(stream, kind, **options)
    return stream.getvalue()


def _scans() -> bytes:
    content = _encoded("JPEG", (4000, 4000), progressive=True)
    first = content.index(b"\xff\xda", content.index(b"\xff\xda") + 2)
    scan = content[first : content.index(b"\xff\xc4", first)]
    return content[:-2] + scan * 1000 + b"\xff\xd9"


def _exif() -> bytes:
    content, segment = _encoded("JPEG"), b"\xff\xe1\xff\xffExif\0\0" + bytes(65_527)
    return content[:2] + segment * 100 + content[2:]


def _tile() -> bytes:
    side, data = 12_000, zlib.compress(bytes(12_000**2))
    values = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side)]
    values += [(324, 134), (325, len(data))]
    entries = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in values)
    return b"II*\0" + struct.pack("<LH", 8, len(values)) + entries + bytes(4) + data


def _chunks() -> bytes:
    content, chunk = _encoded("PNG"), struct.pack(">I4sI", 0, b"prVt", zlib.crc32(b"prVt"))
    return content[:33] + chunk * 200_000 + content[33:]


def _runs() -> bytes:
    runs = b"\1\0" * 9_000_000
    head = struct.pack("<IiiHHIIiiII", 40, 9000, 9000, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(runs), 0, 0, 1078) + head + bytes(1024) + runs


def _reason(content: bytes) -> str:
    try:
        plain.open_picture(content)
    except plain.PictureError as error:
        return error.reason
    return ""


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_scans, "too many scans"),
        (_exif, "too much EXIF"),
        (_tile, "too many pixels"),
        (_chunks, "too many chunks"),
        (_runs, "too many bytes"),
    ],
)
def test_pictures_that_take_a_decoder_long(make: Any, reason: str) -> None:
    outcome = run(_reason, make(), seconds=10)
    assert reason in outcome.returned()
    assert outcome.mib < 100


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}])
def test_ordinary_jpegs_pass(options: dict[str, Any]) -> None:
    assert plain.open_picture(_encoded("JPEG", (64, 48), **options)).size == (64, 48)


# -- data ---------------------------------------------------------------------------------------------------------


def _load(path: Path, root: Path) -> int:
    return len(vlm.load_llava(path, root))


def _conversation(path: Path, question: str, image: Any) -> Path:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "y"}]
    path.write_text(json.dumps([{"image": image, "conversations": turns}]))
    return path


def test_many_markers_and_long_names_are_read_in_linear_time(tmp_path: Path) -> None:
    many = _conversation(tmp_path / "many.json", "x " + "<image>" * 50_000 + " x", ["a.png"] * 50_000)
    assert run(_load, many, tmp_path, seconds=20).refused("pictures")
    long = _conversation(tmp_path / "long.json", "<image> x", "a/" * 200_000 + "x.png")
    assert run(_load, long, tmp_path, seconds=20).refused("too long")


@pytest.mark.parametrize(
    "question", ["<image> x", "x <image>", "<image>\n<image> x", "<image> x <image>", " x\n<image> "]
)
def test_markers_before_and_after_the_words_still_pass(tmp_path: Path, question: str) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    path = _conversation(tmp_path / "a.json", question, ["a.png"] * question.count("<image>"))
    assert vlm.load_llava(path, tmp_path)[0].turns == (("x", "y"),)


def test_an_answer_that_is_no_text_is_not_made_one(tmp_path: Path) -> None:
    asked = {"question_id": 1, "image_id": 1}
    reply = asked | {"answer_type": "x", "multiple_choice_answer": "x", "answers": [{"answer": None}]}
    (tmp_path / "q.json").write_text(json.dumps({"questions": [asked | {"question": "?"}]}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": [reply]}))
    with pytest.raises(DataError, match="VQAv2's form"):
        vlm.load_vqav2(tmp_path / "q.json", tmp_path / "a.json", tmp_path, image_name="a.png")


def test_control_characters_in_errors_are_escaped() -> None:
    shown = str(AcedError("the file \x1b[2J\x07 is\nbroken", remedy="\x9b2J", field="\x1b"))
    assert shown == "the file \\x1b[2J\\x07 is\\nbroken. Remedy: \\x9b2J [field: \\x1b]"


# -- the ONNX runtime ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["NonMaxSuppression", "RNN", "RandomNormalLike", "DFT"])
def test_operators_without_a_bound_are_refused(tmp_path: Path, operator: str) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "ab"]
    graph = helper.make_graph([helper.make_node(operator, ["a"], ["b"])], "g", ends[:1], ends[1:])
    onnx.save_model(helper.make_model(graph), str(tmp_path / "g.onnx"))
    with pytest.raises(FolderError, match=operator):
        check_graph_file(tmp_path / "g.onnx", None)


def _signed(folder: Path, **changes: Any) -> None:
    path = folder / "export.json"
    values = json.loads(path.read_text()) | changes
    values["files"] = {name: sha256(folder / name) for name in values["files"]}
    del values["digest"]
    path.write_text(json.dumps(values | {"digest": manifest_digest(values)}))


def _classify(folder: Path) -> Any:
    return ZeroShot(OnnxEncoder(folder), ["a", "b"]).classify([Image.new("RGB", (16, 16))])


def test_probabilities_are_numbers(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    _signed(folder, scale=1e39)
    assert run(_classify, folder).refused("scale")
    _signed(folder, scale=10.0)
    run(_classify, folder).returned()
    zero_shot = ZeroShot(OnnxEncoder(folder), ["a", "b"])
    with pytest.raises(EncoderError, match="not finite"):
        zero_shot.guesses(np.full((1, 8), np.nan, np.float32))


def test_a_long_list_of_members_is_not_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for number in range(3000):
            archive.writestr(str(number), b"")
    assert run(read_arrays, tmp_path / "a.npz", 2**30).refused("too many members")
