"""What facts are judged to be: one slip each, on a host that is otherwise as it should be."""

import copy

import pytest

from zeropipe.launcher.doctor.checks import check_alike, check_clock, check_facts, check_pairs
from zeropipe.launcher.doctor.exchange import pairings
from zeropipe.launcher.doctor.probe import build_locks, facts
from zeropipe.launcher.hosts.hostfile import Host

GOOD = {
    "name": "node1", "python": "3.11.7", "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"}, "code": "c0de",
    "files": {"a.yaml": "d1"}, "accelerators": 8, "cores": 96, "disk": 10**12, "shared_memory": 10**11,
    "memory": 10**12, "addresses": [["eth0", "10.0.0.1"]], "interfaces": ["eth0", "lo"],
    "compiler": "/usr/bin/c++", "ninja": "/usr/bin/ninja",
    "nvcc": "/usr/local/cuda/bin/nvcc", "build_locks": [],
}  # fmt: skip


def found(slots: int = 8, **changes) -> list[tuple[str, bool]]:
    """Check and weight of every finding on a host with these facts."""
    there = {**copy.deepcopy(GOOD), **changes}
    return [(finding.check, finding.fatal) for finding in check_facts(Host("node2", slots), there, GOOD)]


def test_nothing_is_wrong():
    assert found() == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"python": "3.12.1"}, ("python", True)),
        ({"versions": {"torch": "2.12.0", "deepspeed": "0.19.8"}}, ("versions", True)),
        ({"versions": {"torch": "2.13.0"}}, ("versions", True)),
        ({"versions": {**GOOD["versions"], "peft": "0.21"}}, ("versions", True)),
        ({"code": "beef"}, ("code", True)),
        ({"files": {"a.yaml": None}}, ("files", True)),
        ({"files": {"a.yaml": "d2"}}, ("files", True)),
        ({"slots": 9}, ("slots", True)),
        ({"slots": 4}, ("slots", False)),
        ({"accelerators": 0, "cores": 4}, ("slots", True)),
        ({"build_locks": [["/x/fused_adam/lock", 7200.0]]}, ("build", True)),
        ({"accelerators": 0, "build_locks": [["/x/fused_adam/lock", 7200.0]]}, ("build", False)),
        ({"nvcc": None}, ("build", False)),
        ({"compiler": None}, ("build", False)),
        ({"disk": 10**9}, ("disk", False)),
        ({"disk": 10**6}, ("disk", True)),
        ({"shared_memory": 10**6}, ("shared memory", False)),
        ({"memory": 10**8}, ("memory", False)),
    ],
)
def test_one_slip(changes, expected):
    assert found(**changes) == [expected]


def test_a_build_under_way_is_no_fault():
    assert found(build_locks=[["/x/fused_adam/lock", 30.0]]) == []


def test_hosts_without_accelerators_among_others():
    mixed = {"a": {"accelerators": 8}, "b": {"accelerators": 0}, "c": {"accelerators": 8}}
    assert [finding.host for finding in check_alike(mixed)] == ["b"]
    assert list(check_alike({"a": {"accelerators": 0}, "b": {"accelerators": 0}})) == []


@pytest.mark.parametrize(("skew", "words"), [(3.5, "3.5 seconds ahead of"), (-86400.0, "86400.0 seconds behind")])
def test_clocks(skew, words):
    assert words in next(check_clock("node2", skew)).says
    assert list(check_clock("node2", 1.0)) == []


FAST, SLOW, LATE = [1e-4, 1e9], [1e-4, 1e8], [5e-2, 1e9]


@pytest.mark.parametrize(
    ("slow", "named"),
    [
        ({}, []),
        ({("a", "b"): SLOW}, ["a - b"]),
        ({("c", "d"): LATE}, ["c - d"]),
        ({("a", "b"): SLOW, ("c", "d"): LATE}, ["a - b", "c - d"]),
    ],
)
def test_slow_links(slow, named):
    names = "abcd"
    pairs = {(low, high): FAST for low in names for high in names if low < high}
    assert [finding.host for finding in check_pairs({**pairs, **slow})] == named


def test_a_slow_host_and_a_slow_pair():
    pairs = {(low, high): FAST for low in "abcde" for high in "abcde" if low < high}
    slow = {pair: SLOW for pair in pairs if "c" in pair}
    assert [finding.host for finding in check_pairs({**pairs, **slow, ("a", "b"): LATE})] == ["c", "a - b"]
    assert list(check_pairs({("a", "b"): SLOW})) == []  # with nothing to compare it with


@pytest.mark.parametrize("hosts", [2, 3, 4, 7, 16, 31, 32, 33, 100, 1000, 1001])
def test_pairs_in_rounds(hosts):
    """No host twice in a round; every pair once where they are few, every near one where they are many."""
    rounds = pairings(hosts)
    for pairs in rounds:
        members = [host for pair in pairs for host in pair]
        assert len(members) == len(set(members))
        assert set(members) <= set(range(hosts))
    met = {frozenset(pair) for pairs in rounds for pair in pairs}
    if hosts <= 32:
        assert sum(map(len, rounds)) == len(met) == hosts * (hosts - 1) // 2
        assert len(rounds) <= hosts
    else:
        assert len(rounds) == 8
        assert {host for pair in met for host in pair} == set(range(hosts))


def test_facts_of_this_machine(tmp_path):
    (tmp_path / "a").write_text("x")
    here = facts([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "new" / "run"))
    assert list(here["files"].values())[1] is None
    assert here["files"][str(tmp_path / "a")]
    assert here["disk"] > 0
    assert here["versions"]["torch"].startswith("2.")
    assert here["code"] == facts([], ".")["code"]


def test_locks_are_found_in_both_depths(tmp_path):
    for folder in ("fused_adam", "py311_cu128/cpu_adam"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "lock").touch()
    found = build_locks({"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert len(found) == 2
    assert all(age < 60 for _, age in found)
