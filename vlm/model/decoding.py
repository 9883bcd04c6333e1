# SPDX-License-Identifier: Apache-2.0
"""How answers are decoded: greedily, in this package and in what it saves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aced_sdk.errors import ModelError
from aced_sdk.files import read_json

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

_SAMPLING = {"temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
# Left out without a word: lengths and caches, which every call decides, and what greedy decoding is.
_SILENT = {"do_sample", "max_length", "max_new_tokens", "use_cache", "cache_implementation", "transformers_version"}


def _neutral(name: str, value: Any) -> bool:
    """Whether a setting does nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return not value
    return value in (0, 1) or (name, value) == ("top_k", 50)


def _id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_id, value))


# What also shapes greedy answers, and the form that generation takes it in.
_KEPT: dict[str, Callable[[Any], bool]] = {
    "bos_token_id": _id,
    "eos_token_id": lambda value: _id(value) or _ids(value),
    "pad_token_id": _id,
    "repetition_penalty": lambda value: isinstance(value, float) and 0 < value < math.inf,
    "no_repeat_ngram_size": _id,
    "bad_words_ids": lambda value: isinstance(value, list) and bool(value) and all(map(_ids, value)),
    "suppress_tokens": _ids,
    "begin_suppress_tokens": _ids,
}


def settings(folder: Path) -> dict[str, Any]:
    """The generation settings of a folder: of its generation_config.json, or else of its config.json.

    Raises:
        ReadError: if the file cannot be read.
    """
    if (folder / "generation_config.json").is_file():
        found: dict[str, Any] = read_json(folder / "generation_config.json")
        return found
    config: dict[str, Any] = read_json(folder / "config.json")
    text = config.get("text_config")
    return (text if isinstance(text, dict) else {}) | config


def drop_settings(config: Any) -> None:
    """Remove generation settings from a model's config, where older versions of transformers kept them."""
    from transformers import GenerationConfig

    own = type(config)().to_dict().keys() | {"use_cache"}
    for name in (GenerationConfig().to_dict().keys() & vars(config).keys()) - own:
        if not name.endswith("_token_id"):
            delattr(config, name)


def decoding(
    given: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, image_token: int | None = None
) -> GenerationConfig:
    """Greedy generation settings.

    Args:
        given: settings of a language model; those that also shape greedy answers are kept.
        tokenizer: its tokens end answers and pad batches where `given` has none.
        image_token: never generated; None: there is none.

    Raises:
        ModelError: if no token is left that could be generated.
    """
    from transformers import GenerationConfig

    kept = {name: given[name] for name, fits in _KEPT.items() if fits(given.get(name))}
    kept.setdefault("eos_token_id", tokenizer.eos_token_id)
    kept.setdefault("pad_token_id", tokenizer.pad_token_id)
    banned = {*kept.get("suppress_tokens", ()), *kept.get("begin_suppress_tokens", ())}
    banned |= {word[0] for word in kept.get("bad_words_ids", ()) if len(word) == 1}
    banned |= set() if image_token is None else {image_token}
    if len(banned) >= len(tokenizer) and banned.issuperset(tokenizer.get_vocab().values()):
        raise ModelError(
            "the generation settings suppress every token (suppress_tokens, begin_suppress_tokens and bad_words_ids)",
            remedy="correct generation_config.json",
            field="language",
        )
    if image_token is not None:
        kept["suppress_tokens"] = sorted({*kept.get("suppress_tokens", []), image_token})
    return GenerationConfig(do_sample=False, **kept)


def warn_of_lost(given: Mapping[str, Any]) -> None:
    """Warn of settings that `decoding` leaves out; those of a model that samples are expected."""
    from transformers import GenerationConfig

    known = GenerationConfig().to_dict().keys() - _SILENT - (_SAMPLING if given.get("do_sample") is True else set())
    lost = [name for name in sorted(known & given.keys()) if not _neutral(name, given[name])]
    lost = [name for name in lost if not name.startswith("_") and not (name in _KEPT and _KEPT[name](given[name]))]
    if lost:
        warnings.warn(
            f"the generation settings {', '.join(f'{name}={given[name]!r:.40}' for name in lost)} are left out: "
            "answers are decoded greedily",
            stacklevel=3,
        )
