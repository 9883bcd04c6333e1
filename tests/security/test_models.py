# SPDX-License-Identifier: Apache-2.0
"""A model folder or a config of somebody else's: no code runs, and nothing outside of the folder is read or written."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import ARCHITECTURE, distillation, encoder, write_pool

from aced_sdk import presets, towers
from aced_sdk.config import DistillConfig, Student
from aced_sdk.towers.folder import CONFIG, MANIFEST
from aced_sdk.verbs import evaluate, plan
from tests.security.folders import BERT, change, files, text_tower, tokenizer, with_text, write
from tests.security.sandbox import canary, run

CODE = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return towers.save(encoder(), tmp_path_factory.mktemp("plain") / "s")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose text tower and tokenizer are transformers', both in `./text`."""
    folder = tmp_path_factory.mktemp("texts")
    towers.save(towers.build(Student(architecture=with_text(folder / "origin")), 0), folder / "s")
    text_tower(folder / "s/text")
    change(
        folder / "s" / CONFIG,
        model_cfg__text_cfg__hf_model_name="./text",
        model_cfg__text_cfg__hf_tokenizer_name="./text",
    )
    return folder / "s"


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "s", symlinks=True))


def plant(folder: Path, code: str) -> None:
    for name in ("evil.py", "tokenization_evil.py", "modeling_evil.py"):
        (folder / name).write_text(code + "class Evil: pass\n")


def load(folder: Path) -> str:
    """Load it, and answer "y" to whatever is asked."""
    sys.stdin = io.StringIO("y\n" * 99)
    return str(towers.load(folder).tokenize("a red boat").tolist())


def load_and_save(folder: Path, target: Path) -> str:
    return str(towers.save(towers.load(folder), target))


def build(architecture: Any) -> str:
    sys.stdin = io.StringIO("y\n" * 99)
    return str(towers.build(Student(architecture=architecture), 0).embedding_dim)


def plan_of(path: Path) -> str:
    sys.stdin = io.StringIO("y\n" * 99)
    return str(plan(DistillConfig.from_yaml(path)))


def test_the_folders_of_these_attacks_load_when_honest(plain: Path, texts: Path) -> None:
    for folder in (plain, texts):
        assert run(load, folder).returned()


# -- code -------------------------------------------------------------------------------------------------------------

