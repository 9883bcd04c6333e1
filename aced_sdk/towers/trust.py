# SPDX-License-Identifier: Apache-2.0
"""Checks of a model folder from elsewhere, before transformers, tokenizers or timm read it.

No code of a folder runs: every call passes `trust_remote_code=False`. Weights are safetensors. The checks here refuse
files outside of the folder and numbers that would take all memory or never end.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any

from aced_sdk.errors import AcedError, ModelError
from aced_sdk.files import (
    ReadError,
    check_links,
    check_tensors,
    inside,
    open_regular,
    printable,
    read_json,
    read_text,
    stored_bytes,
)
from aced_sdk.towers.numbers import check_length, check_number, check_real, check_together
from aced_sdk.towers.text_files import ATTENTIONS, REWORKED, check_tokenizer

_KINDS = ("llava", "fast_vlm", "aya_vision")
_PROCESSORS = ("LlavaProcessor", "AyaVisionProcessor", "PixtralProcessor", None)
_VISION = (
    "clip_vision_model",
    "siglip_vision_model",
    "siglip2_vision_model",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "vit",
    "pixtral",
    "timm_wrapper",
)

_MODEL = ("config.json", "generation_config.json")
_PICTURES = ("preprocessor_config.json", "processor_config.json")
# Keys that name models by any path, code to be copied or fetched, and configs that are read in the place of this one.
_ELSEWHERE = {"audio_tokenizer", "_auto_class", "configuration_files", "kernel_config", "use_kernels"}
_REMEDY = "correct the file, or do not use this folder"

_CROP = (0.25, 4.0)  # crop_pct: pictures are resized to the size divided by it
_MAX_PREPARED = 2**24  # pixels of all tiles of a picture
_IMAGE_PROCESSORS = re.compile(
    r"(?:CLIP|Siglip|ViT|DeiT|Bit|DINOv3ViT|ConvNext|Pixtral|GotOcr2|Llava|TimmWrapper)(?:ImageProcessor(?:Fast|Pil)?|"
    r"FeatureExtractor)"
)
_ELEMENTS, _PER_BYTE = 2**26, 2  # of a model's tensors: so many, and so many more for each byte of its weights' files
_MODULES = 50_000
# What no embedding and no answer depends on: buffers that are computed today, and pooling heads.
_UNREAD = re.compile(
    r"(^|[._])(position_ids|inv_freq|masked_bias|token_type_ids|cos_cached|sin_cached|num_batches_tracked)$|"
    r"(^|\.)(head|pooler)\."
)
_NUMBER = re.compile(r"\.\d+\.")  # of a layer, in the name of a tensor


@contextmanager
def without_bars() -> Iterator[None]:
    """Show no progress bars of transformers and huggingface_hub within the block: they go to logs and pipes too."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def library_errors(
    cause: str,
    remedy: str,
    field: str,
    *,
    kind: type[AcedError] = ModelError,
) -> Iterator[None]:
    """Turn any error of a library into one of `kind`; other errors of this project pass. No bar of transformers shows.

    Contents of a foreign folder make transformers and its dependencies raise many kinds of errors. Tokenizers written
    in Rust raise a PanicException, which is no `Exception`.

    Raises:
        AcedError: of `kind`, with `cause` and the error's text.
    """
    try:
        with without_bars():
            yield
    except BaseException as error:
        if isinstance(error, AcedError) and not isinstance(error, ReadError):
            raise
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        detail = error.cause if isinstance(error, ReadError) else str(error) or type(error).__name__
        raise kind(f"{cause}: {printable(detail, 2000)}", remedy=remedy, field=field) from error


