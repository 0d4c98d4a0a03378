"""Hosts from allocations, and a choice among hosts, as DeepSpeed itself would read them."""

from collections import OrderedDict

import pytest

from zeropipe.data_prep.errors import UserError
from zeropipe.launcher.hosts.hostfile import Host
from zeropipe.launcher.hosts.selection import include_words, select_hosts
from zeropipe.launcher.hosts.sources import hostfile_text, hosts_from

HOSTS = (Host("node1", 4), Host("node2", 4), Host("node-3", 2))


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({"SLURM_JOB_NODELIST": "gpu[08-09]", "SLURM_GPUS_ON_NODE": "8"}, "gpu08 slots=8\ngpu09 slots=8\n"),
        ({"SLURM_JOB_NODELIST": "gpu[1,3]", "SLURM_GPUS_PER_NODE": "a100:4"}, "gpu1 slots=4\ngpu3 slots=4\n"),
        ({"SLURM_JOB_NODELIST": "c[1-3]", "SLURM_TASKS_PER_NODE": "2(x2),1"}, "c1 slots=2\nc2 slots=2\nc3 slots=1\n"),
        ({"SLURM_JOB_NODELIST": "c1"}, "c1 slots=1\n"),
    ],
)
def test_slurm(environ, text):
    assert hostfile_text(hosts_from("slurm", environ)) == text


@pytest.mark.parametrize(
    ("source", "environ", "text"),
    [
        ("skypilot", {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}, "8"),
        ("skypilot", {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n", "SKYPILOT_NUM_GPUS_PER_NODE": "0"}, "1"),
        ("dstack", {"DSTACK_NODES_IPS": "10.0.0.1\n10.0.0.2", "DSTACK_GPUS_PER_NODE": "4"}, "4"),
    ],
)
def test_clouds(source, environ, text):
    assert hostfile_text(hosts_from(source, environ)) == f"10.0.0.1 slots={text}\n10.0.0.2 slots={text}\n"


def test_node_files(tmp_path):
    file = tmp_path / "nodes"
    for lines in ("n1\nn1\nn2\nn1\nn2\nn2\n", "n1:3\nn2:3\n", "# MPI's\nn1 slots=3\nn2 slots=3 max_slots=8 # two\n"):
        file.write_text(lines)
        assert hosts_from(str(file), {}) == (Host("n1", 3), Host("n2", 3))
        assert hosts_from("pbs", {"PBS_NODEFILE": str(file)}) == (Host("n1", 3), Host("n2", 3))


@pytest.mark.parametrize(
    ("source", "environ", "says"),
    [
        ("slurm", {}, "SLURM_JOB_NODELIST is not set"),
        ("pbs", {}, "PBS_NODEFILE is not set"),
        ("pbs", {"PBS_NODEFILE": "/no/such"}, "no such text file"),
        ("skypilot", {}, "SKYPILOT_NODE_IPS is not set"),
        ("dstack", {"DSTACK_NODES_IPS": " \n"}, "DSTACK_NODES_IPS is not set"),
        ("dstack", {"DSTACK_NODES_IPS": "a", "DSTACK_GPUS_PER_NODE": "x"}, "DSTACK_GPUS_PER_NODE=x"),
        ("slurm", {"SLURM_JOB_NODELIST": "c[1-2]", "SLURM_TASKS_PER_NODE": "4"}, "counts 1 nodes"),
        ("lsf", {}, "expected slurm, pbs, skypilot, dstack or a node file"),
    ],
)
def test_no_such_allocation(source, environ, says):
    with pytest.raises(UserError, match=says):
        hosts_from(source, environ)


def test_node_files_that_are_none(tmp_path):
    file = tmp_path / "nodes"
    for text, says in (("n1\nn2 cores=4\n", "line 2"), ("n1:0\n", "line 1"), ("# none\n", "no host in it")):
        file.write_text(text)
        with pytest.raises(UserError, match=says):
            hosts_from(str(file), {})


@pytest.mark.parametrize(
    ("include", "exclude"),
    [
        ("node2", None), ("node2:1,3", None), ("node-3@node1:0", None), ("node1:0,1,2,3", None),
        (None, "node1"), (None, "node1:0"), (None, "node1:0,1,2,3@node-3"), (None, "node-3:0@node2"), (None, None),
    ],
)  # fmt: skip
def test_a_choice_is_deepspeeds(include, exclude):
    """The oracle is `deepspeed.launcher.runner.parse_resource_filter`; what we hand on, it reads as the same again."""
    from deepspeed.launcher.runner import parse_resource_filter

    everything = OrderedDict((host.name, list(range(host.slots))) for host in HOSTS)
    theirs = parse_resource_filter(everything, include or "", exclude or "")
    ours = select_hosts(HOSTS, include, exclude)
    assert {host.name: list(host.devices or range(host.slots)) for host in ours} == dict(theirs)
    assert [host.name for host in ours] == list(theirs)
    assert dict(parse_resource_filter(everything, include_words(ours), "")) == dict(theirs)


@pytest.mark.parametrize(
    ("include", "exclude", "says"),
    [
        ("node1", "node2", "one of them"), ("nod1", None, "'nod1' is not in the hostfile"), ("node1:4", None, "0 to 3"),
        ("node1:a", None, "not 'a'"), (None, "node1@node2@node-3", "no host is left"), ("node1:", None, "not ''"),
    ],
)  # fmt: skip
def test_no_such_choice(include, exclude, says):
    with pytest.raises(UserError, match=says):
        select_hosts(HOSTS, include, exclude)
