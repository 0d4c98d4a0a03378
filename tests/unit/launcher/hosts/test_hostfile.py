from pathlib import Path

import pytest

from zeropipe.data_prep.errors import UserError
from zeropipe.launcher.hosts.hostfile import Host, read_hostfile

ROOT = Path(__file__).parents[4]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hostfile"
    path.write_text(text)
    return path


def test_hosts_keep_their_order_and_comments_are_ignored(tmp_path):
    path = write(
        tmp_path, "# the cluster\n\nnode2 slots=8\n  me@node1.lan   slots=4 max_slots=4  # older\n10.0.0.3 slots=1\n"
    )
    assert read_hostfile(path) == (Host("node2", 8), Host("me@node1.lan", 4), Host("10.0.0.3", 1))


def test_deepspeed_reads_the_same(tmp_path):
    """The pattern of deepspeed.launcher.runner._parse_hostfile, copied; importing it would cost five seconds."""
    import re

    path = write(tmp_path, "node2 slots=8\n  me@node1.lan   slots=4 max_slots=4  # older\n")
    found = [re.search(r"^(\S+)\s+slots=(\d+)", line.strip()) for line in path.read_text().splitlines()]
    assert [(m[1], int(m[2])) for m in found if m] == [(host.name, host.slots) for host in read_hostfile(path)]


def test_the_example_can_be_used():
    assert [host.slots for host in read_hostfile(ROOT / "hostfile.example")] == [8, 8]


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("node1 slots=2\nnode2\n", 2, "cannot read 'node2'"),
        ("node1 slots=two\n", 1, "cannot read"),
        ("node1 slots=2x\n", 1, "cannot read"),
        ("node1 slot=2\n", 1, "cannot read"),
        ("node1 slots=0\n", 1, "no slots"),
        ("node1 slots=1\n#\nnode1 slots=1\n", 3, "on line 1 already"),
        ("node[1-4] slots=8\n", 1, "written out"),
        ("-oProxyCommand=x slots=8\n", 1, "not a host name"),
        ("fe80::1 slots=8\n", 1, "not a host name"),
    ],
)
def test_a_slip_is_named_with_its_line(tmp_path, text, line, says):
    with pytest.raises(UserError, match=f"line {line}: .*{says}") as error:
        read_hostfile(write(tmp_path, text))
    assert str(tmp_path / "hostfile") in str(error.value)


@pytest.mark.parametrize("text", ["", "# nobody\n\n"])
def test_an_empty_hostfile_is_an_error(tmp_path, text):
    with pytest.raises(UserError, match="no host"):
        read_hostfile(write(tmp_path, text))


def test_a_missing_hostfile_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such text file"):
        read_hostfile(tmp_path / "nowhere")
