"""Tries every decoder-only family of transformers, tiny, on every kind of layout against one process of plain
transformers, and writes trainer/families/tried.json, which `zeropipe families` and docs/families.md show.

usage: families.py [--steps N] [--columns a,b,…] [--families a,b,…] [--share K/N] [--output FILE] [--page]

What was tried before stays as it is, but for the families and columns named; an earlier row is shown where it changes.
Ends with 1 if something that worked before does not any more.
Beside the layouts, the logits of our model and of transformers' are compared on one process, and a run is saved under
ZeRO-3, gone on with in the widest layout that works, exported and read by plain transformers.
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
from zeropipe.launcher.families_command import CHECKS, COLUMNS_OF_TABLE, page  # noqa: E402
from zeropipe.launcher.rehearsal.small import small_sizes  # noqa: E402
from zeropipe.trainer.checkpoint.reader import Checkpoint  # noqa: E402
from zeropipe.trainer.export.huggingface import export  # noqa: E402
from zeropipe.trainer.plan import family_layouts  # noqa: E402
from zeropipe.trainer.plan.layout import Layout  # noqa: E402
from zeropipe.trainer.recipe.recipe import Recipe  # noqa: E402
from zeropipe.trainer.run.quiet import quiet  # noqa: E402
from zeropipe.trainer.testing.parity import Bounds, compare, plan_in  # noqa: E402

# what small models of some families need said beside their sizes
OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8},  # that of its rotary part
    # what a block puts out is normed: of weights this small, with hardly a signal in them, that makes much of rounding
    "olmo2": {"initializer_range": 0.1},
}
RANKS_SECONDS, FAMILY_SECONDS = 600, 1800  # a family that hangs is given up, the next one tried
TRIED = ROOT / "trainer" / "families" / "tried.json"
LAYOUTS = {
    "ZeRO-0": Layout(1, 1, zero_stage=0),
    "ZeRO-1": Layout(2, 2, zero_stage=1),
    "ZeRO-2": Layout(2, 2, zero_stage=2),
    "ZeRO-3": Layout(2, 2, zero_stage=3),
    "TP 2": Layout(2, 1, tensor=2, zero_stage=1),
    "PP 2": Layout(2, 1, pipeline=2, zero_stage=1),
    "SP 2": Layout(2, 1, sequence=2, zero_stage=2),
    "EP 2": Layout(2, 2, zero_stage=3, expert=2),
    "TP 2 x PP 2": Layout(4, 1, tensor=2, pipeline=2, zero_stage=1),
}
LOGITS, SAVED = CHECKS
assert (*LAYOUTS, *CHECKS) == COLUMNS_OF_TABLE
WIDEST = ("TP 2 x PP 2", "TP 2", "PP 2", "SP 2", "ZeRO-1")  # which a run goes on in, that was saved under ZeRO-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--columns", type=lambda text: text.split(","), default=list(COLUMNS_OF_TABLE))
    parser.add_argument("--families", type=lambda text: text.split(","))
    parser.add_argument("--share", type=lambda text: tuple(map(int, text.split("/"))), default=(0, 1))
    parser.add_argument("--output", type=Path, default=TRIED)
    parser.add_argument("--page", action="store_true", help="only write docs/families.md from what was tried")
    args = parser.parse_args()
    lost: list[str] = []
    if not args.page:
        quiet()
        family_layouts.outcomes = dict  # what came of it before decides nothing
        own, all_shares = args.share
        lost = try_all((args.families or decoder_only())[own::all_shares], args.steps, args.columns, args.output)
    if args.output == TRIED:
        (ROOT / "docs" / "families.md").write_text(page(json.loads(TRIED.read_text())), encoding="utf-8")
    if lost:
        print(f"worked before and does not any more: {', '.join(lost)}")
    return int(bool(lost))


def decoder_only() -> list[str]:
    """Families that `AutoModelForCausalLM` knows; those that declare a split first."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    def plain_first(name: str) -> tuple[bool, bool]:
        config = CONFIG_MAPPING[name]
        return not getattr(config, "base_model_tp_plan", None), bool(getattr(config, "base_model_ep_plan", None))

    return sorted((name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING), key=plain_first)


def try_all(names: list[str], steps: int, columns: list[str], output: Path) -> list[str]:
    """Tries the families one by one; returns the cells that worked before and do not any more."""
    tried, lost = json.loads(output.read_text()) if output.exists() else {}, []
    with tempfile.TemporaryDirectory() as folder:
        store = tiny.tiny_store(Path(folder) / "store")
        for name in names:
            started, before = time.monotonic(), tried.get(name, {"steps": steps, "cells": {}})
            found = before["cells"] | cells(name, store, steps, columns, before["cells"])
            steps_of = steps if set(columns) & set(LAYOUTS) else before["steps"]
            tried[name] = {"steps": steps_of, "transformers": version("transformers"), "cells": found}
            lost += [f"{name} {c}" for c, was in before["cells"].items() if "works" in was and "works" not in found[c]]
            if before["cells"] and before["cells"] != found:
                print(f"   before: {summary(before['cells'])}")
            print(f"{name}: {summary(tried[name]['cells'])} ({time.monotonic() - started:.0f} s)", flush=True)
            output.write_text(json.dumps(dict(sorted(tried.items())), indent=1) + "\n")
    return lost


def summary(found: dict[str, Any]) -> str:
    return ", ".join(f"{layout} {next(iter(cell))}" for layout, cell in found.items())


def cells(name: str, store: Path, steps: int, columns: list[str], known: dict[str, Any]) -> dict[str, Any]:
    """What came of every layout and check: the differences of what works, or why it was refused, differs or fails; or
    that small models of the family make so much of rounding that nothing can be told.

    Args:
        known: what came of the columns that were tried before.
    """
    found: dict[str, Any] = {}
    try:
        with at_most(FAMILY_SECONDS):
            model = {"config": {"model_type": name, **small_sizes(name), **OWN.get(name, {})}}
            section = {**tiny.tiny_recipe(store, store.parent / "run"), "model": model, "duration": {"steps": steps}}
            recipe = Recipe.model_validate(section)
            try:
                plan = plan_in(recipe, tiny.tiny_json(), LAYOUTS["ZeRO-0"], steps)
            except UserError as error:
                return {column: {"refused": said(error)} for column in columns}
            truth = on_ranks(1, truth_of, plan)[0] if set(columns) & set(LAYOUTS) else None
            for column in columns:
                if column in LAYOUTS:
                    found[column] = cell(recipe, LAYOUTS[column], steps, truth)
            if LOGITS in columns:
                found[LOGITS] = logits(plan)
            if SAVED in columns:
                found[SAVED] = saved_and_exported(section, known | found)
    except Exception as error:
        return {column: {"fails": said(error)} for column in columns} | found
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
        floor = compare(plan, on_ranks(1, nudged_truth_of, plan)[0], truth, Bounds())
        if floor.difference is None:
            return {"differs": verdict.difference}
        return {
            "sensitive": f"loss within {verdict.loss:.1e}, norm within {verdict.norm:.1e}; of plain transformers with "
            f"weights moved by rounding {floor.loss:.1e} and {floor.norm:.1e}"
        }
    return {"works": {"loss": f"{verdict.loss:.1e}", "norm": f"{verdict.norm:.1e}"}}


def logits(plan: Any) -> dict[str, Any]:
    """Those of our model against plain transformers', with the same weights, relative to the largest."""
    try:
        [apart] = on_ranks(1, logits_apart, plan)
    except RankFailed as error:
        return {"fails": said(error)}
    if not apart <= 1e-6:
        return {"differs": f"logits are {apart:.1e} of the largest apart"}
    return {"works": {"logits": f"{apart:.1e}" if apart else "bitwise"}}


def saved_and_exported(section: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Saved under ZeRO-3, gone on with in the widest layout that works, exported, and read by plain transformers."""
    from transformers import AutoModelForCausalLM

    widest = next((layout for layout in WIDEST if "works" in known.get(layout, {})), None)
    if widest is None:
        return {"refused": "no layout to go on in works"}
    with tempfile.TemporaryDirectory() as folder:
        run = {**section, "output": f"{folder}/run", "save": {"every": 2}}
        try:
            for step, layout in ((2, LAYOUTS["ZeRO-3"]), (4, LAYOUTS[widest])):
                parallel = {
                    "tensor_parallel": {"autotp_size": layout.tensor},
                    "sequence_parallel_size": layout.sequence,
                }
                settings = tiny.tiny_json(f"zero{layout.zero_stage}", **parallel)
                recipe = {**run, "duration": {"steps": step}, "parallel": {"pipeline": layout.pipeline}}
                on_ranks(layout.world, tiny._train, recipe, settings)
            done = export(Path(folder) / "run")
        except (RankFailed, UserError) as error:
            return {"fails": said(error)}
        model, checkpoint = AutoModelForCausalLM.from_pretrained(done.folder), Checkpoint.open(Path(folder) / "run")
        unlike = [key for key, weight in model.named_parameters() if not weight.equal(checkpoint.read(key))]
    if unlike or done.step != 4:
        return {"differs": f"step {done.step}: {', '.join(unlike)} is not what was saved"}
    return {"works": {f"ZeRO-3 then {widest}": "bitwise"}}


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ranks return; once more, where somebody else has killed one."""
    try:
        return run_ranks(world, function, *arguments, timeout=RANKS_SECONDS)
    except RankFailed as error:
        if "died without a word" not in str(error):
            raise
    return run_ranks(world, function, *arguments, timeout=RANKS_SECONDS)


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


def nudged_truth_of(plan: Any) -> Any:
    """What plain transformers makes of weights moved by a few units in the last place: no layout can be nearer."""
    import torch

    from zeropipe.trainer.testing import curves

    plain_model = curves.plain_model

    def nudged(plan: Any) -> Any:
        model, generator = plain_model(plan), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 3e-7 * torch.randn(parameter.shape, generator=generator))
        return model

    curves.plain_model = nudged
    return curves.one_process(plan)


def curve_of(plan: Any) -> Any:
    from zeropipe.trainer.testing.curves import of_layout

    return of_layout(plan)


def logits_apart(plan: Any) -> float:
    import torch

    from zeropipe.trainer.adapters.merged import initial_values
    from zeropipe.trainer.modeling.build import build_model
    from zeropipe.trainer.ranks.ranks import Ranks
    from zeropipe.trainer.testing.curves import plain_model

    ids = torch.arange(64).view(2, 32) * 7 % plan.model_config["vocab_size"]
    values, seed = initial_values(plan.recipe.model.init), plan.recipe.seed
    ours = build_model(plan.model_config, values, seed, torch.float32, Ranks())
    theirs = plain_model(plan)
    with torch.no_grad():
        one, other = (model.eval()(input_ids=ids, use_cache=False).logits for model in (ours, theirs))
    return float((one[..., : other.shape[-1]] - other).abs().max() / other.abs().max())


if __name__ == "__main__":
    # ranks import their functions by name, which `__main__` is none of
    import families

    sys.exit(families.main())
