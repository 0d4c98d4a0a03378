"""Trains the engine that a recipe and a JSON would get, on the batches of `reference`, on any layout."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from tests.distributed import reference
from tests.distributed.reference import BATCH, Curve, micro_batch
from zeropipe.trainer.data.batches import Batch, StepBatch
from zeropipe.trainer.engine.build import build_engine
from zeropipe.trainer.optim.adamw import ADAMW
from zeropipe.trainer.plan.layout import Layout
from zeropipe.trainer.plan.plan import Plan
from zeropipe.trainer.plan.settings import read_settings
from zeropipe.trainer.ranks.ranks import Ranks, init_distributed
from zeropipe.trainer.recipe.recipe import Recipe
from zeropipe.trainer.testing.curves import whole_weights

STEPS = 4


class Stream:
    """Stands in for BatchStream: this rank's micro batches of one global batch after the other."""

    def __init__(self, config: dict, ranks: Ranks, accumulation: int):
        self.config, self.ranks, self.accumulation, self.samples_consumed = config, ranks, accumulation, 0

    def ahead(self) -> StepBatch:
        place, first = (self.ranks.data, self.ranks.data_size), self.samples_consumed
        step = first // BATCH
        micro = [micro_batch(self.config, step, *place, m, self.accumulation) for m in range(self.accumulation)]
        return StepBatch(tuple(Batch(*tensors) for tensors in micro), first, first + BATCH, 0)

    def next_step(self) -> StepBatch:
        step = self.ahead()
        self.samples_consumed = step.stop
        return step


def recipe_for(config: dict, pipeline: int = 1, partition: str = "parameters", compile: str = "none") -> Recipe:
    return Recipe.model_validate(
        {
            "name": "parity",
            "model": {"config": config},
            "data": {"train": [{"store": "none"}], "seq_len": reference.TIME},
            "compile": compile,
            "parallel": {"pipeline": pipeline, "partition": partition},
            "duration": {"steps": STEPS},
            "optimizer": {"lr": reference.LR, "betas": list(reference.BETAS), "weight_decay": reference.DECAY},
            "schedule": {"type": "constant", "warmup": 0},
        }
    )


def plan_for(config: dict, recipe: Recipe, layout: Layout, accumulation: int = 2, **ds: Any) -> Plan:
    micro = BATCH // (layout.data * accumulation)
    resolved = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": reference.CLIP,
        "optimizer": {
            "type": "AdamW",
            "params": {**recipe.optimizer.model_dump(include=set(ADAMW.keys)), "torch_adam": True},
        },
        "zero_optimization": {"stage": layout.zero_stage},
        "tensor_parallel": {"autotp_size": layout.tensor},
        "sequence_parallel_size": layout.sequence,
        **ds,
    }
    known = {
        "recipe": recipe,
        "layout": layout,
        "micro_batch": micro,
        "accumulation": accumulation,
        "global_batch": BATCH,
        "seq_len": reference.TIME,
        "vocab_size": config["vocab_size"],
        "model_config": config,
        "total_steps": STEPS,
        "warmup_steps": 0,
        "decay_steps": 0,
        "settings": read_settings(resolved),
    }
    # the rest of a plan (data, memory) plays no part in training
    return Plan(**{field.name: known.get(field.name) for field in fields(Plan)})  # type: ignore[arg-type]


def start(
    config: dict,
    layout: Layout,
    partition: str = "parameters",
    accumulation: int = 2,
    compile: str = "none",
    **ds: Any,
):
    ranks = init_distributed(layout.tensor, layout.sequence, layout.pipeline)
    recipe = recipe_for(config, layout.pipeline, partition, compile)
    plan = plan_for(config, recipe, layout, accumulation, **ds)
    return build_engine(plan, ranks, reference.values)


def train(config: dict, layout: Layout, partition: str = "parameters", accumulation: int = 2, **options: Any) -> Curve:
    engine = start(config, layout, partition, accumulation, **options)
    stream, curve = Stream(config, engine.ranks, accumulation), Curve()
    for step in range(STEPS):
        output = engine.train_step(stream, step)
        curve.losses.append(output.loss)
        curve.norms.append(output.grad_norm)
    curve.weights, torn = whole_weights(engine)
    assert not torn, f"ranks hold unlike copies of {torn}"
    return curve
