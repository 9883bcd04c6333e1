# SPDX-License-Identifier: Apache-2.0
"""What a model folder decides: sizes in bounds, weights that fit, digests that hold, a card that injects nothing."""

from __future__ import annotations

import base64
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURE, distillation, encoder, write_pool

from aced_sdk import towers
from aced_sdk.config import DistillConfig, Student
from aced_sdk.errors import AcedError
from aced_sdk.files import sha256
from aced_sdk.towers.folder import CONFIG, MANIFEST, WEIGHTS
from aced_sdk.verbs import plan
from tests.security.folders import change, files, text_tower, tokenizer, with_text, write
from tests.security.sandbox import run


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return towers.save(encoder(), tmp_path_factory.mktemp("plain") / "s")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    return towers.save(towers.build(Student(architecture=with_text(folder / "origin")), 0), folder / "s")


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "s", symlinks=True))


def load(folder: Path) -> str:
    return str(towers.load(folder).tokenize("a red boat").tolist())


def build(architecture: Any) -> str:
    return str(towers.build(Student(architecture=architecture), 0).embedding_dim)


def load_then_build(folder: Path) -> str:
    """Both must be refused, the second by what this raises."""
    with pytest.raises(AcedError) as caught:
        load(folder)
    architecture = json.loads((folder / CONFIG).read_text())["model_cfg"]
    if "init_logit_scale" in str(caught.value):  # a config has a field of its own for it
        raise caught.value
    return build(architecture)


def plan_of(path: Path) -> str:
    return str(plan(DistillConfig.from_yaml(path)))


# -- sizes ------------------------------------------------------------------------------------------------------------

HUGE = 10**9
SIZES: list[tuple[str, Any]] = [
    ("embed_dim", HUGE), ("embed_dim", 0), ("embed_dim", -1), ("embed_dim", 2**70), ("embed_dim", "16"),
    ("embed_dim", None), ("embed_dim", 1.5), ("init_logit_scale", 1e300), ("custom_text", "yes"), ("evil", 1),
    ("cast_dtype", "torch.float16"), ("output_dict", False), ("vision_cfg", []), ("text_cfg", 3),
    ("vision_cfg__layers", HUGE), ("vision_cfg__layers", -1), ("vision_cfg__layers", [HUGE] * 4),
    ("vision_cfg__layers", [1, 1]), ("vision_cfg__layers", [1] * 10_000), ("vision_cfg__layers", {}),
    ("vision_cfg__patch_size", 0), ("vision_cfg__patch_size", -8), ("vision_cfg__patch_size", HUGE),
    ("vision_cfg__patch_size", [8, 0]), ("vision_cfg__patch_size", None), ("vision_cfg__width", HUGE),
    ("vision_cfg__width", 16_384), ("vision_cfg__width", 33), ("vision_cfg__head_width", 0),
    ("vision_cfg__head_width", 64), ("vision_cfg__mlp_ratio", 1e12), ("vision_cfg__mlp_ratio", -1),
    ("vision_cfg__image_size", HUGE), ("vision_cfg__image_size", [16, HUGE]), ("vision_cfg__image_size", 4),
    ("vision_cfg__image_size", "16"), ("vision_cfg__attn_pooler_queries", HUGE), ("vision_cfg__pool_type", "x"),
    ("vision_cfg__act_kwargs", {"inplace": True}), ("vision_cfg__norm_kwargs", {"device": "cuda:9"}),
    ("vision_cfg__ls_init_value", "x"), ("vision_cfg__patch_dropout", 2),
    ("vision_cfg__timm_model_name", "resnet10t; x"), ("vision_cfg__timm_model_name", "no_such_model"),
    ("text_cfg__layers", HUGE), ("text_cfg__width", HUGE), ("text_cfg__width", 17), ("text_cfg__heads", 0),
    ("text_cfg__heads", HUGE), ("text_cfg__context_length", HUGE), ("text_cfg__context_length", 0),
    ("text_cfg__context_length", -5), ("text_cfg__vocab_size", HUGE), ("text_cfg__vocab_size", -1),
    ("text_cfg__vocab_size", 100), ("text_cfg__mlp_ratio", HUGE), ("text_cfg__pad_id", -HUGE),
    ("text_cfg__tokenizer_mode", "evil"), ("text_cfg__\x1b[2J", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), SIZES, ids=lambda value: str(value)[:25])
