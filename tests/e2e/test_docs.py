# SPDX-License-Identifier: Apache-2.0
"""Every Python block of README.md and docs/ runs, page by page, in a small prepared folder."""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image, ImageDraw

from aced_sdk import Student
from aced_sdk.config import Curation, FrozenConfig
from aced_sdk.config.objective import DISTILLATION_LOSSES
from aced_sdk.evaluation import KINDS
from aced_sdk.towers import build, save

ROOT = Path(__file__).resolve().parents[2]
PAGES = [path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("circle", "square", "triangle", "cross")
TINY: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}


def picture(colour: str, shape: str, shift: int) -> bytes:
    image = Image.new("RGB", (40, 40), "white")
    draw, box = ImageDraw.Draw(image), (4 + shift, 6, 28 + shift, 32)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "triangle":
        draw.polygon([(box[0], box[3]), (box[2], box[3]), (16 + shift, box[1])], fill=colour)
    else:
        draw.line(box, fill=colour, width=5)
        draw.line((box[0], box[3], box[2], box[1]), fill=colour, width=5)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small dual encoders and a small language model as folders, made once."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("reference", "student")):
        save(build(Student(architecture=TINY), seed=seed), folder / name)
    write_language(folder / "language")
    return folder


def write_language(folder: Path) -> None:
    """A Llama with random weights and a byte-level tokenizer with ChatML's marks."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in ("<|im_start|>", "<|im_end|>")])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(fast), **sizes, max_position_embeddings=512)).save_pretrained(folder)


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What a page registers stays its own."""
    known: tuple[dict[str, Any], ...] = (Curation.methods, FrozenConfig.kinds, DISTILLATION_LOSSES, KINDS)
    before = [dict(registry) for registry in known]
    yield
    for registry, values in zip(known, before, strict=True):
        registry.clear()
        registry.update(values)


@pytest.fixture
def world(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages may rely on: `pool/`, `heldout/shapes/`, `reference/`, `student/`, `language/`, `picture.png`."""
    pairs = [(c, s, shift) for shift in (0, 2, 4, 6) for c in COLOURS for s in SHAPES]
    for shard in range(4):
        files: dict[str, bytes] = {}
        for number, (colour, shape, shift) in list(enumerate(pairs))[shard::4]:
            text = "something else" if number % 3 == 0 else f"a {colour} {shape}"
            files[f"{number:04d}.png"] = picture(colour, shape, shift)
            files[f"{number:04d}.txt"] = text.encode()
            files[f"{number:04d}.json"] = json.dumps({"noisy": number % 3 == 0}).encode()
        write_tar(tmp_path / "pool" / f"{shard:05d}.tar", files)
    task = tmp_path / "heldout" / "shapes"
    held_out = {}
    for label, shape in enumerate(SHAPES):
        for number, colour in enumerate(COLOURS):
            held_out[f"{label}{number}.png"] = picture(colour, shape, 3)
            held_out[f"{label}{number}.cls"] = str(label).encode()
    write_tar(task / "test" / "0.tar", held_out)
    (task / "classnames.txt").write_text("\n".join(SHAPES) + "\n", encoding="utf-8")
    (task / "zeroshot_classification_templates.txt").write_text("a {c}\n", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(picture("red", "circle", 1))
    for name in ("reference", "student", "language"):
        (tmp_path / name).symlink_to(models / name)
    monkeypatch.setenv("ACED_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(page: str) -> list[tuple[int, str]]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [(text[: found.start(1)].count("\n"), found[1]) for found in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_the_code_of_a_page_runs(page: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # classes of a page are found by name
    names = vars(module)
    for line, block in blocks(page):
        exec(compile("\n" * line + block, str(ROOT / page), "exec", dont_inherit=True), names)
    assert len(names) > 2  # the blocks did define something


def test_links_between_pages_lead_somewhere() -> None:
    dead = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8")):
            if "://" not in target and not (ROOT / page).parent.joinpath(target).exists():
                dead.append(f"{page}: {target}")
    assert dead == []


def test_each_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert {name for name in pages if f"]({name})" in index} == pages
