import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .netns import VirtualHost, virtual_hosts, what_is_missing

BIN = Path(sys.executable).parent
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
