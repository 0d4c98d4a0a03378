"""A thousand hosts, simulated: asked at once, in bounded time and words, whatever some of them do."""

import asyncio
import json
import time

import pytest

from tests.unit.launcher.doctor.test_checks import GOOD
from zeropipe.data_prep.errors import UserError
from zeropipe.launcher.doctor import probe, quick
from zeropipe.launcher.doctor.agent import REPLY
from zeropipe.launcher.doctor.case import Case, Examination
from zeropipe.launcher.doctor.crew import Crew, ProcessLine, Silence, local_crew, reason_of_end
from zeropipe.launcher.doctor.examine import examine
from zeropipe.launcher.doctor.report import doctor_report, examination_json
from zeropipe.launcher.hosts.hostfile import Host

MANY = [Host(f"gpu{i:04}", 8) for i in range(1000)]
LATENCY = 0.05  # seconds of an answer


class Pretended:
    """An agent that answers from memory; some never do, some end."""

    def __init__(self, name: str, under_way: list[int]) -> None:
        self.name, self.number, self.under_way, self.asked = name, int(name.removeprefix("gpu")), under_way, ""

    async def say(self, text):
        self.asked = text

    async def hear(self):
        self.under_way[0] += 1
        self.under_way[1] = max(self.under_way)
        try:
            if self.number % 250 == 3:
                await asyncio.sleep(3600)  # hangs
            if self.number % 250 == 7:
                return ""  # ssh has ended
            await asyncio.sleep(LATENCY)
            return f"welcome to {self.name}\n" if self.asked == "noise" else self.answer()
        finally:
            self.under_way[0] -= 1

    def answer(self) -> str:
        request = json.loads(self.asked)
        value = {
            "facts": {**GOOD, "addresses": [["dead", "10.1.0.9"], ["eth0", f"10.0.{self.number}.1"]],
                      "interfaces": ["dead", "eth0", "lo"], "accelerators": 8,
                      "code": "stale" if self.number % 10 == 4 else "c0de"},
            "clock": time.time() + (60 if self.number == 5 else 0),
            "listen": 20000, "own_address": f"10.0.{self.number}.1",
            "reach": [0.001 if ip.startswith("10.0.") else None for ip, _ in request["with"].get("targets", ())],
        }.get(request["do"])  # fmt: skip
        return REPLY + json.dumps({"value": value}) + "\n"

    async def why(self):
        return Silence("ssh without a password failed (Permission denied)", f"ssh-copy-id {self.name}")

    async def close(self):
        pass


def pretend(hosts, environment=None, **options) -> tuple[Examination, int]:
    """An examination of hosts that are not there, and how many were asked at once at most."""
    under_way = [0, 0]

    async def connect(name):
        return Pretended(name, under_way)

    found = examine(Case(hosts, ["a.yaml"], ".", None, environment or {}, 4.0), Crew(connect), **options)
    return found, under_way[1]


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.setattr(probe, "facts", lambda *_: GOOD)


def test_a_thousand_hosts():
    began = time.monotonic()
    found, at_once = pretend(MANY, thorough=True)
    assert time.monotonic() - began < 60  # of which 4 s are waiting for the silent ones
    assert 200 <= at_once <= 256
    silent = {finding.host for finding in found.findings if finding.check == "reach"}
    assert silent == {f"gpu{i:04}" for i in range(1000) if i % 250 in (3, 7)}
    stale = {finding.host for finding in found.findings if finding.check == "code"}
    assert len(stale) == 100
    assert (found.address, found.port) == ("10.0.0.1", 20000)
    clocks = [finding.host for finding in found.findings if finding.check == "clock"]
    assert clocks == ["gpu0005"]
    text = doctor_report(found)
    assert len(text.splitlines()) < 120
    assert len(text) < 12_000
    assert text.splitlines()[-1].startswith("108 of 1000 hosts cannot take part")
    assert len(json.loads(examination_json(found))["findings"]) == len(found.findings)


