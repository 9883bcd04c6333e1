# SPDX-License-Identifier: Apache-2.0
"""The student's tokenizer as `tokenizer.json` for the tokenizers library, cut and padded to its context length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from aced_sdk.errors import UnsupportedError
from aced_sdk.towers import DualEncoder
from export.report import TextInput

_CLIP_WORDS = r"(?i)<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def write_tokenizer(student: DualEncoder, path: Path) -> TextInput:
    """Write `tokenizer.json` and return what else the runtime must know.

    Raises:
        UnsupportedError: for tokenizer options that the file cannot hold.
    """
    from open_clip.tokenizer import SimpleTokenizer

    length = student.context_length
    if isinstance(student.tokenizer, SimpleTokenizer):
        tokenizer = clip_tokenizer(student.tokenizer)
        pad_id, pad_token, direction, cleaning = 0, "!", "right", "lower"
    else:
        text_cfg = student.model_cfg["text_cfg"]
        options = dict(text_cfg.get("tokenizer_kwargs") or {})
        cleaning = str(options.pop("clean", "whitespace"))
        if options or text_cfg.get("tokenizer_mode"):
            raise UnsupportedError(
                f"this tokenizer has options that cannot be exported: {sorted(options) or text_cfg['tokenizer_mode']}",
                remedy="export with parts=('vision',), or train without tokenizer_kwargs and tokenizer_mode",
                field="parts",
            )
        source = student.tokenizer.tokenizer
        if not getattr(source, "is_fast", False):
            raise UnsupportedError(
                f"{type(source).__name__} has no tokenizers backend",
                remedy="export with parts=('vision',), or train with a fast tokenizer",
                field="parts",
            )
        tokenizer = Tokenizer.from_str(source.backend_tokenizer.to_str())
        pad_id, pad_token, direction = source.pad_token_id, source.pad_token, source.padding_side
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad_id, pad_token=pad_token, direction=direction)
    tokenizer.save(str(path), pretty=False)
    return TextInput(context_length=length, pad_id=pad_id, cleaning=cleaning)


def clip_tokenizer(simple: Any) -> Tokenizer:
    """open_clip's byte-pair encoding (`SimpleTokenizer`) for the tokenizers library; equal ids for cleaned text."""
    tokenizer = Tokenizer(
        models.BPE(
            vocab=dict(simple.encoder),
            merges=list(simple.bpe_ranks),
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    start, end = "<start_of_text>", "<end_of_text>"
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (start, end)])
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, simple.eot_token_id), (start, simple.sot_token_id), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer
