"""The doctor on real hosts: what is planted on them is found, named, and refused before a rank starts."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from zeropipe.launcher.rehearsal.netns import VirtualHost

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(600)]
BIN = Path(sys.executable).parent
AHEAD = """
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
  int failed = syscall(SYS_clock_gettime, clock, now);
  if (clock == CLOCK_REALTIME) now->tv_sec += 60;
  return failed;
}
"""
NO_LOCKS = "int flock(int file, int operation) { return 0; }"
HOSTFILE = "node1 slots=1\nnode2 slots=1\nnode3 slots=1\n"


def doctor(hosts: list[VirtualHost], folder: Path, *words: str, hostfile: str = HOSTFILE) -> dict:
    """The JSON of an examination that was asked for on the first host."""
    (folder / "hosts3").write_text(hostfile)
    command = [str(BIN / "zeropipe"), "doctor", "--hostfile", "hosts3", "--json", "--seconds", "120", *words]
    done = hosts[0].run(command, cwd=folder, timeout=400)
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["ready"] else 2)
    return found


def faults(found: dict) -> dict[str, str]:
    """What is said of each host that cannot take part."""
    return {finding["host"]: finding["says"] for finding in found["findings"] if finding["fatal"]}


def test_hosts_that_are_ready(hosts, tmp_path):
    """… and one link that is a hundred times slower than the others; the dead interface is nowhere taken."""
    with hosts[2].slow_link("8mbit"):
        found = doctor(hosts, tmp_path)
    assert faults(found) == {}
    assert found["master_addr"] == hosts[0].address
    assert found["all_reduce"]["interfaces"] == dict.fromkeys(("node1", "node2", "node3"), "eth0")
    pairs = found["all_reduce"]["pairs"]
    assert set(pairs) == {"node1 - node2", "node1 - node3", "node2 - node3"}
    assert pairs["node1 - node3"][1] < 2e6 < pairs["node1 - node2"][1]
    slow = [finding["host"] for finding in found["findings"] if finding["check"] == "link"]
    assert slow == ["node3"]
    assert not list(tmp_path.glob(".doctor-*"))


def test_all_that_is_wrong_is_found_at_once(hosts, tmp_path):
    """On one host its own folder, on another too many slots, and one that is not there: each by name, with the cure."""
    hostfile = "node1 slots=1\nnode2 slots=1\nnode3 slots=999\nnode9 slots=1\n"
    (tmp_path / "recipe.yaml").write_text("name: mine\n")
    with hosts[1].own_folder(tmp_path):
        found = doctor(hosts, tmp_path, "--files", "recipe.yaml", hostfile=hostfile)
    says = faults(found)
    assert set(says) == {"node2", "node3", "node9"}
    assert "999 slots, but" in says["node3"]
    assert "ssh without a password failed" in says["node9"]
    of_node2 = {finding["check"]: finding for finding in found["findings"] if finding["host"] == "node2"}
    assert of_node2["files"]["says"] == "recipe.yaml is missing"
    assert f"scp {tmp_path}/recipe.yaml node2:" in of_node2["files"]["cure"]
    assert of_node2["storage"]["says"] == f"{tmp_path} is not the folder it is here"


@pytest.mark.slow
class TestPlantedFaults:
    """One at a time, through `zeropipe launch`: refused with the host's name, and nothing was started."""

    def refused(self, hosts, folder: Path, hostfile: str = HOSTFILE, ranks: int = 3) -> str:
        made = (folder / "refused").exists()
        (folder / "hosts3").write_text(hostfile)
        command = [str(BIN / "zeropipe"), "launch", "recipe.yaml", "--deepspeed_config", "zero2"]
        command += ["--hostfile", "hosts3", "output=refused", f"batch.global={ranks}"]
        done = hosts[0].run(command, cwd=folder, timeout=400)
        assert done.returncode == 2, done.stdout + done.stderr
        assert (folder / "refused").exists() == made
        return done.stderr

    def test_another_recipe(self, hosts, work):
        with hosts[1].own_file(work / "recipe.yaml", "name: another\n"):
            assert f"node2: {work}/recipe.yaml differs from the one here" in self.refused(hosts, work)

    def test_what_is_missing_is_sent(self, hosts, work):
        """With --sync, to the host that lacks them; a dry run sends nothing."""
        own = work / "own"
        own.mkdir(exist_ok=True)
        (own / "recipe.yaml").write_text((work / "recipe.yaml").read_text())
        command = [str(BIN / "zeropipe"), "launch", str(own / "recipe.yaml"), "--deepspeed_config", "zero2", "--sync"]
        command += ["--hostfile", "hosts3", f"output={work}/synced", "batch.global=3", "duration.steps=2"]
        (work / "hosts3").write_text(HOSTFILE)
        with hosts[1].own_folder(own):
            dry = hosts[0].run([*command, "--dry-run"], cwd=work, timeout=200)
            assert f"node2: {own}/recipe.yaml is missing" in dry.stdout
            done = hosts[0].run(command, cwd=work, timeout=400)
            sent = hosts[0].run(["ssh", "node2", f"cat {own}/recipe.yaml"])
        assert done.returncode == 0, done.stdout + done.stderr
        assert "sending what differs to node2\n" in done.stdout
        assert sent.stdout == (own / "recipe.yaml").read_text()

    def test_another_version(self, hosts, work):
        (site,) = {path.parent for path in Path(sys.prefix).glob("lib/python*/site-packages/deepspeed")}
        (metadata,) = site.glob("deepspeed-*.dist-info/METADATA")
        with hosts[2].own_file(metadata, "Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.9.9\n"):
            said = self.refused(hosts, work)
        assert "node3: deepspeed 0.9.9, but" in said
        assert "pip install deepspeed==" in said

    def test_other_code(self, hosts, work):
        import zeropipe.trainer.loop as loop

        with hosts[1].own_file(Path(str(loop.__file__)), "# stale\n"):
            assert "node2: ZeroPipe's own code differs" in self.refused(hosts, work)

    def test_no_environment(self, hosts, work):
        with hosts[1].own_folder(Path(sys.prefix)):
            assert f"node2: there is no {sys.executable}" in self.refused(hosts, work)

    def test_no_folder(self, hosts, work):
        inner = work / "inner"
        inner.mkdir()
        (inner / "recipe.yaml").write_text(
            (work / "recipe.yaml").read_text().replace("store: store", "store: ../store")
        )
        with hosts[2].own_folder(work):
            assert f"node3: there is no folder {inner}" in self.refused(hosts, inner)

    def test_no_sshd(self, hosts, work):
        with hosts[1].without_sshd():
            assert "node2: ssh without a password failed" in self.refused(hosts, work)

    def test_cut_off(self, hosts, work):
        hosts[2].set_link("down")
        try:
            assert "node3: ssh without a password failed" in self.refused(hosts, work)
        finally:
            hosts[2].set_link("up")

    def test_too_many_slots(self, hosts, work):
        said = self.refused(hosts, work, HOSTFILE.replace("node2 slots=1", "node2 slots=98"), 100)
        assert "node2: 98 slots, but" in said

    def test_a_firewall(self, hosts, work):
        """ssh goes through, the ports of ranks do not."""
        with hosts[0].firewall():
            said = self.refused(hosts, work)
        assert "node2: cannot connect to node1" in said
        assert "node3: cannot connect to node1" in said

    def test_a_full_disk(self, hosts, work):
        (work / "refused").mkdir()
        try:
            with hosts[1].own_folder(work / "refused", size="1m"):
                said = self.refused(hosts, work)
        finally:
            (work / "refused").rmdir()
        assert "node2: 0.00 GiB of disk free" in said

    def test_what_only_the_doctor_sees(self, hosts, tmp_path):
        """A clock that is ahead and little shared memory on one host, on another locks that hold nobody off."""
        with (
            hosts[1].preloaded(tmp_path, AHEAD),
            hosts[1].own_folder(Path("/dev/shm"), size="1m"),
            hosts[2].preloaded(tmp_path, NO_LOCKS),
        ):
            found = doctor(hosts, tmp_path)
        assert found["ready"]
        told = {(finding["check"], finding["host"]): finding for finding in found["findings"]}
        assert set(told) >= {("clock", "node2"), ("shared memory", "node2"), ("locks", "node3")}
        assert {host for check, host in told if check in ("clock", "shared memory", "locks")} == {"node2", "node3"}
        assert re.match(r"its clock is (6\d|59)\.\d seconds ahead of this machine's", told["clock", "node2"]["says"])
        assert told["clock", "node2"]["cure"].startswith("ssh node2 systemctl restart chrony")
        assert told["shared memory", "node2"]["says"] == "0.00 GiB of shared memory free"
        assert told["shared memory", "node2"]["cure"].startswith("ssh node2 mount -o remount,size=8g /dev/shm")
        assert told["locks", "node3"]["says"] == f"a lock that node1 holds in {tmp_path} is not seen here"
        assert "NFS: without nolock" in told["locks", "node3"]["cure"]

    def test_ports_that_are_closed_one_way(self, hosts, tmp_path):
        """The first host is reached by all; another one is reached by nobody."""
        with hosts[2].firewall():
            found = doctor(hosts, tmp_path)
        closed = {finding["host"]: finding for finding in found["findings"] if finding["check"] == "ports"}
        assert set(closed) == {"node1", "node2"}
        for finding in closed.values():
            assert finding["says"].startswith(f"cannot connect to node3 ({hosts[2].address}:")
            assert finding["cure"].startswith("open TCP between the hosts in the firewall")

    def test_a_stale_build_lock(self, hosts, work):
        """Told by the doctor, not refused on CPUs, where nothing has to be built."""
        extensions = Path.home() / ".cache" / "torch_extensions"
        extensions.mkdir(parents=True, exist_ok=True)
        with hosts[1].own_folder(extensions):
            lock = extensions / "py311_cpu" / "fused_adam" / "lock"
            touch = f"mkdir -p {lock.parent} && touch -d '2 hours ago' {lock}"
            subprocess.run(hosts[0].command(["ssh", "node2", touch]), check=True, timeout=60)
            found = doctor(hosts, work, "--files", "recipe.yaml")
        (finding,) = [finding for finding in found["findings"] if finding["check"] == "build"]
        assert finding["host"] == "node2"
        assert finding["cure"] == f"ssh node2 rm {lock}"
