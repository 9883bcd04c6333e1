# SPDX-License-Identifier: Apache-2.0
"""Model folders whose numbers would take all memory or never end."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.security.sandbox import canary, run
from tests.security.vlm_parts import HUGE, edit, foreign, open_all, parts, refused

__all__ = ["parts"]
Parts = dict[str, Path]
Case = tuple[str, str, str, Any]  # kind of folder, file, key, value


def spoilt(parts: Parts, tmp_path: Path, cases: list[Case]) -> list[tuple[str, Path]]:
    folders = []
    for number, (kind, name, where, value) in enumerate(cases):
        folder = foreign(parts[kind], tmp_path / f"{number}-{where[:40]}")
        edit(folder / name, where, value)
        folders.append((kind, folder))
    return folders


def test_numbers_out_of_bounds_are_refused_before_anything_is_built(parts: Parts, tmp_path: Path) -> None:
    numbers = [
        ("num_hidden_layers", HUGE),
        ("num_hidden_layers", -1),
        ("hidden_size", HUGE),
        ("hidden_size", 0),
        ("intermediate_size", HUGE),
        ("num_attention_heads", 0),
        ("vocab_size", HUGE),
        ("num_labels", HUGE),
        ("max_position_embeddings", HUGE),
        ("image_size", HUGE),
        ("patch_size", 0),
        ("anything_else", 10**400),
    ]
    places = [("merged", "text_config."), ("merged", "vision_config."), ("vision", ""), ("language", "")]
    cases = [(kind, "config.json", part + key, value) for kind, part in places for key, value in numbers]
    refused(spoilt(parts, tmp_path, cases), parts, "must be", "config.json", mib=200)


def test_a_config_describes_no_more_than_the_weights_hold(parts: Parts, tmp_path: Path) -> None:
    cases = [
        ("merged", "config.json", "text_config.hidden_size", 2**19),
        ("merged", "config.json", "vision_config.intermediate_size", 2**20),
        ("merged", "config.json", "text_config.vocab_size", 2**23),
        ("language", "config.json", "intermediate_size", 2**20),
        ("vision", "config.json", "image_size", 4096),
    ]
    refused(spoilt(parts, tmp_path, cases), parts, mib=800)


def test_layers_without_weights_are_refused_soon(parts: Parts, tmp_path: Path) -> None:
    outcome = run(open_all, spoilt(parts, tmp_path, [("language", "config.json", "num_hidden_layers", 1000)]), parts)
    assert "lacks" in outcome.returned()[0]
    experts = {"model_type": "mixtral", "num_local_experts": 2**20, "num_hidden_layers": 1000}
    folder = foreign(parts["language"], tmp_path / "experts")
    for key, value in experts.items():
        edit(folder / "config.json", key, value)
    refused([("language", folder)], parts, "describes more than")


def test_tables_that_grow_with_the_length(parts: Parts, tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    shutil.copytree(parts["language"], folder)
    run(_save_gpt2, folder, {"n_embd": 16, "n_layer": 1, "n_head": 1, "vocab_size": 30, "n_positions": 64}).returned()
    edit(folder / "config.json", "n_positions", 2**24)
    refused([("language", folder)], parts, "describes more than")


def _save_gpt2(folder: Path, sizes: dict[str, int]) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder)


def test_numbers_of_processors_tokenizers_and_generation(parts: Parts, tmp_path: Path) -> None:
    padding = {"strategy": {"Fixed": HUGE}, "direction": "Right"}
    cases: list[Case] = [
        ("merged", "config.json", "image_seq_length", HUGE),
        ("merged", "config.json", "image_seq_length", 0),
        ("merged", "preprocessor_config.json", "crop_size", {"height": HUGE, "width": HUGE}),
        ("merged", "preprocessor_config.json", "crop_size", {"height": -24, "width": 24}),
        ("merged", "preprocessor_config.json", "size", {"shortest_edge": 10**6}),
        ("merged", "preprocessor_config.json", "size", 0),
        ("merged", "processor_config.json", "num_additional_image_tokens", HUGE),
        ("merged", "processor_config.json", "patch_size", 0),
        ("merged", "processor_config.json", "image_processor", {"crop_size": {"height": HUGE}}),
        ("merged", "generation_config.json", "num_beams", HUGE),
        ("merged", "generation_config.json", "num_return_sequences", 1000),
        ("vision", "preprocessor_config.json", "size", {"height": 10**5, "width": 10**5}),
        ("vision", "preprocessor_config.json", "crop_size", {"height": -1, "width": -1}),
        ("merged", "tokenizer_config.json", "pad_to_multiple_of", HUGE),
        ("language", "tokenizer.json", "padding", padding),
    ]
    refused(spoilt(parts, tmp_path, cases), parts, "must be", ".json", mib=200)


def test_tokenizers_that_lengthen_a_text(parts: Parts, tmp_path: Path) -> None:
    ten = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    once = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10**6}
    chain = {"type": "Sequence", "normalizers": [ten] * 11}
    nested = {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [ten] * 6}] * 2}
    ids = {"<unk>": {"id": "<unk>", "ids": [0] * 10**5, "tokens": ["<unk>"] * 10**5}}
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<unk>", "type_id": 0}}] * 1000}
    cases: list[Case] = [
        *((kind, "tokenizer.json", "normalizer", part) for kind in ("merged", "language") for part in (chain, nested)),
        ("merged", "tokenizer.json", "normalizer", once),
        ("merged", "tokenizer.json", "decoder", {"type": "Sequence", "decoders": [ten] * 11}),
        ("merged", "tokenizer.json", "post_processor", template | {"pair": [], "special_tokens": ids}),
    ]
    refused(spoilt(parts, tmp_path, cases), parts, "tokenizer.json", mib=200)


def test_errors_of_tokenizers_written_in_rust_have_names(parts: Parts, tmp_path: Path) -> None:
    """Such as a regex that gives up, which panics."""
    cases: list[Case] = []
    for pattern in (r"([a-z]+)+\d", r"([a-z]|[a-z][a-z])+\d", "(", "a" * 10**5 + "{1,1000000}"):
        part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        cases += [(kind, "tokenizer.json", "pre_tokenizer", part) for kind in ("merged", "language")]
    cases.append(("merged", "tokenizer.json", "truncation", {"max_length": 2, "stride": 5, "strategy": "LongestFirst"}))
    cases.append(("merged", "tokenizer.json", "model", {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}))
    run(open_all, spoilt(parts, tmp_path, cases), parts, seconds=60).returned()


def test_an_image_token_far_beyond_the_vocabulary(parts: Parts, tmp_path: Path) -> None:
    case = ("language", "tokenizer.json", "model.vocab.<image>", 2**23)
    refused(spoilt(parts, tmp_path, [case]), parts, "embeddings of", mib=200)


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_of_another_form_are_refused(parts: Parts, tmp_path: Path) -> None:
    mark, code = canary(tmp_path)
    (tmp_path / "planted.py").write_text(code)
    config = "adapter/adapter_config.json"
    cases: list[Case] = [
        ("apart", config, "layer_replication", [[0, 2]] * 10**4),
        ("apart", config, "megatron_config", {"tensor_model_parallel_size": 1}),
        ("apart", config, "megatron_core", "planted"),
        ("apart", config, "target_modules", "(.*)*(.*)*(.*)*x"),
        ("apart", config, "target_modules", r".*language_model.*\.(q|k)_proj|(a+)+$"),
        ("apart", config, "target_modules", []),
        ("apart", config, "exclude_modules", "(.*)*(.*)*x"),
        ("apart", config, "rank_pattern", {"(.*)*x": 10**6}),
        ("apart", config, "r", HUGE),
        ("apart", config, "r", "2"),
        ("apart", config, "peft_type", "PROMPT_TUNING"),
        ("apart", config, "modules_to_save", ["vision_tower", "language_model"] * 100),
        ("apart", config, "init_lora_weights", "pissa_niter_100000"),
        ("apart", config, "trainable_token_indices", list(range(10**4))),
        ("apart", config, "corda_config", {"cache_file": "/tmp/x"}),
        ("apart", config, "new_option", {"path": "/"}),
    ]
    refused(spoilt(parts, tmp_path, cases), parts, "the adapter's", mib=300)
    assert not mark.exists()
