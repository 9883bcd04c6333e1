# SPDX-License-Identifier: Apache-2.0
"""The demo's settings: one config, and the two fields in which the methods differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

import aced_sdk as aced
from aced_sdk.config import Config, Curation
from aced_sdk.errors import ConfigError

Size = Annotated[int, Field(gt=0)]
SHARE = 0.2  # 1 - f: what is trained of what is drawn

# A plain CLIP ViT, so that transformers' LLaVA can hold its picture tower.
STUDENT: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 1},
}
ZERO_SHOT = ("unseen_style_twemoji", "unseen_style_openmoji", "unseen_concept")
RETRIEVAL = ("retrieval_unseen_concept",)
QUESTIONS = ("colour", "group", "yes_no")  # scored; names are learned from a few pictures and shown as captions
CAPTIONS = 200  # names among the questions trained on


class Settings(Config):
    """Sizes of the demo. `make demo FULL=1` takes the larger ones.

    Attributes:
        directory: where runs, folders and the page go.
        seeds: one run of every method for each.
        steps: of every method; trained examples = steps * sub_batch.
        sub_batch: b; the super-batch is b / SHARE.
        num_chunks: n of the joint sampler.
        evaluate_every: steps between the points of a learning curve.
        box: size of the data box.
        apt: take the apt packages too.
        reference_steps: of the reference's two heads.
        align_steps: of the projector.
        adapt_steps: of the adapter.
        questions: held-out questions that are scored.
        processes: runs side by side, one compute thread each.
    """

    directory: Path = Path("runs/demo")
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    steps: Size = 200
    sub_batch: Size = 256
    num_chunks: Size = 16
    evaluate_every: Size = 40
    box: Literal["slice", "small", "full"] = "small"
    apt: bool = False
    reference_steps: Size = 400
    align_steps: Size = 20
    adapt_steps: Size = 130
    questions: Size = 210
    processes: Size = 2

    @property
    def tuning(self) -> Any:
        """vlm.TuneConfig of the two stages."""
        import vlm

        return vlm.TuneConfig(
            stages=(
                vlm.Align(steps=self.align_steps, batch_size=8, learning_rate=3e-3),
                vlm.Adapt(steps=self.adapt_steps, batch_size=8, learning_rate=1e-3, lora=vlm.Lora(rank=8, alpha=16)),
            ),
            engine=aced.Engine(kind="deepspeed", checkpoint_every=40),
        )


FULL = Settings(
    directory=Path("runs/demo-full"), seeds=(0, 1, 2), steps=400, evaluate_every=80, align_steps=40, adapt_steps=600
)


def methods(settings: Settings) -> dict[str, tuple[Curation, aced.Objective]]:
    """Curation and objective of every method: the two fields in which their configs differ."""
    b = settings.sub_batch
    drawn = round(b / SHARE)
    iid = aced.Iid(sub_batch=b)
    easy = aced.Joint(sub_batch=b, super_batch=drawn, num_chunks=settings.num_chunks, score="easy_reference")
    learnable = easy.replace(score="learnability")
    task = aced.Objective()
    distil = aced.Objective(distillation=(aced.Distillation(loss="softmax", weight=5.0),))
    return {
        "iid": (iid, task),
        "softmax_kd": (iid, distil),
        "i_acid": (easy, task),
        "h_acid": (learnable, task),
        "aced": (learnable, distil),
        "static": (aced.StaticFilter(sub_batch=b, keep_fraction=SHARE), task),
    }


def distil_config(
    settings: Settings, method: str, seed: int, pool: Path, reference: Path, evaluation: Path, prepared: Path
) -> aced.DistillConfig:
    """The config of one run. `trusted` is IID on the trusted pairs alone; all other methods draw from the pool.

    Raises:
        ConfigError: for a method that the demo does not know.
    """
    known = methods(settings) | {"trusted": methods(settings)["iid"]}
    if method not in known:
        raise ConfigError(
            f"the demo knows no method '{method}'", remedy=f"take one of {', '.join(known)}", field="method"
        )
    curation, objective = known[method]
    return aced.DistillConfig(
        student=aced.Student(architecture=STUDENT),
        data=aced.Data(shards=(str(pool),), prepared=prepared),
        reference=aced.Frozen(model=str(reference)),
        curation=curation,
        objective=objective,
        optimizer=aced.Optimizer(learning_rate=1e-3, weight_decay=0.05),
        schedule=aced.Schedule(steps=settings.steps, warmup=0.1),
        engine=aced.Engine(kind="deepspeed", threads=1, scoring_batch=128, checkpoint_every=50),
        evaluation=aced.Evaluation(tasks=(*ZERO_SHOT, *RETRIEVAL), data_root=evaluation, every=settings.evaluate_every),
        seed=seed,
        directory=settings.directory / "distil" / f"{method}-{seed}",
    )
