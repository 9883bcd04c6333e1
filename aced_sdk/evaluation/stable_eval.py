# SPDX-License-Identifier: Apache-2.0
"""StableEval: the 27 tasks of ACED (arXiv 2411.18674), their groups, and the names of their published folders."""

from __future__ import annotations

from collections.abc import Iterator

# Settled from Apple's per-task results of MobileCLIP-S0, S1 and S2: no other assignment of tasks to groups gives the
# group means that ACED publishes for all three. The metric is top-1 accuracy, for retrieval the mean of both R@1.
STABLE_EVAL: dict[str, tuple[str, ...]] = {
    "imagenet": ("imagenet1k",),
    "imagenet_shift": ("imagenetv2", "imagenet-a", "imagenet-r", "objectnet"),
    "object": (
        "cifar10", "cifar100", "caltech101", "voc2007", "stl10", "food101", "pets", "flowers", "cars", "fgvc_aircraft",
    ),
    "scene": ("sun397", "resisc45", "geode", "fmow"),
    "retrieval": ("mscoco_captions", "flickr30k"),
    "mean_only": ("imagenet_sketch", "dtd", "eurosat", "pcam", "dollar_street", "iwildcam"),
}  # fmt: skip
"""Group to tasks. Tasks of `mean_only` enter the mean of 27 and no group."""

# What CLIP_benchmark and DataComp call a task, where that is another name; `/` is `-` in a folder's name.
_PUBLISHED = {
    "caltech101": ("vtab/caltech101",),
    "cifar100": ("vtab/cifar100",),
    "dollar_street": ("fairness/dollar_street",),
    "dtd": ("vtab/dtd",),
    "eurosat": ("vtab/eurosat",),
    "flickr30k": ("retrieval/flickr_1k_test_image_text_retrieval",),
    "flowers": ("vtab/flowers",),
    "fmow": ("wilds/fmow",),
    "geode": ("fairness/geode",),
    "iwildcam": ("wilds/iwildcam",),
    "mscoco_captions": ("retrieval/mscoco_2014_5k_test_image_text_retrieval",),
    "pcam": ("vtab/pcam",),
    "pets": ("vtab/pets",),
    "resisc45": ("vtab/resisc45",),
}


def expand_names(names: list[str] | tuple[str, ...]) -> list[str]:
    """Task names with `stable_eval` replaced by its 27 tasks, each once."""
    result: dict[str, None] = {}
    for name in names:
        tasks = [task for group in STABLE_EVAL.values() for task in group] if name == "stable_eval" else [name]
        result |= dict.fromkeys(tasks)
    return list(result)


def folder_names(task: str) -> Iterator[str]:
    """The names that a task's folder may have: its own, and those of CLIP_benchmark and DataComp (`wds_vtab-pets`)."""
    for name in (task, *_PUBLISHED.get(task, ())):
        for folder in dict.fromkeys((name, name.replace("/", "-"))):
            yield from (folder, f"wds_{folder}", f"wds_{folder}_test")


def group_of(folder: str) -> str:
    """The group of a task or of a published folder; `other` for a task that is not in StableEval."""
    for group, tasks in STABLE_EVAL.items():
        if any(folder in folder_names(task) for task in tasks):
            return group
    return "other"
