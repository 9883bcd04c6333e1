# SPDX-License-Identifier: Apache-2.0
"""Vision towers as transformers holds them: our students, open_clip folders and Hugging Face encoders, or a refusal."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from aced_sdk import towers
from aced_sdk.errors import ModelError, UnsupportedError
from aced_sdk.files import expand, printable
from aced_sdk.towers import DualEncoder
from aced_sdk.towers.huggingface import (
    clip_image_processor,
    clip_vision_model,
    is_clip_vit,
    is_siglip_vit,
    siglip_vision_model,
)
from aced_sdk.towers.trust import bounded, check_folder, check_weights, library_errors, weight_bytes
from vlm.model.hub import downloaded

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

_ROADS = (
    "the roads are: a CLIP ViT, a SigLIP ViT (SigLIP 2 at a fixed resolution too) or DINOv2 through "
    "LlavaForConditionalGeneration, and a FastViT, MobileCLIP or other convolutional timm tower through "
    "FastVlmForConditionalGeneration"
)
# Tokens that stand before the patches, by the vision config's model_type: what LLaVA was seen to hold.
_PREFIX = {"clip_vision_model": 1, "siglip_vision_model": 0, "dinov2": 1, "vit": 1}

_MAX_TOKENS = 2**14  # attention over more takes gigabytes


@dataclass(frozen=True)
class VisionTower:
    """A tower, how pictures are prepared for it, and what tokens it gives.

    Attributes:
        model: transformers' own model, float32, in evaluation mode.
        image_processor: prepares pictures, all to the same size.
        stride: pixels along a side that one token stands for.
        size: height and width of a prepared picture.
        prefix: tokens before the patches; the first of them is a class token and is left out.
    """

    model: PreTrainedModel
    image_processor: BaseImageProcessor
    stride: int
    size: tuple[int, int]
    prefix: int

    @property
    def convolutional(self) -> bool:
        """Whether its features are a map instead of a row of tokens."""
        return bool(self.model.config.model_type == "timm_wrapper")

    @property
    def strategy(self) -> str:
        """LLaVA's word for what happens to the first token: `default` leaves it out, `full` keeps it.

        SigLIP has no class token: `default` would silently drop its first patch.
        """
        return "default" if self.prefix else "full"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.size[0] // self.stride, self.size[1] // self.stride

    @property
    def tokens(self) -> int:
        """Tokens that a picture becomes before any reduction."""
        return self.grid[0] * self.grid[1]

    @property
    def layers(self) -> int:
        """Blocks whose outputs can be chosen from; 0 for a convolutional tower, which has its last map alone."""
        return 0 if self.convolutional else int(self.model.config.num_hidden_layers)


def open_tower(vision: str | Path | DualEncoder) -> VisionTower:
    """The vision tower of a student or of a Hugging Face encoder.

    Args:
        vision: a loaded student; a folder in open_clip's layout (`local-dir:FOLDER`, `hf-hub:ORG/REPO` or its path);
            or a transformers folder or hub name of CLIP, SigLIP, SigLIP 2 at a fixed resolution, DINOv2 or ViT.

    Raises:
        ModelError: if it cannot be loaded, or its pictures do not fit it.
        UnsupportedError: if no model of transformers can hold it; the error names those that can be held.
    """
    if isinstance(vision, DualEncoder):
        tower = _from_student(vision)
    else:
        with library_errors(
            f"the encoder '{printable(vision)}' cannot be loaded",
            remedy="name a folder with config.json, safetensors and preprocessor_config.json, a student's folder, "
            "or a hub name that can be reached",
            field="vision",
        ):
            tower = _named(str(vision))
    _check_tokens(tower)
    return tower


def _named(name: str) -> VisionTower:
    folder = expand(name)
    ours = ":" in name or (folder / "open_clip_config.json").is_file()
    if not ours and ((folder / "config.json").is_file() or _is_hub_name(name)):
        return _from_transformers(folder if folder.is_dir() else downloaded(name))
    return _from_student(towers.load(name if ":" in name else folder))


def _is_hub_name(name: str) -> bool:
    """`org/name`, and no folder of that name is there."""
    return name.count("/") == 1 and not name.startswith((".", "~", "/")) and not Path(name).exists()


def _from_student(encoder: DualEncoder) -> VisionTower:
    size = encoder.preprocess_config.size
    image_processor = clip_image_processor(encoder)
    if is_clip_vit(encoder) or is_siglip_vit(encoder):
        model = clip_vision_model(encoder) if is_clip_vit(encoder) else siglip_vision_model(encoder)
        return VisionTower(model, image_processor, int(model.config.patch_size), size, int(is_clip_vit(encoder)))
    model, stride = _convolutional(encoder)
    return VisionTower(model, image_processor, stride, size, 0)


def _convolutional(encoder: DualEncoder) -> tuple[Any, int]:
    """A convolutional trunk of timm as TimmWrapperModel, and its stride; branches are folded where it has any."""
    from timm.utils import reparameterize_model
    from transformers import TimmWrapperConfig, TimmWrapperModel

    trunk: Any = getattr(encoder.model.visual, "trunk", None)
    if trunk is None:
        raise _refused("a tower of open_clip's own that is no plain CLIP ViT")
    name = encoder.model_cfg["vision_cfg"]["timm_model_name"]
    if not re.fullmatch(r"[\w.-]+", name):  # transformers would look it up on a hub, or load a folder
        raise _refused(f"timm's {name}")
    height, width = encoder.preprocess_config.size
    pixels = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    training = trunk.training
    with torch.no_grad():
        features = trunk.eval().forward_features(pixels.to(encoder.mean.device)).cpu()
    trunk.train(training)
    if features.ndim != 4 or features.shape[1] != trunk.num_features:
        raise _refused(f"timm's {name}")
    rows, columns = features.shape[-2:]
    stride = height // rows
    if (height // stride, width // stride) != (rows, columns):
        raise ModelError(
            f"the tower makes {rows} x {columns} tokens of {height} x {width} pixels, and transformers' processors "
            "count tokens by one number of pixels for both sides",
            remedy="distil the student at sides that are multiples of its stride, 32 or 64 pixels as a rule",
            field="vision",
        )
    folded = reparameterize_model(trunk).state_dict()
    arguments = {"inference_mode": True} if folded.keys() != trunk.state_dict().keys() else None
    model = TimmWrapperModel(
        TimmWrapperConfig(architecture=name, model_args=arguments, do_pooling=False, hidden_size=trunk.num_features)
    ).eval()
    own = model.timm_model.state_dict()
    if any(key not in folded or folded[key].shape != tensor.shape for key, tensor in own.items()):
        raise _refused(f"timm's {name} in another form than timm builds by that name")
    model.timm_model.load_state_dict({key: folded[key] for key in own})
    with torch.no_grad():
        same = torch.allclose(model(pixels).last_hidden_state, features, atol=1e-4, rtol=1e-3)
    if not same:
        raise _refused(f"timm's {name} in another form than timm builds by that name")
    return model, stride


def _refused(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"the image tower is {what}, which no vision-language model of transformers holds",
        remedy=_ROADS,
        field="vision",
    )


# -- transformers' own towers -----------------------------------------------------------------------------------------


def _from_transformers(folder: Path) -> VisionTower:
    from transformers import MODEL_MAPPING, AutoConfig, AutoImageProcessor

    check_folder(folder, pictures=True)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    if config.model_type not in _PREFIX:
        raise _naflex() if config.model_type == "siglip2_vision_model" else _refused(f"a '{config.model_type}'")
    with bounded(weight_bytes(folder)):
        model, found = MODEL_MAPPING[type(config)].from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    check_weights(model, found["unexpected_keys"])
    image_processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # the pooling heads are no part of what a projector reads
    lost = sorted(key for key in found["missing_keys"] if not key.startswith(("head.", "pooler.")))
    if lost:
        raise ModelError(
            f"'{folder}' lacks {len(lost)} of the tower's tensors, {lost[0]} first",
            remedy="save the encoder again with save_pretrained",
            field="vision",
        )
    model.config._name_or_path = ""  # a path of this machine has no place in what is saved
    stride, size = int(model.config.patch_size), _size(image_processor)
    return VisionTower(model.eval(), image_processor, stride, size, _PREFIX[config.model_type])


def _naflex() -> UnsupportedError:
    return UnsupportedError(
        "the image tower is SigLIP 2 in its NaFlex form, whose pictures have any shape, and LLaVA cannot feed it",
        remedy="take a SigLIP 2 of a fixed resolution (its config says model_type 'siglip'); " + _ROADS,
        field="vision",
    )


def _size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width that every picture gets."""
    sizes = set()
    for shape in ((97, 61), (61, 97)):
        pixels = image_processor(images=[Image.new("RGB", shape)], return_tensors="pt")["pixel_values"]
        sizes.add(tuple(pixels.shape[1:]))
    if len(sizes) != 1 or len(next(iter(sizes))) != 3:
        raise UnsupportedError(
            f"the encoder's image processor gives pictures different shapes: {sorted(sizes)}",
            remedy="set do_resize and do_center_crop in its preprocessor_config.json, so that all have one size",
            field="vision",
        )
    _, height, width = next(iter(sizes))
    return int(height), int(width)


def _check_tokens(tower: VisionTower) -> None:
    """Feed one grey picture of the processor's size: as many tokens must come out as a processor will write."""
    if tower.convolutional:
        return
    if tower.tokens > _MAX_TOKENS:
        raise ModelError(
            f"the tower makes {tower.tokens} tokens of a picture, more than {_MAX_TOKENS}",
            remedy="set a smaller size in preprocessor_config.json, or a larger patch_size in the tower's config",
            field="vision",
        )
    try:
        with torch.no_grad():
            out = tower.model(torch.zeros(1, 3, *tower.size)).last_hidden_state
    except Exception as error:  # configs of another make lead transformers to many kinds of errors
        raise ModelError(
            f"the tower does not take the pictures of {tower.size[0]} x {tower.size[1]} that its image processor "
            f"prepares: {error}",
            remedy="set the size in preprocessor_config.json to the image_size of the tower's config",
            field="vision",
        ) from error
    if out.shape[1] != tower.prefix + tower.tokens:
        raise ModelError(
            f"the tower makes {out.shape[1]} tokens of a picture, and {tower.prefix + tower.tokens} were expected",
            remedy="compare image_size and patch_size in its config with preprocessor_config.json",
            field="vision",
        )
