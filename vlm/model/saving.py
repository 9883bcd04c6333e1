# SPDX-License-Identifier: Apache-2.0
"""Models in and out of folders that transformers and peft open without this package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from aced_sdk.errors import ModelError
from aced_sdk.files import (
    ReadError,
    check_digests,
    check_links,
    expand,
    file_digests,
    printable,
    read_json,
    whole_folder,
    write_json,
)
from aced_sdk.towers.trust import (
    bounded,
    check_folder,
    check_vision_language,
    check_weights,
    library_errors,
    weight_bytes,
)
from vlm.data.pictures import check_fit
from vlm.model.adapters import base_of, has_adapter, load_adapter
from vlm.model.card import card
from vlm.model.decoding import decoding, settings, warn_of_lost
from vlm.model.language import reads
from vlm.model.tokens import settle
from vlm.model.writing import write, write_adapter

if TYPE_CHECKING:
    from transformers import LlavaProcessor

    from vlm.scores import Scores

_BASE, _ADAPTER, _MANIFEST = "base", "adapter", "aced_vlm.json"


def save(
    model: Any,
    processor: LlavaProcessor,
    directory: str | Path,
    merge: bool = True,
    *,
    scores: Scores | None = None,
    license: str | None = None,
    about: str | None = None,
) -> Path:
    """Write a model, its processor, a model card and digests of all files, whole or not at all.

    The model in memory stays as it is. The folder's settings are those of `vlm.answer`: answers are decoded greedily
    and never contain `<image>`, and batches are padded on the left.

    Weights have LLaVA's classic names (`classic_names`) and the JSON files what older readers look for, so that
    transformers 4, transformers 5 and servers all read the folder.

    Args:
        model: a LLaVA model, or the PeftModel that `tune` gave.
        processor: its processor.
        directory: replaced if a model is in it already.
        merge: True writes one folder for `AutoModelForImageTextToText`, adapters added into the weights. False writes
            `base/` (the model without its training) and `adapter/` for `PeftModel.from_pretrained(base, adapter)`; the
            trained projector lies in the adapter. From inside the directory `AutoPeftModel.from_pretrained("adapter")`
            opens both.
        scores: what `vlm.evaluate` gave, for the card.
        license: the hub's name of the licence (`apache-2.0`), for the card; None says that it is not stated.
        about: what the tower and the language model are, which data the model was tuned on, or anything else that the
            card shall say.

    Raises:
        ModelError: with merge=False, if the model has no adapters, or is not the PeftModel that holds them; if the
            processor is another model's; if transformers cannot save it; if the directory holds something else than a
            model.
    """
    base = base_of(model)
    check_fit(base, processor)
    target = free_for_a_model(directory)
    if not merge and (model is base or not has_adapter(base)):
        raise ModelError(
            "there is no adapter to keep apart",
            remedy="pass TuneResult.model after an Adapt stage, or set merge=True",
            field="merge",
        )
    with whole_folder(target) as folder:
        if merge:
            write(base, processor, folder, trained=True)
        else:
            write(base, processor, folder / _BASE, trained=False)
            write_adapter(model, folder / _ADAPTER, _BASE)
        text = card(base, target.name, merge, scores, license, about)
        (folder / "README.md").write_text(text, encoding="utf-8")
        write_json(folder / _MANIFEST, {"format": 1, "files": file_digests(folder, [_MANIFEST])})
    return target


def free_for_a_model(directory: str | Path, *, mark: str = "config.json") -> Path:
    """The absolute path of a folder that may be replaced: there is none yet, it is empty, or an older one of its kind.

    Args:
        directory: the folder.
        mark: a file that tells one of its kind, in it or in its `base/`.

    Raises:
        ModelError: if it holds something else, which would be lost.
    """
    target = Path(directory).absolute()
    held = target.is_dir() and any((target / part / mark).is_file() for part in (".", _BASE))
    if target.exists() and not held and (target.is_file() or any(target.iterdir())):
        raise ModelError(
            f"{target} holds something else than a model, and would be replaced",
            remedy="name a new folder, or remove what is there",
            field="directory",
        )
    return target


def load(directory: str | Path) -> tuple[Any, LlavaProcessor]:
    """A model and its processor from what `save` wrote, merged or apart, or from any LLaVA folder of transformers.

    No code of the folder runs, and weights are read from safetensors alone. A folder that `save` wrote must be as it
    was saved; one without `aced_vlm.json` is taken for a folder of transformers.

    Raises:
        ModelError: if the folder is neither, was altered, names files outside of it, describes a model far larger than
            its weights, or is not whole: nothing is ever filled up with new weights.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

    folder = Path(directory)
    with library_errors(
        f"{printable(folder)} holds no model that is whole",
        remedy="name a folder that vlm.save wrote",
        field="directory",
    ):
        folder = expand(directory)
        _check_saved(folder)
        apart = (folder / _ADAPTER).is_dir()
        held = folder / _BASE if apart else folder
        check_vision_language(check_folder(held, pictures=True, tokens=True), held)
        with bounded(weight_bytes(held)):
            model, found = AutoModelForImageTextToText.from_pretrained(
                held,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                generation_config=GenerationConfig(),  # transformers refuses some settings, and saves none of them
            )
        check_weights(model, found["unexpected_keys"])
        processor = AutoProcessor.from_pretrained(held, local_files_only=True, trust_remote_code=False)
        # LLaVA reads no pooling head of a tower, and some checkpoints have none
        lost = {name for name in found["missing_keys"] if ".head." not in name and ".pooler." not in name}
        check_fit(base_of(model), processor)
        reads(model.config.text_config)
        settle(processor.tokenizer)
        given = settings(held)
        warn_of_lost(given)
        model.generation_config = decoding(given, processor.tokenizer, model.config.image_token_id)
        if apart:
            model, more = load_adapter(model, folder / _ADAPTER)
            lost |= more
            check_weights(model)
    if lost:
        raise ModelError(
            f"{folder} lacks {len(lost)} of the model's tensors, {min(lost)} first",
            remedy="copy or save the model again",
            field="directory",
        )
    return model.eval(), processor


def _check_saved(folder: Path) -> None:
    """Compare a folder of `save` with the digests in its manifest, and refuse links out of any folder.

    Raises:
        ReadError: naming the file.
    """
    check_links(folder)
    if (folder / _MANIFEST).exists():
        manifest = read_json(folder / _MANIFEST)
        if not isinstance(manifest, dict):
            raise ReadError(f"{printable(folder / _MANIFEST)} holds no JSON object", remedy="restore the file")
        files: Any = manifest.get("files")
        check_digests(folder, files, [_MANIFEST])
