"""From the command to the first step, taken apart: what each part costs, and how much of it is the libraries'.

    python benchmarks/startup.py [--turns 3]

The commands that need no torch are timed whole, against an empty Python. `train` and `launch --devices 2` are timed to
the end of the first step of a tiny GPT-2: every rank notes the time when a part is done, and a part's seconds are those
since the part before, of the slower rank; the first part of a rank begins when its process does. Medians of the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

GOAL = 0.3  # seconds, of `zeropipe --help`
VERBS = ("prepare", "plan", "launch", "train", "eval", "export", "ckpt", "report", "parity")
ZEROPIPE = [sys.executable, "-m", "zeropipe.launcher"]
NOTES = "STARTUP_NOTES"  # set in a rank of the run, which is this file again: the folder for its notes
SKEW = "STARTUP_SKEW"  # what the system's times of process starts are ahead of the clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    turns = parser.parse_args().turns
    print(__doc__)
    from tests import tiny
    from zeropipe.trainer.recipe.recipe import Recipe, dump_recipe

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = tiny.tiny_store(folder / "store")
        one_step = {"duration": {"steps": 1}, "schedule": {"type": "constant", "warmup": 0}, "resume": "never"}
        recipe = tiny.tiny_recipe(store, folder / "run", **one_step)
        (folder / "recipe.yaml").write_text(dump_recipe(Recipe.model_validate(recipe)))
        (folder / "deepspeed.json").write_text(json.dumps(tiny.tiny_json("zero2")))
        pair = [str(folder / "recipe.yaml"), "--deepspeed_config", str(folder / "deepspeed.json")]
        commands(pair, turns)
        runs("train, one rank", pair, 1, folder, turns)
        runs("launch --devices 2", pair, 2, folder, turns)


def commands(pair: list[str], turns: int) -> None:
    """The commands that import no torch."""
    timed = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "zeropipe --help": [*ZEROPIPE, "--help"],
        **{f"zeropipe {verb} --help": [*ZEROPIPE, verb, "--help"] for verb in VERBS},
        "zeropipe plan": [*ZEROPIPE, "plan", *pair],
        "zeropipe launch --dry-run": [*ZEROPIPE, "launch", *pair, "--dry-run"],
    }
    for name, command in timed.items():
        seconds = statistics.median(seconds_of(command) for _ in range(max(turns, 3)))
        goal = f"  (goal {GOAL} s)" if "--help" in name else ""
        print(f"{name:<28} {seconds:6.3f} s{goal}", flush=True)


def seconds_of(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def runs(title: str, pair: list[str], ranks: int, folder: Path, turns: int) -> None:
    """A run to its first step, `turns` times; prints the parts and the whole."""
    found = [one_run(pair, ranks, folder) for _ in range(turns)]
    whole = statistics.median(sum(parts.values()) for parts in found)
    print(f"\n{title}: {whole:.2f} s from the command to the end of the first step")
    for part in found[0]:
        print(f"  {part:<56} {statistics.median(parts[part] for parts in found):6.2f} s", flush=True)


def one_run(pair: list[str], ranks: int, folder: Path) -> dict[str, float]:
    """Seconds of each part, in order."""
    from zeropipe.launcher.command import Launch, deepspeed_command
    from zeropipe.launcher.running import child_environment
    from zeropipe.trainer.ranks.ports import free_port

    notes = folder / "notes"
    notes.mkdir(exist_ok=True)
    script = [str(Path(__file__).resolve())]
    launch = Launch(("--run", *pair), ranks, master_port=free_port())
    parts: dict[str, float] = {}
    if ranks == 1:
        command = [sys.executable, *script, *launch.arguments]
    else:
        parts["zeropipe launch: imports, plan"] = seconds_of(
            [*ZEROPIPE, "launch", *pair, "--devices", "2", "--dry-run"]
        )
        words = deepspeed_command(launch)
        at = words.index("--module")
        command = [*words[:at], *script, *words[at + 2 :]]
    environment = {**child_environment(launch, folder), NOTES: str(notes), SKEW: str(clock_skew())}
    started = time.time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    stamps = [json.loads((notes / str(rank)).read_text()) for rank in range(ranks)]
    before = started
    for part in stamps[0]:  # the launchers' are the same in all ranks; a rank's count where the slower one is
        done = max(rank[part] for rank in stamps)
        parts[part], before = done - before, done
    return parts


def clock_skew() -> float:
    """Seconds that psutil's times are ahead of `time.time()`: they count from a boot time of whole seconds."""
    import psutil

    process = psutil.Popen([sys.executable, "-c", "pass"])
    skew = process.create_time() - time.time()
    process.wait()
    return skew


def rank(notes: Path, arguments: list[str]) -> None:
    """One rank of the run: `zeropipe.trainer`, with the time noted where a part is done."""
    import psutil

    me = psutil.Process()
    stamps: dict[str, float] = {}
    if "WORLD_SIZE" in os.environ:  # started by `deepspeed`, which starts its launcher, which starts the ranks
        launcher = me.parent()
        assert launcher is not None
        skew = float(os.environ[SKEW])
        stamps["deepspeed, until its launcher starts (imports torch)"] = launcher.create_time() - skew
        stamps["its launcher, until the rank starts (imports torch again)"] = me.create_time() - skew

    def done(part: str) -> None:
        stamps.setdefault(part, time.time())

    from zeropipe.trainer.commands import train as command
    from zeropipe.trainer.run.quiet import quiet

    quiet()
    done("Python, zeropipe's command line, pydantic, yaml")
    import torch

    done("import torch")
    import deepspeed  # noqa: F401

    done("import deepspeed")
    import torch._dynamo  # noqa: F401

    done("import torch._dynamo (transformers, and torch.optim)")
    import transformers.modeling_utils  # noqa: F401

    done("import transformers")
    from zeropipe.trainer import loop
    from zeropipe.trainer.engine import base
    from zeropipe.trainer.plan import deepspeed_json, plan
    from zeropipe.trainer.ranks import ranks

    done("import zeropipe's own modules, numpy, safetensors")
    clock(deepspeed_json, "load_pair", done, "recipe and DeepSpeed JSON")
    clock(ranks, "join_world", done, "rendezvous: process group")
    clock(plan, "make_plan", done, "plan")
    clock(loop.RunData, "open", done, "run directory, environment, data")
    clock(base.deepspeed, "initialize", done, "model, initial values, deepspeed.initialize")
    clock(loop.Checkpoints, "resume_or_start", done, "evaluator, stream, checkpoints")
    clock(base.Agreed, "take", done, "first batch")
    clock(base.Engine, "train_step", done, "first step")
    code = command.main(arguments)
    (notes / os.environ.get("RANK", "0")).write_text(json.dumps(stamps))
    os._exit(code)


def clock(owner: Any, name: str, done: Callable[[str], None], part: str) -> None:
    """Has `owner.name` note when it is done."""
    real = getattr(owner, name)

    def clocked(*arguments: Any, **options: Any) -> Any:
        try:
            return real(*arguments, **options)
        finally:
            done(part)

    setattr(owner, name, staticmethod(clocked) if isinstance(owner, type) and name == "open" else clocked)


if __name__ == "__main__":
    if NOTES in os.environ:
        rank(Path(os.environ[NOTES]), sys.argv[1:])
    else:
        main()