def test_sizes_are_bounded_before_anything_is_built(plain: Path, tmp_path: Path, name: str, value: Any) -> None:
    folder = copy(plain, tmp_path)
    change(folder / CONFIG, **{f"model_cfg__{name}": value})
    outcome = run(load_then_build, folder, seconds=20, mib=512)
    assert outcome.refused()
    assert outcome.mib < 200, outcome
    assert "\x1b" not in outcome.value


@pytest.mark.parametrize(
    "vision",
    [
        {"image_size": 2_048, "patch_size": 1, "width": 64, "layers": 1},  # 4 million patches
        {"image_size": 2_048, "patch_size": 16, "width": 1_024, "head_width": 1, "layers": 1},
        {"image_size": 2_048, "layers": [1, 1, 1, 1], "width": 16_384, "head_width": 64},
        {"image_size": 256, "patch_size": 16, "width": 16_384, "head_width": 64, "layers": 512},
    ],
    ids=str,
)
def test_sizes_that_are_too_large_together_are_refused(tmp_path: Path, vision: dict[str, Any]) -> None:
    architecture = ARCHITECTURE | {"vision_cfg": vision}
    assert run(build, architecture, seconds=20, mib=512).refused("bound")
    config = distillation(tmp_path / "run", write_pool(tmp_path / "pool", 8, 1), tmp_path)
    config.replace(student=Student(architecture=architecture)).to_yaml(tmp_path / "c.yaml")
    assert run(plan_of, tmp_path / "c.yaml", seconds=20, mib=512).refused()


PICTURES: list[Any] = [
    {"size": HUGE}, {"size": [HUGE, HUGE]}, {"size": -16}, {"size": 0}, {"size": []}, {"size": "16"}, {"size": {}},
    {"mean": [0, 0]}, {"mean": "x"}, {"std": [0, 0, 0]}, {"std": [-1, 1, 1]}, {"std": [1e300] * 3}, {"mode": "F"},
    {"interpolation": "evil"}, {"resize_mode": "evil"}, {"fill_color": HUGE}, {"fill_color": -1}, [1], "x", 7,
]  # fmt: skip


@pytest.mark.parametrize("preprocess", PICTURES, ids=str)
def test_preprocessing_is_bounded(plain: Path, tmp_path: Path, preprocess: Any) -> None:
    folder = copy(plain, tmp_path)
    change(folder / CONFIG, preprocess_cfg=preprocess)
    assert run(load, folder, seconds=20, mib=512).refused("preprocess_cfg")


TEXT_TOWERS = [
    {"num_hidden_layers": HUGE}, {"hidden_size": HUGE}, {"vocab_size": HUGE}, {"max_position_embeddings": HUGE},
    {"num_labels": HUGE}, {"num_attention_heads": 0}, {"intermediate_size": 2**40}, {"hidden_act": "evil"},
    {"num_hidden_layers": -1}, {"hidden_size": "x"}, {"num_attention_heads": 3}, {"dtype": "evil"},
    {"num_attention_heads": -1},
]  # fmt: skip


