# SPDX-License-Identifier: Apache-2.0
"""lmms-eval's view of a saved model: `lmms_eval --model aced_vlm --model_args pretrained=FOLDER --tasks ...`.

lmms-eval finds it by this package's entry point in the group `lmms_eval.models`; nothing else imports this module.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from aced_sdk.errors import UnsupportedError
from vlm.data.chat import IMAGE
from vlm.generation import answer
from vlm.model.saving import load


def manifest() -> ModelManifest:
    """What the entry point gives to lmms-eval."""
    return ModelManifest(model_id="aced_vlm", simple_class_path="vlm.lmms.AcedVlm")


class AcedVlm(lmms):  # type: ignore[misc]
    """A folder of `vlm.save`, or any LLaVA folder, asked as `vlm.answer` asks: greedily, pictures before the question.

    Args:
        pretrained: the folder, merged or with the adapter apart.
        device: where one process runs it; None, or with several processes: the one that accelerate gives.
        batch_size: questions decoded together.
        max_new_tokens: longest answer, tokens, in tasks that do not say.

    Raises:
        ModelError: if the folder holds no model.
    """

    def __init__(
        self, pretrained: str, device: str | None = None, batch_size: int | str = 1, max_new_tokens: int = 128
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()  # lmms-eval gathers the processes' answers through it
        alone = self.accelerator.num_processes == 1
        self.device = torch.device(device if device and alone else self.accelerator.device)
        self.model, self.processor = load(pretrained)
        self.model.to(self.device)
        self.batch_size, self.max_new_tokens = int(batch_size), int(max_new_tokens)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer to each request, cut at the task's stop words.

        Raises:
            UnsupportedError: if the task wants sampling or beams: the score would be of something else.
            DataError: if what a task shows is no picture.
        """
        by_length: dict[int, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            by_length[self._longest(request.args[1])].append(number)
        answers = [""] * len(requests)
        for longest, numbers in by_length.items():
            images, questions = [], []
            for context, _, doc_to_visual, doc_id, task, split in (requests[number].args for number in numbers):
                images.append(tuple(doc_to_visual(self.task_dict[task][split][doc_id]) or ()))
                questions.append(context.replace(IMAGE, "").strip())  # `answer` writes its own marks
            texts = answer(self.model, self.processor, images, questions, longest, self.batch_size)
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = _until(text, requests[number].args[1].get("until"))
        return answers

    def _longest(self, options: Mapping[str, Any]) -> int:
        if options.get("do_sample", bool(options.get("temperature"))) or (options.get("num_beams") or 1) > 1:
            raise UnsupportedError(
                f"the task asks for sampling or beams ({dict(options)}), and answers are decoded greedily",
                remedy="pass --gen_kwargs do_sample=False,num_beams=1,temperature=0",
                field="gen_kwargs",
            )
        return int(options.get("max_new_tokens", self.max_new_tokens))

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refused."""
        raise _generation_only("multiple choice by likelihood")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Refused."""
        raise _generation_only("rounds of questions")


def _generation_only(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"the task needs {what}", remedy="take a task with output_type: generate_until", field="tasks"
    )


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    for stop in [stops] if isinstance(stops, str) else stops or ():
        text = text.split(stop)[0] if stop else text
    return text.strip()
