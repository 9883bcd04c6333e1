# SPDX-License-Identifier: Apache-2.0
"""Captioning and VQA models on a distilled vision tower: build, tune, generate, score, save."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm.building import build as build
    from vlm.coco import load_coco_captions as load_coco_captions
    from vlm.coco import load_vqav2 as load_vqav2
    from vlm.config import Adapt as Adapt
    from vlm.config import Align as Align
    from vlm.config import Lora as Lora
    from vlm.config import Projector as Projector
    from vlm.config import TuneConfig as TuneConfig
    from vlm.data import Sample as Sample
    from vlm.data import load_llava as load_llava
    from vlm.data import load_messages as load_messages
    from vlm.generating import answer as answer
    from vlm.generating import caption as caption
    from vlm.generating import stream_answer as stream_answer
    from vlm.gguf import save_gguf as save_gguf
    from vlm.hub import push_to_hub as push_to_hub
    from vlm.metrics import caption_scores as caption_scores
    from vlm.probing import LitDecoder as LitDecoder
    from vlm.probing import lit_decoder as lit_decoder
    from vlm.ranking import Ranking as Ranking
    from vlm.ranking import rank_encoders as rank_encoders
    from vlm.saving import load as load
    from vlm.saving import save as save
    from vlm.scoring import Scores as Scores
    from vlm.scoring import evaluate as evaluate
    from vlm.tuning import TuneResult as TuneResult
    from vlm.tuning import tune as tune
    from vlm.vqa import vqa_accuracy as vqa_accuracy
    from vlm.webdataset import load_webdataset as load_webdataset

_HOME = {
    "Adapt": "config",
    "Align": "config",
    "LitDecoder": "probing",
    "Lora": "config",
    "Projector": "config",
    "Ranking": "ranking",
    "Sample": "data",
    "Scores": "scoring",
    "TuneConfig": "config",
    "TuneResult": "tuning",
    "answer": "generating",
    "build": "building",
    "caption": "generating",
    "caption_scores": "metrics",
    "evaluate": "scoring",
    "lit_decoder": "probing",
    "load": "saving",
    "load_coco_captions": "coco",
    "load_llava": "data",
    "load_messages": "data",
    "load_vqav2": "coco",
    "load_webdataset": "webdataset",
    "push_to_hub": "hub",
    "rank_encoders": "ranking",
    "save": "saving",
    "save_gguf": "gguf",
    "stream_answer": "generating",
    "tune": "tuning",
    "vqa_accuracy": "vqa",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    # torch and transformers are loaded by the first verb, not by the import
    if name in _HOME:
        return getattr(import_module(f"vlm.{_HOME[name]}"), name)
    raise AttributeError(f"module 'vlm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
