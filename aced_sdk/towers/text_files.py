# SPDX-License-Identifier: Apache-2.0
"""Folders of Hugging Face text towers and tokenizers: found, checked before transformers reads them, copied."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aced_sdk.errors import ModelError
from aced_sdk.files import ReadError, check_links, expand, inside, printable, read_bytes, read_json
from aced_sdk.processing.plain.tokenizers import MAX_TOKEN, read_tokenizer
from aced_sdk.towers.entities import bound_entities
from aced_sdk.towers.numbers import check_real
from aced_sdk.towers.words import Words

MIB = 2**20
_MAX_FILE = 64 * MIB
_MAX_ADDED = 100_000  # tokens
_MAX_SPECIAL = 10_000  # tokens of a list; Gemma 3 has 6,415, and the time grows with the square
# The files of text towers and tokenizers that are copied into a saved student.
_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model",
    "tokenizer.model", "bpe.codes", "dict.txt", "source.spm", "target.spm",
)  # fmt: skip
_SUFFIXES = {Path(name).suffix for name in _FILES} | {".jinja"}
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_HUB_FILES = ["*.json", "*.txt", "*.model"]
# Others compile or fetch kernels on first use, which takes minutes.
ATTENTIONS = (None, "eager", "sdpa")
# Settings that change how weights are stored or read; with float weights they never end, or fail at some lengths.
REWORKED = ("quantization_config", "chunk_size_feed_forward")
_REMEDY = "correct the file, or take a tokenizer that you trust"


def _place(name: str, folder: Path | None, check: Callable[[Path], None]) -> Path:
    local = expand(name).absolute() if folder is None else None
    if folder is not None and (name == "." or name.startswith("./")):
        found = inside(folder, name)
    elif local is not None and os.path.isdir(local):
        found = local
    elif _REPO.fullmatch(name) and ".." not in name:
        found = fetch(name, _HUB_FILES)
    else:
        raise ModelError(
            f"'{printable(name)}' names no text tower or tokenizer inside the model's folder, and is no hub name",
            remedy="copy its files into the model's folder and name them `./NAME`, or write ORG/REPO",
            field="text_cfg",
        )
    if not os.path.isdir(found):
        raise ModelError(f"{printable(found)} is not a folder", remedy="restore the model's folder", field="text_cfg")
    check(found)
    return found


def fetch(repo: str, patterns: list[str]) -> Path:
    """The local snapshot of a hub repository, of the files that match `patterns` alone.

    Raises:
        ModelError: if the name is not valid or the files cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except Exception as error:  # its own, and those of its HTTP library
        raise ModelError(
            f"{printable(repo)} cannot be loaded: {printable(error)}",
            remedy="check the name and the network, or name a local folder",
        ) from error


def check_text_tower(folder: Path) -> None:
    """Check a text tower's config.json: a family that open_clip knows, and sizes in bounds.

    Raises:
        ModelError: if it is another family, or a value is out of bounds or could run code.
        ReadError: if the file cannot be read, or a link leads out of the folder.
    """
    from open_clip.hf_configs import arch_dict

    check_links(folder)
    config = check_config(folder / "config.json")
    for key, value in _pairs(config):
        if isinstance(value, int) and value < 0 and not key.endswith("_id"):
            raise _refuse(folder / "config.json", f"sets {printable(key, 50)} to {value}")
    family = str(config.get("model_type"))
    if family not in arch_dict:
        raise ModelError(
            f"{printable(folder)} holds a text tower of the family {printable(family, 50)}, which open_clip cannot "
            "build",
            remedy=f"take one of: {', '.join(arch_dict)}",
            field="text_cfg.hf_model_name",
        )


def check_config(path: Path) -> dict[str, Any]:
    """Check a model's config.json: no loop of 10^9 layers or labels, no attention kernel of a hub, no other file.

    Raises:
        ModelError: if a value is out of bounds, or names code or another file.
        ReadError: if it cannot be read.
    """
    config = _mapping(path, MIB)
    for key, value in _pairs(config):
        _check_number(path, key, value, 1_024 if "layer" in key else 65_536 if "label" in key else 2**31)
        if isinstance(value, int | float) and not isinstance(value, bool):
            check_real(key, value, str(path))
        if ("implementation" in key and "/" in str(value)) or (key in ("use_kernels", "kernel_config") and value):
            raise _refuse(path, f"names code to download in {printable(key, 50)}")
        if "attn_implementation" in key and value not in ATTENTIONS:
            raise _refuse(path, f"asks for another attention than eager or sdpa in {printable(key, 50)}")
        if key in REWORKED and value:
            raise _refuse(path, f"sets {key}")
        if key == "configuration_files":
            raise _refuse(path, "names other files in configuration_files")
    return config


def check_tokenizer(folder: Path) -> None:
    """Check a tokenizer's files before transformers or tokenizers reads them.

    Raises:
        ModelError: if a value is out of bounds, names a file elsewhere, or names a class that is not a tokenizer.
        ReadError: if a file cannot be read, or a link leads out of the folder.
    """
    check_links(folder)
    for path in folder.iterdir():
        if path.suffix in _SUFFIXES and path.stat().st_size > _MAX_FILE:
            raise _refuse(path, f"has more than {_MAX_FILE:,} bytes")
    if (path := folder / "config.json").exists():
        _check_class(check_config(path), path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path := folder / name).exists():
            settings = _mapping(path, 16 * MIB)
            _check_class(settings, path)
            _check_settings(settings, path)
            if name == "special_tokens_map.json" and (odd := [key for key in settings if key.endswith("_file")]):
                raise _refuse(path, f"names a file: {printable(odd[0])}")  # transformers reads it from anywhere
    if (path := folder / "added_tokens.json").exists():
        _check_tokens(path, "added tokens", list(_mapping(path)), _MAX_ADDED)
    for path in sorted(folder.glob("tokenizer*.json")):
        if path.name != "tokenizer_config.json":
            read_tokenizer(path)


PLACES: dict[str, Callable[[str, Path | None], Path]] = {
    "hf_model_name": lambda name, folder: _place(name, folder, check_text_tower),
    "hf_tokenizer_name": lambda name, folder: _place(name, folder, check_tokenizer),
}
_TARGETS = {"hf_model_name": "./text_model", "hf_tokenizer_name": "./tokenizer"}


def copy_text_files(model_cfg: dict[str, Any], source: Path | None, target: Path) -> dict[str, Any]:
    """Copy the text tower's and the tokenizer's own files into a folder; no links, and nothing from outside.

    Args:
        model_cfg: names them `./NAME`, by a local folder, or by a hub name. Files of a hub name are not copied.
        source: the folder that `./NAME` is inside of.
        target: a new folder.

    Returns:
        The `model_cfg` for the new folder.

    Raises:
        ModelError: if `source` is needed and None.
        ReadError: if a file cannot be read or is outside of `source`.
    """
    text_cfg = dict(model_cfg["text_cfg"])
    for key in PLACES:
        name = text_cfg.get(key)
        if not name or _REPO.fullmatch(name):
            continue
        if Path(name).is_absolute():
            origin, text_cfg[key] = Path(name), _TARGETS[key]
        elif source is None:
            raise ModelError(
                f"{printable(name)} is inside the model's folder, and it has none",
                remedy="load the model from a folder",
            )
        else:
            origin = inside(source, name)
        place = inside(target, text_cfg[key])
        place.mkdir(parents=True, exist_ok=True)
        for file in _FILES:
            if (origin / file).exists():
                (place / file).write_bytes(read_bytes(inside(origin, file), _MAX_FILE))
    return model_cfg | {"text_cfg": text_cfg}


@contextmanager
def tokenizing(what: str) -> Iterator[None]:
    """Turn whatever a tokenizer raises into a `ModelError`, a panic of the tokenizers library included."""
    try:
        yield
    except ModelError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"{what}: {type(error).__name__}: {printable(error)}",
            remedy="put the tokenizer's files into the model's folder, or make its hub reachable",
        ) from error


def tokenizer_of(model_cfg: dict[str, Any]) -> Any:
    """The tokenizer that a resolved `model_cfg` names: open_clip's BPE, or a Hugging Face one.

    Raises:
        ModelError: if it cannot be loaded, or does not fit the text tower.
    """
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    text_cfg = model_cfg["text_cfg"]
    context_length = text_cfg.get("context_length", 77)
    options = text_cfg.get("tokenizer_kwargs") or {}
    if name := text_cfg.get("hf_tokenizer_name"):
        mode = text_cfg.get("tokenizer_mode")
        with tokenizing(f"the tokenizer '{printable(name)}' cannot be loaded"):
            check_tokenizer(Path(name))
            tokenizer = HFTokenizer(
                name, context_length=context_length, tokenizer_mode=mode, trust_remote_code=False, **options
            )
            if tokenizer(["a picture"]).shape != (1, context_length):
                raise ValueError(f"it does not pad texts to {context_length} tokens")
            bound_entities(tokenizer)
        return tokenizer
    simple = SimpleTokenizer(context_length=context_length, clean=options.get("clean", "lower"))
    if simple.vocab_size > text_cfg.get("vocab_size", 49408):
        raise ModelError(
            f"the text tower has {text_cfg.get('vocab_size')} token rows, "
            f"open_clip's tokenizer has {simple.vocab_size}",
            remedy="set text_cfg.vocab_size to 49408, or name the tokenizer in text_cfg.hf_tokenizer_name",
        )
    simple.bpe = Words(simple.bpe_ranks, simple.cache)
    bound_entities(simple)
    return simple


# -- what transformers' JSON files may hold ---------------------------------------------------------------------------


def _mapping(path: Path, limit: int = _MAX_FILE) -> dict[str, Any]:
    value = read_json(path, limit)
    if not isinstance(value, dict):
        raise ReadError(f"{printable(path)} does not hold an object", remedy=_REMEDY)
    return value


def _refuse(path: Path, why: str) -> ModelError:
    return ModelError(f"{printable(path)} {why}", remedy=_REMEDY)


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every object that is nested in a JSON value."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _nodes(item)


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    for node in _nodes(value):
        for key, item in node.items():
            for single in item if isinstance(item, list) else [item]:
                yield key, single


def _check_number(path: Path, key: str, value: Any, bound: int) -> None:
    if isinstance(value, int) and abs(value) > bound and key not in ("model_max_length", "max_len"):
        raise _refuse(path, f"sets {printable(key, 50)} to {printable(value, 30)}, and the bound is {bound:,}")


def _check_class(settings: dict[str, Any], path: Path) -> None:
    """Whatever class of transformers is named here, its `from_pretrained` is called."""
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    name = settings.get("tokenizer_class")
    if name is None:
        return
    try:
        found = [tokenizer_class_from_name(form) for form in (name, name.removesuffix("Fast"), f"{name}Fast")]
        plain = all(kind is None or issubclass(kind, PreTrainedTokenizerBase) for kind in found)
    except Exception:  # noqa: BLE001  no text, no class, or one whose import fails
        plain = False
    if not plain:
        raise _refuse(path, f"names a tokenizer_class that is no tokenizer: {printable(name, 50)}")


def _check_settings(settings: dict[str, Any], path: Path) -> None:
    """A tokenizer's settings become arguments of its class: no other file, no positional arguments, no huge length."""
    for key, value in _pairs(settings):
        # max_length is what the longest text had that was ever tokenised
        large = 2**24 if key == "max_length" else 2_000_000
        _check_number(path, key, value, large if "vocab" in key or key.endswith(("_id", "max_length")) else 65_536)
        elsewhere = key in ("vocab", "merges", "gguf_file")
        if key.endswith("_file") and "/" in str(value):  # often a path of the machine that saved it, which is not here
            elsewhere = os.path.exists(str(value)) or os.path.exists(path.parent / str(value))
        if elsewhere and isinstance(value, str):
            raise _refuse(path, f"names a file elsewhere in {printable(key, 50)}")
    for key, value in settings.items():
        if key.endswith(("_token", "_tokens", "added_tokens_decoder")):
            _check_tokens(path, key, value)
    for key in ("init_inputs", "fast_tokenizer_files"):
        if settings.get(key):
            raise _refuse(path, f"sets {key}")


def _check_tokens(path: Path, key: str, tokens: Any, most: int = _MAX_SPECIAL) -> None:
    """A token, or a list or mapping of tokens: not too many, and none too long."""
    held = tokens if isinstance(tokens, list | dict) else [tokens]
    if len(held) > most:
        raise _refuse(path, f"has more than {most:,} tokens in {printable(key, 50)}")
    texts = [text for _, text in _pairs({key: held if isinstance(held, list) else [held, *held.values()]})]
    if any(isinstance(text, str) and len(text) > MAX_TOKEN for text in texts):
        raise _refuse(path, f"has a token of more than {MAX_TOKEN:,} characters in {printable(key, 50)}")
