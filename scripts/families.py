"""Tries every decoder-only family of transformers, tiny, on every kind of layout against one process of plain
transformers, and writes trainer/families/tried.json, which `zeropipe families` and docs/families.md show.

usage: families.py [--steps N] [--families a,b,…] [--share K/N] [--output FILE] [--page]

What was tried before stays as it is, but for the families named; a family's earlier row is shown where it changes.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import tiny  # noqa: E402
from tests.harness import RankFailed, run_ranks  # noqa: E402
from zeropipe.data_prep.errors import UserError  # noqa: E402
from zeropipe.launcher.families_command import COLUMNS_OF_TABLE, page  # noqa: E402
from zeropipe.launcher.rehearsal.small import small_sizes  # noqa: E402
from zeropipe.trainer.plan import family_layouts  # noqa: E402
from zeropipe.trainer.plan.layout import Layout  # noqa: E402
from zeropipe.trainer.recipe.recipe import Recipe  # noqa: E402
from zeropipe.trainer.run.quiet import quiet  # noqa: E402
from zeropipe.trainer.testing.parity import Bounds, compare, plan_in  # noqa: E402

RANKS_SECONDS, FAMILY_SECONDS = 300, 1200  # a family that hangs is given up, the next one tried
TRIED = ROOT / "trainer" / "families" / "tried.json"
LAYOUTS = {
    "ZeRO-0": Layout(1, 1, zero_stage=0),
    "ZeRO-1": Layout(2, 2, zero_stage=1),
    "ZeRO-2": Layout(2, 2, zero_stage=2),
    "ZeRO-3": Layout(2, 2, zero_stage=3),
    "TP 2": Layout(2, 1, tensor=2, zero_stage=1),
    "PP 2": Layout(2, 1, pipeline=2, zero_stage=1),
    "SP 2": Layout(2, 1, sequence=2, zero_stage=2),
    "TP 2 x PP 2": Layout(4, 1, tensor=2, pipeline=2, zero_stage=1),
}
assert tuple(LAYOUTS) == COLUMNS_OF_TABLE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layouts", type=lambda text: text.split(","), default=list(LAYOUTS))
    parser.add_argument("--families", type=lambda text: text.split(","))
    parser.add_argument("--share", type=lambda text: tuple(map(int, text.split("/"))), default=(0, 1))
    parser.add_argument("--output", type=Path, default=TRIED)
    parser.add_argument("--page", action="store_true", help="only write docs/families.md from what was tried")
    args = parser.parse_args()
    if not args.page:
        quiet()
        family_layouts.outcomes = dict  # what came of it before decides nothing
        own, all_shares = args.share
        try_all((args.families or decoder_only())[own::all_shares], args.steps, args.layouts, args.output)
    if args.output == TRIED:
        (ROOT / "docs" / "families.md").write_text(page(json.loads(TRIED.read_text())), encoding="utf-8")
    return 0


def decoder_only() -> list[str]:
    """Families that `AutoModelForCausalLM` knows; those that declare a split first."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    def plain_first(name: str) -> tuple[bool, bool]:
        config = CONFIG_MAPPING[name]
        return not getattr(config, "base_model_tp_plan", None), bool(getattr(config, "base_model_ep_plan", None))

    return sorted((name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING), key=plain_first)


def try_all(names: list[str], steps: int, layouts: list[str], output: Path) -> None:
    tried = json.loads(output.read_text()) if output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        store = tiny.tiny_store(Path(folder) / "store")
        for name in names:
            started, before = time.monotonic(), tried.get(name)
            found = cells(name, store, steps, layouts)
            tried[name] = {"steps": steps, "transformers": version("transformers"), "cells": found}
            if before is not None and before["cells"] != tried[name]["cells"]:
                print(f"   before: {summary(before['cells'])}")
            print(f"{name}: {summary(tried[name]['cells'])} ({time.monotonic() - started:.0f} s)", flush=True)
            output.write_text(json.dumps(dict(sorted(tried.items())), indent=1) + "\n")


def summary(found: dict[str, Any]) -> str:
    return ", ".join(f"{layout} {next(iter(cell))}" for layout, cell in found.items())


def cells(name: str, store: Path, steps: int, layouts: list[str]) -> dict[str, Any]:
    """What came of every layout: the differences of one that works, or why it was refused, differs or fails."""
    found: dict[str, Any] = {}
    try:
        with at_most(FAMILY_SECONDS):
            model = {"config": {"model_type": name, **small_sizes(name)}}
            section = tiny.tiny_recipe(store, store.parent / "run")
            recipe = Recipe.model_validate({**section, "model": model, "duration": {"steps": steps}})
            [truth] = on_ranks(1, truth_of, plan_in(recipe, tiny.tiny_json(), LAYOUTS["ZeRO-0"], steps))
            for layout in layouts:
                found[layout] = cell(recipe, LAYOUTS[layout], steps, truth)
    except Exception as error:
        return {layout: {"fails": said(error)} for layout in layouts} | found
    return found


def cell(recipe: Recipe, sizes: Layout, steps: int, truth: Any) -> dict[str, Any]:
    """What came of one layout."""
    try:
        plan = plan_in(recipe, tiny.tiny_json(), sizes, steps)
    except UserError as error:
        return {"refused": said(error)}
    try:
        verdict = compare(plan, on_ranks(sizes.world, curve_of, plan)[0], truth, Bounds())
    except RankFailed as error:
        return {"fails": said(error)}
    if verdict.difference is not None:
        return {"differs": verdict.difference}
    return {"works": {"loss": f"{verdict.loss:.1e}", "norm": f"{verdict.norm:.1e}"}}


def on_ranks(world: int, function: Callable[..., Any], plan: Any) -> list[Any]:
    """What ranks return; once more, where somebody else has killed one."""
    try:
        return run_ranks(world, function, plan, timeout=RANKS_SECONDS)
    except RankFailed as error:
        if "died without a word" not in str(error):
            raise
    return run_ranks(world, function, plan, timeout=RANKS_SECONDS)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises TimeoutError where what it holds takes longer."""

    def over(*_: Any) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1][:240].replace(tempfile.gettempdir(), "TMP")


def truth_of(plan: Any) -> Any:
    from zeropipe.trainer.testing.curves import one_process

    return one_process(plan)


def curve_of(plan: Any) -> Any:
    from zeropipe.trainer.testing.curves import of_layout

    return of_layout(plan)


if __name__ == "__main__":
    # ranks import their functions by name, which `__main__` is none of
    import families

    sys.exit(families.main())