@pytest.mark.parametrize("settings", TEXT_TOWERS, ids=str)
def test_text_towers_are_bounded(texts: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = copy(texts, tmp_path)
    change(folder / "text_model/config.json", **settings)
    (folder / MANIFEST).unlink()
    outcome = run(load, folder, seconds=20, mib=512)
    assert outcome.refused()
    assert outcome.mib < 200, outcome


REPLACE = {"type": "Replace", "pattern": {"Regex": ""}, "content": "aaaaaaaa"}
PADDING = {"strategy": {"Fixed": HUGE}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
           "pad_type_id": 0, "pad_token": "[PAD]"}  # fmt: skip
CUT = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": HUGE}
SPLIT = {"type": "Split", "pattern": {"Regex": "(a|a)*$"}, "behavior": "Isolated", "invert": False}
# sentencepiece's table of replacements: an empty trie, and one long text
TABLE = base64.b64encode(struct.pack("<I", 4) + bytes(4) + b"a" * 2**20 + b"\0").decode()
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "x", "type_id": 0}}],
    "pair": [],
    "special_tokens": {"x": {"id": "x", "ids": [1] * 100_000, "tokens": ["x"] * 100_000}},
}


def sequence(*normalizers: Any) -> dict[str, Any]:
    return {"normalizer": {"type": "Sequence", "normalizers": [*normalizers]}}


TOKENIZERS: list[tuple[str, dict[str, Any]]] = [
    ("tokenizer.json", {"padding": PADDING}),
    ("tokenizer.json", {"padding": PADDING | {"strategy": "BatchLongest", "pad_to_multiple_of": HUGE}}),
    ("tokenizer.json", {"truncation": CUT}),
    ("tokenizer.json", sequence(*[REPLACE] * 12)),
    ("tokenizer.json", sequence(*[sequence(*[REPLACE] * 6)["normalizer"]] * 6)),
    ("tokenizer.json", {"normalizer": {"type": "Precompiled", "precompiled_charsmap": TABLE}}),
    ("tokenizer.json", {"post_processor": TEMPLATE}),
    ("tokenizer.json", {"model": {"type": "evil"}}),
    ("tokenizer.json", {"pre_tokenizer": SPLIT, "model": {}}),
    ("tokenizer_config.json", {"tokenizer_padding": {"length": HUGE}}),
    ("tokenizer_config.json", {"pad_to_multiple_of": HUGE}),
    ("tokenizer_config.json", {"max_length": HUGE}),
    ("tokenizer_config.json", {"extra_ids": HUGE, "tokenizer_class": "T5Tokenizer"}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"7": 1}}),
    ("tokenizer_config.json", {"pad_token": None}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), TOKENIZERS, ids=lambda value: str(value)[:60])
