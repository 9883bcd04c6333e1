# SPDX-License-Identifier: Apache-2.0
"""Language models from a folder, a hub name or a GGUF file, with their tokenizers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from aced_sdk.errors import MissingPackageError, ModelError, UnsupportedError
from aced_sdk.files import home, sha256, whole_folder, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FACTS = "aced_language.json"


def load_language(language: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32 and its tokenizer.

    Args:
        language: a transformers folder, a hub name, a GGUF file, or a folder with one GGUF file somewhere inside.

    Raises:
        ModelError: if it is none of these or cannot be loaded.
        MissingPackageError: if a GGUF file is given and `gguf` or `accelerate` is not installed.
        UnsupportedError: if it is a model of pictures and text.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(language).expanduser()
    source = str(language)
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        source = str(converted(_gguf_file(path)))
    elif path.is_dir():
        source = str(path)
    try:
        import torch

        model, found = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the language model '{language}' cannot be loaded: {error}",
            remedy="name a folder that save_pretrained wrote, a GGUF file, or a hub name that can be reached",
            field="language",
        ) from error
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
    return found[0]


def converted(gguf: Path) -> Path:
    """The ordinary transformers folder of a GGUF file, dequantised once and kept in the cache home.

    Raises:
        ModelError: if transformers cannot read it.
        MissingPackageError: if `gguf` or `accelerate` is not installed.
    """
    digest = sha256(gguf)
    target = home() / "models" / f"{gguf.stem}-{digest[:12]}"
    facts = {"format": 1, "gguf": gguf.name, "sha256": digest}
    if (target / _FACTS).is_file() and json.loads((target / _FACTS).read_text(encoding="utf-8")) == facts:
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        quantised = AutoModelForCausalLM.from_pretrained(**where)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except ImportError as error:
        raise MissingPackageError(
            f"a GGUF file needs packages that are not installed: {error}",
            remedy="pip install 'aced-sdk[vlm]'",
            field="language",
        ) from error
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise ModelError(
            f"transformers cannot read {gguf.name}: {error}",
            remedy="take a GGUF of an architecture it knows",
            field="language",
        ) from error
    # save_pretrained refuses weights that were dequantised, so they move to a model that never was quantised
    del quantised.config.quantization_config
    fresh = type(quantised)(quantised.config)
    fresh.load_state_dict(quantised.state_dict())
    with whole_folder(target) as folder:
        fresh.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / _FACTS, facts)
    return target
