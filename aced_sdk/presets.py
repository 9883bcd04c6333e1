# SPDX-License-Identifier: Apache-2.0
"""Published methods and models. A preset is a function that returns a complete config.

    config = presets.aced(student=..., reference=..., teacher=..., data=..., sub_batch=1024, directory="runs/aced")

Without arguments a preset has the sizes of the paper (ACED, arXiv 2411.18674):

- b = 32,768 of B = 163,840 (f = 0.8) in n = 16 chunks;
- sigmoid loss, 3 billion trained examples (as in the ablations), an S/32 student at 256 px;
- an rsqrt schedule with peak 1e-3, 10 % warm-up and 10 % cool-down.

The sizes are known; learning rate, schedule and student are believed. Weight decay is the default of this package.
Shards, reference, teacher and directory are placeholders (`path/to/...`). A preset sets only those that it reads.

Docstrings list what is known of a preset and its cost in *IID steps*. A trained example costs three forward passes,
a scored one costs one. Cached embeddings of the reference and the teacher cost nothing. `aced.plan` computes the same.
`engine.micro_batch`, which b = 32,768 needs on one GPU, adds a third of an IID step. It adds nothing if the student
scores at full size (`h_acid`, `aced`), because the scores serve as its first pass.

Text towers use open_clip's BPE vocabulary of 49,408. The paper's SentencePiece vocabulary of 32,000 cannot be
shipped here; MACs do not depend on it. To use another one, set `text_cfg.hf_tokenizer_name` of the student.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from pydantic import field_validator

from aced_sdk.config import (
    Contrastive,
    Curation,
    Data,
    Distillation,
    DistillConfig,
    Engine,
    Evaluation,
    Frozen,
    FrozenConfig,
    Iid,
    Independent,
    Joint,
    Objective,
    Optimizer,
    Schedule,
    StaticFilter,
    Student,
)
from aced_sdk.errors import ConfigError
from aced_sdk.towers import ProfiledStudent

__all__ = [
    "Options",
    "Preset",
    "aced",
    "aced_f0",
    "aced_f1",
    "aced_f2",
    "aced_iid_distill",
    "feature_kd",
    "flexi_aced",
    "h_acid",
    "h_acid_independent",
    "i_acid",
    "i_acid_kd",
    "iid",
    "interactive_kd",
    "mobileclip_s0",
    "mobileclip_s1",
    "mobileclip_s2",
    "relational_kd",
    "siglip2_finish",
    "sigmoid_kd",
    "softmax_kd",
    "static",
    "static_kd",
]  # fmt: skip

_ABLATION, _FULL = 3_000_000_000, 13_000_000_000
_MOBILECLIP_ABLATION = 45_000 * 8_192
# Pairs per pass and rows per slab of a loss: an estimate for 80 GB of GPU memory.
_MICRO_BATCH, _SLAB = 1024, 2048


class Preset(DistillConfig):
    """A `DistillConfig` whose student has a `profile`. YAML and hash are those of the plain config."""

    student: ProfiledStudent

    @field_validator("student", mode="before")
    @classmethod
    def _profiled(cls, student: Any) -> Any:
        return student.model_dump(exclude_unset=True) if isinstance(student, Student) else student


class Options(TypedDict, total=False):
    """Options of all presets: four sizes, the length of training, and any field of `DistillConfig`.

    A field replaces the preset's whole field. Sizes that a preset's curation does not have are ignored, so that many
    presets can be compared with the same options.
    """

    sub_batch: int  # b: examples trained per step
    super_batch: int  # B: examples scored per step; default: the preset's multiple of b
    num_chunks: int  # n
    gain: float  # factor on the log-weights
    examples: int  # trained examples of the run; steps = examples // b
    student: Student
    data: Data
    reference: FrozenConfig | None
    teacher: FrozenConfig | tuple[FrozenConfig, ...] | None
    curation: Curation
    objective: Objective
    optimizer: Optimizer
    schedule: Schedule
    engine: Engine
    evaluation: Evaluation
    seed: int
    directory: str | Path


def _preset(
    name: str,
    options: Options,
    curation: Curation,
    terms: tuple[Distillation, ...] = (),
    *,
    student: Student | None = None,
    examples: int = _ABLATION,
    sub_batch: int = 32_768,
    ratio: int = 5,
    optimizer: Optimizer = Optimizer(learning_rate=1e-3),  # noqa: B008
    shape: Literal["rsqrt", "constant"] = "rsqrt",
) -> Preset:
    """Combine a method (curation, terms), a student, sizes (B = ratio * b) and the user's options."""
    given: dict[str, Any] = {**options}
    sizes: dict[str, Any] = {"sub_batch": _number("sub_batch", given.pop("sub_batch", sub_batch))}
    sizes["super_batch"] = given.pop("super_batch", ratio * sizes["sub_batch"])
    sizes |= {size: given.pop(size) for size in ("num_chunks", "gain") if size in given}
    examples = _number("examples", given.pop("examples", examples))
    config = Preset(
        student=student or _vit(384, patch=32, pixels=256),
        data=Data(shards=("path/to/pool",)),
        reference=Frozen(model="path/to/reference") if curation.needs_reference else None,
        teacher=Frozen(model="path/to/teacher") if terms else None,
        curation=curation.replace(**{size: value for size, value in sizes.items() if hasattr(curation, size)}),
        objective=Objective(contrastive=Contrastive(chunk=_SLAB), distillation=terms),
        optimizer=optimizer,
        schedule=Schedule(steps=1, shape=shape, warmup=0.1, cooldown=0.1),
        directory=Path("runs") / name,
    ).replace(**given)
    size = config.curation.sub_batch
    micro_batch = _MICRO_BATCH if size > _MICRO_BATCH and size % _MICRO_BATCH == 0 else None
    of_size = {
        "schedule": config.schedule.replace(steps=max(1, examples // size)),
        "engine": Engine(precision="bf16", micro_batch=micro_batch),
    }
    return config.replace(**{field: value for field, value in of_size.items() if field not in given})


def _number(field: str, value: Any) -> Any:
    """The value, if it is a size; its config checks the rest."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**63:
        raise ConfigError(f"{field} is not a number above 0", remedy="write one, or leave it out", field=field)
    return value


def _kd(weight: float, **settings: Any) -> tuple[Distillation, ...]:
    return (Distillation(weight=weight, **({"chunk": _SLAB} | settings)),)


def _vit(width: int, patch: int, pixels: int) -> Student:
    """A student with a 12-layer ViT and the paper's text tower S.

    Both are plain open_clip CLIP towers: class token, causal text, linear projections to the image tower's width.
    """
    return Student(
        architecture={
            "embed_dim": width,
            "vision_cfg": {"image_size": pixels, "layers": 12, "width": width, "patch_size": patch},
            "text_cfg": {"context_length": 64, "vocab_size": 49408, "width": 384, "heads": 6, "layers": 12},
        }
    )


# -- baselines --------------------------------------------------------------------------------------------------------


def iid(**options: Unpack[Options]) -> Preset:
    """Standard training: sigmoid loss on uniform draws, no teacher.

    Known: ranked last in the paper: IID < Softmax-KD < I-ACID < H-ACID < ACED. Cost: 1 IID step, by definition.
    """
    return _preset("iid", options, Iid())


def softmax_kd(weight: float = 1.0, **options: Unpack[Options]) -> Preset:
    """IID with Softmax-KD (eq. 3), lambda = `weight`.

    Known: better than IID only with large teachers; best method on about 4 of 27 tasks (including Cars and DTD).
    Believed: lambda was swept over 0.5, 1, 2. Open: the temperatures; here each model's learned scale. Cost: 1.
    """
    return _preset("softmax_kd", options, Iid(), _kd(weight))


def sigmoid_kd(weight: float = 1.0, **options: Unpack[Options]) -> Preset:
    """IID with Sigmoid-KD, for a sigmoid-trained teacher.

    Known: a baseline of the paper. Open: its weight. Cost: 1.
    """
    return _preset("sigmoid_kd", options, Iid(), _kd(weight, loss="sigmoid"))


def feature_kd(weight: float = 2000.0, **options: Unpack[Options]) -> Preset:
    """IID with feature matching. Student and teacher need the same embedding dimension.

    Known: a baseline of the paper; the weight is CLIP-KD's (arXiv 2307.12732). Open: the paper's weight. Cost: 1.
    """
    return _preset("feature_kd", options, Iid(), _kd(weight, loss="feature", chunk=None))


def interactive_kd(weight: float = 1.0, **options: Unpack[Options]) -> Preset:
    """IID with CLIP-KD's interactive contrastive loss. Student and teacher need the same embedding dimension.

    Not in the paper. Known: ICL in CLIP-KD. Cost: 1.
    """
    return _preset("interactive_kd", options, Iid(), _kd(weight, loss="interactive"))


def relational_kd(weight: float = 1.0, **options: Unpack[Options]) -> Preset:
    """IID with CLIP-KD's contrastive relational distillation.

    Not in the paper. Known: CRD in CLIP-KD; its gradient is that of `softmax_kd`. Cost: 1.
    """
    return _preset("relational_kd", options, Iid(), _kd(weight, loss="relational"))


def static(keep_fraction: float = 0.2, **options: Unpack[Options]) -> Preset:
    """Uniform draws from the top fraction `keep_fraction` of the pool by the reference's pair score, filtered once.

    Not in the paper: the baseline for online curation. Cost: 1.
    """
    return _preset("static", options, StaticFilter(keep_fraction=keep_fraction))


def static_kd(keep_fraction: float = 0.2, weight: float = 1.0, **options: Unpack[Options]) -> Preset:
    """The static filter with Softmax-KD: the strongest simple baseline for `aced`.

    Not in the paper. Cost: 1.
    """
    return _preset("static_kd", options, StaticFilter(keep_fraction=keep_fraction), _kd(weight))


# -- active curation --------------------------------------------------------------------------------------------------


def i_acid(**options: Unpack[Options]) -> Preset:
    """Curation without distillation; selects pairs that are easy for the reference.

    Known: better than IID (with every reference) and Softmax-KD, worse than H-ACID. Cost: 1; the student scores
    nothing.
    """
    return _preset("i_acid", options, Joint(score="easy_reference"))


def i_acid_kd(weight: float = 1.0, **options: Unpack[Options]) -> Preset:
    """I-ACID with Softmax-KD on the same batch: like `aced` at the cost of an IID step.

    Not in the paper. Cost: 1; the student scores nothing.
    """
    return _preset("i_acid_kd", options, Joint(score="easy_reference"), _kd(weight))


def h_acid(**options: Unpack[Options]) -> Preset:
    """Curation without distillation; selects learnable pairs: hard for the student, easy for the reference.

    Known: better than I-ACID; the best references are larger than the student (B for Ti, L for S, g for B). JEST
    reaches IID's result of 3B examples with 2B, 1B, 0.67B at f = 0.5, 0.8, 0.9. Cost: (r + 3) / 3 with r = B/b,
    2.67 at f = 0.8.
    """
    return _preset("h_acid", options, Joint())


def h_acid_independent(**options: Unpack[Options]) -> Preset:
    """H-ACID with each pair scored independently.

    Known: worse than joint selection, by more at larger f (JEST, arXiv 2406.17711). Cost: 2.67, as `h_acid`.
    """
    return _preset("h_acid_independent", options, Independent())


def aced(weight: float = 1.0, **options: Unpack[Options]) -> Preset:
    """ACED-ACIDistill, the paper's method: H-ACID and Softmax-KD on the same batch, lambda = `weight`.

    Known: the best variant of the paper. Its reference was trained on curated data, its teacher on more diverse data.
    With `teacher=None` the reference is the teacher. Believed: lambda was swept over 0.5, 1, 2. Open: temperatures and
    gain. Cost: 2.67.
    """
    return _preset("aced", options, Joint(), _kd(weight))


def aced_iid_distill(weight: float = 1.0, **options: Unpack[Options]) -> Preset:
    """ACED-IIDistill: H-ACID for the task loss, Softmax-KD on a second, uniform batch of b pairs.

    Known: worse than `aced`. Cost: (r + 6) / 3, 3.67 at f = 0.8; 2 b pairs are trained on.
    """
    return _preset("aced_iid_distill", options, Joint(), _kd(weight, batch="iid"))


def flexi_aced(scoring_size: int = 128, weight: float = 1.0, **options: Unpack[Options]) -> Preset:
    """ACED with cheap scoring: pairs are scored at half the image size, and half of each batch is trained at it.

    Believed: Flexi-JEST scores with patches of 32 instead of 16 at 0.28 of the cost, 1.11 IID steps in total. Here the
    student is B/16 at 256 px with text tower S, and a pair at 128 px costs 0.286 of one at 256. Cost: 1.12 at f = 0.8.
    A student with few patches saves less, because its text tower costs the same: 1.83 for S/32.
    """
    student = _vit(768, patch=16, pixels=256)
    return _preset("flexi_aced", options, Joint(scoring_size=scoring_size), _kd(weight), student=student)


def siglip2_finish(**options: Unpack[Options]) -> Preset:
    """SigLIP 2's last stage for small models (arXiv 2502.14786): H-ACID without distillation, after pretraining.

    The student is a folder (`local-dir:path/to/student`). The reference is SigLIP 2's only teacher. Known: learning
    rate 1e-5, no weight decay, sigmoid loss only, b = 32k of 64k (f = 0.5), and f = 0.75 for B/32
    (`super_batch=131_072`); the teacher was fine-tuned on 1B curated examples; ImageNet 74.0 for B/32, 79.1 for B/16.
    Believed: 4B examples. Open: schedule and score; here constant with warm-up and cool-down, learnability. Cost: 1.67.
    """
    return _preset(
        "siglip2_finish",
        options,
        Joint(),
        student=Student(architecture="local-dir:path/to/student"),
        examples=4_000_000_000,
        ratio=2,
        optimizer=Optimizer(learning_rate=1e-5, weight_decay=0.0),
        shape="constant",
    )


# -- the paper's models -----------------------------------------------------------------------------------------------


def aced_f0(weight: float = 1.0, **options: Unpack[Options]) -> Preset:
    """ACED-F0: `aced` with 13 billion examples, 3.30 GMACs per pair.

    Open: the shape of its S-size image tower; here S/32 at 288 px (3.296 GMACs; S/28 at 252 px has 3.273).
    Known: ImageNet 68.5, ImageNet shifts 56.1, object 77.9, scene 59.4, COCO 51.0, Flickr30k 79.5, mean of 27 tasks
    64.0 (MobileCLIP-S0 63.6). Cost: 2.67 IID steps.
    """
    return _preset("aced_f0", options, Joint(), _kd(weight), student=_vit(384, patch=32, pixels=288), examples=_FULL)


def aced_f1(weight: float = 1.0, **options: Unpack[Options]) -> Preset:
    """ACED-F1: B/32 at 256 px, 13 billion examples, 7.14 GMACs per pair (7.147 here).

    Known: ImageNet 74.9, ImageNet shifts 67.3, object 81.8, scene 64.0, COCO 55.6, Flickr30k 84.7, mean of 27 tasks
    69.7 (MobileCLIP-S1 67.9). Believed: the shape. Cost: 2.67 IID steps.
    """
    return _preset("aced_f1", options, Joint(), _kd(weight), student=_vit(768, patch=32, pixels=256), examples=_FULL)


def aced_f2(weight: float = 1.0, **options: Unpack[Options]) -> Preset:
    """ACED-F2: B/24 at 240 px, 13 billion examples, 10.29 GMACs per pair (10.297 here).

    Known: ImageNet 76.9, ImageNet shifts 70.7, object 82.3, scene 64.6, COCO 58.3, Flickr30k 85.3, mean of 27 tasks
    70.9 (MobileCLIP-S2 69.8). Believed: the shape. Cost: 2.67 IID steps.
    """
    return _preset("aced_f2", options, Joint(), _kd(weight), student=_vit(768, patch=24, pixels=240), examples=_FULL)


# -- MobileCLIP's towers ----------------------------------------------------------------------------------------------


def mobileclip_s0(weight: float = 1.0, **options: Unpack[Options]) -> Preset:
    """`aced` for MobileCLIP's FastViT MCi0, 5.37 GMACs per pair with open_clip's MobileCLIP2-S0.

    Not in the paper. MobileCLIP-S0 (known: 3.70 GMACs, ImageNet 67.8, mean 63.6) has the same image tower, but a
    smaller, convolutional text tower that open_clip lacks. These towers have batch norm, which excludes micro-batches,
    so b = 1,024 (our choice). Believed: 369 million examples, as in MobileCLIP's ablations. Cost: 2.67 IID steps.
    """
    return _mobileclip("MobileCLIP2-S0", "mobileclip_s0", weight, options)


def mobileclip_s1(weight: float = 1.0, **options: Unpack[Options]) -> Preset:
    """`aced` for MobileCLIP-S1, 7.65 GMACs per pair (known: 7.64, ImageNet 72.6, mean 67.9). As `mobileclip_s0`."""
    return _mobileclip("MobileCLIP-S1", "mobileclip_s1", weight, options)


def mobileclip_s2(weight: float = 1.0, **options: Unpack[Options]) -> Preset:
    """`aced` for MobileCLIP-S2, 10.83 GMACs per pair (known: 10.81, ImageNet 74.4, mean 69.8). As `mobileclip_s0`."""
    return _mobileclip("MobileCLIP-S2", "mobileclip_s2", weight, options)


def _mobileclip(architecture: str, name: str, weight: float, options: Options) -> Preset:
    student = Student(architecture=architecture)
    return _preset(name, options, Joint(), _kd(weight), student=student, examples=_MOBILECLIP_ABLATION, sub_batch=1024)