def test_every_host_wrong_in_its_own_way_is_still_a_page(monkeypatch):
    found = Examination(MANY, facts={host.name: GOOD for host in MANY})
    from zeropipe.launcher.doctor.checks import Finding

    found.findings = [Finding("slots", host.name, f"{i} slots", f"edit {host.name}") for i, host in enumerate(MANY)]
    text = doctor_report(found)
    assert len(text.splitlines()) < 120
    assert "… and 960 more; --json tells them all" in text


def test_a_launch_is_refused_in_a_page(monkeypatch):
    monkeypatch.setattr(quick, "ssh_crew", lambda *_: Crew(connect))
    monkeypatch.setattr(quick, "SECONDS", 4.0)

    async def connect(name):
        return Pretended(name, [0, 0])

    with pytest.raises(UserError) as error:
        quick.check_hosts(MANY[:250], None, None)
    lines = str(error.value).splitlines()
    assert lines[0] == "27 of 250 hosts cannot take part:"
    assert len(lines) == 22
    assert "… and 7 more" in lines[-1]


@pytest.mark.parametrize(
    ("status", "said", "says", "cure"),
    [
        (255, "Permission denied (publickey).", "without a password failed", "ssh-copy-id node2"),
        (255, "Connection timed out", "Connection timed out", "`ssh node2 true` must work"),
        (81, "", "there is no folder", "share it with node2"),
        (82, "", "there is no /", "rsync -a"),
        (1, "ModuleNotFoundError: No module named 'psutil'", "not whole", "install it anew"),
        (139, "it said nothing", "ended with 139", "ssh node2"),
    ],
)
def test_why_an_agent_ended(status, said, says, cure):
    silence = reason_of_end("node2", status, said)
    assert says in silence.says
    assert cure in silence.cure


def test_this_machine_alone(monkeypatch, tmp_path):
    """The real agent, without ssh."""
    monkeypatch.undo()
    found = examine(Case([Host("localhost", 1)], (), str(tmp_path), tmp_path), local_crew(), thorough=False)
    assert found.fatal == []
    assert found.port is not None
    assert "1 host is ready" in doctor_report(found)


def test_an_agent_that_ends_while_it_is_closed(monkeypatch):
    """The process has gone between the wait that gave up and the kill."""

    async def close() -> None:
        line = await ProcessLine.open("n1", ["sleep", "60"])
        real = line._process.kill

        def kill() -> None:
            real()
            raise ProcessLookupError

        monkeypatch.setattr(line._process, "kill", kill)
        await line.close()

    asyncio.run(close())


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", None),
        ("GLOO_SOCKET_IFNAME", "eth", "GLOO_SOCKET_IFNAME=eth, but its interfaces are dead, eth0, lo"),
        ("GLOO_SOCKET_IFNAME", "dead", "GLOO_SOCKET_IFNAME=dead does not lead to gpu0001 (tried 10.1.0.9)"),
        ("GLOO_SOCKET_IFNAME", "lo", "GLOO_SOCKET_IFNAME=lo does not lead to gpu0001 (tried 127.0.0.1)"),
        ("NCCL_SOCKET_IFNAME", "eth", None),
        ("NCCL_SOCKET_IFNAME", "=eth", "NCCL_SOCKET_IFNAME==eth, but its interfaces are dead, eth0, lo"),
        ("NCCL_SOCKET_IFNAME", "^dead,lo", None),
        ("NCCL_SOCKET_IFNAME", "^eth", "NCCL_SOCKET_IFNAME=^eth does not lead to gpu0001 (tried 10.1.0.9, 127.0.0.1)"),
    ],
)
def test_an_interface_that_the_user_has_named(variable, value, says):
    found, _ = pretend(MANY[1:3], {variable: value}, thorough=False)
    told = {finding.host: finding.says for finding in found.findings if finding.check == "interface"}
    assert told.get("gpu0002") == says
