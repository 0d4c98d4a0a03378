"""`deepspeed --hostfile` over pdsh between two hosts, as `zeropipe launch` composes it."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.unit.launcher.test_command import NASTY

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]

# runs on node1; the trainer is replaced by one that writes down what it was told
LAUNCH = """
import sys
from pathlib import Path

from zeropipe.data_prep.errors import UserError
from zeropipe.launcher import command, running
from zeropipe.launcher.hosts.hostfile import read_hostfile

output, hostfile, *words = sys.argv[1:]
hosts = read_hostfile(hostfile)
launch = command.Launch(tuple(words), sum(host.slots for host in hosts), Path(hostfile), hosts)
real = command.deepspeed_command
running.deepspeed_command = lambda launch, names: [
    "tests.hosts.show_arguments" if word == "zeropipe.trainer" else word for word in real(launch, names)
]
try:
    sys.exit(running.start(launch, Path(output)))
except UserError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def hostfile(tmp_path) -> Path:
    path = tmp_path / "hostfile"
    path.write_text("node1 slots=1\nnode2 slots=1\n")
    return path


def test_ranks_are_told_exactly_what_was_said(hosts, hostfile, tmp_path):
    words = [word for word in NASTY if word]
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / ".deepspeed_env").write_text(f"PLANTED=$(touch {tmp_path}/ran) $HOME `id` 5%h\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_ETAG_TIMEOUT": "7 $s", "HF_TOKEN": "secret"}
    environment |= {"HOME": str(tmp_path / "env"), "UCX_LOG_FILE": "$(id)", "FI_PROVIDER": "tcp", "PYTORCH_X": "1"}
    done = hosts[0].run(
        [sys.executable, "-c", LAUNCH, str(tmp_path), str(hostfile), *words], cwd=ROOT, env=environment, timeout=90
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(2)]
    assert [rank["host"] for rank in told] == ["node1", "node2"]
    for rank in told:
        assert rank["words"] == ["--local_rank=0", *words]
        assert rank["folder"] == str(ROOT)
        assert rank["environment"]["OMP_NUM_THREADS"] == "1"
        assert rank["environment"]["HF_HUB_ETAG_TIMEOUT"] == "7 $s"
        for name in ("UCX_LOG_FILE", "FI_PROVIDER", "PYTORCH_X"):
            assert rank["environment"][name] == environment[name]
        assert rank["environment"]["PLANTED"] == f"$(touch {tmp_path}/ran) $HOME `id` 5%h"
        assert "HF_TOKEN" not in rank["environment"]  # a secret is not put on a command line
    assert not list(tmp_path.glob(".launch-*")) and not (tmp_path / "ran").exists()


def test_every_host_is_looked_at_first(hosts, hostfile, tmp_path):
    """Not only the first one, as DeepSpeed does; and nothing is left of a launch that never started."""
    hostfile.write_text("node1 slots=1\nnode2 slots=1\nnode7 slots=1\n")
    done = hosts[0].run([sys.executable, "-c", LAUNCH, str(tmp_path / "run"), str(hostfile)], cwd=ROOT)
    assert "1 of 3 hosts cannot take part" in done.stderr
    assert "node7: ssh without a password failed" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_is_not_shared_is_noticed(hosts, hostfile, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    with hosts[1].own_folder(output):
        done = hosts[0].run([sys.executable, "-c", LAUNCH, str(output), str(hostfile)], cwd=ROOT)
    assert f"node2: {output} is not the folder it is here" in done.stderr
