# SPDX-License-Identifier: Apache-2.0
"""Random inputs through every reader of foreign data: `make fuzz`, or `python -m tools.fuzz --examples 50000`.

hypothesis changes valid inputs. A reader may return, skip and count, or raise an error of this project. Any other error
is listed with the input that hypothesis shrank it to, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

import export
import vlm
from aced_sdk.config import Data, Student
from aced_sdk.data import Decoding, Pool
from aced_sdk.errors import AcedError
from aced_sdk.evaluation.tasks import load_task
from aced_sdk.files import sha256
from aced_sdk.towers import DualEncoder, build, save
from export.runtime.manifest import manifest_digest

ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
Target = Callable[[Path, random.Random], str]

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, "", " ", "a", "0", "\0", "\ud800", "é" * 50,
    "../x", "/etc/passwd", "a.png", "<image>", "x" * 5000, [], {}, [[]], [None], {"a": None}, [0] * 50, {"": {}},
)  # fmt: skip


def changed(value: Any, dice: random.Random) -> Any:
    """A JSON value with one place changed, removed, repeated or renamed."""
    if dice.random() < 0.15 or not isinstance(value, dict | list) or not value:
        return dice.choice(VALUES)
    if isinstance(value, list):
        place, copy = dice.randrange(len(value)), list(value)
        match dice.randrange(4):
            case 0:
                del copy[place]
            case 1:
                copy.insert(place, copy[place])
            case _:
                copy[place] = changed(copy[place], dice)
        return copy
    key, other = dice.choice(list(value)), dict(value)
    match dice.randrange(4):
        case 0:
            del other[key]
        case 1:
            other[str(dice.choice(VALUES))] = other.pop(key)
        case _:
            other[key] = changed(other[key], dice)
    return other


def several(value: Any, dice: random.Random) -> Any:
    """One to four changes."""
    for _ in range(dice.randint(1, 4)):
        value = changed(value, dice)
    return value


def damaged(content: bytes, dice: random.Random) -> bytes:
    """Bytes with a few of them changed, cut out, repeated, or the end cut off."""
    raw = bytearray(content)
    for _ in range(dice.randint(1, 4)):
        start = dice.randrange(len(raw) + 1)
        end = min(len(raw), start + dice.choice((1, 4, 100, 512)))
        match dice.randrange(5):
            case 0:
                raw[start:end] = dice.randbytes(end - start)
            case 1:
                del raw[start:end]
            case 2:
                raw[start:start] = raw[start:end]
            case 3:
                raw[start:end] = bytes(end - start)
            case _:
                del raw[start:]
    return bytes(raw)


def written(value: Any, dice: random.Random) -> bytes:
    """A JSON file, at times damaged."""
    content = json.dumps(value).encode()
    return damaged(content, dice) if dice.random() < 0.3 else content


class World:
    """Valid inputs, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        Image.new("RGB", (20, 18), (200, 10, 10)).save(folder / "a.png")
        self.picture = (folder / "a.png").read_bytes()
        self.encoder: DualEncoder = build(Student(architecture=ARCHITECTURE), seed=0)
        save(self.encoder, folder / "student")
        export.to_onnx(folder / "student", folder / "onnx", precisions=("fp32",), measure=False)
        self.onnx = export.OnnxEncoder(folder / "onnx", threads=1)
        (folder / "task" / "test").mkdir(parents=True)

    def tar(self, dice: random.Random, extra: dict[str, bytes]) -> bytes:
        """A tar of three samples, changed."""
        files = []
        for key in "abc":
            members = {"png": self.picture, "txt": b"a red square", "json": b'{"noisy": false}'} | extra
            files += [(f"{key}.{extension}", content) for extension, content in members.items()]
        for _ in range(dice.randint(0, 3)):
            place = dice.randrange(len(files))
            name, content = files[place]
            names = (name, "a.png", "a.b.txt", "._a.png", "a", ".", "é/" + name, "x" * 200 + name)
            files[place] = (dice.choice(names), damaged(content, dice) if content and dice.random() < 0.7 else content)
        stream = io.BytesIO()
        kind = dice.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
        with tarfile.open(fileobj=stream, mode="w", format=kind) as tar:
            for name, content in files:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                if dice.random() < 0.05:
                    info.type, info.linkname, info.size = dice.choice((b"1", b"2", b"3", b"5", b"6")), "a.png", 0
                try:
                    tar.addfile(info, io.BytesIO(content))
                except ValueError:  # a name that the format cannot hold
                    continue
        content = stream.getvalue()
        return damaged(content, dice) if dice.random() < 0.4 else content * dice.choice((1, 1, 1, 2))


