"""Writes the table of trials as a page of matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tests.distributed.legality_table import Combination, Table

CELLS = {"works": "yes", "raises": "raises", "differs": "**wrong**", "ignored": "ignored", "hangs": "hangs"}
AXES = ("pipeline", "data", "sequence", "tensor")
STAGES = range(4)


def page(table: Table) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in table.made_with.items())
    bounds = "; ".join(
        f"{precision}: " + ", ".join(f"{quantity} {bound:g}" for quantity, bound in by_quantity.items())
        for precision, by_quantity in table.bounds.items()
    )
    lines = [
        "# What combines",
        "",
        f"Written by `scripts/legality.py` from {len(table.trials)} trials on CPUs with {versions}; not by hand.",
        "Each trial trained three steps of a tiny GPT-2 on 1, 2 or 4 gloo ranks, with active clipping unless said",
        "otherwise, and compared losses, gradient norms and weights with one process of plain transformers and torch.",
        "`zeropipe plan` accepts what says yes and refuses the rest, by rules (a test holds them against this table,",
        "`tests/distributed/legality.json`).",
        "",
        f"Largest relative differences that count as the same: {bounds}.",
        "",
        "- **yes**: trains, within these bounds",
        "- **wrong**: trains without a word, and away from the truth",
        "- **ignored**: trains right, but something that was asked for is left out without a word",
        "- **raises**, **hangs**: does not train",
        "",
        "A split over more than two ranks counts as one over two here. Pipelines run ZeRO-0 as ZeRO-1 (see the end).",
        "fp16 was not tried: DeepSpeed does not compute in it on CPUs. Splits along three axes were not tried here.",
        "",
        "## Precision and ZeRO stage",
        "",
        *_matrix(table, [(p, {"precision": p}) for p in ("fp32", "bf16", "bf16_autocast")]),
        "",
        "## Offload to the CPU, fp32",
        "",
        *_matrix(table, [(o, {"offload": o}) for o in ("optimizer", "optimizer and parameters")]),
        "",
        "## Without clipping; with activation checkpointing",
        "",
        *_exceptions(table),
        "",
        "## What does not work, and why",
        "",
        *_reasons(table),
        "",
        "## Plain DeepSpeed, beside what plans use",
        "",
        "Tensor parallelism is our own (AutoTP below is DeepSpeed's; its loss alone is compared). In a pipeline our",
        "engine tells DeepSpeed stage 1 where the JSON says 0. On CPUs overlap_comm overlaps nothing, so its yes says",
        "little, and plans refuse it with a pipeline.",
        "",
        "| | outcome | |",
        "|---|---|---|",
        *(f"| {trial.name} | {CELLS[trial.outcome]} | {_cell(trial.detail)} |" for trial in table.plain),
    ]
    return "\n".join(lines) + "\n"


def _splits(table: Table) -> list[dict[str, int]]:
    found = []
    for combination in table.trials:
        split = {axis: getattr(combination, axis) for axis in AXES if getattr(combination, axis) > 1}
        if split not in found:
            found.append(split)
    return found


def _named(split: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in split.items()) or "one rank"


def _matrix(table: Table, kinds: Sequence[tuple[str, dict]]) -> Iterator[str]:
    """A row for each split, a column for each stage of each kind."""
    yield "| | " + " | ".join(f"{name} ZeRO-{stage}" for name, _ in kinds for stage in STAGES) + " |"
    yield "|---" * (1 + len(kinds) * len(STAGES)) + "|"
    for split in _splits(table):
        cells = []
        for _, settings in kinds:
            for stage in STAGES:
                trial = table.trials.get(Combination(**split, stage=stage, **settings))
                cells.append(CELLS[trial.outcome] if trial else "")
        yield f"| {_named(split)} | " + " | ".join(cells) + " |"


def _exceptions(table: Table) -> Iterator[str]:
    """Whether either changes an outcome."""
    for setting, name in (({"clipping": False}, "Without clipping"), ({"checkpointing": True}, "With checkpointing")):
        tried = [c for c in table.trials if all(getattr(c, key) == value for key, value in setting.items())]
        usual = {"clipping": True, "checkpointing": False}
        others = [c for c in tried if table.trials[c].outcome != table.trials[_with(c, **usual)].outcome]
        listed = "; ".join(f"{c}: {CELLS[table.trials[c].outcome]}" for c in others)
        yield f"- {name}, {len(tried)} trials: " + (listed or "the same outcomes as above.")


def _with(combination: Combination, **changes: bool) -> Combination:
    from dataclasses import replace

    return replace(combination, **changes)  # type: ignore[arg-type]


def _reasons(table: Table) -> Iterator[str]:
    """Every distinct reason, with the number of trials and the first of them."""
    yield "| outcome | trials | such as | |"
    yield "|---|---|---|---|"
    groups: dict[tuple[str, str], list[tuple[Combination, str]]] = {}
    for combination, trial in table.trials.items():
        if trial.outcome == "works":
            continue
        key = combination.precision + " " + str(combination.stage) if trial.outcome == "differs" else trial.detail
        groups.setdefault((trial.outcome, key), []).append((combination, trial.detail))
    for (outcome, _), members in groups.items():
        yield f"| {CELLS[outcome]} | {len(members)} | {members[0][0]} | {_cell(members[0][1])} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
