"""Two hosts, one of which comes to harm: the launch ends soon, everywhere, and says last what happened where."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from zeropipe.launcher.rehearsal.drive import launch_words, rehearse
from zeropipe.launcher.rehearsal.rank import Harm
from zeropipe.trainer.metrics.audit import audit
from zeropipe.trainer.metrics.reading import read_metrics

from .netns import VirtualHost

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(900)]
BIN = Path(sys.executable).parent
RECIPE = """
model: {config: {model_type: gpt2, n_layer: 2, n_embd: 32, n_head: 2, n_positions: 32}}
data: {train: [{store: store}], split: "90,10,0", seq_len: 32}
batch: {global: 12}
duration: {steps: 100000}
schedule: {type: constant, warmup: 0}
optimizer: {lr: 1.0e-3}
log: {every: 1}
eval: {every: 0}
save: {every: 5}
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder to launch in, with a recipe and a small token store."""
    folder = tmp_path_factory.mktemp("harm")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    prepare = ["prepare", "--builtin", "stdlib", "--limit-bytes", "200K", "--train-tokenizer", "300", "--workers", "0"]
    subprocess.run([str(BIN / "zeropipe"), *prepare, "--output", "store"], cwd=folder, check=True, capture_output=True)
    return folder


def words(*overrides: str) -> list[str]:
    return launch_words("recipe.yaml", "zero2", "hostfile", overrides)


def test_a_rank_of_the_second_host_that_dies_at_the_start(hosts: list[VirtualHost], work: Path):
    found = rehearse(words("output=dies"), hosts[0], "node2", Harm("exit", 1, "set-up", 0, str(work)), environment=ENV)
    assert found.right, found
    assert found.code == 3
    assert found.left == 0
    assert found.seconds is not None
    assert found.seconds < 25  # 15 on a machine of its own


def test_a_link_that_is_cut(hosts: list[VirtualHost], work: Path):
    """Nobody closes a socket: both sides must find out by themselves."""
    harm = Harm("link", 1, "step", 7, str(work))
    try:
        found = rehearse(words("output=cut"), hosts[0], "node2", harm, lambda _: hosts[1].set_link("down"), ENV)
    finally:
        hosts[1].set_link("up")
    assert found.right, found
    assert found.code == 3
    assert found.left == 0
    assert found.seconds is not None
    assert found.seconds < 25  # 15 on a machine of its own


@pytest.mark.slow
def test_three_hosts_go_on_as_two(hosts: list[VirtualHost], work: Path):
    """Every sample once and in order, and the losses of a run that nothing happened to."""
    (work / "three").write_text("node1 slots=1\nnode2 slots=1\nnode3 slots=1\n")
    (work / "fp32.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    overrides = ["duration.steps=14", "save.every=2"]
    options = ["--max-restarts", "1", "--min-hosts", "2"]
    command = launch_words("recipe.yaml", "fp32.json", "three", [*overrides, "output=fewer"], *options)
    harm = Harm("link", 2, "step", 7, str(work))
    try:
        found = rehearse(command, hosts[0], "node3", harm, lambda _: hosts[2].set_link("down"), ENV, end_seconds=400)
    finally:
        hosts[2].set_link("up")
    said = (work / "said").read_text()
    assert found.code == 0, said
    assert "error: rank 2 on node3 has not been heard" in said
    audited = audit(work / "fewer")
    assert audited.defects == []
    assert (audited.steps, audited.resumes, audited.worlds) == (14, 1, [3, 2])
    alone = [str(BIN / "zeropipe"), "train", "recipe.yaml", "--deepspeed_config", "fp32.json", *overrides]
    subprocess.run([*alone, "output=alone"], cwd=work, env=ENV, check=True, capture_output=True)
    fewer, undisturbed = ({r["step"]: r["loss"] for r in read_metrics(work / name) if r["kind"] == "train"}
                          for name in ("fewer", "alone"))  # fmt: skip
    assert fewer.keys() == undisturbed.keys()
    assert [fewer[step] for step in sorted(fewer)] == pytest.approx(list(undisturbed.values()), rel=2e-6)


ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