def check_folder(folder: Path, *, pictures: bool = False, tokens: bool = False) -> dict[str, Any]:
    """Check a transformers folder's files, and return its config.json.

    Args:
        folder: holds config.json and safetensors.
        pictures: whether its image processor will be read.
        tokens: whether its tokenizer will be read.

    Raises:
        ReadError: naming a link or a file name that leads outside, a number out of its bounds, or a file that is not
            JSON.
    """
    check_links(folder)
    if (folder / "audio_tokenizer_config.json").is_file():
        raise ReadError(f"{printable(folder)} names an audio tokenizer, which can be elsewhere", remedy=_REMEDY)
    if (folder / "adapter_config.json").is_file():
        raise ReadError(f"{printable(folder)} holds an adapter, which names a model elsewhere", remedy=_REMEDY)
    config = _object(folder / "config.json")
    names = [*_MODEL, *(_PICTURES if pictures else ())]
    if tokens:
        names += sorted(path.name for path in folder.glob("tokenizer*.json"))
    for name in names:
        if (folder / name).is_file():
            _check(_object(folder / name), name.removesuffix(".json"), folder)
    for path in folder.glob("*.safetensors.index.json"):
        _check_index(_object(path), path)
    for path in folder.glob("*.safetensors"):
        check_tensors(path)
    if tokens:
        check_tokenizer(folder)
    for path in (*folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*.jinja")):
        read_text(path, 2**20)
    return config


def check_vision_language(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a folder of another kind than `vlm.build` makes, or with parts that load further files by themselves.

    Raises:
        ReadError: naming the part.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    vision, language = (config.get(part) or {} for part in ("vision_config", "text_config"))
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() & MODEL_MAPPING_NAMES.keys()
    for what, kind, known in (
        ("model", config.get("model_type"), _KINDS),
        ("vision tower", dict(vision).get("model_type", "clip_vision_model"), _VISION),
        ("language model", dict(language).get("model_type", "llama"), causal),
    ):
        if kind not in known:
            raise ReadError(f"the {what} in {printable(folder)} is a {printable(repr(kind))}", remedy=_REMEDY)
    for path in (folder / "tokenizer_config.json", *(folder / name for name in _PICTURES)):
        for facts in _objects(_object(path) if path.is_file() else {}):
            if facts.get("auto_map"):
                raise ReadError(f"{printable(path)} needs code from elsewhere (auto_map)", remedy=_REMEDY)
            if (name := facts.get("processor_class")) not in _PROCESSORS:
                raise ReadError(f"{printable(path)} names the processor {printable(repr(name))}", remedy=_REMEDY)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """A JSON object and all objects in it."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(part)


def weight_bytes(folder: Path) -> int:
    """Bytes of a folder's weights, without holes of sparse files."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with open_regular(path) as stream:
            total += stored_bytes(stream)
    return total


def check_weights(model: Any, unused: Collection[str] = ()) -> None:
    """Refuse a loaded model whose weights are not finite, or whose files hold more tensors than its config describes.

    Args:
        model: after loading.
        unused: names of the weights that have no place in it. Those of another tower may stay unused.

    Raises:
        ReadError: naming a tensor.
    """
    from aced_sdk.towers.weights import is_finite

    own = dict(model.state_dict())
    forms = {_NUMBER.sub(".N.", name) for name in own}
    towers = {name.partition(".")[0] for name in own}
    for name in sorted(unused):
        if _NUMBER.sub(".N.", name) in forms:
            raise ReadError(
                f"its config describes fewer layers than its weights have: {printable(name)} is unused", remedy=_REMEDY
            )
        if name.partition(".")[0] in towers and not _UNREAD.search(name):
            raise ReadError(
                f"its config leaves out a tensor that its weights have: {printable(name)} is unused", remedy=_REMEDY
            )
    for name, tensor in own.items():
        if not is_finite(tensor):
            raise ReadError(f"{printable(name)} has values that are not finite", remedy=_REMEDY)


@contextmanager
def bounded(size: int, per_byte: int = _PER_BYTE) -> Iterator[None]:
    """Stop the building of a model whose config describes far more than its weights' files of `size` bytes hold.

    transformers builds models on the meta device first, where nothing takes memory yet.

    Raises:
        ReadError: at the first module or tensor beyond the bounds.
    """
    from torch import Tensor
    from torch.nn.modules import module as hooks

    mine, limit = get_ident(), _ELEMENTS + per_byte * size
    modules = elements = 0

    def count_module(*_: object) -> None:
        nonlocal modules
        if get_ident() == mine:
            modules += 1
            if modules > _MODULES:
                raise ReadError(f"its config describes more than {_MODULES:,} layers", remedy=_REMEDY)

    def count_tensor(_module: object, _name: str, tensor: Tensor | None) -> None:
        nonlocal elements
        if tensor is not None and tensor.is_meta and get_ident() == mine:
            elements += tensor.numel()
            if elements > limit:
                raise ReadError(
                    f"its config describes more than {limit:,} parameters, and its weights have {size:,} bytes",
                    remedy=_REMEDY,
                )

    handles = [
        hooks.register_module_module_registration_hook(count_module),
        hooks.register_module_parameter_registration_hook(count_tensor),
        hooks.register_module_buffer_registration_hook(count_tensor),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ReadError(f"{printable(path)} holds no JSON object", remedy=_REMEDY)
    return value


def _check(value: Any, key: str, folder: Path, where: str = "") -> None:
    """Check a value of a config and what is in it; `key` is the name that it is under."""
    where = where or f"{folder / key}.json"
    if isinstance(value, dict):
        if value.get("model_type") == "timm_wrapper":
            _check_timm(value, where)
        if odd := [name for name in sorted(_ELSEWHERE & value.keys()) if value[name]]:
            raise ReadError(f"{printable(where)} has {odd[0]}, which loads further files", remedy=_REMEDY)
        if odd := [name for name in REWORKED if value.get(name)]:
            raise ReadError(f"{printable(where)} sets {odd[0]}", remedy=_REMEDY)
        if "template" in value and not re.fullmatch(r"[\w-]+", str(value.get("name", "default"))):
            raise ReadError(f"{printable(where)} names a chat template {printable(value['name'])}", remedy=_REMEDY)
        if where.endswith("tokenizer.json") and "model" in value:
            value = {name: part for name, part in value.items() if name not in ("model", "added_tokens")}
        if value.get("crop_to_patches"):
            _check_tiles(value, where)
        check_together(value, where)
        for name, part in value.items():
            _check(part, key if "implementation" in key else name, folder, where)
    elif isinstance(value, list):
        check_length(key, value, where)
        for part in value:
            _check(part, key, folder, where)
    elif (
        key == "crop_pct"
        and value is not None
        and not (isinstance(value, int | float) and _CROP[0] <= value <= _CROP[1])
    ):
        raise ReadError(f"crop_pct in {printable(where)} is {printable(value)}", remedy=_REMEDY)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        check_real(key, value, where)
        if isinstance(value, int):
            check_number(key, value, where)
    elif isinstance(value, str):
        _check_name(value, key, folder, where)


def _check_tiles(facts: Mapping[str, Any], where: str) -> None:
    """Bound the pixels that a picture becomes when it is cut into tiles."""
    sides = facts.get("size")
    side = max(
        [1, *(n for n in (sides.values() if isinstance(sides, dict) else (sides,)) if isinstance(n, int | float))]
    )
    most = facts.get("max_patches", 12)
    if not isinstance(most, int) or most * side**2 > _MAX_PREPARED:
        raise ReadError(f"{printable(where)} cuts pictures into too many tiles", remedy=_REMEDY)


def _check_name(value: str, key: str, folder: Path, where: str) -> None:
    """Refuse names that lead to files outside, to kernels on a hub, or to image processors that load further files."""
    if key in ("transformers_weights", "fast_tokenizer_files"):
        inside(folder, value)
        if "/" in value:  # an index of weights there would not be checked
            raise ReadError(f"{printable(key)} in {printable(where)} names a file in another folder", remedy=_REMEDY)
    if key.endswith("_file") and "\0" not in value:  # often a path of the machine that saved it, which is not there
        for path in (Path(value), folder / value):
            if path.exists() and not path.resolve().is_relative_to(folder.resolve()):
                raise ReadError(f"{printable(key)} in {printable(where)} names a file outside", remedy=_REMEDY)
    if "implementation" in key and "/" in value:
        raise ReadError(f"{printable(key)} in {printable(where)} names code elsewhere", remedy=_REMEDY)
    if "attn_implementation" in key and value not in ATTENTIONS:
        raise ReadError(
            f"{printable(key)} in {printable(where)} is {printable(value, 50)}, and must be eager or sdpa",
            remedy=_REMEDY,
        )
    if key in ("image_processor_type", "feature_extractor_type") and not _IMAGE_PROCESSORS.fullmatch(value):
        raise ReadError(f"{printable(where)} names the image processor {printable(value)}", remedy=_REMEDY)


def _check_timm(config: Mapping[str, Any], where: str) -> None:
    """timm would load a checkpoint, or look up a hub, by these."""
    name, arguments = config.get("architecture", ""), config.get("model_args") or {}
    plain = isinstance(arguments, dict) and all(isinstance(one, int | float | None) for one in arguments.values())
    if not plain or not isinstance(name, str) or not re.fullmatch(r"[\w.-]*", name):
        raise ReadError(f"{printable(where)} asks timm for more than a plain model", remedy=_REMEDY)


def _check_index(index: Mapping[str, Any], path: Path) -> None:
    """Each weight must be in a safetensors file of the folder."""
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ReadError(f"{printable(path)} has no weight_map of file names", remedy=_REMEDY)
    for name in set(names.values()):
        inside(path.parent, name)
        if not name.endswith(".safetensors"):
            raise ReadError(f"{printable(path)} names {printable(name)}, which is not safetensors", remedy=_REMEDY)
