# SPDX-License-Identifier: Apache-2.0
"""Worlds to train in: the data box dealt anew by a seed into trusted pairs, a noisy pool and a reference.

Pictures are shrunk to the student's resolution, and the features of the two frozen pretrained trunks
(EfficientNet-Lite0 on 112 px, all-MiniLM-L6-v2) are computed once for all worlds. A world's reference is two heads
trained on its own trusted pairs; its embeddings of the pool go into the pool's tars as KEY.npz, which the library
reads as `Stored`.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import aced_sdk as aced
from aced_sdk import towers
from aced_sdk.config import LossForm
from aced_sdk.data import Pool, prepare
from aced_sdk.errors import DataError
from aced_sdk.files import home, save_tensors, whole_folder, write_json
from examples.quickstart.box import Box, BoxConfig, build_box, fetch_models
from examples.quickstart.box.clipart import has_apt
from examples.quickstart.box.splits import shuffle_captions
from examples.quickstart.box.write import ROWS_PER_SHARD, write_tar
from examples.quickstart.reference import assemble, features, train_heads

SIDE = 32
STUDENT: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}
EMBED_DIM = 128  # the reference's too, so that losses that compare embeddings apply
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class WorldConfig:
    """How the box is dealt.

    Attributes:
        seed: of the deal, the noise, the reference's heads and their order.
        noise: share of the pool's captions that are dealt to wrong pictures.
        pool: pairs in the pool, before unusable ones.
        trusted_emoji: share of the box's trusted emoji that is taken.
        trusted_pool: share of the box's pool that joins the trusted pairs with its true captions, so that the
            reference knows every domain; these pairs leave the pool.
        reference_steps: of the heads.
        reference_loss: loss that the heads are trained with; a softmax-trained reference has no bias.
    """

    seed: int
    noise: float = 0.5
    pool: int = 12_000
    trusted_emoji: float = 0.8
    trusted_pool: float = 0.15
    reference_steps: int = 400
    reference_loss: LossForm = "sigmoid"

    def name(self) -> str:
        """A folder's name that changes with any value and with the recipe."""
        text = json.dumps({"recipe": 1, "student": STUDENT} | asdict(self), sort_keys=True)
        return f"seed{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


@dataclass(frozen=True, eq=False)
class Material:
    """All pairs of a box with everything that worlds are dealt from; rows of trusted pairs come first.

    Attributes:
        directory: with the folders `evaluation` and `validation` at the student's resolution.
        trusted: rows that the box trusts.
        pictures: PNG of SIDE x SIDE pixels.
        captions: the true ones.
        kinds: emoji, icon, logo or clipart.
        image: features of the pictures, float32 [N, 1280].
        text: features of the captions, float32 [N, 384].
    """

    directory: Path
    trusted: int
    pictures: list[bytes]
    captions: list[str]
    kinds: list[str]
    image: Tensor
    text: Tensor


@dataclass(frozen=True)
class World:
    """Where one world lies, and how well its reference tells true from shuffled captions of the pool (AUC)."""

    directory: Path
    evaluation: Path
    validation: Path
    auc: dict[str, float | None]

    @property
    def pool(self) -> Path:
        """Shards with noise."""
        return self.directory / "pool"

    @property
    def trusted(self) -> Path:
        """Shards without."""
        return self.directory / "trusted"

    @property
    def reference(self) -> aced.Stored:
        """The reference's embeddings of the pool."""
        facts = json.loads((self.directory / "world.json").read_text(encoding="utf-8"))
        return aced.Stored(scale=facts["scale"], bias=facts["bias"])


