"""Two hosts, one of which comes to harm: the launch ends soon, everywhere, and says last what happened where."""

import contextlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from zeropipe.launcher.rehearsal.drive import launch_words, rehearse
from zeropipe.launcher.rehearsal.netns import VirtualHost
from zeropipe.launcher.rehearsal.rank import Harm
from zeropipe.trainer.metrics.audit import audit
from zeropipe.trainer.metrics.reading import read_metrics

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(900)]
BIN = Path(sys.executable).parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
LONG = ("batch.global=12", "duration.steps=100000", "save.every=5")


def words(*overrides: str) -> list[str]:
    return launch_words("recipe.yaml", "zero2", "hostfile", [*LONG, *overrides])


def test_a_rank_of_the_second_host_that_dies_at_the_start(hosts: list[VirtualHost], work: Path):
    found = rehearse(words("output=dies"), hosts[0], "node2", Harm("exit", 1, "set-up", 0, str(work)), environment=ENV)
    assert found.right, found
    assert found.code == 3
    assert found.left == 0
    assert found.seconds is not None
    assert found.seconds < 25  # 15 on a machine of its own


def test_a_link_that_is_cut(hosts: list[VirtualHost], work: Path):
    """Nobody closes a socket: both sides must find out by themselves."""
    harm = Harm("link-down", 1, "step", 7, str(work))
    found = rehearse(words("output=cut"), hosts[0], "node2", harm, lambda _: hosts[1].cut_off(), ENV)
    assert found.right, found
    assert found.code == 3
    assert found.left == 0
    assert found.seconds is not None
    assert found.seconds < 25  # 15 on a machine of its own


@pytest.mark.slow
class TestRestarts:
    """Every sample once and in order, and the losses of a run that nothing happened to."""

    # dropout draws by rank, so losses of other worlds are alike without it
    DROPOUT = tuple(f"model.config.{name}_pdrop=0.0" for name in ("embd", "attn", "resid"))
    OVERRIDES = ("batch.global=12", "duration.steps=14", "save.every=2", *DROPOUT)

    @pytest.fixture(scope="class")
    def undisturbed(self, work: Path) -> list[float]:
        (work / "three").write_text("node1 slots=1\nnode2 slots=1\nnode3 slots=1\n")
        (work / "fp32.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
        alone = [str(BIN / "zeropipe"), "train", "recipe.yaml", "--deepspeed_config", "fp32.json", *self.OVERRIDES]
        subprocess.run([*alone, "output=alone"], cwd=work, env=ENV, check=True, capture_output=True)
        return losses_of(work / "alone")

    def restarted(self, hosts, work, harm: Harm, output: str, act=lambda _: contextlib.nullcontext()) -> str:
        """What a launch on three hosts said that came to harm once."""
        options = ["--max-restarts", "1", "--min-hosts", "2"]
        overrides = [*self.OVERRIDES, f"output={output}"]
        command = launch_words("recipe.yaml", "fp32.json", "three", overrides, *options)
        where = f"node{harm.rank + 1}"
        found = rehearse(command, hosts[0], where, harm, act, ENV, end_seconds=400)
        said = (work / "said").read_text()
        assert found.code == 0, said
        assert found.left == 0
        return said

    @pytest.mark.parametrize("fault", ["link-down", "host-gone"])
    def test_three_hosts_go_on_as_two(self, hosts, work, undisturbed, fault, record_property):
        step = random.randrange(3, 12)
        record_property("step", step + 1)
        act = {"link-down": lambda _: hosts[2].cut_off(), "host-gone": lambda _: hosts[2].gone()}[fault]
        said = self.restarted(hosts, work, Harm(fault, 2, "step", step, str(work)), f"fewer-{fault}", act)
        assert "error: rank 2 on node3 " in said
        assert "node3: no answer by ssh" in said
        audited = audit(work / f"fewer-{fault}")
        assert audited.defects == []
        assert (audited.steps, audited.resumes, audited.worlds) == (14, 1, [2, 3])
        assert losses_of(work / f"fewer-{fault}") == pytest.approx(undisturbed, rel=2e-6)

    def test_all_hosts_go_on_after_a_crash(self, hosts, work, undisturbed):
        said = self.restarted(hosts, work, Harm("kill", 1, "step", 7, str(work)), "crashed")
        assert "error: rank 1 on node2 was ended by SIGKILL" in said
        audited = audit(work / "crashed")
        assert audited.defects == []
        assert (audited.steps, audited.resumes, audited.worlds) == (14, 1, [3])
        assert losses_of(work / "crashed") == pytest.approx(undisturbed, rel=2e-6)

    def test_too_few_hosts_are_left(self, hosts, work, undisturbed):
        """Without --min-hosts all are needed: the exit code is that of a host that failed."""
        overrides = [*self.OVERRIDES, "output=few"]
        command = launch_words("recipe.yaml", "fp32.json", "three", overrides, "--max-restarts", "1")
        harm = Harm("host-gone", 2, "step", 5, str(work))
        found = rehearse(command, hosts[0], "node3", harm, lambda _: hosts[2].gone(), ENV, end_seconds=60)
        assert found.code == 3, found
        assert found.last == "error: cannot go on: 2 hosts answer, and --min-hosts 3 are needed"


def losses_of(run: Path) -> list[float]:
    losses = {record["step"]: record["loss"] for record in read_metrics(run) if record["kind"] == "train"}
    return [losses[step] for step in range(1, 15)]
