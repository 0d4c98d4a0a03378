from collections.abc import Iterator

import pytest

from .netns import VirtualHost, virtual_hosts, what_is_missing


@pytest.fixture(scope="session")
def hosts(tmp_path_factory) -> Iterator[list[VirtualHost]]:
    """Three hosts, node1 to node3; commands of a test run on the first."""
    if missing := what_is_missing():
        pytest.skip(missing)
    with virtual_hosts(tmp_path_factory.mktemp("hosts"), 3) as made:
        yield made
