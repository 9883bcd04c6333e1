# SPDX-License-Identifier: Apache-2.0
"""Bounds on the numbers in a foreign folder's JSON files, by name.

Whole numbers decide sizes. Real numbers decide values: out of bounds they make embeddings and answers that are not
finite, or the same for every input, without an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from aced_sdk.files import ReadError, printable

_REMEDY = "correct the file, or do not use this folder"

_LARGEST = 2**24  # of any integer; the longest context of today's models is 10 M tokens
_FREE = re.compile(r"rope|theta|freq|max_length|^seed$|_ids?$")  # names of numbers that no size follows from
_SIDE = (1, 4096)
_COUNT = (1, 1024)
_RANGES: dict[str, tuple[int, int]] = {
    "num_hidden_layers": _COUNT,
    "num_layers": _COUNT,
    "n_layer": _COUNT,
    "n_layers": _COUNT,
    "num_attention_heads": _COUNT,
    "num_channels": (1, 64),
    "hidden_size": (1, 2**20),
    "intermediate_size": (1, 2**20),
    "vocab_size": (1, _LARGEST),
    "num_labels": (0, 2**17),
    "patch_size": _SIDE,
    "image_size": _SIDE,
    "image_seq_length": (1, 2**16),
    "downsample_factor": (1, 64),
    # GGUF's names
    "block_count": _COUNT,
    "head_count": _COUNT,
    "embedding_length": (1, 2**20),
    "feed_forward_length": (1, 2**20),
    # preprocessing
    "size": (1, 2048),
    "crop_size": (1, 2048),
    "pad_size": (1, 2048),
    "height": (1, 2048),
    "width": (1, 2048),
    "shortest_edge": (1, 2048),
    "longest_edge": (1, 2048),
    "max_height": (1, 2048),
    "max_width": (1, 2048),
    "size_divisor": (1, 2048),
    "img_size": (1, 2048),
    "min_patches": (1, 64),
    "max_patches": (1, 64),
    "input_size": (1, 2048),
    "num_additional_image_tokens": (0, 64),
    # tokenizers
    "Fixed": (1, 2**16),
    "pad_to_multiple_of": (0, 2**12),
    # generation
    "num_beams": (1, 16),
    "num_beam_groups": (1, 16),
    "num_return_sequences": (1, 1),
    "no_repeat_ngram_size": (0, 4096),
}
# Real numbers, and whole ones in their place. A value of 0 is let pass only where 0 is in the range.
_REALS: tuple[tuple[re.Pattern[str], float, float], ...] = tuple(
    (re.compile(name), low, high)
    for name, low, high in (
        (r"(^|_)(eps|epsilon)$", 0, 0.1),
        (r"dropout|drop_path|layerdrop|_pdrop$|_dropout_prob$", 0, 1),
        (r"theta$|base_freq$|freq_base$|^rotary_emb_base$", 1, 1e12),
        (r"^factor$|^(short|long)_factor$|^attention_factor$|^(low|high)_freq_factor$|^beta_(fast|slow)$", 1e-3, 1e5),
        (r"^partial_rotary_factor$|^rotary_pct$", 1e-3, 1),
        (r"_multiplier$|^logits_scaling$|softcapping$|_pre_attn_scalar$|^logit_scale$", 1e-6, 1e6),
        (r"^mscale(_all_dim)?$", 0, 100),
        (r"^image_std$", 1e-6, 1000),
        (r"^image_mean$", -1000, 1000),
        (r"^rescale_factor$", 1e-6, 1000),
        (r"^repetition_penalty$", 0.01, 100),
    )
)
_UNBOUNDED = {"time_step_limit"}  # Mamba 2's is infinite
_MOST_REAL = 1e30
# Values of a list, and of the lists in it; generation takes time for each.
_LENGTHS = {"bad_words_ids": 10_000, "eos_token_id": 1_000}


def check_number(key: str, value: int, where: str) -> None:
    """Refuse an integer out of the bounds of its name.

    Raises:
        ReadError: naming it.
    """
    free = bool(_FREE.search(key))
    low, high = _RANGES.get(key, (-_LARGEST, _LARGEST))
    if not low <= value <= high and (key in _RANGES or not free):
        raise _out_of_bounds(key, value, where, low, high)


def check_real(key: str, value: float, where: str) -> None:
    """Refuse a real number, or an integer in its place, that is not finite or out of the bounds of its name.

    Raises:
        ReadError: naming it.
    """
    low, high = next(((low, high) for name, low, high in _REALS if name.search(key)), (-_MOST_REAL, _MOST_REAL))
    known = (low, high) != (-_MOST_REAL, _MOST_REAL)
    if isinstance(value, float) and math.isnan(value):
        raise ReadError(f"{printable(key)} in {printable(where)} is not a number", remedy=_REMEDY)
    if (known or (isinstance(value, float) and key not in _UNBOUNDED)) and not low <= value <= high:
        raise _out_of_bounds(key, value, where, low, high)


def check_length(key: str, values: list[Any], where: str) -> None:
    """Refuse a list of so many values that using it takes minutes.

    Raises:
        ReadError: naming it.
    """
    count = sum(len(value) if isinstance(value, list) else 1 for value in values)
    if count > _LENGTHS.get(key, count):
        raise ReadError(
            f"{printable(key)} in {printable(where)} has {count:,} values, and must have at most {_LENGTHS[key]:,}",
            remedy=_REMEDY,
        )


def check_together(values: Mapping[str, Any], where: str) -> None:
    """Refuse numbers that are in bounds one by one, and together divide by zero.

    Raises:
        ReadError: naming them.
    """
    low, high = values.get("low_freq_factor"), values.get("high_freq_factor")
    if isinstance(low, int | float) and isinstance(high, int | float) and not low < high:
        raise ReadError(
            f"low_freq_factor in {printable(where)} is {low}, and must be below high_freq_factor, {high}",
            remedy=_REMEDY,
        )


def _out_of_bounds(key: str, value: float, where: str, low: float, high: float) -> ReadError:
    shown = "a number of more than 30 digits" if isinstance(value, int) and abs(value) >= 10**30 else value
    return ReadError(f"{printable(key)} in {printable(where)} is {shown}, and must be {low} to {high}", remedy=_REMEDY)
