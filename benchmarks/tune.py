"""What `zeropipe tune` predicts, against runs that others have published and steps that are measured here.

    python benchmarks/tune.py [--families gpt2 llama] [--seconds 220] [--results FILE] [--published]

Here: every legal layout of 1, 2 and 4 ranks of this machine (data, tensor, sequence, pipeline, each ZeRO stage; no
offload, which on a CPU goes nowhere), the smallest and the largest micro batch, with and without checkpointing, in
fp32; the median of three steps after one. In an order drawn by lot, until the time is up; with --results, a later run
goes on with what is missing. The machine's record is measured in the same run. Spearman's rank correlation says
whether tune would choose well.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import published_runs

from tests import tiny
from zeropipe.trainer.recipe.recipe import Recipe
from zeropipe.trainer.tune.hardware import Device, Link
from zeropipe.trainer.tune.machine import measure_machine
from zeropipe.trainer.tune.measure import measure_candidate
from zeropipe.trainer.tune.search import Candidate, search

VOCAB, TIME, SEQUENCES = 2048, 128, 8
WORLDS = (1, 2, 4)
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {**tiny.GPT2, **tiny.NO_DROPOUT, "n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": TIME},
    "llama": {
        **tiny.LLAMA,
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": TIME,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seconds", type=float, default=220, help="for each family")
    parser.add_argument("--results", type=Path, help="a JSON file of what was measured before; it is added to")
    parser.add_argument("--published", action="store_true", help="compare with published runs alone")
    arguments = parser.parse_args()
    print(__doc__)
    print("\n".join(published_runs.lines()))
    if arguments.published:
        return
    with tempfile.TemporaryDirectory() as folder:
        store = tiny.tiny_store(Path(folder) / "store", documents=1000, vocab=VOCAB)
        for family in arguments.families:
            here(family, store, arguments.seconds, arguments.results)


def here(family: str, store: Path, seconds: float, results: Path | None) -> None:
    """Measures the layouts of a family and compares."""
    deadline = time.monotonic() + seconds
    known: dict[str, Any] = json.loads(results.read_text()) if results and results.exists() else {}
    devices = {world: machine(known, world) for world in WORLDS}
    recipe = recipe_of(family, store)
    candidates = [one for world in WORLDS for one in chosen(recipe, world, devices[world])]
    steps: dict[str, float] = known.setdefault(family, {})
    missing = [one for one in candidates if name_of(one) not in steps]
    random.Random(1).shuffle(missing)
    for one in missing:
        if time.monotonic() > deadline:
            break
        seconds = measure_candidate(recipe, one)
        if isinstance(seconds, str):
            print(f"{name_of(one)}: {seconds}", flush=True)
            continue
        steps[name_of(one)] = seconds
        if results:
            results.write_text(json.dumps(known, indent=1))
    compare(family, [one for one in candidates if name_of(one) in steps], steps, len(candidates))


def compare(family: str, tried: Sequence[Candidate], steps: dict[str, float], legal: int) -> None:
    print(f"\n{family}: {len(tried)} of {legal} legal ones measured")
    print(f"{'layout':<76} {'measured s':>10} {'predicted s':>11} {'ratio':>6}")
    for one in sorted(tried, key=lambda one: steps[name_of(one)]):
        found, said = steps[name_of(one)], one.cost.seconds
        print(f"{name_of(one):<76} {found:>10.3f} {said:>11.3f} {said / found:>6.2f}")
    for world in (*WORLDS, None):
        own = [one for one in tried if world in (None, one.layout.world)]
        if len(own) > 2:
            rank = spearman([one.cost.seconds for one in own], [steps[name_of(one)] for one in own])
            print(f"{family}, {f'{world} ranks' if world else 'all'}: {len(own)} layouts, rank correlation {rank:.3f}")


def name_of(one: Candidate) -> str:
    return f"{one.layout.world}: {one}"


def chosen(recipe: Recipe, world: int, device: Device) -> list[Candidate]:
    """All legal ones without offload, of the smallest and largest micro batch."""
    found = search(recipe, tiny.tiny_json("zero1"), world, device).candidates
    kept = [one for one in found if not one.layout.offload_optimizer]
    sizes: dict[Any, list[int]] = {}
    for one in kept:
        sizes.setdefault(one.layout, []).append(one.micro_batch)
    return [one for one in kept if one.micro_batch in (min(sizes[one.layout]), max(sizes[one.layout]))]


def recipe_of(family: str, store: Path) -> Recipe:
    return Recipe.model_validate(
        tiny.tiny_recipe(
            store,
            store.parent / "run",
            model={"config": MODELS[family]},
            data={"seq_len": TIME},
            batch={"global": SEQUENCES},
            duration={"steps": 8},
        )
    )


def machine(known: dict[str, Any], world: int) -> Device:
    """The machine's record, measured once for all runs that share their results."""
    stored = known.setdefault("machine", {}).get(str(world))
    if stored is None:
        device = measure_machine(world)
        links = {name: vars(getattr(device, name)) for name in ("near", "far", "host")}
        known["machine"][str(world)] = {**vars(device), **links}
        return device
    return Device(**{key: Link(**value) if key in ("near", "far", "host") else value for key, value in stored.items()})


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Pearson's correlation of the ranks; equal values share the mean of theirs."""
    import numpy as np

    return float(np.corrcoef(ranked(one), ranked(other))[0, 1])


def ranked(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    places: dict[float, list[int]] = {}
    for place, value in enumerate(ordered):
        places.setdefault(value, []).append(place)
    return [sum(places[value]) / len(places[value]) for value in values]


if __name__ == "__main__":
    main()
