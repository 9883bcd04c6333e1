# SPDX-License-Identifier: Apache-2.0
"""Model folders whose numbers, weights or side files would give nonsense, take minutes, or lead elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURE, encoder

from aced_sdk import towers
from aced_sdk.config import Student
from aced_sdk.files import parse_json
from aced_sdk.towers.folder import CONFIG, WEIGHTS
from aced_sdk.towers.numbers import check_real
from tests.security.folders import change, with_text, write
from tests.security.sandbox import run
from tests.security.vlm_parts import edit, foreign, open_all, parts, refused

__all__ = ["parts"]
Parts = dict[str, Path]
Weights = dict[str, torch.Tensor]
NAN, INF = float("nan"), float("inf")


def load(folder: Path) -> str:
    return str(towers.load(folder).embedding_dim)


def build(architecture: dict[str, Any]) -> str:
    return str(towers.build(Student(architecture=architecture), 0).embedding_dim)


def embed(folder: Path, size: tuple[int, int]) -> str:
    return str(towers.load(folder).encode_image([Image.new("RGB", size)]).shape)


def rewrite(path: Path, change: Callable[[Weights], Weights]) -> None:
    weights = load_file(path)
    save_file(weights | change(weights), path, {"format": "pt"})


def spoilt(weights: Weights, mark: str, value: float) -> Weights:
    """The tensors with `mark` in their name, one value of each replaced."""
    found = {name: tensor.clone() for name, tensor in weights.items() if mark in name}
    for tensor in found.values():
        tensor.view(-1)[-1] = value
    assert found
    return found


# -- dual encoders ----------------------------------------------------------------------------------------------------

DUAL: dict[str, Callable[[Weights], Weights]] = {
    "NaN": lambda weights: spoilt(weights, "visual.proj", NAN),
    "infinity": lambda weights: spoilt(weights, "text_projection", INF),
    "a scale of NaN": lambda weights: {"logit_scale": torch.tensor(NAN)},
    "a scale that overflows": lambda weights: {"logit_scale": torch.tensor(1e6)},
    "a scale of nothing": lambda weights: {"logit_scale": torch.tensor(-1e6)},
    "whole numbers": lambda weights: {"visual.proj": weights["visual.proj"].bool()},
}


@pytest.mark.parametrize("name", DUAL)
def test_weights_of_a_dual_encoder_are_numbers(tmp_path: Path, name: str) -> None:
    folder = towers.save(encoder(), tmp_path / "s")
    (folder / "aced.json").unlink()
    rewrite(folder / WEIGHTS, DUAL[name])
    assert run(load, folder).refused(WEIGHTS)


@pytest.mark.parametrize(
    ("tower", "sizes"),
    [
        ("vision_cfg", {"image_size": 2_044, "layers": 100, "width": 16, "patch_size": 14, "head_width": 16}),
        ("text_cfg", {"context_length": 4_096, "vocab_size": 49_408, "width": 32, "heads": 32, "layers": 256}),
        ("text_cfg", {"context_length": 1, "vocab_size": 49_408, "width": 16, "heads": 2, "layers": 1}),
    ],
)
def test_a_small_file_describes_no_hours_of_work(tower: str, sizes: dict[str, Any]) -> None:
    assert run(build, ARCHITECTURE | {tower: sizes}, seconds=20).refused(tower)


def test_the_largest_towers_of_today_are_within_the_bounds() -> None:
    from aced_sdk.towers.architecture import check

    tower = {"image_size": 378, "layers": 32, "width": 1_280, "head_width": 80, "patch_size": 14}
    check(ARCHITECTURE | {"vision_cfg": tower})


@pytest.mark.parametrize(
    "settings",
    [{"layer_norm_eps": 1e300}, {"layer_norm_eps": -5.0}, {"hidden_dropout_prob": INF}, {"initializer_range": -INF}],
    ids=str,
)
def test_real_numbers_of_a_text_tower_are_bounded(tmp_path: Path, settings: dict[str, float]) -> None:
    folder = towers.save(towers.build(Student(architecture=with_text(tmp_path / "t")), 0), tmp_path / "s")
    change(folder / "text_model/config.json", **settings)
    (folder / "aced.json").unlink()
    assert run(load, folder).refused(next(iter(settings)), "must be")


def test_pictures_that_a_student_cannot_prepare_have_a_name(tmp_path: Path) -> None:
    folder = towers.save(encoder(), tmp_path / "s")
    change(folder / CONFIG, preprocess_cfg__resize_mode="longest")
    assert run(embed, folder, (4_000, 20)).refused("images[0]", "too long and thin")
    assert run(embed, folder, (200, 20)).returned()
    change(folder / CONFIG, preprocess_cfg__std=[1e-300] * 3)
    assert run(load, folder).refused("preprocess_cfg")


# -- transformers folders ---------------------------------------------------------------------------------------------

ROPE = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = ROPE | {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
REALS: list[tuple[str, str, Any]] = [
    ("preprocessor_config.json", "image_std", [0, 0, 0]),
    ("preprocessor_config.json", "image_std", [1e-300] * 3),
    ("preprocessor_config.json", "image_mean", [INF] * 3),
    ("preprocessor_config.json", "rescale_factor", 1e300),
    ("preprocessor_config.json", "rescale_factor", 0),
    ("preprocessor_config.json", "rescale_factor", -1.0),
    ("config.json", "rope_parameters", ROPE | {"rope_theta": 0.0}),
    ("config.json", "rope_parameters", ROPE | {"rope_theta": INF}),
    ("config.json", "rope_parameters", ROPE | {"rope_type": "linear", "factor": 0.0}),
    ("config.json", "rope_parameters", ROPE | {"rope_type": "linear", "factor": -3}),
    ("config.json", "rope_parameters", ROPE | {"rope_type": "yarn", "factor": 2.0, "attention_factor": -1e30}),
    ("config.json", "rope_parameters", ROPE | {"partial_rotary_factor": 1e6}),
    ("config.json", "rope_parameters", LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 1.0}),
    ("config.json", "rope_parameters", LLAMA3 | {"rope_type": "longrope", "short_factor": [0.0] * 8}),
    ("config.json", "rope_scaling", {"full_attention": {"factor": -1}}),
    ("config.json", "rms_norm_eps", 1e30),
    ("config.json", "rms_norm_eps", -1e-6),
    ("config.json", "attention_dropout", 5.0),
    ("config.json", "logits_scaling", 0.0),
    ("config.json", "final_logit_softcapping", 0),
    ("config.json", "attention_multiplier", INF),
    ("generation_config.json", "repetition_penalty", 1e-300),
    ("generation_config.json", "repetition_penalty", 1e308),
    ("generation_config.json", "no_repeat_ngram_size", 10**7),
    ("generation_config.json", "eos_token_id", [0] * 10**6),
    ("generation_config.json", "bad_words_ids", [[3] * 10**6]),
    ("generation_config.json", "bad_words_ids", [[1, 2]] * 10**5),
]


def test_real_numbers_of_a_folder_are_bounded(parts: Parts, tmp_path: Path) -> None:
    folders = []
    for number, (name, where, value) in enumerate(REALS):
        for kind in ("merged", "vision") if name.startswith("pre") else ("merged", "language"):
            folders.append((kind, foreign(parts[kind], tmp_path / f"{number}-{kind}-{where}")))
            inside = "text_config." if kind == "merged" and name == "config.json" else ""
            edit(folders[-1][1] / name, inside + where, value)
    refused(folders, parts, "must", ".json")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer_norm_eps", 1e-12), ("rms_norm_eps", 1e-5), ("hidden_dropout_prob", 0.1), ("rope_theta", 5_000_000),
        ("rope_local_base_freq", 10_000.0), ("factor", 32.0), ("attention_factor", 1.0), ("long_factor", 64.75),
        ("query_pre_attn_scalar", 256), ("embedding_multiplier", 12.0), ("image_std", 0.26862954), ("image_mean", 0),
        ("rescale_factor", 1 / 255), ("rescale_factor", 1), ("repetition_penalty", 1.1), ("time_step_limit", INF),
        ("initializer_factor", 1.0), ("layerscale_value", 1e-5), ("attention_dropout", 0), ("clip_qkv", 8.0),
    ],
)  # fmt: skip
def test_numbers_of_published_models_are_within_the_bounds(name: str, value: float) -> None:
    check_real(name, value, "config.json")


def test_weights_of_a_folder_are_numbers(parts: Parts, tmp_path: Path) -> None:
    marks = {"merged": "linear_1.weight", "vision": "mlp.fc2.weight", "language": "mlp.down_proj.weight"}
    folders = [(kind, foreign(parts[kind], tmp_path / kind)) for kind in marks]
    for kind, folder in folders:
        rewrite(folder / "model.safetensors", lambda weights, kind=kind: spoilt(weights, marks[kind], NAN))
    apart = foreign(parts["apart"], tmp_path / "apart")
    rewrite(apart / "adapter/adapter_model.safetensors", lambda weights: spoilt(weights, "lora_B", INF))
    refused([*folders, ("apart", apart)], parts, "not finite")


def test_a_config_describes_all_layers_that_the_weights_have(parts: Parts, tmp_path: Path) -> None:
    folders = []
    for kind, part in (("merged", "text_config."), ("merged", "vision_config."), ("language", "")):
        folders.append((kind, foreign(parts[kind], tmp_path / f"{kind}-{part}")))
        edit(folders[-1][1] / "config.json", f"{part}num_hidden_layers", 1)
    refused(folders, parts, "fewer layers")


def test_a_tower_of_a_whole_clip_model_opens(parts: Parts, tmp_path: Path) -> None:
    """Its text tower stays unused, and has layers too."""
    from transformers import CLIPConfig, CLIPModel

    folder = foreign(parts["vision"], tmp_path / "clip")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(text_config=size, vision_config=size | {"image_size": 16, "patch_size": 8})
    CLIPModel(config).save_pretrained(folder)
    assert run(open_all, [("vision", folder)], parts).returned() == [""]


LONGER = {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 100}


def test_no_other_file_is_read_than_the_one_that_is_checked(parts: Parts, tmp_path: Path) -> None:
    folders = []
    for kind in ("merged", "language", "vision"):
        folder = foreign(parts[kind], tmp_path / f"config-{kind}")
        shutil.copy(folder / "config.json", folder / "config.4.0.0.json")
        edit(folder / "config.json", "configuration_files", ["config.4.0.0.json"])
        folders.append((kind, folder))
    for kind in ("merged", "language"):
        folder = foreign(parts[kind], tmp_path / f"tokenizer-{kind}")
        values = parse_json((folder / "tokenizer.json").read_text(), "tokenizer.json")
        longer = {"type": "Sequence", "normalizers": [LONGER] * 4}
        write(folder / "tokenizer.4.0.0.json", values | {"normalizer": longer})
        edit(folder / "tokenizer_config.json", "fast_tokenizer_files", ["tokenizer.4.0.0.json"])
        folders.append((kind, folder))
        folder = foreign(parts[kind], tmp_path / f"special-{kind}")
        write(folder / "special_tokens_map.json", {"tokenizer_file": "secret.json"})  # of the working folder
        folders.append((kind, folder))
    refused(folders, parts, "fi")
    assert all(run(open_all, [one], parts).returned()[0].count("_files") for one in (folders[0], folders[-2]))


@pytest.mark.parametrize("target", ["../secret.safetensors", "weights.bin"])
def test_an_index_of_weights_in_another_folder_is_not_read(parts: Parts, tmp_path: Path, target: str) -> None:
    """It could name weights outside, or a pickle."""
    folders = []
    for kind in ("merged", "language", "vision"):
        folder = foreign(parts[kind], tmp_path / kind)
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
        torch.save(weights, folder / "weights.bin")
        (folder / "sub").mkdir()
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, target)}
        write(folder / "sub/e.safetensors.index.json", index)
        edit(folder / "config.json", "transformers_weights", "sub/e.safetensors.index.json")
        folders.append((kind, folder))
    refused(folders, parts, "another folder")


def test_tokenizers_of_language_models_are_checked_like_those_of_towers(parts: Parts, tmp_path: Path) -> None:
    cases: list[tuple[str, str, Any]] = [
        ("tokenizer_config.json", "tokenizer_class", "RagTokenizer"),
        ("tokenizer_config.json", "tokenizer_class", "LlamaForCausalLM"),
        ("tokenizer_config.json", "tokenizer_class", ["a"]),
        ("tokenizer_config.json", "init_inputs", ["/etc/passwd"]),
        ("config.json", "tokenizer_class", "LlamaForCausalLM"),
    ]
    folders = []
    for number, (name, where, value) in enumerate(cases):
        for kind in ("merged", "language"):
            folders.append((kind, foreign(parts[kind], tmp_path / f"{number}-{kind}")))
            edit(folders[-1][1] / name, where, value)
    many = foreign(parts["language"], tmp_path / "many")
    write(many / "added_tokens.json", {f"<{n}>": n for n in range(200_000)})
    texts = run(open_all, [*folders, ("language", many)], parts, seconds=40).returned()
    assert all("tokenizer_class" in text or "init_inputs" in text for text in texts[:-1]), texts
    assert "added_tokens.json has more than" in texts[-1]


def test_code_to_fetch_is_refused_under_every_name(parts: Parts, tmp_path: Path) -> None:
    folders = []
    for number, (where, value) in enumerate(
        [
            ("_attn_implementation_internal", "somebody/kernel:f"),
            ("use_kernels", True),
            ("kernel_config", {"kernel_mapping": {"RMSNorm": "somebody/kernel:F"}}),
        ]
    ):
        for kind in ("merged", "language", "vision"):
            folders.append((kind, foreign(parts[kind], tmp_path / f"{number}-{kind}")))
            edit(folders[-1][1] / "config.json", where, value)
    refused(folders, parts, "config.json")


def test_a_generation_config_leaves_a_token_to_generate(parts: Parts, tmp_path: Path) -> None:
    folders = [(kind, foreign(parts[kind], tmp_path / kind)) for kind in ("merged", "language")]
    for _, folder in folders:
        edit(folder / "generation_config.json", "suppress_tokens", list(range(100)))
    refused(folders, parts, "suppress every token")


def test_numbers_of_an_adapter_are_bounded(parts: Parts, tmp_path: Path) -> None:
    folders = []
    for number, (where, value) in enumerate(
        [
            ("lora_alpha", 1e308),
            ("lora_alpha", -5_000),
            ("lora_alpha", 0),
            ("lora_alpha", "2"),
            ("lora_dropout", 5.0),
            ("target_modules", rf".*language_model.*\.({'q|' * 10**5}k)_proj"),
        ]
    ):
        folders.append(("apart", foreign(parts["apart"], tmp_path / str(number))))
        edit(folders[-1][1] / "adapter/adapter_config.json", where, value)
    refused(folders, parts, "the adapter's")


def test_every_tensor_of_an_adapter_has_a_place(parts: Parts, tmp_path: Path) -> None:
    folder = foreign(parts["apart"], tmp_path / "apart")
    unknown = {"base_model.model.other.lora_A.weight": torch.zeros(2, 2)}
    rewrite(folder / "adapter/adapter_model.safetensors", lambda _: unknown)
    refused([("apart", folder)], parts, "the adapter's", "no place")


def test_broken_lines_are_read_quickly(tmp_path: Path) -> None:
    """A line takes microseconds, not a walk over its characters."""
    good = json.dumps({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]})
    path = tmp_path / "d.jsonl"
    path.write_text(f"{good}\n" * 4 + "{x\n" * 50_000)
    assert run(_skipped, path, seconds=25).returned() == {"line is not JSON": 50_000}


def _skipped(path: Path) -> dict[str, int]:
    import vlm

    return dict(vlm.load_llava(path, path.parent, max_unusable_fraction=1.0).reasons)
