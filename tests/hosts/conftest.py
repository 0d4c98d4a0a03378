from collections.abc import Iterator

import pytest

from .netns import VirtualHost, virtual_hosts, what_is_missing


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