def targets(world: World) -> dict[str, Target]:
    """The readers by name; each returns how it ended."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    llava = [
        {"id": str(n), "image": "a.png", "conversations": turns, "kind": "x", "answers": ["red"]} for n in range(3)
    ]
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    row = {
        "id": "0",
        "messages": [*talk, {"role": "assistant", "content": "red"}],
        "images": [str(world.folder / "a.png")],
    }
    captions = {
        "images": [{"id": n, "file_name": "a.png"} for n in range(3)],
        "annotations": [{"image_id": n, "caption": "red"} for n in range(3)],
    }
    people = [{"answer": "red"}] * 10
    asked = {
        "data_subtype": "x",
        "questions": [{"question_id": n, "image_id": 1, "question": "What?"} for n in range(3)],
    }
    answered = {
        "annotations": [
            {
                "question_id": 1,
                "image_id": 1,
                "answer_type": "other",
                "multiple_choice_answer": "red",
                "answers": people,
            }
        ]
    }

    def skipped(samples: vlm.Samples) -> str:
        return "skipped" if samples.skipped else "read"

    def load_llava(folder: Path, dice: random.Random) -> str:
        (folder / "d.json").write_bytes(written(several(llava, dice), dice))
        return skipped(vlm.load_llava(folder / "d.json", world.folder, max_unusable_fraction=0.7))

    def load_messages(folder: Path, dice: random.Random) -> str:
        return skipped(vlm.load_messages(several([row] * 3, dice), max_unusable_fraction=0.7))

    def load_coco(folder: Path, dice: random.Random) -> str:
        (folder / "d.json").write_bytes(written(several(captions, dice), dice))
        return skipped(vlm.load_coco_captions(folder / "d.json", world.folder, max_unusable_fraction=0.7))

    def load_vqa(folder: Path, dice: random.Random) -> str:
        (folder / "q.json").write_bytes(written(several(asked, dice), dice))
        (folder / "a.json").write_bytes(written(several(answered, dice), dice))
        return skipped(
            vlm.load_vqav2(
                folder / "q.json", folder / "a.json", world.folder, image_name="a.png", max_unusable_fraction=0.7
            )
        )

    def load_webdataset(folder: Path, dice: random.Random) -> str:
        talk = {"json": written(several({"conversations": turns}, dice), dice)} if dice.random() < 0.5 else {}
        (folder / "0.tar").write_bytes(world.tar(dice, talk))
        return skipped(vlm.load_webdataset([folder / "0.tar"], folder / "pictures", max_unusable_fraction=0.7))

    def task(folder: Path, dice: random.Random) -> str:
        kind = dice.choice(("classification", "multilabel", "retrieval"))
        array = io.BytesIO()
        np.save(array, np.array([0, 1, 0]))
        files = {
            "dataset_type.txt": kind.encode(), "classnames.txt": b"red\ngreen\nblue\n",
            "zeroshot_classification_templates.txt": b"a {c}\nthe {}\n",
        }  # fmt: skip
        for name in files:
            if dice.random() < 0.3:
                files[name] = damaged(files[name], dice)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        (folder / "test").mkdir()
        (folder / "test" / "0.tar").write_bytes(world.tar(dice, {"cls": b"1", "npy": array.getvalue()}))
        loaded = load_task(folder.name, folder.parent, world.encoder, max_unusable_fraction=0.7)
        return "skipped" if loaded.skipped else "read"

    def tokens(folder: Path, dice: random.Random) -> str:
        (folder / "0.tar").write_bytes(world.tar(dice, {}))
        pool = Pool([folder / "0.tar"], caption_lines="first" if dice.random() < 0.5 else "join")
        decoder = Decoding(pool, world.encoder.processor, Data(shards=("x",), max_unusable_fraction=0.7))
        decoder.fetch(np.arange(len(decoder.pool)))
        return "skipped" if decoder.skipped else "read"

    def onnx(folder: Path, dice: random.Random) -> str:
        given = dice.choice(VALUES)
        if dice.random() < 0.7:
            given = damaged(world.picture, dice)
        if dice.random() < 0.3:
            shape = [dice.choice((0, 1, 3, 4, 7)) for _ in range(dice.randint(0, 5))]
            given = np.zeros(shape, dice.choice((np.uint8, np.float32, np.int64)))
        world.onnx.encode_image([world.picture, given] if dice.random() < 0.5 else given)
        return "read"

    def texts(folder: Path, dice: random.Random) -> str:
        letters = "".join(chr(dice.choice((dice.randrange(128), dice.randrange(0x110000)))) for _ in range(30))
        given = letters if dice.random() < 0.7 else dice.choice(VALUES)
        world.onnx.encode_text(["a", given] if dice.random() < 0.5 else given)
        return "read"

    def folders(folder: Path, dice: random.Random) -> str:
        here = folder / "o"
        shutil.copytree(world.folder / "onnx", here)
        small = [path for path in here.rglob("*") if path.is_file() and path.stat().st_size < 2_000_000]
        victim = here / "export.json" if dice.random() < 0.5 else dice.choice(small)
        content = victim.read_bytes()
        if victim.suffix == ".json" and dice.random() < 0.7:
            victim.write_bytes(json.dumps(several(json.loads(content), dice)).encode())
        else:
            victim.write_bytes(damaged(content, dice))
        if dice.random() < 0.7:  # as an attacker would: with digests that fit
            _redigest(here)
        export.verify_folder(here)
        return "read"

    return {
        "vlm.load_llava": load_llava, "vlm.load_messages": load_messages, "vlm.load_coco_captions": load_coco,
        "vlm.load_vqav2": load_vqa, "vlm.load_webdataset": load_webdataset, "task folders": task,
        "tars to tokens": tokens, "OnnxEncoder.encode_image": onnx, "OnnxEncoder.encode_text": texts,
        "verify_folder": folders,
    }  # fmt: skip


def _redigest(folder: Path) -> None:
    """Write the digests of today's files into `export.json`, where it still is a manifest."""
    try:
        manifest = json.loads((folder / "export.json").read_text())
        manifest["files"] = {name: sha256(folder / name) for name in manifest["files"]}
        manifest["digest"] = manifest_digest(manifest)
        (folder / "export.json").write_text(json.dumps(manifest))
    except (ValueError, KeyError, TypeError, OSError, AttributeError, AcedError):
        return