ALL = {"auto_map": CODE}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: (tokenizer_kwargs of the folder, tokenizer_config.json, config.json)
    "trusted by the config": ({"trust_remote_code": True}, ALL | {"tokenizer_class": "EvilTokenizer"}, ALL),
    "a class of its own": ({}, ALL | {"tokenizer_class": "EvilTokenizer"}, ALL),
    "a family of its own": ({}, ALL | {"tokenizer_class": "EvilTokenizer"}, ALL | {"model_type": "evil"}),
    "a tokenizer that is a model": ({}, {"tokenizer_class": "AutoModel"}, ALL | {"model_type": "evil"}),
    "a tokenizer that is a config": ({}, {"tokenizer_class": "AutoConfigFast"}, ALL | {"model_type": "evil"}),
    "a processor": ({}, {"tokenizer_class": "AutoProcessor"}, ALL),
    "an attention kernel": ({}, {}, {"attn_implementation": "evil/kernel"}),
    "a kernel in an inner config": ({}, {}, {"text_config": {"_attn_implementation": "evil/kernel"}}),
    "another config": ({}, {}, {"configuration_files": ["config.4.0.0.json"]}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_no_code_of_a_folder_runs(texts: Path, tmp_path: Path, name: str) -> None:
    folder = copy(texts, tmp_path)
    ran, code = canary(tmp_path)
    plant(folder / "text", code)
    options, settings, config = SETTINGS[name]
    change(folder / CONFIG, model_cfg__text_cfg__tokenizer_kwargs=options)
    change(folder / "text/tokenizer_config.json", **settings)
    change(folder / "text/config.json", **config)
    outcome = run(load, folder)
    assert not ran.exists()
    if name != "a class of its own":  # then transformers takes a class of its own
        assert outcome.refused()
    # The same as a config names it: what aced.distill, aced.resume and aced.plan read.
    text_cfg = dict.fromkeys(("hf_model_name", "hf_tokenizer_name"), str(folder / "text"))
    architecture = ARCHITECTURE | {"text_cfg": text_cfg | {"context_length": 8, "tokenizer_kwargs": options}}
    again = run(build, architecture)
    assert not ran.exists()
    assert again.kind == outcome.kind, again


def test_no_code_runs_through_a_tokenizer_alone(plain: Path, tmp_path: Path) -> None:
    folder = copy(plain, tmp_path)
    ran, code = canary(tmp_path)
    tokenizer(folder / "tok", auto_map=CODE, tokenizer_class="EvilTokenizer")
    write(folder / "tok/config.json", {"model_type": "evil", "auto_map": CODE})
    plant(folder / "tok", code)
    change(folder / CONFIG, model_cfg__text_cfg__hf_tokenizer_name="./tok")
    for options in ({}, {"trust_remote_code": True}, {"code_revision": "x"}, {"tokenizer_type": "evil"}):
        change(folder / CONFIG, model_cfg__text_cfg__tokenizer_kwargs=options)
        run(load, folder)
        assert not ran.exists()


def test_no_code_runs_through_the_verbs(texts: Path, tmp_path: Path) -> None:
    folder = copy(texts, tmp_path)
    ran, code = canary(tmp_path)
    plant(folder / "text", code)
    change(folder / CONFIG, model_cfg__text_cfg__tokenizer_kwargs={"trust_remote_code": True})
    change(folder / "text/config.json", model_type="evil", **ALL)
    assert run(evaluate, folder, ["stable_eval"], tmp_path).refused("tokenizer_kwargs.trust_remote_code")
    pool = write_pool(tmp_path / "pool", pairs=32, shards=1)
    config = distillation(tmp_path / "run", pool, folder)
    config.to_yaml(tmp_path / "reference.yaml")
    config.replace(student=Student(architecture=f"local-dir:{folder}")).to_yaml(tmp_path / "student.yaml")
    for name in ("reference.yaml", "student.yaml"):
        assert run(plan_of, tmp_path / name).refused("tokenizer_kwargs.trust_remote_code")
    assert not ran.exists()


@pytest.mark.parametrize("scheme", ["hf-hub:", "hf_hub:", "local-dir:", "timm/", "./", "/", "torch.hub:", "\n"])
def test_a_timm_tower_is_one_that_timm_defines(plain: Path, tmp_path: Path, scheme: str) -> None:
    import torch

    folder, other = copy(plain, tmp_path), tmp_path / "other"
    ran, code = canary(tmp_path)
    other.mkdir()
    write(other / "config.json", {"architecture": "resnet10t", "pretrained_cfg": {}})
    torch.save({"code": code}, other / "pytorch_model.bin")
    vision = {"timm_model_name": f"{scheme}{other}", "image_size": 16, "timm_model_pretrained": True}
    change(folder / CONFIG, model_cfg__vision_cfg=vision)
    assert run(load, folder).refused("vision_cfg.timm_model_name")
    assert run(build, ARCHITECTURE | {"vision_cfg": vision}).refused("vision_cfg.timm_model_name")
    assert not ran.exists()


OPTIONS = [
    {"cache_dir": "/tmp"}, {"gguf_file": "x.gguf"}, {"tokenizer_file": "/etc/passwd"}, {"vocab_file": "/etc/passwd"},
    {"config": {}}, {"mistral_format": True}, {"tokenizer_name": "x"}, {"subfolder": ".."}, {"revision": "x"},
    {"clean": "system"}, {"language": "a" * 99}, {"strip_sep_token": "yes"}, {"context_length": 10**9}, [], "x",
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_only_known_options_reach_a_tokenizer(texts: Path, tmp_path: Path, options: Any) -> None:
    folder = copy(texts, tmp_path)
    change(folder / CONFIG, model_cfg__text_cfg__tokenizer_kwargs=options)
    assert run(load, folder).refused("tokenizer_kwargs" if options else "")


# -- other folders ----------------------------------------------------------------------------------------------------

NAMES = ["./../other", "./sub/../../other", "../other", "/ABSOLUTE", "~/other", "~nosuchuser/x", "other", "./", ".",
         "./other\0", "./missing", "//x", "a/b/c", "-x/y", "a..b/..", "http://x/y", "./" + "x" * 5_000,
         "./\ud800"]  # fmt: skip


@pytest.mark.parametrize("key", ["hf_tokenizer_name", "hf_model_name"])
@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:20]))
def test_a_folder_names_no_files_of_another_one(texts: Path, tmp_path: Path, key: str, name: str) -> None:
    folder = copy(texts, tmp_path)
    other = text_tower(tmp_path / "other")
    (other / "private.txt").write_text("secret")
    change(folder / CONFIG, **{f"model_cfg__text_cfg__{key}": name.replace("/ABSOLUTE", str(other))})
    text_tower(tmp_path / "elsewhere/other", hidden_size=32)  # what a save would overwrite
    before = files(tmp_path)
    assert run(offline, folder, tmp_path / "elsewhere/saved").refused()
    assert files(tmp_path) == before


def offline(folder: Path, target: Path) -> str:
    import huggingface_hub

    def nothing(*_: object, **__: object) -> str:
        raise OSError("this test has no hub")

    huggingface_hub.snapshot_download = nothing
    os.chdir(folder.parent)  # where `other` is a folder
    return load_and_save(folder, target)


@pytest.mark.parametrize("place", ["text/vocab.txt", "text/config.json", "text/tokenizer.json", "text/sub", "README",
                                   CONFIG, MANIFEST, "open_clip_model.safetensors", "text"])  # fmt: skip
def test_links_out_of_a_folder_are_refused(texts: Path, tmp_path: Path, place: str) -> None:
    folder = copy(texts, tmp_path)
    target = tmp_path / "outside"
    if (folder / place).exists():
        (folder / place).rename(target)  # so that its content is not what is refused
    else:
        target.write_text("private key")
    (folder / place).symlink_to(target)
    assert run(load_and_save, folder, tmp_path / "saved").refused("link that leads out")
    assert not (tmp_path / "saved").exists()


def test_a_saved_folder_holds_its_own_files_alone(texts: Path, tmp_path: Path) -> None:
    folder = copy(texts, tmp_path)
    for name in ("evil.py", "id_rsa", "pytorch_model.bin", ".env", "secrets.json", "sub/config.json"):
        (folder / "text" / name).parent.mkdir(exist_ok=True)
        (folder / "text" / name).write_text("private")
    os.umask(0o022)
    run(load_and_save, folder, tmp_path / "saved").returned()
    names = {"README.md", MANIFEST, CONFIG, "open_clip_model.safetensors"}
    texts_own = {f"text/{name}" for name in ("config.json", "tokenizer.json", "tokenizer_config.json")}
    assert set(files(tmp_path / "saved")) == names | texts_own
    assert run(load, tmp_path / "saved").returned() == run(load, texts).returned()


def test_a_configs_own_tokenizer_goes_into_the_saved_folder(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    own = towers.build(Student(architecture=with_text(origin)), 0)
    (origin / "private.json").write_text("{}")
    saved = towers.save(own, tmp_path / "saved")
    assert not any("private" in name for name in files(saved))
    shutil.rmtree(origin)
    again = towers.load(saved)
    assert again.tokenize("a red boat").tolist() == [[4, 5, 6, 0, 0, 0, 0, 0]]
    assert again.fingerprint() == own.fingerprint()


TOKENIZER_FILES = [
    {"tokenizer_file": "/etc/hostname"}, {"vocab_file": "/etc/passwd"}, {"vocab": "/etc/hostname"}, {"merges": "x"},
    {"gguf_file": "x.gguf"}, {"init_inputs": ["/etc/hostname"]}, {"fast_tokenizer_files": ["tokenizer.4.json"]},
    {"sp_model_kwargs": {"model_file": "/etc/hostname"}}, {"tokenizer_class": ["x"]},
    {"tokenizer_class": "AutoTokenizer"},
]  # fmt: skip


@pytest.mark.parametrize("settings", TOKENIZER_FILES, ids=str)
def test_a_tokenizers_settings_name_no_other_file(texts: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = copy(texts, tmp_path)
    change(folder / "text/tokenizer_config.json", **settings)
    assert run(load, folder).refused("tokenizer_config.json")


# -- a hub ------------------------------------------------------------------------------------------------------------


def load_from_hub(snapshot: Path) -> list[str]:
    import huggingface_hub

    patterns: list[str] = []

    def download(repo: str, *, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        return str(snapshot)

    huggingface_hub.snapshot_download = download
    encoder = towers.load("hf-hub:org/repo")
    assert encoder.folder == snapshot
    return patterns


def test_a_hub_gives_safetensors_and_text_alone(plain: Path, tmp_path: Path) -> None:
    patterns = run(load_from_hub, plain).returned()
    assert patterns
    assert not any(pattern.endswith(("bin", "pt", "pth", "py", "pkl", "*")) for pattern in patterns)
    ran, _ = canary(tmp_path)
    folder = copy(plain, tmp_path)
    (folder / "open_clip_model.safetensors").unlink()
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + os.fsencode(ran) + b"'\ntR.")
    assert run(load_from_hub, folder).refused("holds no open_clip_model.safetensors", "pickled weights")
    assert not ran.exists()


def load_from_cache(cache: Path) -> str:
    from huggingface_hub import constants

    constants.HF_HUB_CACHE = str(cache)
    return load("hf-hub:org/repo")  # type: ignore[arg-type]


def test_a_hubs_cache_is_read_through_its_links(plain: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--repo/snapshots/0123"
    for folder in (snapshot, tmp_path / "models--org--repo/refs", tmp_path / "models--org--repo/blobs"):
        folder.mkdir(parents=True)
    (tmp_path / "models--org--repo/refs/main").write_text("0123")
    for path in plain.iterdir():
        shutil.copy(path, tmp_path / "models--org--repo/blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert run(load_from_cache, tmp_path).returned() == run(load, plain).returned()
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to(plain / CONFIG)
    assert run(load_from_cache, tmp_path).refused("link that leads out")


@pytest.mark.parametrize("name", ["hf-hub:", "hf-hub:../x", "hf-hub:a/b/c", "hf-hub:\0", "hf-hub:" + "a" * 500])
def test_hub_names_that_are_none(name: str) -> None:
    assert run(load, name).refused()  # type: ignore[arg-type]


# -- names ------------------------------------------------------------------------------------------------------------


NONE = ["~nosuchuser/x", "a\0b", "x" * 5_000, "", "~\ud800", "\x1b[2J", "/proc/self/mem", "/dev/zero"]


@pytest.mark.parametrize("name", NONE, ids=lambda name: ascii(name[:20]))
def test_names_that_are_no_folder(name: str, tmp_path: Path) -> None:
    for text in (name, f"local-dir:{name}"):
        assert "\x1b" not in str(run(load, text).value)  # type: ignore[arg-type]
        assert run(load, text).refused()  # type: ignore[arg-type]
    assert run(build, f"local-dir:{name}").refused()
    assert run(build, name).refused()
    config = distillation(tmp_path / "run", write_pool(tmp_path / "pool", 8, 1), tmp_path)
    values = json.loads(config.model_dump_json()) | {"reference": {"model": name}}
    (tmp_path / "c.yaml").write_text(json.dumps(values))
    assert run(plan_of, tmp_path / "c.yaml").refused()


def profile(architecture: str) -> str:
    return str(presets.aced(student=Student(architecture=architecture)).student.profile())


def test_presets_name_their_errors() -> None:
    assert run(profile, "local-dir:~nosuchuser/x").refused("nosuchuser")
    assert run(profile, "hf-hub:org/repo").refused("cannot be loaded")


def test_text_towers_of_other_families_are_refused(texts: Path, tmp_path: Path) -> None:
    folder = copy(texts, tmp_path)
    for settings in (BERT | {"model_type": "gpt2"}, BERT | {"model_type": None}, BERT | {"model_type": ["bert"]}):
        write(folder / "text/config.json", settings)
        assert run(load, folder).refused("hf_model_name")
