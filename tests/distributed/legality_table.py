"""What DeepSpeed did with every small combination when it was tried. `scripts/legality.py` made the table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from zeropipe.trainer.plan.layout import Layout

TABLE = Path(__file__).with_name("legality.json")
OFFLOADS = ("none", "optimizer", "optimizer and parameters")

# works: equals one process within the table's bounds. differs: trains, and silently wrong. ignored: trains right, but
# something that was asked for is silently left out
Outcome = Literal["works", "raises", "differs", "ignored", "hangs"]


@dataclass(frozen=True)
class Combination:
    """One way to lay out and compute a step. Sizes above one count as two: whether there is a split is what matters."""

    data: int = 1
    tensor: int = 1
    sequence: int = 1
    pipeline: int = 1
    stage: int = 0
    precision: str = "fp32"
    offload: str = "none"
    clipping: bool = True
    checkpointing: bool = False

    @classmethod
    def of(cls, layout: Layout, precision: str, clipping: bool, checkpointing: bool) -> Combination:
        """The combination that a plan is an instance of."""
        sizes = {axis: min(2, getattr(layout, axis)) for axis in ("data", "tensor", "sequence", "pipeline")}
        offload = OFFLOADS[layout.offload_optimizer + layout.offload_param]
        return cls(**sizes, stage=layout.zero_stage, precision=precision, offload=offload,
                   clipping=clipping, checkpointing=checkpointing)  # fmt: skip

    @property
    def usual(self) -> Combination:
        """The same with clipping and without activation checkpointing, which changed no outcome."""
        return replace(self, clipping=True, checkpointing=False)

    @property
    def world(self) -> int:
        return self.data * self.tensor * self.sequence * self.pipeline

    @property
    def layout(self) -> Layout:
        return Layout(
            world=self.world,
            data=self.data,
            tensor=self.tensor,
            sequence=self.sequence,
            pipeline=self.pipeline,
            zero_stage=self.stage,
            offload_optimizer=self.offload != "none",
            offload_param="parameters" in self.offload,
        )

    @property
    def sections(self) -> dict[str, Any]:
        """The part of a DeepSpeed JSON that asks for it."""
        zero: dict[str, Any] = {"stage": self.stage}
        if self.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu"}
        if "parameters" in self.offload:
            zero["offload_param"] = {"device": "cpu"}
        sections: dict[str, Any] = {"zero_optimization": zero}
        if self.precision == "bf16_autocast":
            sections["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        elif self.precision != "fp32":
            sections[self.precision] = {"enabled": True}
        if not self.clipping:
            sections["gradient_clipping"] = 0.0
        if self.checkpointing:
            sections["activation_checkpointing"] = {}
        return sections

    def __str__(self) -> str:
        extras = [] if self.offload == "none" else [f"{self.offload} on CPU"]
        extras += [] if self.clipping else ["no clipping"]
        extras += ["activation checkpointing"] if self.checkpointing else []
        axes = ("pipeline", "data", "sequence", "tensor")
        split = " x ".join(f"{axis} {getattr(self, axis)}" for axis in axes if getattr(self, axis) > 1)
        return ", ".join([split or "one rank", f"ZeRO-{self.stage}", self.precision, *extras])


@dataclass(frozen=True)
class Trial:
    """What came of one combination: an outcome, and the largest relative differences or the first line of the error."""

    combination: Combination
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class Plain:
    """What came of something that DeepSpeed offers and our engines do not use, in words."""

    name: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class Table:
    made_with: Mapping[str, str]
    bounds: Mapping[str, Mapping[str, float]]  # of loss, gradient norm and weights, by precision
    trials: Mapping[Combination, Trial]
    plain: Sequence[Plain]

    def write(self, path: Path = TABLE) -> None:
        """One trial a line, without what has its default."""
        defaults = asdict(Combination())

        def changed(combination: Combination) -> dict[str, Any]:
            return {key: value for key, value in asdict(combination).items() if value != defaults[key]}

        rows = [[changed(trial.combination), trial.outcome, trial.detail] for trial in self.trials.values()]
        plain = [[trial.name, trial.outcome, trial.detail] for trial in self.plain]
        head = json.dumps({"made_with": self.made_with, "bounds": self.bounds}, indent=1)[:-2]
        bodies = [",\n".join("  " + json.dumps(row) for row in part) for part in (rows, plain)]
        text = f'{head},\n "trials": [\n{bodies[0]}\n ],\n "plain": [\n{bodies[1]}\n ]\n}}\n'
        path.write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, path: Path = TABLE) -> Table:
        stored = json.loads(path.read_text(encoding="utf-8"))
        trials = [Trial(Combination(**changed), outcome, detail) for changed, outcome, detail in stored["trials"]]
        plain = [Plain(*row) for row in stored["plain"]]
        return cls(stored["made_with"], stored["bounds"], {trial.combination: trial for trial in trials}, plain)


@cache
def known_table() -> Table:
    return Table.read()


def nearest_working(wanted: Combination, table: Table, most: int = 3) -> list[str]:
    """What to change of `wanted`, at the fewest places, to come to combinations that work."""
    ways = []
    for found, trial in table.trials.items():
        if trial.outcome == "works":
            pairs = ((field.name, getattr(found, field.name)) for field in fields(found))
            ways.append([f"{name} {value}" for name, value in pairs if value != getattr(wanted, name)])
    fewest = min(map(len, ways), default=0)
    return [", ".join(way) for way in ways if len(way) == fewest][:most]
