# SPDX-License-Identifier: Apache-2.0
"""Model folders that would run code, read files elsewhere, or hold other weights than were saved."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.security.sandbox import canary, run
from tests.security.vlm_parts import MANIFEST, edit, foreign, open_all, parts, refused

__all__ = ["parts"]
Parts = dict[str, Path]
KINDS = ("merged", "vision", "language")


def test_honest_folders_open(parts: Parts, tmp_path: Path) -> None:
    """Also a snapshot of the hub, where files are links to the `blobs` of the same repository, with another card."""
    blobs, snapshot = tmp_path / "models--me--m" / "blobs", tmp_path / "models--me--m" / "snapshots" / "main"
    shutil.copytree(parts["merged"], blobs)
    (blobs / "README.md").write_text("# Mine")
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    folders = [(kind, parts[kind]) for kind in ("merged", "apart", "vision", "language")] + [("merged", snapshot)]
    assert run(open_all, folders, parts).returned() == [""] * 5


# -- code -------------------------------------------------------------------------------------------------------------

_CODE = """{code}
from transformers import LlamaConfig as A, LlamaForCausalLM as B, PreTrainedTokenizerFast as C, CLIPImageProcessor as D
from transformers import LlavaProcessor as E
"""
_MAPS: dict[str, dict[str, Any]] = {
    "config.json": {"AutoConfig": "own.A", "AutoModelForCausalLM": "own.B", "AutoModelForImageTextToText": "own.B"},
    "tokenizer_config.json": {"AutoTokenizer": ["own.C", "own.C"], "AutoProcessor": "own.E"},
    "preprocessor_config.json": {"AutoImageProcessor": "own.D", "AutoProcessor": "own.E"},
    "processor_config.json": {"AutoProcessor": "own.E"},
}
_CLASSES = {
    "config.json": "model_type",
    "tokenizer_config.json": "tokenizer_class",
    "preprocessor_config.json": "image_processor_type",
    "processor_config.json": "processor_class",
}


def test_python_files_of_a_folder_do_not_run(parts: Parts, tmp_path: Path) -> None:
    """Neither where transformers has a class of its own, nor where it would ask on standard input."""
    mark, code = canary(tmp_path)
    folders = []
    for kind in KINDS:
        present = [name for name in _MAPS if (parts[kind] / name).is_file()]
        for number, unknown in enumerate([[], present, *([name] for name in present)]):
            folder = foreign(parts[kind], tmp_path / f"{kind}{number}")
            (folder / "own.py").write_text(_CODE.format(code=code))
            (folder / "custom_generate").mkdir()
            (folder / "custom_generate" / "generate.py").write_text(code)
            for name in present:
                edit(folder / name, "auto_map", _MAPS[name])
            for name in unknown:
                edit(folder / name, _CLASSES[name], "Own")
            folders.append((kind, folder))
    texts = run(open_all, folders, parts, seconds=40).returned()
    assert [text for (_, folder), text in zip(folders, texts, strict=True) if folder.name.endswith("1")].count("") == 0
    assert not mark.exists()


def test_no_part_of_a_model_asks_for_code(parts: Parts, tmp_path: Path) -> None:
    mark, code = canary(tmp_path)
    folders = []
    for number, (name, where, classes) in enumerate(
        [
            ("processor_config.json", "auto_map", {"AutoProcessor": "own.E"}),
            ("preprocessor_config.json", "auto_map", {"AutoImageProcessor": "own.D"}),
            ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["own.C", None]}),
            ("processor_config.json", "image_processor.auto_map", {"AutoImageProcessor": "own.D"}),
            ("config.json", "text_config.auto_map", {"AutoModel": "own.B", "AutoConfig": "own.A"}),
            ("config.json", "vision_config.auto_map", {"AutoModel": "own.B"}),
        ]
    ):
        folder = foreign(parts["merged"], tmp_path / str(number))
        (folder / "own.py").write_text(_CODE.format(code=code))
        edit(folder / name, where, classes)
        for file in ("tokenizer_config.json", "processor_config.json"):  # transformers falls back to other rules
            edit(folder / file, "processor_class", None)
        folders.append(("merged", folder))
    texts = run(open_all, folders, parts).returned()
    assert all("auto_map" in text for text in texts[:4])
    assert not mark.exists()


def test_names_in_a_config_that_lead_elsewhere(parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    torch.save({}, tmp_path / "weights.pth")
    timm = {"model_type": "timm_wrapper", "architecture": "resnet18", "hidden_size": 512}
    cases: list[tuple[str, str, str, Any, str]] = [
        ("merged", "config.json", "text_config.attn_implementation", "somebody/kernel", "code elsewhere"),
        ("merged", "config.json", "attn_implementation", {"text_config": "somebody/kernel"}, "code elsewhere"),
        ("language", "config.json", "attn_implementation", "somebody/kernel@main", "code elsewhere"),
        ("language", "config.json", "experts_implementation", "somebody/kernel", "code elsewhere"),
        ("vision", "config.json", "_attn_implementation", "somebody/kernel", "code elsewhere"),
        ("merged", "config.json", "vision_config", timm | {"model_args": {"checkpoint_path": "w.pth"}}, "plain model"),
        ("merged", "config.json", "vision_config", timm | {"model_args": {"pretrained_cfg": {}}}, "plain model"),
        ("merged", "config.json", "vision_config", timm | {"architecture": "hf-hub:somebody/model"}, "plain model"),
        ("merged", "config.json", "vision_config", timm | {"architecture": "local-dir:/tmp"}, "plain model"),
        ("merged", "config.json", "model_type", "sam", "is a 'sam'"),
        ("merged", "config.json", "text_config.model_type", "timm_backbone", "is a 'timm_backbone'"),
        ("merged", "config.json", "vision_config.model_type", "rag", "is a 'rag'"),
        ("merged", "config.json", "text_config.model_type", [], "holds no model"),
        ("merged", "preprocessor_config.json", "image_processor_type", "OneFormerImageProcessor", "OneFormer"),
        ("vision", "preprocessor_config.json", "image_processor_type", "Pix2StructImageProcessor", "Pix2Struct"),
        ("merged", "processor_config.json", "processor_class", "BarkProcessor", "BarkProcessor"),
        ("merged", "config.json", "transformers_weights", "../weights.safetensors", "outside"),
        ("language", "config.json", "transformers_weights", str(tmp_path / "w.safetensors"), "outside"),
        ("language", "tokenizer_config.json", "fast_tokenizer_files", ["../tokenizer.1.json"], "outside"),
        ("merged", "tokenizer_config.json", "vocab_file", str(tmp_path / "secret.json"), "outside"),
        ("language", "tokenizer_config.json", "tokenizer_file", "../secret.json", "outside"),
        ("language", "adapter_config.json", "base_model_name_or_path", str(parts["language"]), "a model elsewhere"),
        ("vision", "adapter_config.json", "base_model_name_or_path", "somebody/model", "a model elsewhere"),
        ("merged", "adapter_config.json", "base_model_name_or_path", "somebody/model", "a model elsewhere"),
    ]
    folders = []
    for number, (kind, name, where, value, _) in enumerate(cases):
        folders.append((kind, foreign(parts[kind], tmp_path / str(number))))
        edit(folders[-1][1] / name, where, value)
    for (*_, words), text in zip(cases, run(open_all, folders, parts, seconds=40).returned(), strict=True):
        assert words in text, (words, text)


def test_old_paths_in_a_config_are_no_fault(parts: Parts, tmp_path: Path) -> None:
    folder = foreign(parts["language"], tmp_path / "old")
    edit(folder / "tokenizer_config.json", "special_tokens_map_file", "/none/special_tokens_map.json")
    edit(folder / "tokenizer_config.json", "tokenizer_file", "tokenizer.json")
    assert run(open_all, [("language", folder)], parts).returned() == [""]


# -- weights ----------------------------------------------------------------------------------------------------------


def test_pickled_weights_are_not_read(parts: Parts, tmp_path: Path) -> None:
    folders = [(kind, foreign(parts[kind], tmp_path / kind)) for kind in KINDS]
    for _, folder in folders:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    refused(folders, parts, "model.safetensors")
    adapter = foreign(parts["apart"], tmp_path / "apart") / "adapter"
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    refused([("apart", adapter.parent)], parts, "adapter_model.safetensors")


def test_an_index_names_no_weights_outside(parts: Parts, tmp_path: Path) -> None:
    folders = []
    for kind in KINDS:
        for how in ("absolute", "up", "link"):
            folder = foreign(parts[kind], tmp_path / f"{kind}-{how}")
            outside = shutil.move(folder / "model.safetensors", tmp_path / f"{kind}-{how}.safetensors")
            name = {"absolute": str(outside), "up": f"../{outside.name}", "link": "shard.safetensors"}[how]
            if how == "link":
                (folder / name).symlink_to(outside)
            names = dict.fromkeys(load_file(outside), name)
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
            folders.append((kind, folder))
    refused(folders, parts, " out")


def test_an_index_of_another_form(parts: Parts, tmp_path: Path) -> None:
    folders = []
    for kind in KINDS:
        for number, names in enumerate(([], {"a": 1}, {"a": "x.bin"}, None)):
            folder = foreign(parts[kind], tmp_path / f"{kind}-{number}")
            (folder / "model.safetensors").unlink()
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
            folders.append((kind, folder))
    refused(folders, parts, "model.safetensors.index.json")


def test_links_out_of_a_folder_and_pipes_are_refused(parts: Parts, tmp_path: Path) -> None:
    folders = []
    for kind in (*KINDS, "apart"):
        prefix = "base/" if kind == "apart" else ""
        for number, name in enumerate((f"{prefix}tokenizer.json", f"{prefix}model.safetensors", "notes/deep.json")):
            for what in ("link", "pipe"):
                folder = foreign(parts[kind], tmp_path / f"{kind}-{number}-{what}")
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).unlink(missing_ok=True)
                if what == "link":
                    (tmp_path / "outside").write_text("{}")
                    (folder / name).symlink_to(tmp_path / "outside")
                else:
                    os.mkfifo(folder / name)
                folders.append((kind, folder))
    refused([one for one in folders if one[1].name.endswith("link")], parts, "leads out of the folder")
    refused([one for one in folders if one[1].name.endswith("pipe")], parts, "not a regular file")


def test_files_that_are_no_json(parts: Parts, tmp_path: Path) -> None:
    folders, deep = [], '{"a":' * 100 + "1" + "}" * 100
    for kind in KINDS:
        names = [path.name for path in parts[kind].glob("*.json") if path.name != MANIFEST]
        for number, content in enumerate(("[" * 100_000, '{"a": 1e', "[]", "null", deep, "\xff")):
            for name in names:
                folder = foreign(parts[kind], tmp_path / f"{kind}-{number}-{name}")
                (folder / name).write_bytes(content.encode("latin-1"))
                folders.append((kind, folder))
    refused(folders, parts)


# -- digests ----------------------------------------------------------------------------------------------------------


def _zeroes(folder: Path, file: str) -> None:
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / file).items()}
    save_file(tensors, folder / file, metadata={"format": "pt"})


def test_a_saved_folder_must_be_as_it_was(parts: Parts, tmp_path: Path) -> None:
    folders = []
    for number, (kind, change) in enumerate(
        [
            ("merged", lambda folder: _zeroes(folder, "model.safetensors")),
            ("apart", lambda folder: _zeroes(folder, "base/model.safetensors")),
            ("apart", lambda folder: _zeroes(folder, "adapter/adapter_model.safetensors")),
            ("merged", lambda folder: edit(folder / "preprocessor_config.json", "image_mean", [0, 0, 0])),
            ("merged", lambda folder: edit(folder / "tokenizer.json", "normalizer", {"type": "Lowercase"})),
            ("merged", lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")),
            ("merged", lambda folder: edit(folder / "generation_config.json", "num_beams", 2)),
            ("merged", lambda folder: (folder / "generation_config.json").unlink()),
            ("merged", lambda folder: edit(folder / "special_tokens_map.json", "eos_token", "red")),
            ("apart", lambda folder: (folder / "base" / "own.py").write_text("")),
            ("merged", lambda folder: edit(folder / MANIFEST, "files", {})),
            ("merged", lambda folder: (folder / MANIFEST).write_text("[]")),
            ("merged", lambda folder: edit(folder / MANIFEST, "files", {"../language/config.json": "0"})),
        ]
    ):
        shutil.copytree(parts[kind], tmp_path / str(number))
        change(tmp_path / str(number))
        folders.append((kind, tmp_path / str(number)))
    refused(folders, parts, "holds no model that is whole")
