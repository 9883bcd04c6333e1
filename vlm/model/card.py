# SPDX-License-Identifier: Apache-2.0
"""The model card of a saved vision-language model."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import yaml

from aced_sdk.files import printable

if TYPE_CHECKING:
    from vlm.scores import Scores

_CARD = """---
{facts}---
# {name}

A vision-language model made with ACED SDK.{about}

| part | what it is |
|---|---|
| vision tower | `{tower}`, {tower_size:.1f} M parameters{tokens} |
| language model | `{language}`, {layers} layers of width {hidden} |
| licence | {license} |

## How to load it

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
{opening}
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is this?"}}]}}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=[Image.open("picture.png")], text=[text], return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
print(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

## Scores

{scores}
"""
_MERGED = """
folder = {name}  # or the name of its repository on the hub
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
"""
_APART = """from peft import PeftModel

folder = {name}  # from the hub: folder = huggingface_hub.snapshot_download(REPOSITORY)
model = AutoModelForImageTextToText.from_pretrained(f"{{folder}}/base")
model = PeftModel.from_pretrained(model, f"{{folder}}/adapter")
processor = AutoProcessor.from_pretrained(f"{{folder}}/base")
"""


def card(base: Any, name: str, merged: bool, scores: Scores | None, license: str | None, about: str | None) -> str:
    """The card as Markdown; texts from elsewhere cannot add front matter, headings or table rows.

    Args:
        base: the model.
        name: of its folder.
        merged: whether adapters are added into the weights.
        scores: as in `vlm.save`.
        license: as in `vlm.save`.
        about: as in `vlm.save`.
    """
    facts = {"library_name": "transformers" if merged else "peft", "pipeline_tag": "image-text-to-text"}
    tower, text = base.config.vision_config, base.config.text_config
    tokens = getattr(base.config, "image_seq_length", None)  # Aya Vision's own folders do not say
    license = " ".join(printable(license).split()) if license else None
    return _CARD.format(
        facts=yaml.safe_dump(facts | ({"license": license} if license else {}), sort_keys=False),
        name=_cell(name),
        about=f"\n\n{_paragraphs(about)}" if about else "",
        tower=_cell(getattr(tower, "architecture", None) or tower.model_type),  # timm's towers have their name there
        tower_size=base.model.vision_tower.num_parameters() / 1e6,
        tokens=f"; a picture becomes {int(tokens)} tokens" if tokens else "",
        language=_cell(text.model_type),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        license=_cell(license or "not stated; those of the vision tower and of the language model hold in any case"),
        opening=(_MERGED if merged else _APART).format(name=json.dumps(name).replace("`", "\\u0060")),
        scores=_table(scores) if scores else "None were given.",
    )


def _cell(text: str) -> str:
    """One line that cannot end a table cell, a code span or a heading."""
    line = " ".join(text.split()).replace("`", "'")
    return re.sub(r"([<|\\])", r"\\\1", printable(line))


def _paragraphs(text: str) -> str:
    """Text of several lines, none of which is a heading, a rule, a table row or the start of a code or HTML block."""
    lines = [printable(line.expandtabs(), 10_000) for line in text.strip().splitlines()]
    lines = [re.sub(r"<(?!https?:)", "&lt;", line) for line in lines]
    return "\n".join(re.sub(r"^\s*(?=[#|]|```|~~~|[-=*_:][-=*_:|\s]*$)", r"\\", line) for line in lines)


def _table(scores: Scores) -> str:
    """Shares of right answers and what `metric` added, per kind of question, each beside its blind one."""
    names = list(scores.total.metrics)
    lines = [["questions", "number", "right", *map(_cell, names)], ["---"] * (3 + len(names))]
    for kind, one in [*scores.kinds.items(), ("all", scores.total)]:
        blind = one.blind_metrics or {}
        values = [_beside(one.accuracy, one.blind), *(_beside(one.metrics[key], blind.get(key)) for key in names)]
        lines.append([_cell(kind.replace("|", "/")) or "-", str(one.count), *values])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"In brackets: the same with another sample's picture, which is what the words alone give away.\n\n{rows}"


def _beside(value: float, blind: float | None) -> str:
    return f"{value:.3f}" if blind is None else f"{value:.3f} ({blind:.3f})"
