"""The verb `families`: which model families train on which layouts, as `scripts/families.py` found it."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..data_prep.errors import UserError, did_you_mean
from ..trainer.commands.arguments import add_verb
from ..trainer.families.tried import outcomes

GATE_STEPS = 20  # of the parity gate
CHECKS = ("logits", "saved")  # of one process; of a run that changes its layout and is exported
COLUMNS_OF_TABLE = ("ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "TP 2", "PP 2", "SP 2", "EP 2", "TP 2 x PP 2", *CHECKS)

_DESCRIPTION = """\
Lists the model families of transformers and the layouts that follow one process of plain transformers: every loss
within 1e-6, every gradient norm within 1e-5, tiny models in fp32. With a family named, why each layout works or not.

A family that is not listed, or newer than the list, may work all the same: `zeropipe parity` tells.
"""
_MARKS = {
    "works": "yes",
    "refused": "no",
    "differs": "DIFFERS",
    "fails": "fails",
    "sensitive": "unsure",
    "untried": "-",
}


def register(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(verbs, "families", run, "list the model families and the layouts they train on", _DESCRIPTION)
    parser.add_argument("family", nargs="?", help="a model_type of transformers")


def run(args: argparse.Namespace) -> int:
    tried = outcomes()
    if args.family is None:
        print(f"{'family':<28}" + "".join(f"{layout:>13}" for layout in COLUMNS_OF_TABLE))
        for name, found in tried.items():
            print(f"{name:<28}" + "".join(f"{_MARKS[_outcome(found, layout)]:>13}" for layout in COLUMNS_OF_TABLE))
        print(_counts(tried))
        return 0
    if args.family not in tried:
        hint = did_you_mean(args.family, tried) or "; `zeropipe families` lists them"
        raise UserError(f"families: {args.family!r} has not been tried{hint}")
    for layout, cell in tried[args.family]["cells"].items():
        print(f"{layout:<13}{_in_words(cell)}")
    return 0


def page(tried: Mapping[str, Any]) -> str:
    """docs/families.md."""
    head = " | ".join(COLUMNS_OF_TABLE)
    lines = [
        "# Model families",
        "",
        "Written by `scripts/families.py`, nothing by hand: families that `AutoModelForCausalLM` knows, tiny, in fp32,",
        "on every kind of layout against one process of plain transformers. A number is the largest relative",
        "difference of a loss from that of the one process; why a layout is refused, differs or fails stands below.",
        "logits: of our model and transformers', the same weights, relative to the largest. saved: a run saved under",
        "ZeRO-3, gone on with in the widest layout that works, exported, and read again by `from_pretrained`, bitwise.",
        "unsure: plain transformers is as far from itself when its weights are moved by rounding.",
        "",
        f"{_counts(tried)}",
        "",
        f"| family | steps | {head} |",
        "|---" * (len(COLUMNS_OF_TABLE) + 2) + "|",
    ]
    for name, found in tried.items():
        shown = " | ".join(_cell(found["cells"].get(layout, {"untried": None})) for layout in COLUMNS_OF_TABLE)
        lines.append(f"| {name} | {found['steps']} | {shown} |")
    lines += ["", "## Why not", ""]
    for name, found in tried.items():
        reasons: dict[str, list[str]] = {}
        for layout in COLUMNS_OF_TABLE:
            if _outcome(found, layout) not in ("works", "untried"):
                reasons.setdefault(_in_words(found["cells"][layout]), []).append(layout)
        lines += [f"- {name}, {', '.join(layouts)}: {reason}" for reason, layouts in reasons.items()]
    return "\n".join(lines) + "\n"


def _outcome(found: Mapping[str, Any], layout: str) -> str:
    return next(iter(found["cells"].get(layout, {"untried": None})))


def _cell(cell: Mapping[str, Any]) -> str:
    return next(iter(cell["works"].values())) if "works" in cell else _MARKS[next(iter(cell))]


def _in_words(cell: Mapping[str, Any]) -> str:
    [(outcome, more)] = cell.items()
    if outcome != "works":
        return f"{outcome}: {more}"
    return "works: " + ", ".join(f"{what} {'' if far == 'bitwise' else 'within '}{far}" for what, far in more.items())


def _counts(tried: Mapping[str, Any]) -> str:
    """How many families work on what: all of them, then those that were tried for `GATE_STEPS` steps."""
    long = {name: found for name, found in tried.items() if found["steps"] >= GATE_STEPS}
    whole, gated = _counted(tried), _counted(long)
    return f"Of {len(tried)} families, {whole}. Of these, {len(long)} were tried for {GATE_STEPS} steps: {gated}."


def _counted(tried: Mapping[str, Any]) -> str:
    works = Counter(
        layout for found in tried.values() for layout in COLUMNS_OF_TABLE if _outcome(found, layout) == "works"
    )
    every = sum(all(_outcome(found, f"ZeRO-{stage}") == "works" for stage in range(4)) for found in tried.values())
    return f"{every} work on every ZeRO stage; " + ", ".join(f"{col} {works[col]}" for col in COLUMNS_OF_TABLE[4:])
