# SPDX-License-Identifier: Apache-2.0
"""Captioning and VQA models on a distilled vision tower: build, tune, generate, score, save."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm.config import Adapt as Adapt
    from vlm.config import Align as Align
    from vlm.config import Lora as Lora
    from vlm.config import Projector as Projector
    from vlm.config import TuneConfig as TuneConfig
    from vlm.data.coco import load_coco_captions as load_coco_captions
    from vlm.data.coco import load_vqav2 as load_vqav2
    from vlm.data.samples import Sample as Sample
    from vlm.data.samples import load_llava as load_llava
    from vlm.data.samples import load_messages as load_messages
    from vlm.data.webdataset import load_webdataset as load_webdataset
    from vlm.generation import answer as answer
    from vlm.generation import caption as caption
    from vlm.generation import stream_answer as stream_answer
    from vlm.model.building import build as build
    from vlm.model.gguf import save_gguf as save_gguf
    from vlm.model.hub import push_to_hub as push_to_hub
    from vlm.model.saving import load as load
    from vlm.model.saving import save as save
    from vlm.probing.lit import LitDecoder as LitDecoder
    from vlm.probing.lit import lit_decoder as lit_decoder
    from vlm.probing.ranking import Ranking as Ranking
    from vlm.probing.ranking import rank_encoders as rank_encoders
    from vlm.scores import Scores as Scores
    from vlm.scoring.captions import caption_scores as caption_scores
    from vlm.scoring.evaluate import evaluate as evaluate
    from vlm.scoring.vqa import vqa_accuracy as vqa_accuracy
    from vlm.tuning import TuneResult as TuneResult
    from vlm.tuning import tune as tune

_HOME = {
    "Adapt": "config",
    "Align": "config",
    "LitDecoder": "probing.lit",
    "Lora": "config",
    "Projector": "config",
    "Ranking": "probing.ranking",
    "Sample": "data.samples",
    "Scores": "scores",
    "TuneConfig": "config",
    "TuneResult": "tuning",
    "answer": "generation",
    "build": "model.building",
    "caption": "generation",
    "caption_scores": "scoring.captions",
    "evaluate": "scoring.evaluate",
    "lit_decoder": "probing.lit",
    "load": "model.saving",
    "load_coco_captions": "data.coco",
    "load_llava": "data.samples",
    "load_messages": "data.samples",
    "load_vqav2": "data.coco",
    "load_webdataset": "data.webdataset",
    "push_to_hub": "model.hub",
    "rank_encoders": "probing.ranking",
    "save": "model.saving",
    "save_gguf": "model.gguf",
    "stream_answer": "generation",
    "tune": "tuning",
    "vqa_accuracy": "scoring.vqa",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    # torch and transformers are loaded by the first verb, not by the import
    if name in _HOME:
        return getattr(import_module(f"vlm.{_HOME[name]}"), name)
    raise AttributeError(f"module 'vlm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
