"""A real all-reduce among all ranks of all hosts, and what every pair of hosts has to itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .case import Case, Examination
from .checks import Finding, check_pairs
from .crew import Crew


async def start_ranks(case: Case, crew: Crew) -> None:
    own = {host.name: {"count": host.slots} for host in case.hosts}
    await crew.ask(list(own), "start_ranks", case.seconds, own, environment=dict(case.environment))


async def run_all_reduce(case: Case, crew: Crew, found: Examination) -> None:
    """All ranks of all hosts, as a launch would place them."""
    world, first, own, at = sum(host.slots for host in case.hosts), [], {}, 0
    gpu = all(facts["accelerators"] for facts in found.facts.values())
    for host in case.hosts:
        first.append(at)
        own[host.name] = at
        at += host.slots
    common = {
        "WORLD_SIZE": str(world), "MASTER_ADDR": str(found.address), "MASTER_PORT": str(found.port),
        "FIRST_RANKS": json.dumps(first), "DEVICE": "gpu" if gpu else "cpu", "SECONDS": str(case.seconds),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    places = {
        host.name: {"places": [
            {**common, "RANK": str(own[host.name] + i), "LOCAL_RANK": str(i), "LOCAL_WORLD_SIZE": str(host.slots)}
            for i in range(host.slots)
        ]} for host in case.hosts
    }  # fmt: skip
    answers = await crew.ask(list(own), "all_reduce", case.seconds + 5, places, seconds=case.seconds)
    for name, ranks in answers.items():
        failed = [rank["error"] for rank in ranks if "error" in rank]
        if failed:
            cure = "ports and interfaces as above; NCCL_DEBUG=INFO or TORCH_DISTRIBUTED_DEBUG=DETAIL says more"
            found.findings.append(Finding("all-reduce", name, failed[0], cure))
    good = {name: ranks[0] for name, ranks in answers.items() if all("error" not in rank for rank in ranks)}
    if len(good) == len(case.hosts):
        found.measured = _summary(case, good)
        found.findings += check_pairs(found.measured["pairs"])


def _summary(case: Case, first: Mapping[str, Any]) -> dict[str, Any]:
    names = [host.name for host in case.hosts]
    pairs = {
        tuple(sorted((name, names[int(other)]))): values
        for name in names for other, values in first[name]["pairs"].items()
    }  # fmt: skip
    return {
        "latency": max(value["latency"] for value in first.values()),
        "bandwidth": min((value["bandwidth"] or 0.0) for value in first.values()) or None,
        "interfaces": {name: first[name]["interface"] for name in names},
        "pairs": dict(sorted(pairs.items())),
    }
