# SPDX-License-Identifier: Apache-2.0
"""infinity's torch engine on transformers folders."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from infinity_emb import AsyncEmbeddingEngine, EngineArgs
from PIL import Image

from tools.clients.inside import Check


def checks(folder: Path) -> Iterator[Check]:
    """Embeddings.

    infinity cuts all texts after 20 tokens, for which a shorter context has no place. The transformers that it allows
    takes SigLIP's tokenizer from a SentencePiece file alone.
    """
    pictures = [Image.open(path) for path in sorted((folder / "pictures").glob("own*.png"))]
    texts = json.loads((folder / "inputs.json").read_text())["texts"]
    for artefact in ("transformers/clip", "transformers/clip-short"):
        run = partial(embed, folder / artefact, "image_embed", images=pictures)
        yield Check(artefact, "image embeddings", "image_embed", run)
    run = partial(embed, folder / "transformers/clip", "embed", sentences=texts)
    yield Check("transformers/clip", "text embeddings", "embed", run)


def embed(place: Path, method: str, **inputs: list[Any]) -> Any:
    """Normalised embeddings."""

    async def run() -> Any:
        options = {"engine": "torch", "device": "cpu", "model_warmup": False, "bettertransformer": False}
        engine = AsyncEmbeddingEngine.from_args(EngineArgs(model_name_or_path=str(place), **options))
        async with engine:
            found, _ = await getattr(engine, method)(**inputs)
        return found

    return asyncio.run(run())
