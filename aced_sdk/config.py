# SPDX-License-Identifier: Apache-2.0
"""What a user writes: frozen, checked, and readable from YAML. Nothing here imports torch.

Sizes count examples, lengths count steps (one step trains one sub-batch), rates are per step.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from aced_sdk.errors import ConfigError
from aced_sdk.files import whole_file


class Config(BaseModel):
    """Base of every config: frozen, unknown fields refused, mistakes told as `ConfigError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _readable(error, type(self)) from None

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked like a new one.

        Raises:
            ConfigError: if the result is not a valid config.
        """
        values = {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}
        return type(self)(**(values | changes))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a config from YAML.

        Raises:
            ConfigError: if the file is missing, is not YAML, or holds a mistake (the field is named).
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}", remedy="check the path") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not YAML: {error}", remedy="correct the file") from None
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise ConfigError(f"{path} does not hold a mapping of fields", remedy="write `field: value` lines")
        return cls(**values)

    def to_yaml(self, path: str | Path) -> None:
        """Write every value, defaults too, so that the file still means the same under later defaults."""
        with whole_file(Path(path)) as temporary:
            temporary.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False), encoding="utf-8")

    def hash(self) -> str:
        """Twelve hex digits that change when any value changes."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


_METHODS = ("iid", "static", "independent", "joint")


def _readable(error: ValidationError, kind: type[BaseModel]) -> ConfigError:
    """The first mistake that pydantic found, as cause, remedy and dotted field."""
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"] if part not in _METHODS]  # pydantic names a union's tag as a place
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):
        field = ".".join(place + ([inner.field] if inner.field else []))
        return ConfigError(inner.cause, remedy=inner.remedy, field=field or None)
    field = ".".join(place)
    more = f" ({error.error_count() - 1} more mistakes follow)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = sorted(kind.model_fields)
        near = difflib.get_close_matches(place[-1], known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known fields here: {', '.join(known)}"
        return ConfigError(f"unknown field '{place[-1]}'{more}", remedy=hint, field=field)
    if first["type"] == "missing":
        return ConfigError(f"'{field}' is missing{more}", remedy="give it a value", field=field)
    return ConfigError(
        f"{first['msg']} (got {first.get('input')!r}){more}",
        remedy=f"correct '{field}' in {kind.__name__}",
        field=field,
    )


# --- models ------------------------------------------------------------------------------------------------------


class Student(Config):
    """The encoder to be trained: an open_clip architecture built anew, or a folder to go on from."""

    architecture: str | dict[str, Any] = Field(
        description="open_clip architecture name (`ViT-B-32`), `local-dir:FOLDER`, "
        "or a `model_cfg` mapping as in open_clip_config.json"
    )
    init_scale: float = Field(10.0, gt=0, description="first value of the learned scale on cosine similarities")
    init_bias: float = Field(-10.0, description="first value of the learned bias of the sigmoid loss")
    mean: tuple[float, float, float] = Field((0.5, 0.5, 0.5), description="per-channel mean, pictures in 0..1")
    std: tuple[float, float, float] = Field((0.5, 0.5, 0.5), description="per-channel deviation, pictures in 0..1")
    resize: Literal["squash", "shortest", "longest"] = Field(
        "squash",
        description="how a picture becomes square: squash, crop after the shortest side, pad after the longest",
    )


class Frozen(Config):
    """A frozen dual encoder that serves as reference or teacher through its cached embeddings."""

    model: str = Field(description="folder of a dual encoder, or an open_clip name such as `hf-hub:ORG/REPO`")
    cache: Path | None = Field(None, description="folder of its embedding cache; default: beside the run's caches")


# --- data --------------------------------------------------------------------------------------------------------


class Data(Config):
    """The pool: pairs in WebDataset tars (KEY.jpg|png|webp, KEY.txt, KEY.json)."""

    shards: tuple[str, ...] = Field(
        min_length=1, description="tar files or folders of tars; braces such as {0000..0099} expand"
    )
    prepared: Path | None = Field(
        None,
        description="folder for resized uint8 pictures and tokens, made once and memory-mapped; "
        "for pools that fit on disk",
    )
    max_bad_fraction: float = Field(0.02, ge=0, le=1, description="share of unusable pairs above which the run stops")
    max_pixels: int = Field(100_000_000, gt=0, description="pictures with more pixels are skipped and counted")
    workers: int = Field(2, ge=1, description="threads that read and decode ahead")


# --- curation ----------------------------------------------------------------------------------------------------

Score = Literal["learnability", "easy_reference", "hard_learner"]
LossForm = Literal["sigmoid", "softmax"]


class _Selection(Config):
    sub_batch: int = Field(256, gt=0, description="b: examples trained on in a step")

    @property
    def candidates(self) -> int:
        """B: examples drawn from the pool for one step."""
        return self.sub_batch

    @property
    def needs_student(self) -> bool:
        """Whether the student has to score the super-batch."""
        return False

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's embeddings are read."""
        return False


class Iid(_Selection):
    """No curation: every drawn example is trained on."""

    method: Literal["iid"] = "iid"


class StaticFilter(_Selection):
    """An offline filter: only the top share of the pool by the reference's own pair score is ever drawn."""

    method: Literal["static"] = "static"
    share: float = Field(0.2, gt=0, le=1, description="share of the pool that is kept")
    loss: LossForm = Field("sigmoid", description="form of the reference's pair score")

    @property
    def needs_reference(self) -> bool:
        return True


class _Scored(_Selection):
    super_batch: int = Field(1280, gt=0, description="B: examples scored in a step")
    score: Score = Field("learnability", description="learnability (H-ACID), easy_reference (I-ACID) or hard_learner")
    loss: LossForm = Field("sigmoid", description="form of the loss that the scores are made of")
    gain: float = Field(1.0, gt=0, description="factor on the log-weights before a draw; larger is greedier")

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if self.super_batch % self.sub_batch:
            raise ConfigError(
                f"the super-batch of {self.super_batch} is not a multiple of the sub-batch of {self.sub_batch}",
                remedy=f"take {max(1, round(self.super_batch / self.sub_batch)) * self.sub_batch}",
                field="super_batch",
            )
        return self

    @property
    def filter_ratio(self) -> float:
        """f = 1 - b/B."""
        return 1 - self.sub_batch / self.super_batch

    @property
    def candidates(self) -> int:
        return self.super_batch

    @property
    def needs_student(self) -> bool:
        return self.score != "easy_reference"

    @property
    def needs_reference(self) -> bool:
        return self.score != "hard_learner"


class Independent(_Scored):
    """Every example scored by its own pair loss alone; the baseline of the joint sampler."""

    method: Literal["independent"] = "independent"


class Joint(_Scored):
    """Joint example selection in chunks (JEST, Algorithm 1), the sampler of ACID and ACED."""

    method: Literal["joint"] = "joint"
    num_chunks: int = Field(16, gt=0, description="n: the sub-batch is drawn in n chunks of b/n")

    @model_validator(mode="after")
    def _chunks(self) -> Self:
        if self.sub_batch % self.num_chunks:
            raise ConfigError(
                f"the sub-batch of {self.sub_batch} does not divide into {self.num_chunks} chunks",
                remedy="make the sub-batch a multiple of num_chunks",
                field="num_chunks",
            )
        return self


Curation = Annotated[Iid | StaticFilter | Independent | Joint, Field(discriminator="method")]


# --- objective ---------------------------------------------------------------------------------------------------


class Contrastive(Config):
    """The task loss over the sub-batch."""

    loss: LossForm = "sigmoid"
    weight: float = Field(1.0, ge=0, description="task weight; 0 trains by distillation alone")
    chunk: int | None = Field(
        None, gt=0, description="texts per slab of the sigmoid loss; None: one slab. Saves memory, changes nothing"
    )


class Distillation(Config):
    """One distillation loss; its targets come from the teacher's cached embeddings."""

    loss: Literal["softmax", "sigmoid", "feature", "interactive", "relational"] = "softmax"
    weight: float = Field(1.0, ge=0, description="lambda")
    teacher_scale: float | None = Field(
        None, gt=0, description="scale on the teacher's similarities; None: its own learned one"
    )
    student_scale: float | None = Field(
        None, gt=0, description="scale on the student's similarities; None: its own learned one"
    )


class Objective(Config):
    """What a step minimises: weight * contrastive + the sum of lambda * distillation."""

    contrastive: Contrastive = Contrastive()
    distillation: tuple[Distillation, ...] = ()

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.contrastive.weight == 0 and not any(term.weight > 0 for term in self.distillation):
            raise ConfigError(
                "nothing to learn: the task weight is 0 and no distillation term has a weight",
                remedy="give contrastive.weight or a distillation term a positive weight",
                field="contrastive.weight",
            )
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's embeddings are read."""
        return any(term.weight > 0 for term in self.distillation)


# --- optimisation and engine -------------------------------------------------------------------------------------


class Optimizer(Config):
    """AdamW."""

    learning_rate: float = Field(1e-3, gt=0, description="peak rate")
    weight_decay: float = Field(1e-4, ge=0, description="decoupled; matrices only")
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = Field(1.0, gt=0, description="largest norm of the whole gradient")


class Schedule(Config):
    """Length of training, and the learning rate over it as a factor of the peak."""

    steps: int = Field(gt=0, description="steps of training; trained examples = steps * sub_batch")
    shape: Literal["cosine", "rsqrt", "constant"] = "cosine"
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps with a linear rise")
    cooldown: float = Field(
        0.1, ge=0, lt=1, description="share of the steps with a linear fall to zero; rsqrt and constant only"
    )

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.warmup + self.cooldown > 1:
            raise ConfigError("warm-up and cool-down overlap", remedy="make their sum at most 1", field="cooldown")
        return self


class Engine(Config):
    """How a step is taken and kept."""

    kind: Literal["deepspeed", "single"] = Field("deepspeed", description="DeepSpeed, or one plain process")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the forward passes (autocast); weights stay float32"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage")
    deepspeed: dict[str, Any] | Path | None = Field(
        None, description="further DeepSpeed JSON, laid over what the fields above give"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, gt=0, description="CPU threads of this process; None: torch's own choice")
    scoring_batch: int = Field(1024, gt=0, description="examples per forward pass when the super-batch is scored")
    checkpoint_every: int = Field(100, gt=0, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, gt=0, description="newest checkpoints that are kept")
    max_bad_steps: int = Field(
        3, ge=0, description="steps in a row with a non-finite loss that are skipped before the run stops"
    )


class Evaluation(Config):
    """Evaluation on held-out tasks while training and at its end; no tasks, none."""

    tasks: tuple[str, ...] = ()
    data_root: Path | None = Field(
        None, description="folder with one folder per task, in CLIP_benchmark's WebDataset layout"
    )
    every: int = Field(0, ge=0, description="steps between evaluations; 0: at the end alone")

    @model_validator(mode="after")
    def _root(self) -> Self:
        if self.tasks and self.data_root is None:
            raise ConfigError("evaluation tasks are named, but no data", remedy="name their folder", field="data_root")
        return self


class DistillConfig(Config):
    """A whole run. Methods differ in `curation` and `objective` alone."""

    student: Student
    data: Data
    reference: Frozen | None = None
    teacher: Frozen | None = Field(None, description="None with a distillation term: the reference teaches too")
    curation: Curation = Iid()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule
    engine: Engine = Engine()
    evaluation: Evaluation = Evaluation()
    seed: int = Field(0, ge=0, description="of weights, order of the pool and selection")
    directory: Path = Field(description="folder of the run: config, events, checkpoints, student")

    @model_validator(mode="after")
    def _models(self) -> Self:
        if self.curation.needs_reference and self.reference is None:
            raise ConfigError(
                f"curation '{self.curation.method}' reads a reference, and none is named",
                remedy="set reference=Frozen(model=...)",
                field="reference",
            )
        if self.objective.needs_teacher and self.teacher is None and self.reference is None:
            raise ConfigError(
                "a distillation term needs a teacher, and none is named",
                remedy="set teacher=Frozen(model=...), or a reference that teaches too",
                field="teacher",
            )
        return self

    @property
    def effective_teacher(self) -> Frozen | None:
        """The teacher, or the reference where no other teacher is named; None without distillation."""
        if not self.objective.needs_teacher:
            return None
        return self.teacher or self.reference
