import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.tiny import train_on_ranks
from zeropipe.launcher.rehearsal.netns import VirtualHost, virtual_hosts, what_is_missing
from zeropipe.trainer.plan.deepspeed_json import load_ds_config

BIN = Path(sys.executable).parent
STEPS = 6
RECIPE = """
model: {config: {model_type: gpt2, n_layer: 2, n_embd: 32, n_head: 2, n_positions: 32}}
data: {train: [{store: store}], split: "90,10,0", seq_len: 32}
batch: {global: 8}
duration: {steps: 6}
schedule: {type: constant, warmup: 0}
optimizer: {lr: 1.0e-3}
log: {every: 1}
eval: {every: 0}
"""


@pytest.fixture(scope="session")
def hosts(tmp_path_factory) -> Iterator[list[VirtualHost]]:
    """Three hosts, node1 to node3, as awkward as hosts are; commands of a test run on the first.

    Each calls itself 127.0.1.1 and has an interface that leads nowhere; the sshd of node2 has another port.
    """
    if missing := what_is_missing():
        pytest.skip(missing)
    with virtual_hosts(
        tmp_path_factory.mktemp("hosts"), 3, loopback_names=True, dead_interfaces=True, ports={"node2": 2200}
    ) as made:
        yield made


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    """A folder to launch in, with a recipe, a small token store, and the environment for the ranks."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    (folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    prepare = ["prepare", "--builtin", "stdlib", "--limit-bytes", "200K", "--train-tokenizer", "300", "--workers", "0"]
    subprocess.run(
        [str(BIN / "zeropipe"), *prepare, "--output", "store"], cwd=folder, check=True, timeout=120, capture_output=True
    )
    return folder


def losses(run: Path) -> list[str]:
    """Loss of every step, as `float.hex`: exact."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [float.hex(line["loss"]) for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="session")
def one_host(work) -> list[str]:
    """What two ranks of one host find; they are made here, without a launch."""
    recipe = yaml.safe_load((work / "recipe.yaml").read_text())
    recipe["data"]["train"][0]["store"] = str(work / "store")
    train_on_ranks(2, {"name": "one", **recipe, "output": str(work / "one")}, load_ds_config("zero2"))
    assert len(losses(work / "one")) == STEPS
    return losses(work / "one")


def wait_for_steps(metrics: Path, process: subprocess.Popen, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not metrics.exists() or metrics.read_text().count('"train"') < STEPS:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"fewer than {STEPS} steps in {seconds:.0f} s"
        time.sleep(0.2)


def ranks_left(hosts: list[VirtualHost]) -> list[str]:
    """Command lines of trainers that still run on a host."""
    found = []
    for host in hosts:
        pids = subprocess.check_output(["ip", "netns", "pids", host.namespace], text=True).split()
        lines = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() for pid in pids]
        found += [line for line in lines if "zeropipe.trainer" in line]
    return found