def get_material(progress: Progress) -> Material:
    """The material of the box, made once and kept in the cache home. Clip-art and Tux Paint need apt-get."""
    box = build_box(BoxConfig(size="small", with_apt=has_apt()), progress=progress)
    models = fetch_models(progress=progress)
    folder = home() / "ordering" / f"{box.directory.name}-{SIDE}"
    if not (folder / "rows.json").is_file():
        with whole_folder(folder) as temporary:
            _write_material(box, models, temporary, progress)
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "features.safetensors")
    pool = Pool([folder / "pictures"])
    return Material(
        folder,
        rows["trusted"],
        [pool.read(row, "png") or b"" for row in range(len(pool))],
        rows["captions"],
        rows["kinds"],
        tensors["image"].float(),
        tensors["text"].float(),
    )


def _write_material(box: Box, models: dict[str, Path], folder: Path, progress: Progress) -> None:
    parts = [Pool([box.trusted]), Pool([box.pool])]
    facts = [part.metadata(row) for part in parts for row in range(len(part))]
    captions = [fact["true_caption"] for fact in facts]
    pictures = [_shrunk(part.read(row, "png") or b"") for part in parts for row in range(len(part))]
    for start in range(0, len(pictures), ROWS_PER_SHARD):
        shard = range(start, min(start + ROWS_PER_SHARD, len(pictures)))
        files = [{"png": pictures[row], "txt": captions[row].encode()} for row in shard]
        write_tar(folder / "pictures" / f"{start // ROWS_PER_SHARD:05d}.tar", files, [f"{row:06d}" for row in shard])
    for split in ("evaluation", "validation"):
        for task in sorted((box.directory / split).iterdir()):
            _shrink_task(task, folder / split / task.name)
    with tempfile.TemporaryDirectory() as staging:
        encoder = assemble(models, Path(staging), seed=0)
        both: list[tuple[Tensor, Tensor]] = []
        for number, part in enumerate(parts):
            true = _with_true_captions(part, Path(staging) / f"part{number}")
            both.append(features(encoder, true, partial(_tell, progress, len(part))))
    image, text = (torch.cat([pair[side] for pair in both]).half() for side in (0, 1))
    if len(image) != len(captions):
        raise DataError(
            f"{len(captions) - len(image)} pictures of the box cannot be read",
            remedy="delete the box in the cache home; it is built again",
        )
    save_tensors(folder / "features.safetensors", {"image": image, "text": text})
    write_json(
        folder / "rows.json",
        {"trusted": len(parts[0]), "captions": captions, "kinds": [fact["kind"] for fact in facts]},
    )


def _tell(progress: Progress, total: int, done: int) -> None:
    progress("frozen features", done, total)


def _with_true_captions(part: Pool, folder: Path) -> Pool:
    """The same pictures with the captions that belong to them."""
    for start in range(0, len(part), ROWS_PER_SHARD):
        shard = range(start, min(start + ROWS_PER_SHARD, len(part)))
        files = [
            {"png": part.read(row, "png") or b"", "txt": part.metadata(row)["true_caption"].encode()} for row in shard
        ]
        write_tar(folder / f"{start // ROWS_PER_SHARD:05d}.tar", files, [f"{row:06d}" for row in shard])
    return Pool([folder])


def _shrunk(png: bytes) -> bytes:
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    stream = io.BytesIO()
    white.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


def _shrink_task(task: Path, target: Path) -> None:
    shutil.copytree(task, target, ignore=shutil.ignore_patterns("*.tar"))
    pool = Pool([task / "test"])
    files = []
    for row in range(len(pool)):
        members = {extension: pool.read(row, extension) or b"" for extension in pool.members(row)}
        files.append(members | {"png": _shrunk(members["png"])})
    write_tar(target / "test" / "0.tar", files, [pool.key(row) for row in range(len(pool))])


def make_world(config: WorldConfig, material: Material) -> World:
    """Deal, train the reference's heads, and write the shards; a world that is there is taken as it is."""
    folder = home() / "ordering" / "worlds" / f"{material.directory.name}-{config.name()}"
    if not (folder / "world.json").is_file():
        with whole_folder(folder) as temporary:
            _write_world(config, material, temporary)
        student = towers.build(aced.Student(architecture=STUDENT), 0)
        for part in ("pool", "trusted"):
            data = aced.Data(shards=(str(folder / part),))
            prepare(Pool(data.shards), student.processor, data, home() / "prepared")
    facts = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    return World(folder, material.directory / "evaluation", material.directory / "validation", facts["auc"])


