"""Whether the hosts reach each other, and where their ranks are to meet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...trainer.ranks.interface import VARIABLES
from .case import Case, Examination
from .checks import Finding
from .crew import Crew

REACH_SECONDS = 2.0  # for a connection; a port that a firewall drops never answers
MOST_ALL_PAIRS = 64  # hosts: above, each tries its next NEAR ones only
NEAR = 8


async def find_meeting(case: Case, crew: Crew, found: Examination) -> None:
    """Finds an address of the first host that every other one reaches, and a port that is free there."""
    first, *rest = [host.name for host in case.hosts]
    if first not in found.facts:
        return
    ports = await crew.ask([first], "listen", case.seconds)
    addresses = [address for _, address in found.facts[first]["addresses"]]
    if first not in ports or not rest:
        found.port, found.address = ports.get(first), (addresses or ["127.0.0.1"])[0]
        await crew.ask([first], "hush", case.seconds)
        return
    found.port = ports[first]
    targets = [[address, found.port] for address in addresses]
    able = [name for name in rest if name in found.facts]
    took = await crew.ask(able, "reach", case.seconds, targets=targets, seconds=REACH_SECONDS)
    await crew.ask([first], "hush", case.seconds)
    reached = {
        name: {a for a, t in zip(addresses, times, strict=True) if t is not None} for name, times in took.items()
    }
    votes = {address: sum(address in found_ for found_ in reached.values()) for address in addresses}
    best = max(addresses, key=lambda address: votes[address], default=None)
    if best is not None and votes[best]:
        found.address = best
    for name, addresses_ in reached.items():
        if best not in addresses_:
            tried = ", ".join(f"{address}:{found.port}" for address in addresses) or "it has no address"
            says = f"cannot connect to {first} (tried {tried})"
            cure = f"open TCP ports above 1023 between the hosts; see: ssh {name} ip route get {best or first}"
            found.findings.append(Finding("network", name, says, cure))
    found.findings += _check_interfaces(case, found, reached)


def _check_interfaces(case: Case, found: Examination, reached: Mapping[str, set[str]]) -> Iterator[Finding]:
    """Interfaces that the user has named lead to the first host. `reached`: which of its addresses, from each other."""
    first = case.hosts[0].name
    for variable in VARIABLES:
        value = case.environment.get(variable)
        if value is None or (variable.startswith("NCCL") and not found.facts[first]["accelerators"]):
            continue
        cure = f"unset {variable}: the interface is found by the route between the hosts"
        there = [address for name, address in _addresses(found.facts[first]) if _names(variable, value, name)]
        for host, facts in found.facts.items():
            if not any(_names(variable, value, name) for name in facts["interfaces"]):
                says = f"{variable}={value}, but its interfaces are {', '.join(facts['interfaces'])}"
                yield Finding("interface", host, says, cure)
            elif host in reached and there and not reached[host] & set(there):
                says = f"{variable}={value} does not lead to {first} (tried {', '.join(there)})"
                yield Finding("interface", host, says, cure)


def _addresses(facts: Mapping[str, Any]) -> list[list[str]]:
    return [*facts["addresses"], ["lo", "127.0.0.1"]]


def _names(variable: str, value: str, interface: str) -> bool:
    """Whether the interface may be taken. gloo's variable has whole names; NCCL's beginnings, after `=` whole names,
    after `^` beginnings of those that it must not take.
    """
    words = value.lstrip("=^").split(",")
    whole = variable.startswith("GLOO") or value.startswith("=")
    found = any(interface == word if whole else interface.startswith(word) for word in words)
    return found != value.startswith("^")


async def try_ports(case: Case, crew: Crew, found: Examination) -> None:
    """Every host connects to the others, at the address that leads to the first one: both ways, then."""
    names = list(found.facts)
    if len(names) < 2 or found.address is None:
        return
    route = await crew.ask(names, "own_address", case.seconds, target=found.address)
    ports = await crew.ask(list(route), "listen", case.seconds)
    count = len(names)
    near = range(1, count if count <= MOST_ALL_PAIRS else NEAR + 1)
    others = {a: [names[(i + step) % count] for step in near] for i, a in enumerate(names)}
    others = {a: [b for b in mine if b in ports and route.get(b)] for a, mine in others.items()}
    own = {a: {"targets": [[route[b], ports[b]] for b in mine]} for a, mine in others.items()}
    took = await crew.ask(list(ports), "reach", case.seconds, own, seconds=REACH_SECONDS)
    for a, times in took.items():
        closed = [b for b, seconds in zip(others[a], times, strict=True) if seconds is None]
        if closed:
            shown = ", ".join(f"{b} ({route[b]}:{ports[b]})" for b in closed[:4]) + (" …" if len(closed) > 4 else "")
            cure = "open TCP between the hosts in the firewall, all ports above 1023, in both directions"
            found.findings.append(Finding("ports", a, f"cannot connect to {shown}", cure))
    await crew.ask(list(ports), "hush", case.seconds)
