"""Two hosts of one rank with a throttled link between them: what `zeropipe tune` predicts against real launches.

    python benchmarks/tune_hosts.py [--mbit 200] [--steps 4]

The hosts are network namespaces of this machine (as root), the link is held to a rate by `tc tbf`; the ranks are
started over ssh by `zeropipe launch`. The same GPT-2 as in benchmarks/tune.py, every legal layout of two ranks, the
largest micro batch; the median of the steps after the first. The rate of the link is stated, not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tune import VOCAB, chosen, name_of, recipe_of, spearman

from tests import tiny
from tests.hosts.netns import VirtualHost, virtual_hosts, what_is_missing
from zeropipe.trainer.recipe.recipe import dump_recipe
from zeropipe.trainer.run.quiet import quiet
from zeropipe.trainer.tune.hardware import Device, Link
from zeropipe.trainer.tune.machine import measure_machine
from zeropipe.trainer.tune.search import Candidate

ZEROPIPE = str(Path(sys.executable).parent / "zeropipe")
LATENCY = 0.4e-3  # seconds of a message between such hosts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, default=200)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    print(__doc__)
    if missing := what_is_missing():
        print(f"not done: {missing}")
        return
    quiet()
    os.environ["OMP_NUM_THREADS"] = "1"
    link = Link(arguments.mbit * 1e6 / 8, LATENCY)
    device = replace(measure_machine(2), near=link, far=link, per_node=1)
    with tempfile.TemporaryDirectory() as folder, virtual_hosts(Path(folder)) as hosts:
        for host in hosts:
            throttle(host, arguments.mbit)
        work = Path(folder)
        tiny.tiny_store(work / "store", documents=1000, vocab=VOCAB)
        (work / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
        (work / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
        compare(hosts[0], work, device, arguments.steps)


def compare(host: VirtualHost, work: Path, device: Device, steps: int) -> None:
    recipe = recipe_of("gpt2", work / "store")
    tried = [one for one in chosen(recipe, 2, device) if not one.checkpointing and one.micro_batch > 1]
    (work / "recipe.yaml").write_text(dump_recipe(recipe))
    found: dict[str, float] = {}
    for number, one in enumerate(tried):
        found[name_of(one)] = launched(host, work, one, steps, f"run{number}")
    print(f"{'layout':<50} {'measured s':>10} {'predicted s':>11}")
    for one in sorted(tried, key=lambda one: found[name_of(one)]):
        print(f"{name_of(one):<50} {found[name_of(one)]:>10.3f} {one.cost.seconds:>11.3f}")
    rank = spearman([one.cost.seconds for one in tried], [found[name_of(one)] for one in tried])
    print(f"{len(tried)} layouts, rank correlation {rank:.3f}")


def launched(host: VirtualHost, work: Path, one: Candidate, steps: int, output: str) -> float:
    (work / "ds.json").write_text(json.dumps(one.ds))
    words = [ZEROPIPE, "launch", "recipe.yaml", "--deepspeed_config", "ds.json", "--hostfile", "hostfile"]
    words += [f"output={output}", f"duration.steps={steps}", f"parallel.pipeline={one.layout.pipeline}"]
    words += ["schedule.warmup=0", "save.every=0", "log.every=1"]
    done = host.run(words, cwd=work, timeout=180)
    if done.returncode:
        raise SystemExit(f"{one}: {done.stdout}{done.stderr}")
    lines = [json.loads(line) for line in (work / output / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([line["step_seconds"] for line in lines if line["kind"] == "train"][1:])


def throttle(host: VirtualHost, mbit: float) -> None:
    """Holds what the host sends to a rate."""
    shape = ["tbf", "rate", f"{mbit:g}mbit", "burst", "64kb", "latency", "100ms"]
    subprocess.run(
        ["ip", "netns", "exec", host.namespace, "tc", "qdisc", "add", "dev", "eth0", "root", *shape], check=True
    )


if __name__ == "__main__":
    main()