def _write_world(config: WorldConfig, material: Material, folder: Path) -> None:
    rng = np.random.default_rng([config.seed, 2411])
    emoji = rng.permutation(material.trusted)[: round(config.trusted_emoji * material.trusted)]
    others = material.trusted + rng.permutation(len(material.captions) - material.trusted)
    known = round(config.trusted_pool * len(others))
    trusted = np.concatenate([emoji, others[:known]])
    pool = others[known : known + config.pool]

    image, text, scale, bias = _embed(material, trusted, config)
    captions = shuffle_captions(
        [material.captions[row] for row in pool], config.noise, random.Random(f"{config.seed} noise")
    )
    of_caption = {caption: row for row, caption in enumerate(material.captions)}  # every caption is some row's own
    written = np.array([of_caption[caption] for caption in captions])
    noisy = np.array([caption != material.captions[row] for caption, row in zip(captions, pool, strict=True)])
    for name, rows, said in (
        ("trusted", trusted, [material.captions[row] for row in trusted]),
        ("pool", pool, captions),
    ):
        for start in range(0, len(rows), ROWS_PER_SHARD):
            files = []
            for place in range(start, min(start + ROWS_PER_SHARD, len(rows))):
                row = int(rows[place])
                facts = {"kind": material.kinds[row], "noisy": bool(name == "pool" and noisy[place])}
                members = {
                    "png": material.pictures[row],
                    "txt": said[place].encode(),
                    "json": json.dumps(facts, sort_keys=True).encode(),
                }
                if name == "pool":
                    members["npz"] = _npz(image[row], text[int(written[place])])
                files.append(members)
            keys = [f"{row:06d}" for row in rows[start : start + ROWS_PER_SHARD]]
            write_tar(folder / name / f"{start // ROWS_PER_SHARD:05d}.tar", files, keys)
    similarity = (image[pool] * text[written]).sum(dim=1).numpy()
    kinds = np.array([material.kinds[row] for row in pool])
    aucs = {"all": share_in_order(similarity, noisy)} | {
        str(kind): share_in_order(similarity[kinds == kind], noisy[kinds == kind]) for kind in np.unique(kinds)
    }
    write_json(
        folder / "world.json",
        asdict(config) | {"scale": scale, "bias": bias, "auc": aucs, "trusted": len(trusted), "rows": len(pool)},
    )


def _embed(material: Material, trusted: Any, config: WorldConfig) -> tuple[Tensor, Tensor, float, float]:
    """All pairs by heads that were trained on the trusted ones: [N, EMBED_DIM] each, the scale and the bias."""
    with tempfile.TemporaryDirectory() as staging:
        encoder = assemble(fetch_models(), Path(staging), config.seed, EMBED_DIM)
    train_heads(
        encoder,
        material.image[trusted],
        material.text[trusted],
        config.reference_steps,
        512,
        config.seed,
        lambda _: None,
        config.reference_loss,
    )
    model: Any = encoder.model.eval()
    normal = torch.nn.functional.normalize
    with torch.no_grad():
        image = normal(model.visual.head(material.image), dim=-1)
        text = normal(model.text.proj(material.text), dim=-1)
    return image, text, encoder.scale, encoder.bias if config.reference_loss == "sigmoid" else 0.0


def _npz(image: Tensor, text: Tensor) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, image_emb=image.half().numpy(), text_emb=text.half().numpy())
    return stream.getvalue()


def share_in_order(scores: Any, bad: Any) -> float | None:
    """How often a true pair scores above a shuffled one; None where there are no pairs of both."""
    if bad.all() or not bad.any():
        return None
    ranks = scores.argsort().argsort() + 1
    good = ~bad
    return float((ranks[good].sum() - good.sum() * (good.sum() + 1) / 2) / (good.sum() * bad.sum()))
