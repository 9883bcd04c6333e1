# SPDX-License-Identifier: Apache-2.0
"""Language models from a folder, a hub name or a GGUF file, with their tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from aced_sdk.errors import MissingPackageError, ModelError, UnsupportedError
from aced_sdk.files import ReadError, expand, home, inside, read_json, sha256, whole_folder, write_json
from aced_sdk.towers.trust import bounded, check_folder, check_weights, library_errors, weight_bytes, without_bars
from vlm.model.decoding import decoding, settings, warn_of_lost
from vlm.model.gguf_header import check_gguf
from vlm.model.hub import downloaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FACTS = "aced_language.json"


def load_language(language: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32, decoding greedily, and its tokenizer; no code of the folder runs.

    Args:
        language: a transformers folder, a hub name, a GGUF file, or a folder with one GGUF file somewhere inside.

    Raises:
        ModelError: if it is none of these or cannot be loaded.
        MissingPackageError: if a GGUF file is given and `gguf` or `accelerate` is not installed.
        UnsupportedError: if it is a model of pictures and text.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    path = expand(language)
    with library_errors(
        f"the language model '{language}' cannot be loaded",
        remedy="name a folder that save_pretrained wrote, with safetensors; a GGUF file; or a hub name that can be "
        "reached",
        field="language",
    ):
        if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
            path = converted(_gguf_file(path))
        folder = path if path.is_dir() else downloaded(str(language))
        check_folder(folder, tokens=True)
        with bounded(weight_bytes(folder)):
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                generation_config=GenerationConfig(),  # transformers refuses some settings, and saves none of them
            )
        check_weights(model, found["unexpected_keys"])
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        given = settings(folder)
        warn_of_lost(given)
        model.generation_config = decoding(given, tokenizer)
    if lost := sorted(found["missing_keys"]):
        raise ModelError(
            f"the language model '{language}' lacks {len(lost)} of its tensors, {lost[0]} first",
            remedy="copy or save it again",
            field="language",
        )
    if hasattr(model.config, "text_config"):
        raise UnsupportedError(
            f"the language model '{language}' is a '{model.config.model_type}', which has more than text already",
            remedy="take its text model, or another causal language model",
            field="language",
        )
    return model, tokenizer


def reads(config: Any) -> int:
    """Tokens of one conversation that tuning can feed a language model with this text config.

    Layers that look back over a window alone (Gemma 3, Mistral) are tuned within that window.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    longest = int(config.max_position_embeddings)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return longest
    return min(longest, int(window))


def _gguf_file(path: Path) -> Path:
    found = [path] if path.is_file() else sorted(path.rglob("*.gguf"))
    if len(found) != 1 or found[0].suffix != ".gguf":
        names = ", ".join(file.name for file in found[:3])
        raise ModelError(
            f"{path} is no transformers folder and holds {len(found)} GGUF files{f' ({names})' if names else ''}",
            remedy="name a folder with config.json, or one GGUF file",
            field="language",
        )
    if path.is_dir():
        inside(path, found[0].relative_to(path))
    return found[0]


def converted(gguf: Path) -> Path:
    """The ordinary transformers folder of a GGUF file, dequantised once and kept in the cache home.

    Raises:
        ModelError: if transformers cannot read it.
        MissingPackageError: if `gguf` or `accelerate` is not installed.
    """
    with library_errors(
        f"transformers cannot read {gguf.name}", remedy="take a GGUF of an architecture it knows", field="language"
    ):
        check_gguf(gguf)  # also where an earlier version of this package has converted it
    digest = sha256(gguf)
    target = home() / "models" / f"{gguf.stem}-{digest[:12]}"
    facts = {"format": 1, "gguf": gguf.name, "sha256": digest}
    if _kept(target) == facts:
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {
        "pretrained_model_name_or_path": gguf.parent,
        "gguf_file": gguf.name,
        "local_files_only": True,
    }
    with library_errors(
        f"transformers cannot read {gguf.name}", remedy="take a GGUF of an architecture it knows", field="language"
    ):
        try:
            with bounded(gguf.stat().st_size, per_byte=8):
                quantised, found = AutoModelForCausalLM.from_pretrained(
                    **where, trust_remote_code=False, output_loading_info=True
                )
            if lost := sorted(found["missing_keys"]):
                raise ReadError(f"it lacks {len(lost)} tensors, {lost[0]} first", remedy="convert the model again")
            tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        except ImportError as error:
            raise MissingPackageError(
                f"a GGUF file needs packages that are not installed: {error}",
                remedy="pip install 'aced-sdk[vlm]'",
                field="language",
            ) from error
    # save_pretrained refuses weights that were dequantised, so they move to a model that never was quantised
    del quantised.config.quantization_config
    fresh = type(quantised)(quantised.config)
    fresh.load_state_dict(quantised.state_dict())
    with without_bars(), whole_folder(target) as folder:
        fresh.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / _FACTS, facts)
    return target


def _kept(folder: Path) -> Any:
    """What was noted of an earlier conversion; None if there is none, or it cannot be read."""
    try:
        return read_json(folder / _FACTS)
    except ReadError:
        return None