def fuzz(name: str, target: Target, examples: int, start: int) -> dict[str, Any]:
    """Run one target; raw errors are kept by the line that raised them."""
    ends: Counter[str] = Counter()
    raw: dict[str, str] = {}
    slowest = 0.0

    @seed(start)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.integers(0, 2**62))
    def example(number: int) -> None:
        nonlocal slowest
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ends[target(Path(folder), random.Random(number))] += 1
            except AcedError:
                ends["named error"] += 1
            except Exception as error:  # noqa: BLE001, whatever it is: it is listed
                ends["raw error"] += 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                raw.setdefault(
                    f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}", f"{number}: {error}"
                )
        slowest = max(slowest, time.process_time() - began)

    example()
    return {"target": name, "inputs": ends.total(), **ends, "slowest_cpu_s": round(slowest, 3), "raw": raw}


def main() -> int:
    """Run all targets and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=50_000, help="of all targets together")
    parser.add_argument("--only", nargs="*", default=[], help="targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chosen = {
            name: one for name, one in targets(World(Path(folder))).items() if name in asked.only or not asked.only
        }
        rows = []
        for name, target in chosen.items():
            rows.append(fuzz(name, target, asked.examples // len(chosen), asked.seed))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    text = json.dumps({"seed": asked.seed, "aced-sdk": version("aced-sdk"), "rows": rows}, indent=1)
    if asked.output:
        asked.output.write_text(text + "\n")
    print(text)
    return int(any(row["raw"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