def test_tokenizers_are_bounded(plain: Path, tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    folder = copy(plain, tmp_path)
    tokenizer(folder / "tok")
    change(folder / "tok" / name, **settings)
    change(folder / CONFIG, model_cfg__text_cfg__hf_tokenizer_name="./tok")
    outcome = run(load, folder, seconds=20, mib=512)
    assert outcome.refused()
    assert outcome.mib < 200, outcome


def embed(folder: Path, text: str) -> str:
    own = towers.load(folder)
    return str(own.encode_text([text]).shape)


def test_a_text_tower_takes_the_context_that_is_asked_of_it(texts: Path, tmp_path: Path) -> None:
    folder = copy(texts, tmp_path)
    change(folder / CONFIG, model_cfg__text_cfg__context_length=17)  # of 16 positions
    assert run(load, folder).refused("takes 16 tokens")
    change(folder / CONFIG, model_cfg__text_cfg={"hf_model_name": "", "context_length": 4_096, "heads": 512})
    assert run(load, folder).refused("values in one layer")
    wide = {"hidden_size": 4_096, "num_attention_heads": 4_096, "max_position_embeddings": 4_096}
    architecture = with_text(tmp_path / "t")
    change(tmp_path / "t/config.json", **wide)
    text_cfg = architecture["text_cfg"] | {"context_length": 4_096}
    assert run(build, architecture | {"text_cfg": text_cfg}).refused("with 4,096 heads")


def test_what_a_tokenizer_does_with_a_text_is_named(plain: Path, tmp_path: Path) -> None:
    folder = copy(plain, tmp_path)
    tokenizer(folder / "tok")
    change(folder / "tok/tokenizer.json", pre_tokenizer=SPLIT)
    change(folder / CONFIG, model_cfg__text_cfg__hf_tokenizer_name="./tok")
    assert run(embed, folder, "a" * 100 + "c").refused("tokenizer")  # a panic of the tokenizers library
    tokenizer(folder / "tok")
    change(folder / "tok/tokenizer.json", model={"type": "WordLevel", "vocab": {"[UNK]": 60_000}, "unk_token": "[UNK]"})
    assert run(embed, folder, "a").refused("ids below 49408")


# -- weights ----------------------------------------------------------------------------------------------------------


def header(path: Path, change: Callable[[dict[str, Any]], None], grow: int = 0) -> None:
    """Rewrite the header of a safetensors file, and make the file larger without writing (a sparse file)."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    values = json.loads(content[8 : 8 + length])
    change(values)
    text = json.dumps(values).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    if grow:
        os.truncate(path, path.stat().st_size + grow)


def larger(values: dict[str, Any]) -> None:
    last = max((name for name in values if name != "__metadata__"), key=lambda name: values[name]["data_offsets"][1])
    values[last] |= {"shape": [2**38], "dtype": "F32"}
    values[last]["data_offsets"][1] = values[last]["data_offsets"][0] + 2**40


def lie(values: dict[str, Any]) -> None:
    values["logit_scale"]["data_offsets"] = [0, 2**60]


def overflow(values: dict[str, Any]) -> None:
    values["logit_scale"]["shape"] = [2**62, 2**62]


def strange(values: dict[str, Any]) -> None:
    for value in values.values():
        if value.get("dtype") == "F32":
            value |= {"dtype": "F8_E4M3", "shape": [*value["shape"][:-1], 4 * (value["shape"] or [1])[-1]]}


def wider(folder: Path) -> Path:
    return towers.save(encoder(vision_cfg=ARCHITECTURE["vision_cfg"] | {"width": 64}), folder)


BROKEN: dict[str, Callable[[Path], object]] = {
    "a terabyte": lambda path: header(path, larger, 2**40),
    "a header that lies": lambda path: header(path, lie),
    "a shape that overflows": lambda path: header(path, overflow),
    "a strange type": lambda path: header(path, strange),
    "a header of 2**62 bytes": lambda path: path.write_bytes(struct.pack("<Q", 2**62)),
    "a header of a gigabyte": lambda path: (path.write_bytes(struct.pack("<Q", 2**30)), os.truncate(path, 2**31)),
    "nothing": lambda path: path.write_bytes(b""),
    "a name with controls": lambda path: save_file(load_file(path) | {"\x1b[2J": load_file(path)["logit_scale"]}, path),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pickle": lambda path: path.write_bytes(b"\x80\x04."),
    "larger tensors": lambda path: os.replace(wider(path.parent / "x") / WEIGHTS, path),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("manifest", [True, False])
def test_weights_that_do_not_fit_are_refused(plain: Path, tmp_path: Path, name: str, manifest: bool) -> None:
    folder = copy(plain, tmp_path)
    BROKEN[name](folder / WEIGHTS)
    if not manifest:
        (folder / MANIFEST).unlink()
    outcome = run(load, folder, seconds=20, mib=512)
    assert outcome.refused(*() if name in ("a pipe", "a folder", "a device") else (WEIGHTS,))
    assert "\x1b" not in outcome.value


# -- digests ----------------------------------------------------------------------------------------------------------

ALTERED: dict[str, Callable[[Path], object]] = {
    "preprocessing": lambda folder: swap(folder / CONFIG, '"squash"', '"longest"'),
    "the tokenizer": lambda folder: swap(folder / "tokenizer/tokenizer.json", '"red": 5', '"red": 6'),
    "the tokenizer's settings": lambda folder: write(folder / "tokenizer/tokenizer_config.json", {}),
    "the text tower": lambda folder: swap(folder / "text_model/config.json", '"bert"', '"roberta"'),
    "an added file": lambda folder: write(folder / "tokenizer/added_tokens.json", {"boat": 4}),
    "a missing file": lambda folder: (folder / "tokenizer/tokenizer_config.json").unlink(),
    "no digest": lambda folder: manifest(folder, weights_sha256=None),
    "no digests": lambda folder: manifest(folder, files={}),
    "digests without the config": lambda folder: manifest(folder, files={WEIGHTS: sha256(folder / WEIGHTS)}),
    "digests of other files": lambda folder: manifest(folder, files__x="0"),
    "a digest outside": lambda folder: manifest(folder, **{"files__../x": "0"}),
    "an unknown format": lambda folder: manifest(folder, format=3),
    "a list": lambda folder: write(folder / MANIFEST, []),
    "no JSON": lambda folder: (folder / MANIFEST).write_text("{"),
    "a huge file": lambda folder: os.truncate(folder / "README.md", 2**40),
}


def swap(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def manifest(folder: Path, **changes: Any) -> None:
    kept = folder / "kept.json"
    shutil.copy(folder / MANIFEST, kept)
    change(kept, **changes)  # removes the manifest
    kept.rename(folder / MANIFEST)


@pytest.mark.parametrize("name", ALTERED)
def test_altered_folders_are_refused(texts: Path, tmp_path: Path, name: str) -> None:
    folder = copy(texts, tmp_path)
    ALTERED[name](folder)
    assert run(load, folder, seconds=20).refused()


def test_folders_of_format_1_are_read(texts: Path, tmp_path: Path) -> None:
    folder = copy(texts, tmp_path)
    old = {"format": 1, "kind": "dual_encoder", "weights_sha256": sha256(folder / WEIGHTS), "facts": {"seed": 3}}
    write(folder / MANIFEST, old)
    assert towers.load(folder).fingerprint() == towers.load(texts).fingerprint()
    assert towers.read_manifest(folder).facts == {"seed": 3}
    weights = load_file(folder / WEIGHTS)
    save_file(weights | {"logit_scale": weights["logit_scale"] + 1}, folder / WEIGHTS)
    assert run(load, folder).refused("is not the file that was saved")
    write(folder / MANIFEST, {"format": 1, "kind": "dual_encoder"})
    assert run(load, folder).refused("weights_sha256")


def test_folders_of_open_clip_are_read(texts: Path, tmp_path: Path) -> None:
    folder = copy(texts, tmp_path)
    (folder / MANIFEST).unlink()
    change(folder / CONFIG, preprocess_cfg={"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash", "x": 1})
    assert towers.load(folder).fingerprint() == towers.load(texts).fingerprint()


# -- the card ---------------------------------------------------------------------------------------------------------

EVIL = "MIT\nlicense_link: http://x\n---\n# <script>alert(1)</script>\n| a | b |\n![x](http://x)`\x1b[2J\r"


def test_a_card_is_not_injected_into(tmp_path: Path) -> None:
    facts = {EVIL: EVIL, "seed": 0, "config_hash": "ab_c"}
    license = "".join(filter(str.isprintable, EVIL))
    saved = towers.save(encoder(), tmp_path / "s", license=license, facts=facts)
    text = (saved / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {"library_name": "open_clip", "license": license, "pipeline_tag": "zero-shot-image-classification"}
    body = text.split("---\n", 2)[2]
    assert body.count("\n# ") == 1
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 4 + len(facts)
    assert all(line.replace("\\|", "").count("|") == 3 for line in rows)
    assert not any(part in body for part in ("\x1b", "\r", " <script", " ![", " `"))
    assert "| config_hash | ab_c |" in body
    assert towers.read_manifest(saved).license == license
    assert set(files(saved)) == {WEIGHTS, CONFIG, MANIFEST, "README.md"}


def test_a_text_tower_of_bert_is_what_these_attacks_change(texts: Path, tmp_path: Path) -> None:
    assert text_tower(tmp_path / "t").is_dir()
    assert run(load, texts).returned() == "[[4, 5, 6, 0, 0, 0, 0, 0]]"
