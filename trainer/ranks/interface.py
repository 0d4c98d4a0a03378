"""The network interface between the hosts: gloo and NCCL are told which, before either of them guesses.

gloo takes the interface that the host's own name resolves to, which on Debian is the loopback; NCCL takes the first one
that is up, which may lead nowhere. What always leads to the other hosts is the route to them.
"""

from __future__ import annotations

import socket
import time
from collections.abc import MutableMapping
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

import psutil

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_PEER = "zeropipe/address of a host that is not the first"
_LOST = "zeropipe/ranks that MASTER_ADDR leads back to"


def own_address(target: str) -> str | None:
    """The address that packets to `target` leave this host with; None where no route or no such name is known."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(where)  # of datagrams: nothing is sent
            return probe.getsockname()[0]
    except OSError:
        return None


def interface_of(address: str) -> str | None:
    """Name of the interface that has an address of this host."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(item.address.split("%")[0] == address for item in addresses):
            return name
    return None


def is_loopback(address: str) -> bool:
    return ip_address(address.split("%")[0]).is_loopback


def set_interface(environ: MutableMapping[str, str], timeout: timedelta) -> Any:
    """Names the interface in `environ` where several hosts take part; what the user has set stays.

    On the host that MASTER_ADDR is on, that name may mean the loopback: one of the others then tells its address,
    through the store that the ranks meet at anyway.

    Returns:
        The store, if it was opened: keep it until the ranks have met, or its port closes before they do.
    """
    world, local = int(environ["WORLD_SIZE"]), environ.get("LOCAL_WORLD_SIZE", environ.get("LOCAL_SIZE"))
    if local is None or int(local) == world or all(name in environ for name in VARIABLES):
        return None
    address, store = own_address(environ["MASTER_ADDR"]), None
    lost = address is None or is_loopback(address)
    if lost or environ["LOCAL_RANK"] == "0":
        store = _open_store(environ, timeout)
        if lost:
            address = _route_to_a_peer(store, world, timeout)
        else:
            store.set(_PEER, str(address))
    interface = interface_of(address) if address else None
    if interface is not None:
        environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # this one, and not all that begin so
    return store


def _route_to_a_peer(store: Any, world: int, timeout: timedelta) -> str | None:
    """This host's address towards a host that knows a way here; None where every rank is on the loopback."""
    store.add(_LOST, 1)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        if store.check([_PEER]):
            return own_address(store.get(_PEER).decode())
        if store.add(_LOST, 0) == world:
            return None
        time.sleep(0.05)
    return None


def _open_store(environ: MutableMapping[str, str], timeout: timedelta) -> Any:
    """The store of the ranks, as torch opens it a moment later; the two share one server in rank 0."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    serves = environ["RANK"] == "0" and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    world, port = int(environ["WORLD_SIZE"]), int(environ["MASTER_PORT"])
    return TCPStore(environ["MASTER_ADDR"], port, world, serves, timeout, wait_for_workers=False, multi_tenant=True)
