# SPDX-License-Identifier: Apache-2.0
"""The student's tokenizer as `tokenizer.json` for the tokenizers library, cut and padded to its context length."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from aced_sdk.errors import UnsupportedError
from aced_sdk.towers import DualEncoder
from export.onnx.report import TextInput

# open_clip's pattern ignores case. JavaScript knows no `(?i)`, and texts are in lower case here: of the letters in it
# only s has another small form.
_CLIP_WORDS = r"<[sſ]tart_of_text>|<end_of_text>|'[sſ]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_START, _END = "<start_of_text>", "<end_of_text>"


class Padding(NamedTuple):
    """How texts are padded to the context length."""

    id: int
    token: str
    side: str


def padding_of(student: DualEncoder) -> Padding:
    """How the student's tokenizer pads."""
    from open_clip.tokenizer import SimpleTokenizer

    if isinstance(student.tokenizer, SimpleTokenizer):
        return Padding(0, "!", "right")
    source = student.tokenizer.tokenizer
    return Padding(source.pad_token_id, source.pad_token, source.padding_side)


def write_tokenizer(student: DualEncoder, path: Path) -> TextInput:
    """Write `tokenizer.json` and return what else the runtime must know.

    open_clip's cleaning is in its normalisers, all but ftfy and HTML entities, for which tokenizers has none.

    Raises:
        UnsupportedError: for tokenizer options that the file cannot hold.
    """
    tokenizer, cleaning = backend(student)
    pad_id, pad_token, side = padding_of(student)
    length = student.context_length
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad_id, pad_token=pad_token, direction=side)
    tokenizer.save(str(path), pretty=False)
    return TextInput(context_length=length, pad_id=pad_id, cleaning=cleaning)


def tokenizer_config(student: DualEncoder) -> dict[str, Any]:
    """`tokenizer_config.json` beside it, by which transformers, fastembed and transformers.js open the tokenizer."""
    from open_clip.tokenizer import SimpleTokenizer

    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": student.context_length,
        "padding_side": padding_of(student).side,
        "clean_up_tokenization_spaces": False,
    }
    if not isinstance(student.tokenizer, SimpleTokenizer):
        # the towers that such tokenizers go with read their padding: no mask
        marks = student.tokenizer.tokenizer.special_tokens_map
        return config | {"model_input_names": ["input_ids"]} | {k: v for k, v in marks.items() if isinstance(v, str)}
    config |= {"model_input_names": ["input_ids", "attention_mask"], "bos_token": _START, "eos_token": _END}
    if ends_once(student):
        # open_clip pads with 0, the id of "!", which as a special token would be cut out of texts
        config["pad_token"] = _END
    return config


def token_ids(student: DualEncoder) -> dict[str, int]:
    """The vocabulary's size and the ids of first, last and padding tokens, under transformers' names."""
    from open_clip.tokenizer import SimpleTokenizer

    simple = student.tokenizer
    if isinstance(simple, SimpleTokenizer):
        ids = {"bos": simple.sot_token_id, "eos": simple.eot_token_id, "pad": simple.eot_token_id}
        size = simple.vocab_size
    else:
        source = student.tokenizer.tokenizer
        ids = {"bos": source.bos_token_id, "eos": source.eos_token_id, "pad": source.pad_token_id}
        size = len(source)
    return {"vocab_size": size} | {f"{name}_token_id": value for name, value in ids.items() if value is not None}


def ends_once(student: DualEncoder) -> bool:
    """Whether what follows a text's first end token changes nothing: the tower is causal and pools there."""
    text_cfg = student.model_cfg["text_cfg"]
    other = text_cfg.get("no_causal_mask") or text_cfg.get("embed_cls") or text_cfg.get("hf_model_name")
    return not other and text_cfg.get("pool_type", "argmax") in ("argmax", "eos")


def backend(student: DualEncoder) -> tuple[Tokenizer, Any]:
    """The tokenizer with its cleaning, neither cutting nor padding, and the name of the cleaning.

    Raises:
        UnsupportedError: for tokenizer options that tokenizers cannot hold.
    """
    from open_clip.tokenizer import SimpleTokenizer

    if isinstance(student.tokenizer, SimpleTokenizer):
        return clip_tokenizer(student.tokenizer), "lower"
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
    tokenizer.no_padding()
    tokenizer.no_truncation()
    own = [tokenizer.normalizer] if tokenizer.normalizer else []
    tokenizer.normalizer = normalizers.Sequence([*_cleaning(cleaning), *own])
    return tokenizer, cleaning


def _cleaning(kind: str) -> list[Any]:
    """open_clip's cleaning as normalisers."""
    steps: list[Any] = []
    if kind == "canonicalize":
        steps = [normalizers.Replace("_", " "), normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), "")]
    if kind != "whitespace":
        steps.append(normalizers.Lowercase())
    return [*steps, normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]


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
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (_START, _END)])
    tokenizer.post_processor = processors.RobertaProcessing(
        (_END, simple.eot_token_id), (_START, simple.sot_token_id), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer
