# SPDX-License-Identifier: Apache-2.0
"""The data box: how pictures are joined, split, shuffled, rendered and asked about, and that nothing leaks."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pyvips", reason="the demo's extra is not installed")

from examples.quickstart.box import Box, BoxConfig, FetchError, build_box, emoji, home_folder, pictures
from examples.quickstart.box.config import SIZES
from examples.quickstart.box.questions import KINDS, ask
from examples.quickstart.box.render import Picture, dominant_colour, render
from examples.quickstart.box.sources import CAPTIONS, MODELS, PICTURES
from examples.quickstart.box.splits import decide_fates, one_tone, plain, share_of, shuffle_captions, split

SLICE = BoxConfig(size="slice")
RED_SQUARE = '<path fill="#e01010" d="M0 0h16v16H0z"/>'


def emojibase() -> dict[str, bytes]:
    """A little emojibase-data: an apple, a waving hand with a tone, a man and a woman farmer, and France."""
    entries = [
        {"label": "red apple", "hexcode": "1F34E", "group": 4, "subgroup": 42},
        {
            "label": "waving hand",
            "hexcode": "1F44B",
            "group": 1,
            "subgroup": 16,
            "skins": [{"label": "waving hand: dark skin tone", "hexcode": "1F44B-1F3FF", "tone": 5}],
        },
        {"label": "farmer", "hexcode": "1F9D1-200D-1F33E", "group": 1, "subgroup": 25},
        {"label": "man farmer", "hexcode": "1F468-200D-1F33E", "group": 1, "subgroup": 25},
        {"label": "woman running", "hexcode": "1F3C3-200D-2640-FE0F", "group": 1, "subgroup": 27},
        {"label": "flag: France", "hexcode": "1F1EB-1F1F7", "group": 9, "subgroup": 98},
        {"label": "flag: England", "hexcode": "1F3F4-E0067-E0062-E0065-E006E-E0067-E007F", "group": 9, "subgroup": 99},
        {"label": "regional indicator A", "hexcode": "1F1E6"},
    ]
    groups = {1: "people-body", 4: "food-drink", 9: "flags"}
    subgroups = {16: "hand-fingers-open", 25: "person-role", 27: "person-activity", 42: "food-fruit"}
    subgroups |= {98: "country-flag", 99: "subdivision-flag"}
    messages = {
        "groups": [{"order": order, "key": key} for order, key in groups.items()],
        "subgroups": [{"order": order, "key": key} for order, key in subgroups.items()],
    }
    files = {"en/data.json": entries, "en/messages.json": messages, "en/shortcodes/emojibase.json": {"1F34E": "apple"}}
    return {name: json.dumps(value).encode() for name, value in files.items()}


def candidate(key: str, catalogue: emoji.Catalogue, code: str, source: str, role: str) -> pictures.Candidate:
    meaning = catalogue.by_code[code]
    svg = pictures.svg_of({"icons": {"x": {"body": RED_SQUARE}}}, "x", 32).encode()
    return pictures.Candidate(key, source, source, role, "emoji", "MIT", meaning.label, meaning, svg)  # type: ignore[arg-type]


def numbered(count: int) -> emoji.Catalogue:
    """A catalogue of `count` different foods."""
    catalogue = emoji.Catalogue({})
    for number in range(count):
        code = f"{0x1F300 + number:x}"
        catalogue.by_code[code] = emoji.Meaning(code, f"thing {number}", code, code, "food", None, False, False)
    return catalogue


def read_shards(folder: Path) -> list[dict[str, bytes]]:
    """The rows of a folder of shards, read by the webdataset library, in order."""
    webdataset = pytest.importorskip("webdataset")
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))


# Joining


def test_names_and_code_points_lead_to_the_same_emoji() -> None:
    catalogue = emoji.read_catalogue(emojibase())
    for name in ("red-apple", "redapple", "apple", "red-apple-2"):
        meaning = catalogue.meaning(name)
        assert meaning is not None
        assert meaning.label == "red apple"
    assert emoji.code_of("1F3C3-200D-2640-FE0F") == "1f3c3-200d-2640"
    france = catalogue.country("fr")
    assert france is not None
    assert france.country == "France"
    assert catalogue.meaning("flag-for-france") == catalogue.meaning("france") == france
    england = catalogue.country("gb-eng")
    assert england is not None
    assert england.country == "England"
    assert catalogue.meaning("k3os") is None
    assert catalogue.country("zz") is None
    assert "1f1e6" not in catalogue.by_code


def test_tone_and_gender_share_a_concept() -> None:
    by_code = emoji.read_catalogue(emojibase()).by_code
    assert by_code["1f44b-1f3ff"].concept == by_code["1f44b"].concept
    assert by_code["1f468-200d-1f33e"].concept == by_code["1f9d1-200d-1f33e"].concept
    assert by_code["1f3c3-200d-2640"].concept == "1f3c3"
    assert by_code["1f44b-1f3ff"].toned
    assert by_code["1f468-200d-1f33e"].gendered
    assert not by_code["1f9d1-200d-1f33e"].gendered


def test_one_sets_names_join_another_set() -> None:
    catalogue = emoji.read_catalogue(emojibase())
    emoji.learn_names(catalogue, {"1f34e": "pomme"}, [("apfel", "pomme"), ("unknown", "nothing")])
    assert catalogue.names["pomme"] == catalogue.names["apfel"] == "1f34e"
    assert "unknown" not in catalogue.names


def test_mirrored_alias_is_drawn_mirrored() -> None:
    left = '<path fill="#000" d="M0 0h8v16H0z"/>'
    icons = {"icons": {"left": {"body": left}}, "aliases": {"right": {"parent": "left", "hFlip": True}}, "width": 16}
    pixels = {}
    for name in ("left", "right"):
        picture = render(pictures.svg_of(icons, name, 32).encode(), 32)
        assert picture is not None
        pixels[name] = np.asarray(Image.open(io.BytesIO(picture.png)).convert("L"))
    assert pixels["left"][16, 4] == 0
    assert pixels["left"][16, 28] == 255
    assert np.array_equal(pixels["left"][:, ::-1], pixels["right"])


# Rendering


def test_wide_drawings_keep_their_shape_on_white() -> None:
    icons = {"icons": {"wide": {"body": '<path fill="#0000ff" d="M0 0h64v16H0z"/>', "width": 64, "height": 16}}}
    picture = render(pictures.svg_of(icons, "wide", 64).encode(), 64)
    assert picture is not None
    image = Image.open(io.BytesIO(picture.png))
    assert image.size == (64, 64)
    assert image.getpixel((32, 32)) == (0, 0, 255)
    assert image.getpixel((32, 4)) == (255, 255, 255)
    assert picture.colour == "blue"


def test_raster_pictures_are_fitted() -> None:
    out = io.BytesIO()
    Image.new("RGBA", (200, 100), (0, 160, 0, 255)).save(out, "PNG")
    picture = render(out.getvalue(), 48)
    assert picture is not None
    assert Image.open(io.BytesIO(picture.png)).size == (48, 48)
    assert picture.colour == "green"


def test_drawings_in_points_are_shown_whole() -> None:
    circle = '<circle cx="100" cy="100" r="100"/>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="150pt" height="150pt">{circle}</svg>'
    picture = render(svg.encode(), 64)
    assert picture is not None
    pixels = np.asarray(Image.open(io.BytesIO(picture.png)).convert("L"))
    assert pixels[32, 60] < 64
    assert pixels[3, 3] == pixels[60, 60] == pixels[3, 60] == 255


def test_white_on_white_is_blank() -> None:
    white = pictures.svg_of({"icons": {"x": {"body": RED_SQUARE.replace("#e01010", "#fff")}}}, "x", 32)
    assert render(white.encode(), 32) is None


@pytest.mark.parametrize(
    ("rgb", "word"),
    [
        ((221, 46, 68), "red"),
        ((255, 172, 51), "orange"),
        ((255, 204, 77), "yellow"),
        ((119, 178, 85), "green"),
        ((59, 136, 195), "blue"),
        ((146, 102, 204), "purple"),
        ((244, 171, 186), "pink"),
        ((138, 75, 56), "brown"),
        ((49, 55, 61), "black"),
        ((225, 232, 237), "white"),
        ((136, 136, 140), "grey"),
        ((247, 222, 206), None),
    ],
)
def test_colour_words(rgb: tuple[int, int, int], word: str | None) -> None:
    image = np.zeros((40, 40, 4), np.uint8)
    image[:, :30] = (*rgb, 255)
    assert dominant_colour(image) == word


def test_two_colours_dominate_nothing() -> None:
    image = np.full((40, 40, 4), 255, np.uint8)
    image[:20, :, :3] = (255, 0, 0)
    image[20:, :, :3] = (0, 0, 255)
    assert dominant_colour(image) is None


# Splitting and noise


def test_fates_are_by_concept_and_need_several_styles() -> None:
    catalogue = numbered(600)
    styles = ("a", "b", "c", "d")
    rows = [candidate(f"{s}{c}", catalogue, c, s, "pool") for c in list(catalogue.by_code)[:300] for s in styles]
    rows += [candidate(f"e{c}", catalogue, c, "e", "pool") for c in list(catalogue.by_code)[300:]]
    fates = decide_fates(rows, seed=0)
    counts = Counter(fates[row.concept] for row in rows if row.style == "a")
    assert 20 <= counts["unseen"] <= 55
    assert 8 <= counts["validation"] <= 32
    assert {fates[row.concept] for row in rows if row.style == "e"} == {"train"}
    assert fates == decide_fates(list(reversed(rows)), seed=0)
    assert fates != decide_fates(rows, seed=1)


def test_one_skin_tone_per_emoji_and_style() -> None:
    catalogue = emoji.read_catalogue(emojibase())
    light = emoji.Meaning("1f44b-1f3fb", "waving hand: light", "1f44b", "1f44b", "hand", None, True, False)
    catalogue.by_code[light.code] = light
    codes = ("1f44b", "1f44b-1f3ff", "1f44b-1f3fb")
    rows = [candidate(f"{style}{code}", catalogue, code, style, "pool") for style in ("a", "b") for code in codes]
    kept = one_tone(rows, 0, defaultdict(Counter))
    tones = Counter((row.style, row.meaning.toned) for row in kept if row.meaning)
    assert tones == {("a", False): 1, ("a", True): 1, ("b", False): 1, ("b", True): 1}
    assert [row.caption for row in plain(kept)] == ["waving hand", "waving hand"]


def test_icons_named_like_a_held_out_label_are_left_out() -> None:
    catalogue = numbered(200)
    styles = {"a": "trusted", "b": "pool", "c": "unseen", "d": "validation"}
    rows = [candidate(f"{s}{c}", catalogue, c, s, role) for c in catalogue.by_code for s, role in styles.items()]
    fates = decide_fates(rows, seed=0)
    held_out = next(row for row in rows if fates[row.concept] == "unseen")
    trained = next(row for row in rows if fates[row.concept] == "train")
    icons = [
        pictures.Candidate(f"icon{n}", "i", "i", "pool", "icon", "MIT", row.caption.upper(), None, b"")
        for n, row in enumerate((held_out, trained))
    ]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    parts = split([*rows, *icons], fates, SLICE.model_copy(update={"size": "small"}), SIZES["small"], counts)
    assert [c.key for c in parts.pool if c.kind == "icon"] == ["icon1"]
    assert counts["left_out"]["caption equals a held-out label"] == 1
    assert {c.role for c in parts.validation_concept} == {"trusted", "pool", "validation"}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_shuffled_captions_are_never_their_own(share: float) -> None:
    captions = [f"caption {number // 3}" for number in range(300)]
    shuffled = shuffle_captions(captions, share, random.Random(0))
    changed = sum(one != other for one, other in zip(captions, shuffled, strict=True))
    assert changed == round(share * 300)
    assert Counter(shuffled) == Counter(captions)


def test_one_caption_for_all_cannot_be_shuffled() -> None:
    assert shuffle_captions(["same"] * 10, 1.0, random.Random(0)) == ["same"] * 10


def test_share_is_even_and_steady() -> None:
    shares = [share_of(str(number), 0, "fate") for number in range(2000)]
    assert 0.45 < float(np.mean(shares)) < 0.55
    assert share_of("1f34e", 0, "fate") == share_of("1f34e", 0, "fate") != share_of("1f34e", 1, "fate")


# Questions


def test_questions_are_balanced_and_spare_skin() -> None:
    catalogue = numbered(400)
    groups = ("food", "animal", "flag", "hand")
    for number, (code, one) in enumerate(list(catalogue.by_code.items())):
        catalogue.by_code[code] = emoji.Meaning(code, one.label, code, code, groups[number % 4], None, False, False)
    rows = [candidate(f"k{code}", catalogue, code, "a", "pool") for code in catalogue.by_code]
    colours = ("red", "blue", None)
    drawn = {row.key: Picture(b"", colours[number % 3]) for number, row in enumerate(rows)}
    questions = ask(rows, drawn, 160, random.Random(0))
    assert Counter(q.kind for q in questions) == dict.fromkeys(KINDS, 40)
    assert Counter(q.answer for q in questions if q.kind == "group") == dict.fromkeys(groups, 10)
    assert Counter(q.answer for q in questions if q.kind == "colour") == {"red": 20, "blue": 20}
    assert all(q.row.meaning and q.row.meaning.word != "hand" for q in questions if q.kind == "colour")
    yes_no = [q for q in questions if q.kind == "yes_no"]
    by_question = Counter((q.question, q.answer) for q in yes_no)
    assert all(by_question[text, "yes"] == by_question[text, "no"] for text, _ in by_question)
    for q in yes_no:
        assert q.row.meaning is not None
        assert q.row.meaning.word is not None
        assert (q.answer == "yes") == q.question.removesuffix("?").endswith(q.row.meaning.word)


# The table of sources


def test_sources_are_pinned_and_free() -> None:
    packages = [CAPTIONS, *MODELS, *(part.package for part in PICTURES)]
    assert all(len(package.sha256) == 64 and int(package.sha256, 16) for package in packages)
    assert len({package.filename for package in packages}) == len(packages)
    assert not any("NC" in package.licence or "GPL" in package.licence for package in packages)
    roles = defaultdict(set)
    for part in PICTURES:
        roles[part.style].add(part.role)
    assert all(len(found) == 1 for found in roles.values())
    assert roles["twemoji"] == roles["openmoji"] == {"unseen"}


def test_home_is_the_argument_then_the_variable_then_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ACED_HOME", raising=False)
    assert home_folder() == tmp_path / "aced-sdk"
    monkeypatch.setenv("ACED_HOME", str(tmp_path / "named"))
    assert home_folder() == tmp_path / "named"
    assert home_folder(tmp_path / "given") == tmp_path / "given"


# A real slice


@pytest.fixture(scope="module")
def box() -> Box:
    try:
        return build_box(SLICE)
    except FetchError as error:
        pytest.skip(f"the slice cannot be built here: {error}")


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.network
def test_slice_has_its_noise_and_reads_as_webdataset(box: Box) -> None:
    rows = read_shards(box.pool)
    facts = [json.loads(row["json"]) for row in rows]
    assert len(rows) == box.manifest["rows"]["pool"]["rows"] >= 500
    assert sum(fact["noisy"] for fact in facts) == round(0.5 * len(rows))
    for row, fact in zip(rows, facts, strict=True):
        assert fact["noisy"] == (row["txt"].decode() != fact["true_caption"])
        assert fact["license"]
    image = Image.open(io.BytesIO(rows[0]["png"]))
    assert (image.size, image.mode) == ((112, 112), "RGB")
    trusted = [json.loads(row["json"]) for row in read_shards(box.trusted)]
    assert len(trusted) >= 250
    assert not any(fact["noisy"] for fact in trusted)


@pytest.mark.network
def test_slice_does_not_leak(box: Box) -> None:
    rows = [json.loads(row["json"]) for folder in (box.pool, box.trusted) for row in read_shards(folder)]
    held_out = set(box.manifest["held_out_concepts"])
    assert held_out
    assert not held_out & {row["concept"] for row in rows}
    assert not {"twemoji", "openmoji", "fxemoji"} & {row["style"] for row in rows}
    trained = {emoji.words(row["true_caption"]) for row in rows}
    for task in (box.evaluation / "unseen_concept", box.validation / "validation_concept"):
        names = (task / "classnames.txt").read_text(encoding="utf-8").splitlines()
        assert names
        assert not trained & {emoji.words(name) for name in names}
    pool, trusted = (
        {json.loads(row["json"])["style"] for row in read_shards(folder)} for folder in (box.pool, box.trusted)
    )
    assert not pool & trusted


@pytest.mark.network
def test_slice_has_tasks_as_clip_benchmark_lays_them_out(box: Box) -> None:
    for name in ("unseen_style_twemoji", "unseen_style_openmoji", "unseen_concept", "flags"):
        task = box.evaluation / name
        names = (task / "classnames.txt").read_text(encoding="utf-8").splitlines()
        templates = (task / "zeroshot_classification_templates.txt").read_text().splitlines()
        assert all("{c}" in template for template in templates)
        assert (task / "test" / "nshards.txt").read_text().strip() == "1"
        classes = {int(row["cls"]) for row in read_shards(task / "test")}
        assert classes == set(range(len(names)))
    retrieval = box.evaluation / "retrieval_unseen_concept"
    assert (retrieval / "dataset_type.txt").read_text().strip() == "retrieval"
    names = (box.evaluation / "unseen_concept" / "classnames.txt").read_text(encoding="utf-8").splitlines()
    assert {row["txt"].decode() for row in read_shards(retrieval / "test")} == set(names)


@pytest.mark.network
def test_slice_asks_about_unseen_styles(box: Box) -> None:
    train, test = (json.loads((box.vqa / f"{name}.json").read_text(encoding="utf-8")) for name in ("train", "test"))
    assert len(train) >= 300
    assert len(test) >= 60
    for question in [*train, *test]:
        assert (box.vqa / question["image"]).is_file()
        assert question["conversations"][0]["value"].startswith("<image>\n")
        assert question["conversations"][1]["value"] == question["answers"][0]
        assert "skin tone" not in question["answers"][0]
    assert {q["image"].split("/")[1].split("_")[0] for q in test} == {"twemoji", "openmoji"}
    assert not {q["image"] for q in test} & {q["image"] for q in train}
    names = {q["answers"][0] for q in train if q["kind"] == "name"}
    assert {q["answers"][0] for q in test if q["kind"] == "name"} <= names


@pytest.mark.network
def test_second_call_reuses_and_another_home_gives_equal_bytes(box: Box, tmp_path: Path) -> None:
    before = (box.directory / "manifest.json").stat().st_mtime_ns
    assert build_box(SLICE).directory == box.directory
    assert (box.directory / "manifest.json").stat().st_mtime_ns == before
    (tmp_path / "downloads").symlink_to(home_folder() / "downloads")
    again = build_box(SLICE, tmp_path)
    assert digests(again.directory) == digests(box.directory)
    assert again.directory.name == box.directory.name


def test_shards_are_equal_bytes_for_equal_rows(tmp_path: Path) -> None:
    from examples.quickstart.box.write import write_tar

    rows = [{"txt": b"red apple", "png": b"\x89PNG"}]
    for name in ("one.tar", "two.tar"):
        write_tar(tmp_path / name, rows, ["apple"])
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    with tarfile.open(tmp_path / "one.tar") as tar:
        assert [(member.name, member.mtime) for member in tar] == [("apple.png", 0), ("apple.txt", 0)]
